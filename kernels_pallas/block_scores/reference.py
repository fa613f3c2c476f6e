"""The specification of block scores: dense probabilities, pooled, ranked by one sort."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.block_scores.pooling import INITIAL_RANK, RECENT_RANK, BlockScores, Pooling
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
    importance: Float[Array, "B T K M"],
    first_block: Int[Array, "B T"],
    last_block: Int[Array, "B T"],
    *,
    selected: int,
    initial: int,
    recent: int,
) -> Int[Array, "B T K P"]:
    """The ``selected`` best eligible blocks: forced, then important, then near the query."""
    batch, rows, kv_heads, blocks = importance.shape
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
            jnp.broadcast_to(beyond, (batch, rows, kv_heads, beyond.shape[-1])),
        ],
        axis=-1,
    )
    fill = jnp.zeros((batch, rows, kv_heads, beyond.shape[-1]), importance.dtype)
    rank = jnp.concatenate([importance, fill], axis=-1)
    rank = jnp.where(number < first + initial, jnp.asarray(INITIAL_RANK, rank.dtype), rank)
    rank = jnp.where(number > last - recent, jnp.asarray(RECENT_RANK, rank.dtype), rank)
    eligible = (number >= first) & (number <= last)
    rank = jnp.where(eligible, rank, -1)
    order = jnp.lexsort((-number, -rank), axis=-1)[..., :selected]
    chosen = jnp.where(
        jnp.take_along_axis(rank, order, axis=-1) >= 0,
        jnp.take_along_axis(number, order, axis=-1),
        jnp.iinfo(jnp.int32).max,
    )
    chosen = jnp.sort(chosen, axis=-1)
    return jnp.where(chosen == jnp.iinfo(jnp.int32).max, -1, chosen)
