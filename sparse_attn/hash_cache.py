"""What HashAttention remembers while decoding: keys, values and the packed codes of the keys."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from kernels_pallas.hamming.codes import word_count
from sparse_attn.cache import checked_truncation, write_rows
from sparse_attn.documents import Rows
from sparse_attn.shards import WHOLE, Shards
from sparse_attn.types import HeadShape

CODE_MULTIPLE = 128
"""Room for codes is rounded up to it: odd row lengths cost vector code its alignment."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HashCache:
    """``kv`` [B, S, K, H + Hv], rotated keys with their values behind them, and the keys' codes.

    ``codes`` [B, J, W, S'] uint32 holds one code a list (kv head, or query head), positions last:
    a step reads all of them, in this order. S' is S rounded up to a multiple of 128.
    """

    length: Int[Array, " B"]
    kv: Float[Array, "B S K HHv"]
    codes: UInt32[Array, "B J W S2"]
    token_axes: ClassVar = {"kv": 1}

    @property
    def capacity(self) -> int:
        """S, the tokens a sequence can hold."""
        return self.kv.shape[1]

    def truncate(self, lengths: Int[Array, " B"]) -> HashCache:
        """Forget the tokens after ``lengths``; any number can be undone."""
        cut = checked_truncation(self.length, lengths, rollback=self.capacity)
        return dataclasses.replace(self, length=cut)


def empty_cache(
    shape: HeadShape, *, batch: int, capacity: int, lists: int, bits: int, dtype: Any
) -> HashCache:
    """A cache of static size without tokens, for codes of ``lists`` heads.

    Raises:
      ValueError: if ``capacity`` is below 1.
    """
    if capacity < 1:
        raise ValueError(f"{capacity=} must be at least 1")
    keys = (batch, capacity, shape.kv_heads)
    room = -(-capacity // CODE_MULTIPLE) * CODE_MULTIPLE
    return HashCache(
        length=jnp.zeros((batch,), jnp.int32),
        kv=jnp.zeros((*keys, shape.head_width + shape.value_width), dtype),
        codes=jnp.zeros((batch, lists, word_count(bits), room), jnp.uint32),
    )


def append(
    cache: HashCache,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    codes: UInt32[Array, "B T J W"],
    rows: Rows,
    shards: Shards = WHOLE,
) -> HashCache:
    """Write the valid new tokens and lengthen the sequences by them."""
    room = cache.codes.shape[3]
    target = jnp.where(rows.valid, rows.index, room)
    sequence = jnp.broadcast_to(jnp.arange(target.shape[0])[:, None], target.shape)
    written = cache.codes.at[sequence, :, :, target].set(codes, mode="drop")
    return HashCache(
        length=cache.length + rows.appended,
        kv=write_rows(cache.kv, jnp.concatenate([k, v], axis=3), rows.index, rows.valid, shards),
        # As in write_rows: otherwise the write is fused into every reader, with a copy each.
        codes=jax.lax.optimization_barrier(written),
    )
