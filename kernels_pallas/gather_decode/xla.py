"""Gathered decoding in XLA: the listed blocks of each query become one short dense attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.common import AttentionOutput, accumulation_dtype

__all__ = ["gather_decode"]


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
        """``span`` rows of one head from every start, read where they lie."""

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
        gathered_k = jnp.where(visible[:, None], load(k, sequence, kv_head, start), 0)
        gathered_v = jnp.where(visible[:, None], load(v, sequence, kv_head, start), 0)
        logits = scale * jnp.einsum("GH,SH->GS", heads.astype(dtype), gathered_k)
        top = jnp.max(jnp.where(visible[None, :], logits, -jnp.inf), axis=1, keepdims=True)
        top = jax.lax.stop_gradient(jnp.where(jnp.isneginf(top), 0.0, top))
        weights = jnp.exp(jnp.where(visible[None, :], logits - top, -jnp.inf))
        total = jnp.sum(weights, axis=1, keepdims=True)
        seen = total > 0
        safe_total = jnp.where(seen, total, 1.0)
        out = jnp.einsum("GS,SH->GH", weights, gathered_v) / safe_total
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
