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
    """Arguments and results as in the api. Memory O(B T J P block_size), whatever S is."""
    batch, queries, query_heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    dtype = accumulation_dtype(q.dtype)
    lists = max(indices.shape[2], kv_heads)
    slots = indices.shape[3]
    indices = jnp.broadcast_to(indices.astype(jnp.int32), (batch, queries, lists, slots))
    # Slices may not leave the buffer: the last block of a ragged one starts early.
    span = min(block_size, keys)
    start = jnp.clip(indices * block_size, 0, keys - span)
    row = start[..., None] + jnp.arange(span, dtype=jnp.int32)[None, None, None, None, :]
    visible = (indices >= 0)[..., None] & (row // block_size == indices[..., None])
    if causal:
        visible &= row <= positions.astype(jnp.int32)[:, :, None, None, None]
    visible = visible.reshape(batch, queries, lists, 1, slots * span)
    head = jnp.arange(lists, dtype=jnp.int32) // (lists // kv_heads)
    head = jnp.broadcast_to(head[None, None, :, None], start.shape)
    gathered_k = _gather(k, start, head, span).astype(dtype)
    gathered_v = _gather(v, start, head, span).astype(dtype)
    # Rows of the buffer that nobody sees may hold anything, and 0 * NaN is not 0.
    gathered_v = jnp.where(visible[:, :, :, 0, :, None], gathered_v, 0)
    grouped = q.reshape(batch, queries, lists, query_heads // lists, width).astype(dtype)
    logits = scale * jnp.einsum("BTAGH,BTASH->BTAGS", grouped, gathered_k)
    top = jnp.max(jnp.where(visible, logits, -jnp.inf), axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isneginf(top), 0.0, top))
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, logits - top, 0.0)), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    seen = total > 0
    safe_total = jnp.where(seen, total, 1.0)
    out = jnp.einsum("BTAGS,BTASH->BTAGH", weights, gathered_v) / safe_total
    lse = jnp.where(seen, top + jnp.log(safe_total), -jnp.inf)
    out = out.reshape(batch, queries, query_heads, v.shape[3]).astype(q.dtype)
    return AttentionOutput(out, lse.reshape(batch, queries, query_heads))


def _gather(
    array: Float[Array, "B S K A"],
    start: Int[Array, "B T J P"],
    head: Int[Array, "B T J P"],
    span: int,
) -> Float[Array, "B T J P*span A"]:
    """``span`` rows of one head from each start, read where they lie."""
    width = array.shape[3]

    def slice_of(buffer, first, kv_head):
        zero = jnp.zeros_like(first)
        return jax.lax.dynamic_slice(buffer, (first, kv_head, zero), (span, 1, width))

    slices = jax.vmap(jax.vmap(slice_of, (None, 0, 0)))
    batch, queries, lists, slots = start.shape
    flat = (batch, queries * lists * slots)
    blocks = slices(array, start.reshape(flat), head.reshape(flat))
    return blocks.reshape(batch, queries, lists, slots * span, width)
