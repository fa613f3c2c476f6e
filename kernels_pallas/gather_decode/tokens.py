"""Gathered decoding of single tokens from a cache that keeps each key beside its value.

A listed token is one run of H + Hv numbers in memory, of which a key and a value are copied.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.common import AttentionOutput, accumulation_dtype, merge
from kernels_pallas.gather_decode import reference
from kernels_pallas.gather_decode.xla import WIDE

__all__ = ["gather_tokens_reference", "gather_tokens_xla"]

KEYS_PER_PART = 768
"""Keys that a CPU gathers at a time: few enough that copies of them stay in its second cache."""

LANES = 16
"""Numbers of a vector; parts are multiples of it."""


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

    On a CPU lists are attended in parts, one after the other, so that what a part gathers stays in
    cache; elsewhere all at once.
    """
    batch, queries, query_heads, width = q.shape
    keys, kv_heads, both = kv.shape[1:]
    dtype = accumulation_dtype(q.dtype)
    one_by_one = jax.default_backend() == "cpu"
    lists, slots = max(indices.shape[2], kv_heads), indices.shape[3]
    group = query_heads // lists
    indices = jnp.broadcast_to(indices.astype(jnp.int32), (batch, queries, lists, slots))
    # Fused into the padding, what made the lists would run number by number.
    indices = jax.lax.optimization_barrier(
        jnp.where(indices <= positions[:, :, None, None], indices, -1)
    )
    parts = -(-slots // KEYS_PER_PART) if one_by_one else 1
    length = -(-slots // (parts * LANES)) * LANES
    fill = ((0, 0), (0, 0), (0, 0), (0, parts * length - slots))
    indices = jnp.pad(indices, fill, constant_values=-1).reshape(-1, length)
    # What is fetched beyond a key or a value meets zeros, or is dropped.
    least = min(WIDE, both) if one_by_one else 0
    key_width, value_width = max(width, least), max(both - width, least)
    padded = jnp.pad(q.astype(dtype) * scale, ((0, 0), (0, 0), (0, 0), (0, key_width - width)))
    padded = padded.reshape(-1, group, key_width)
    rows = kv.reshape(-1, both)

    def attend(item):
        number, listed = item
        row = number // parts
        sequence, head = row // (queries * lists), row % lists // (lists // kv_heads)
        source = (sequence * keys + jnp.clip(listed, 0, keys - 1)) * kv_heads + head
        fetched = (
            _columns(rows, source, 0, key_width),
            _columns(rows, source, both - value_width, value_width),
        )
        # Fused into what follows, the copies would become element-wise loops.
        key, value = (x.astype(dtype) for x in jax.lax.optimization_barrier(fetched))
        out, lse = _attend(key, value, padded[row], listed >= 0)
        return out[:, width - both :], lse

    arguments = (jnp.arange(len(indices), dtype=jnp.int32), indices)
    out, lse = jax.lax.map(attend, arguments) if one_by_one else jax.vmap(attend)(arguments)
    by_part = (jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0) for x in (out, lse))
    out, lse = merge(*map(AttentionOutput, *by_part))
    out = out.reshape(batch, queries, query_heads, both - width).astype(q.dtype)
    return AttentionOutput(out, lse.reshape(batch, queries, query_heads))


def _attend(
    key: Float[Array, "P c"],
    value: Float[Array, "P d"],
    heads: Float[Array, "G c"],
    visible: Bool[Array, " P"],
) -> tuple[Float[Array, "G d"], Float[Array, " G"]]:
    """Output and lse of a few heads over the visible keys, whose number is a multiple of LANES."""
    group = heads.shape[0]
    # With the long operand first the product reads it in its own order; a barrier keeps that.
    logits = jax.lax.optimization_barrier(jnp.matmul(key, heads.T)).T
    logits = jnp.where(visible[None, :], logits, -jnp.inf)
    # Reductions over rows of lanes are vector code, those along a row are not.
    logits = jax.lax.optimization_barrier(logits.reshape(group, -1, LANES))
    top = jax.lax.optimization_barrier(jnp.max(logits, axis=1))
    top = jax.lax.stop_gradient(jnp.max(top, axis=1, keepdims=True))
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = jnp.exp(logits - top[:, :, None])
    total = jax.lax.optimization_barrier(jnp.sum(weights, axis=1))
    total = jnp.sum(total, axis=1, keepdims=True)
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    lse = jnp.where(seen, top + jnp.log(safe), -jnp.inf)
    return jnp.matmul(weights.reshape(group, -1), value) / safe, lse[:, 0]


def _columns(
    rows: Float[Array, "R HHv"], source: Int[Array, " P"], first: int, count: int
) -> Float[Array, "P c"]:
    """``rows[source, first : first + count]``, of which only these numbers are read."""

    def one(row: Int[Array, ""]) -> Float[Array, " c"]:
        return jax.lax.dynamic_slice(rows, (row, jnp.full_like(row, first)), (1, count))[0]

    return jax.vmap(one)(source)
