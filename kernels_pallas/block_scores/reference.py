"""The specification of block scores: dense probabilities, pooled, ranked by one sort."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.block_scores.pooling import (
    INITIAL_RANK,
    RECENT_RANK,
    UNSEEN_SCORE,
    BlockScores,
    Pooling,
)
from kernels_pallas.common import accumulation_dtype
from kernels_pallas.ranged.reference import range_mask, ranged_attention_reference


def block_scores_reference(
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
    initial: int,
    recent: int,
    scale: float,
) -> BlockScores:
    """See :func:`kernels_pallas.block_scores.block_scores`; differentiable by autodiff."""
    out, lse = ranged_attention_reference(q, k, v, start, stop, scale=scale)
    importance = block_importance(q, k, lse, start, stop, pooling=pooling, scale=scale)
    indices = rank_blocks(
        jax.lax.stop_gradient(importance),
        first_block,
        last_block,
        selected=selected,
        initial=initial,
        recent=recent,
    )
    return BlockScores(out, lse, indices)


def select_blocks_reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C K H"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    first_block: Int[Array, "B T"],
    last_block: Int[Array, "B T"],
    *,
    lse: Float[Array, "B T N"] | None,
    budget: Int[Array, "B T J"] | None,
    pooling: Pooling,
    selected: int,
    initial: int,
    recent: int,
    floor: float | None,
    share: bool,
    scale: float,
) -> Int[Array, "B T J P"]:
    """See :func:`kernels_pallas.block_scores.select_blocks`; O(T*C) memory."""
    scores = block_log_scores(q, k, lse, start, stop, pooling=pooling, share=share, scale=scale)
    return rank_blocks(
        jnp.maximum(scores, UNSEEN_SCORE),
        first_block,
        last_block,
        selected=selected,
        initial=initial,
        recent=recent,
        unseen=UNSEEN_SCORE,
        floor=-jnp.inf if floor is None else floor,
        budget=budget,
    )


def entry_lse_reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C K H"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    *,
    scale: float,
) -> Float[Array, "B T N"]:
    """See :func:`kernels_pallas.block_scores.entry_lse`; O(T*C) memory."""
    return ranged_attention_reference(q, k, k[..., :1], start, stop, scale=scale).lse


def block_log_scores(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C K H"],
    lse: Float[Array, "B T N"] | None,
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    *,
    pooling: Pooling,
    share: bool,
    scale: float,
) -> Float[Array, "B T J M"]:
    """Score of every block in log space, -inf without visible entries; O(T*C) memory."""
    batch, rows, heads, _ = q.shape
    entries, kv_heads = k.shape[1:3]
    dtype = accumulation_dtype(q.dtype)
    visible = range_mask(start, stop, entries)[:, :, None, None, :]
    grouped = q.reshape(batch, rows, kv_heads, heads // kv_heads, -1).astype(dtype)
    logits = scale * jnp.einsum("BTKGH,BCKH->BTKGC", grouped, k.astype(dtype), precision="highest")
    logits = jnp.where(visible, logits, -jnp.inf)
    shift = jax.nn.logsumexp(logits, axis=-1)
    if lse is not None:
        given = lse.reshape(shift.shape).astype(dtype)
        shift = jnp.where(jnp.isneginf(given), shift, given)
    scores = logits - jnp.where(jnp.isneginf(shift), 0.0, shift)[..., None]
    if share:
        return pooling.pool_log(jax.nn.logsumexp(scores, axis=3))
    return pooling.pool_log(scores.reshape(batch, rows, heads, entries))


def block_importance(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C K H"],
    lse: Float[Array, "B T N"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    *,
    pooling: Pooling,
    scale: float,
) -> Float[Array, "B T K M"]:
    """Pooled probability of every block, summed over the heads of a group; O(T*C) memory."""
    batch, rows, heads, _ = q.shape
    kv_heads = k.shape[2]
    dtype = accumulation_dtype(q.dtype)
    visible = range_mask(start, stop, k.shape[1])[:, :, None, None, :]
    grouped = q.reshape(batch, rows, kv_heads, heads // kv_heads, -1).astype(dtype)
    logits = scale * jnp.einsum("BTKGH,BCKH->BTKGC", grouped, k.astype(dtype), precision="highest")
    lse = lse.reshape(batch, rows, kv_heads, heads // kv_heads, 1)
    probabilities = jnp.where(visible, jnp.exp(jnp.where(visible, logits - lse, 0)), 0)
    return pooling.pool(jnp.sum(probabilities, axis=3))


def rank_blocks(
    importance: Float[Array, "B T J M"],
    first_block: Int[Array, "B T"],
    last_block: Int[Array, "B T"],
    *,
    selected: int,
    initial: int,
    recent: int,
    unseen: float = 0.0,
    floor: float = -jnp.inf,
    budget: Int[Array, "B T J"] | None = None,
) -> Int[Array, "B T J P"]:
    """The ``selected`` best eligible blocks: forced, then important, then near the query.

    ``unseen`` is the importance of blocks past the last entry; blocks below ``floor`` are chosen
    only where they are forced; ``budget`` slots of a row may be filled.
    """
    batch, rows, lists, blocks = importance.shape
    first = jnp.maximum(first_block, 0)[:, :, None, None]
    last = last_block[:, :, None, None]
    # Blocks past the last compressed entry have importance 0: of these only the `selected` nearest
    # and the forced initial ones can be chosen.
    nearest = last - selected + 1 + jnp.arange(selected, dtype=jnp.int32)[None, None, None, :]
    leading = first + jnp.arange(initial, dtype=jnp.int32)[None, None, None, :]
    leading = jnp.where(leading <= last - selected, leading, -1)
    beyond = jnp.concatenate([leading, nearest], axis=-1)
    beyond = jnp.where(beyond >= blocks, beyond, -1)
    number = jnp.concatenate(
        [
            jnp.broadcast_to(jnp.arange(blocks, dtype=jnp.int32), importance.shape),
            jnp.broadcast_to(beyond, (batch, rows, lists, beyond.shape[-1])),
        ],
        axis=-1,
    )
    fill = jnp.full((batch, rows, lists, beyond.shape[-1]), unseen, importance.dtype)
    rank = jnp.concatenate([importance, fill], axis=-1)
    rank = jnp.where(rank >= floor, rank, -jnp.inf)
    rank = jnp.where(number < first + initial, jnp.asarray(INITIAL_RANK, rank.dtype), rank)
    rank = jnp.where(number > last - recent, jnp.asarray(RECENT_RANK, rank.dtype), rank)
    eligible = (number >= first) & (number <= last)
    rank = jnp.where(eligible, rank, -jnp.inf)
    order = jnp.lexsort((-number, -rank), axis=-1)[..., :selected]
    kept = jnp.take_along_axis(rank, order, axis=-1) > -jnp.inf
    if budget is not None:
        slot = jnp.arange(selected, dtype=jnp.int32)[None, None, None, :]
        kept &= slot < budget[..., None]
    chosen = jnp.where(kept, jnp.take_along_axis(number, order, axis=-1), jnp.iinfo(jnp.int32).max)
    chosen = jnp.sort(chosen, axis=-1)
    return jnp.where(chosen == jnp.iinfo(jnp.int32).max, -1, chosen)
