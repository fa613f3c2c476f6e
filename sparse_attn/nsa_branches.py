"""The three branches of NSA on prepared keys and values: shared by module, cache and function."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.block_scores import BlockScores, block_scores
from kernels_pallas.block_sparse import block_sparse_attention
from kernels_pallas.ranged import ranged_attention
from sparse_attn.cache import read_ring, window_slots
from sparse_attn.documents import Rows
from sparse_attn.parallel.ranges import range_attention
from sparse_attn.selecting import eligible_blocks, visible_entries
from sparse_attn.shards import WHOLE, Shards
from sparse_attn.types import AttentionOutput, merge

if TYPE_CHECKING:
    from sparse_attn.nsa import NSA
    from sparse_attn.nsa_cache import NSACache


def compressed_branch(
    config: NSA,
    q: Float[Array, "B T N H"],
    k_cmp: Float[Array, "B C K H"],
    v_cmp: Float[Array, "B C K Hv"],
    rows: Rows,
) -> BlockScores:
    """o_cmp, its lse, and the block lists (Eqs. 8-12)."""
    if config.selector_gradient in ("none", "kl"):
        q, k_cmp = jax.lax.stop_gradient(q), jax.lax.stop_gradient(k_cmp)
    start, stop = visible_entries(rows, config.compression_block, config.compression_stride)
    first, last = eligible_blocks(rows, config.selection_block)
    return block_scores(
        q,
        k_cmp,
        v_cmp,
        start,
        stop,
        first,
        last,
        pooling=config.pooling,
        selected=config.selected_blocks,
        initial=config.initial_blocks,
        recent=config.recent_blocks,
        implementation=config.implementation,
    )


def selected_branch(
    config: NSA,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    indices: Int[Array, "B T K P"],
    rows: Rows,
) -> AttentionOutput:
    """o_slc: token-causal attention over the listed blocks."""
    return block_sparse_attention(
        q,
        k,
        v,
        indices,
        block_size=config.selection_block,
        positions=rows.index,
        implementation=config.implementation,
    )


def everything_branch(
    config: NSA,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    rows: Rows,
) -> AttentionOutput:
    """The selected branch with n unlimited: every earlier token of the document."""
    return ranged_attention(
        q, k, v, rows.start, rows.index + 1, implementation=config.implementation
    )


def window_branch(
    config: NSA,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    rows: Rows,
    shards: Shards = WHOLE,
) -> AttentionOutput:
    """o_win of whole sequences: exactly the last w tokens, the row's own included."""
    start = jnp.maximum(rows.start, rows.index - config.window + 1)
    return range_attention(
        q,
        k,
        v,
        start,
        rows.index + 1,
        shards=shards,
        window=config.window,
        implementation=config.implementation,
    )


def window_branch_cached(
    config: NSA,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    rows: Rows,
    before: NSACache,
    after: NSACache,
) -> AttentionOutput:
    """o_win of new tokens, from the rings ``before`` and ``after`` they were written.

    Few tokens leave every key that their windows need in the ring, which is then read in place as
    at most two ranges of slots. Otherwise the old ring, in order, is put before the new keys.
    """
    first = jnp.maximum(rows.start, rows.index - config.window + 1)
    tokens, size = q.shape[1], before.k_win.shape[1]
    if tokens <= before.rollback + 1:
        if tokens == 1 and size == config.window:
            # The ring is the window: its first slots while it fills, then all of them.
            stop = jnp.where(rows.valid, jnp.minimum(rows.index + 1, size), 0)
            return ranged_attention(
                q,
                after.k_win.astype(q.dtype),
                after.v_win.astype(q.dtype),
                jnp.zeros_like(stop),
                stop,
                implementation=config.implementation,
            )
        last = jnp.where(rows.valid, rows.index, first - 1)
        start_a, stop_a, start_b, stop_b = window_slots(first, last, size)
        keys, values = after.k_win.astype(q.dtype), after.v_win.astype(q.dtype)
        return merge(
            ranged_attention(
                q, keys, values, start_a, stop_a, implementation=config.implementation
            ),
            ranged_attention(
                q, keys, values, start_b, stop_b, implementation=config.implementation
            ),
        )
    keys = jnp.concatenate([read_ring(before.k_win, before.length).astype(q.dtype), k], axis=1)
    values = jnp.concatenate([read_ring(before.v_win, before.length).astype(v.dtype), v], axis=1)
    offset = (size - before.length)[:, None]
    start = jnp.where(rows.valid, first + offset, 0)
    stop = jnp.where(rows.valid, rows.index + 1 + offset, 0)
    return ranged_attention(q, keys, values, start, stop, implementation=config.implementation)
