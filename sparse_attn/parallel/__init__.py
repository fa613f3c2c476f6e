"""Attention over sequences that are split over devices, exactly: see ``docs/parallel.md``.

    parallel = SequenceParallel(mesh)                       # the mesh axis "sequence" splits tokens
    out, cache, aux = call(mechanism, heads, parallel=parallel)

The same call decodes from a cache whose keys and values are split: :func:`split_cache`.
"""

from sparse_attn.parallel.api import SequenceParallel, cache_specs, call, split_cache
from sparse_attn.shards import zigzag_order

__all__ = ["SequenceParallel", "cache_specs", "call", "split_cache", "zigzag_order"]
