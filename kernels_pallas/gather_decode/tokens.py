"""Gathered decoding of single tokens from a cache that keeps each key beside its value.

A listed token is one run of H + Hv numbers, fetched once. Queries padded with zeros meet whole
runs, and of the weighted sum of runs the last Hv numbers are the output: nothing is taken apart.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.common import AttentionOutput, accumulation_dtype
from kernels_pallas.gather_decode import reference

__all__ = ["gather_tokens_reference", "gather_tokens_xla"]


def gather_tokens_reference(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B S K HHv"],
    indices: Int[Array, "B T J P"],
    *,
    positions: Int[Array, "B T"],
    scale: float,
) -> AttentionOutput:
    """Block-sparse attention with blocks of one token."""
    width = q.shape[3]
    return reference.gather_decode(
        q,
        kv[..., :width],
        kv[..., width:],
        indices,
        block_size=1,
        positions=positions,
        causal=True,
        scale=scale,
    )


def gather_tokens_xla(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B S K HHv"],
    indices: Int[Array, "B T J P"],
    *,
    positions: Int[Array, "B T"],
    scale: float,
) -> AttentionOutput:
    """Arguments and results as in the api. Memory O(B T J P), whatever S is.

    On a CPU the lists are attended one after the other, so that what one of them gathers stays in
    cache; elsewhere all at once.
    """
    batch, queries, query_heads, width = q.shape
    keys, kv_heads, both = kv.shape[1:]
    dtype = accumulation_dtype(q.dtype)
    lists, slots = max(indices.shape[2], kv_heads), indices.shape[3]
    group = query_heads // lists
    indices = jnp.broadcast_to(indices.astype(jnp.int32), (batch, queries, lists, slots))
    rows = kv.reshape(-1, both)
    padded = jnp.pad(q.astype(dtype) * scale, ((0, 0), (0, 0), (0, 0), (0, both - width)))

    def attend(item):
        number, heads, listed, position = item
        sequence, head = number // (queries * lists), number % lists // (lists // kv_heads)
        source = (sequence * keys + jnp.clip(listed, 0, keys - 1)) * kv_heads + head
        fetched = rows.at[source].get(mode="promise_in_bounds")
        # Fused into what follows, the copies would become element-wise loops.
        fetched = jax.lax.optimization_barrier(fetched).astype(dtype)
        visible = ((listed >= 0) & (listed <= position))[None, :]
        # With the long operand first the product reads it in its own order.
        logits = jnp.where(visible, jnp.einsum("SH,GH->SG", fetched, heads).T, -jnp.inf)
        top = jax.lax.stop_gradient(jnp.max(logits, axis=1, keepdims=True))
        top = jnp.where(jnp.isneginf(top), 0.0, top)
        weights = jnp.exp(logits - top)
        total = jnp.sum(weights, axis=1, keepdims=True)
        seen = total > 0
        safe = jnp.where(seen, total, 1.0)
        out = jnp.einsum("GS,SH->GH", weights, fetched)[:, width:] / safe
        lse = jnp.where(seen, top + jnp.log(safe), -jnp.inf)
        return out.astype(q.dtype), lse[:, 0]

    items = batch * queries * lists
    arguments = (
        jnp.arange(items, dtype=jnp.int32),
        padded.reshape(items, group, both),
        indices.reshape(items, slots),
        jnp.repeat(positions.astype(jnp.int32).reshape(-1), lists),
    )
    one_by_one = jax.default_backend() == "cpu"
    out, lse = jax.lax.map(attend, arguments) if one_by_one else jax.vmap(attend)(arguments)
    out = out.reshape(batch, queries, query_heads, both - width)
    return AttentionOutput(out, lse.reshape(batch, queries, query_heads))
