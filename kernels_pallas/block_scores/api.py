"""Block scores: attention over compressed keys and the key blocks it points at, or these alone.

Axis alphabet: see :mod:`sparse_attn.types`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.block_scores.pooling import BlockScores, Pooling
from kernels_pallas.block_scores.reference import (
    block_scores_reference,
    entry_lse_reference,
    select_blocks_reference,
)
from kernels_pallas.block_scores.xla import block_scores_xla
from kernels_pallas.block_scores.xla_select import entry_lse_xla, select_blocks_xla
from kernels_pallas.common import Implementation, accumulation_dtype, dispatch, kernels
from kernels_pallas.ranged.api import check_heads, check_rows

_BACKENDS = {
    "reference": block_scores_reference,
    "xla": block_scores_xla,
    **kernels("block_scores", "block_scores"),
}
_LSE_BACKENDS = {
    "reference": entry_lse_reference,
    "xla": entry_lse_xla,
    **kernels("block_scores", "entry_lse"),
}
_SELECT_BACKENDS = {
    "reference": select_blocks_reference,
    "xla": select_blocks_xla,
    **kernels("block_scores", "select_blocks"),
}


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
    _check_counts(selected, initial, recent)
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


def select_blocks(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C K H"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    first_block: Int[Array, "B T"],
    last_block: Int[Array, "B T"],
    *,
    pooling: Pooling,
    selected: int,
    initial: int = 0,
    recent: int = 1,
    lse: Float[Array, "B T N"] | None = None,
    budget: Int[Array, "B T J"] | None = None,
    floor: float | None = None,
    share: bool = True,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> Int[Array, "B T J P"]:
    """The choice of blocks alone, by scores in log space: nothing over- or underflows.

    With s[n, i] = scale * q[n] . k[i] - lse[n] over the entries [start, stop), the score of block j
    is

        score[j] = max_m log weights[m] + log sum_{n in group} exp s[n, stride * j + offset + m]

    (``share=False``: of each query head by itself, without the sum), -inf if it has no visible
    entry. Eligible and forced blocks, ``selected`` and the tie rule are those of
    :func:`block_scores`; a block with score -inf ranks below all others and is still eligible.

    Args:
      q: queries, float32, float64 or bfloat16.
      k: compressed keys.
      start: first visible entry of each row, clipped to [0, C].
      stop: one past the last visible entry.
      first_block: first eligible block (of the row's document).
      last_block: the query's own block; -1, or less than ``first_block``: nothing is selected.
      pooling: how entries become blocks, with ``reducer="max"``.
      selected: P, slots per row and list.
      initial: forced leading blocks.
      recent: forced trailing blocks, the query's own included.
      lse: what normalises the rows; where it is -inf, and by default, the log-sum-exp of the row's
        own logits. It weighs the heads of a group and meets the ``floor``, nothing else.
      budget: how many of the ``selected`` slots a row may fill, the forced ones included.
      floor: smallest score of a block that is not forced.
      share: one list per kv head (J = K), or one per query head (J = N).
      scale: logit scale, default ``H ** -0.5``.
      implementation: backend name, see :func:`kernels_pallas.common.dispatch`.

    Returns:
      Block numbers [B, T, J, P] int32, ascending, unique, -1 trailing, never differentiable. No
      [T, C] array is ever held.

    Raises:
      ValueError: on shapes or dtypes that do not fit together, ``selected < 1``, a negative number
        of forced blocks, or a pooling that sums.
    """
    check_heads(q, k, k)
    check_rows(q, start=start, stop=stop, first_block=first_block, last_block=last_block)
    _check_counts(selected, initial, recent)
    if pooling.reducer != "max":
        raise ValueError(
            f"pooling has reducer={pooling.reducer!r}; scores in log space pool with 'max'"
        )
    if lse is not None and lse.shape != q.shape[:3]:
        raise ValueError(f"lse {lse.shape} must be [B, T, N] = {q.shape[:3]}")
    lists = (*q.shape[:2], k.shape[2] if share else q.shape[2])
    if budget is not None and budget.shape != lists:
        raise ValueError(f"budget {budget.shape} must be [B, T, J] = {lists}")
    entries = k.shape[1]
    if entries == 0:
        k = jnp.pad(k, ((0, 0), (0, 1), (0, 0), (0, 0)))
    q, k, lse = jax.lax.stop_gradient((q, k, lse))
    return dispatch(
        "select_blocks",
        implementation,
        _SELECT_BACKENDS,
        q,
        k,
        jnp.clip(start, 0, entries).astype(jnp.int32),
        jnp.clip(stop, 0, entries).astype(jnp.int32),
        first_block.astype(jnp.int32),
        last_block.astype(jnp.int32),
        lse=lse,
        budget=budget,
        pooling=pooling,
        selected=selected,
        initial=initial,
        recent=recent,
        floor=floor,
        share=share,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
    )


def entry_lse(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C K H"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    *,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "B T N"]:
    """log sum_i exp(scale * q . k[i]) over the entries [start, stop), -inf where there is none.

    The ``lse`` of :func:`block_scores` without its values: at least float32, not differentiable.
    What :func:`select_blocks` takes as a normaliser from other, coarser entries.

    Raises:
      ValueError: on shapes or dtypes that do not fit together.
    """
    check_heads(q, k, k)
    check_rows(q, start=start, stop=stop)
    q, k = jax.lax.stop_gradient((q, k))
    entries = k.shape[1]
    start, stop = (jnp.clip(a, 0, entries).astype(jnp.int32) for a in (start, stop))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if entries == 0:
        return jnp.full(q.shape[:3], -jnp.inf, accumulation_dtype(q.dtype))
    return dispatch("entry_lse", implementation, _LSE_BACKENDS, q, k, start, stop, scale=scale)


def _check_counts(selected: int, initial: int, recent: int) -> None:
    if selected < 1:
        raise ValueError(f"selected={selected} must be at least 1")
    if initial < 0 or recent < 0:
        raise ValueError(f"initial={initial} and recent={recent} must not be negative")
