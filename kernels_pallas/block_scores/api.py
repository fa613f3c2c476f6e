"""Block scores: attention over compressed keys, and the key blocks it points at.

Axis alphabet: see :mod:`sparse_attn.types`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.block_scores.pooling import BlockScores, Pooling
from kernels_pallas.block_scores.reference import block_scores_reference
from kernels_pallas.block_scores.xla import block_scores_xla
from kernels_pallas.common import Implementation, dispatch
from kernels_pallas.ranged.api import check_heads, check_rows

_BACKENDS = {"reference": block_scores_reference, "xla": block_scores_xla}


def block_scores(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C K H"],
    v: Float[Array, "B C K Hv"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    first_block: Int[Array, "B T"],
    last_block: Int[Array, "B T"],
    *,
    pooling: Pooling,
    selected: int,
    initial: int = 1,
    recent: int = 2,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> BlockScores:
    """Attend the compressed entries of each row and select key blocks by their probabilities.

    ``out`` and ``lse`` are ranged attention over the entries [start, stop). With
    p[n, i] = exp(scale * q[n] . k[i] - lse[n]), 0 outside the range, the importance of block j for
    a kv head is (Eqs. 8-10 of NSA, arXiv 2502.11089, for ``reducer="sum"``)

        importance[j] = reduce_m weights[m] * sum_{n in group} p[n, stride * j + offset + m]

    Blocks ``first_block <= j <= last_block`` are eligible. The ``recent`` last and the ``initial``
    first of them are forced and count inside ``selected`` (recent ones win where ``selected`` is
    too short for both); the rest are the most important. Between equals, in every class, the block
    with the higher number (nearest the query) wins. A row whose range of entries is empty has
    importance 0 everywhere, so it selects its forced blocks and then the nearest.

    Args:
      q: queries, float32, float64 or bfloat16.
      k: compressed keys.
      v: compressed values.
      start: first visible entry of each row, clipped to [0, C].
      stop: one past the last visible entry; ``stop <= start`` makes the row see no entry.
      first_block: first eligible block (of the row's document).
      last_block: the query's own block; -1, or less than ``first_block``: nothing is selected.
      pooling: how entries become blocks.
      selected: P, slots per row and kv head.
      initial: forced leading blocks.
      recent: forced trailing blocks, the query's own included.
      scale: logit scale, default ``H ** -0.5``.
      implementation: backend name, see :func:`kernels_pallas.common.dispatch`.

    Returns:
      ``BlockScores``: ``out`` [B, T, N, Hv] and ``lse`` [B, T, N], differentiable in q, k and v as
      in ranged attention; ``indices`` [B, T, K, P] int32, ascending, unique, -1 trailing, never
      differentiable. No [T, C] array is ever held.

    Raises:
      ValueError: on shapes or dtypes that do not fit together, ``selected < 1``, or a negative
        number of forced blocks.
    """
    check_heads(q, k, v)
    check_rows(q, start=start, stop=stop, first_block=first_block, last_block=last_block)
    if selected < 1:
        raise ValueError(f"selected={selected} must be at least 1")
    if initial < 0 or recent < 0:
        raise ValueError(f"initial={initial} and recent={recent} must not be negative")
    entries = k.shape[1]
    if entries == 0:
        padding = ((0, 0), (0, 1), (0, 0), (0, 0))
        k, v = jnp.pad(k, padding), jnp.pad(v, padding)
    return dispatch(
        "block_scores",
        implementation,
        _BACKENDS,
        q,
        k,
        v,
        jnp.clip(start, 0, entries).astype(jnp.int32),
        jnp.clip(stop, 0, entries).astype(jnp.int32),
        first_block.astype(jnp.int32),
        last_block.astype(jnp.int32),
        pooling=pooling,
        selected=selected,
        initial=initial,
        recent=recent,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
    )
