"""Gathered decoding in XLA: the listed blocks of each query become one short dense attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.common import AttentionOutput, accumulation_dtype

__all__ = ["gather_decode"]

WIDE = 80
"""Numbers a gathered row should have on a CPU: LLVM unrolls the copy of shorter rows into single
moves, which takes three times as long as vectors do."""


def gather_decode(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    indices: Int[Array, "B T J P"],
    *,
    block_size: int,
    positions: Int[Array, "B T"],
    causal: bool,
    scale: float,
) -> AttentionOutput:
    """Arguments and results as in the api. Memory O(B T J P block_size), whatever S is.

    On a CPU the lists are attended one after the other, so that what one of them gathers stays in
    cache; elsewhere all at once.
    """
    batch, queries, query_heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    dtype = accumulation_dtype(q.dtype)
    lists, slots = max(indices.shape[2], kv_heads), indices.shape[3]
    group, span = query_heads // lists, min(block_size, keys)
    indices = jnp.broadcast_to(indices.astype(jnp.int32), (batch, queries, lists, slots))
    last = jnp.full((batch, queries), keys - 1, jnp.int32)
    if causal:
        last = jnp.minimum(positions.astype(jnp.int32), last)

    def load(array, sequence, kv_head, start):
        """``span`` rows of one head from every start, read where they lie; see ``_token_rows``."""
        if span == 1:
            return _token_rows(array, sequence, kv_head, start).astype(dtype)

        def rows(first):
            size = (1, span, 1, array.shape[3])
            place = (sequence, first, kv_head, jnp.zeros_like(first))
            return jax.lax.dynamic_slice(array, place, size)

        return jax.vmap(rows)(start).reshape(-1, array.shape[3]).astype(dtype)

    def attend(item):
        row, heads, blocks = item
        sequence, kv_head = row // (queries * lists), row % lists // (lists // kv_heads)
        # Slices may not leave the buffer: the last block of a ragged one starts early. Lanes
        # low..high of a slice are in sight; a division per row would cost more than the gather.
        start = jnp.clip(blocks * block_size, 0, keys - span)
        low = jnp.where(blocks >= 0, blocks * block_size - start, span)
        high = last.reshape(-1)[row // lists] - start
        lane = jnp.arange(span, dtype=jnp.int32)[None, :]
        visible = ((lane >= low[:, None]) & (lane <= high[:, None])).reshape(-1)
        # What nobody sees may hold anything, and 0 * NaN is not 0.
        gathered_k, gathered_v = (
            jnp.where(visible[:, None] & _lanes(rows, array), rows, 0)
            for array in (k, v)
            for rows in (load(array, sequence, kv_head, start),)
        )
        heads = jnp.pad(heads.astype(dtype), ((0, 0), (0, gathered_k.shape[1] - width)))
        # With the long operand first the product reads it in its own order.
        logits = scale * jnp.einsum("SH,GH->SG", gathered_k, heads).T
        top = jnp.max(jnp.where(visible[None, :], logits, -jnp.inf), axis=1, keepdims=True)
        top = jax.lax.stop_gradient(jnp.where(jnp.isneginf(top), 0.0, top))
        weights = jnp.exp(jnp.where(visible[None, :], logits - top, -jnp.inf))
        total = jnp.sum(weights, axis=1, keepdims=True)
        seen = total > 0
        safe_total = jnp.where(seen, total, 1.0)
        out = jnp.einsum("GS,SH->GH", weights, gathered_v)[:, : v.shape[3]] / safe_total
        lse = jnp.where(seen, top + jnp.log(safe_total), -jnp.inf)
        return out.astype(q.dtype), lse[:, 0]

    items = batch * queries * lists
    arguments = (
        jnp.arange(items, dtype=jnp.int32),
        q.reshape(items, group, width),
        indices.reshape(items, slots),
    )
    one_by_one = jax.default_backend() == "cpu"
    out, lse = jax.lax.map(attend, arguments) if one_by_one else jax.vmap(attend)(arguments)
    out = out.reshape(batch, queries, query_heads, v.shape[3])
    return AttentionOutput(out, lse.reshape(batch, queries, query_heads))


def _token_rows(
    array: Float[Array, "B S K H"],
    sequence: Int[Array, ""],
    kv_head: Int[Array, ""],
    tokens: Int[Array, " P"],
) -> Float[Array, "P H2"]:
    """Rows of one head at the listed tokens; lanes from H on hold whatever follows in memory."""
    batch, keys, kv_heads, width = array.shape
    size = keys * kv_heads * width
    if not (jax.default_backend() == "cpu" and WIDE // 2 <= width < WIDE < size < 2**31):
        at = (jnp.full_like(tokens, sequence), tokens, jnp.full_like(tokens, kv_head))
        return array.at[at].get(mode="promise_in_bounds")
    flat = array.reshape(batch, size)
    begin = (tokens * kv_heads + kv_head) * width
    last = size - WIDE
    place = jnp.stack([jnp.full_like(begin, sequence), jnp.minimum(begin, last)], axis=1)
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0, 1)
    )
    rows = jax.lax.gather(flat, place, numbers, (1, WIDE), mode="promise_in_bounds")
    # Only the very last row of the buffer has too little behind it.
    final = jax.lax.dynamic_index_in_dim(flat, sequence, keepdims=False)[size - width :]
    final = jnp.pad(final, (0, WIDE - width))
    return jnp.where((begin > last)[:, None], final[None, :], rows)


def _lanes(rows: Float[Array, "P H2"], array: Float[Array, "B S K H"]) -> Bool[Array, "1 H2"]:
    """Which lanes of gathered rows belong to the head."""
    return (jnp.arange(rows.shape[1], dtype=jnp.int32) < array.shape[3])[None, :]
