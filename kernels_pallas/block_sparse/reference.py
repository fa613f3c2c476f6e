"""Block-sparse attention as the formula reads: a dense mask, then a softmax over it."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.common import AttentionOutput, accumulation_dtype

__all__ = ["block_sparse_attention", "visible_keys"]


def visible_keys(
    indices: Int[Array, "B T J P"],
    positions: Int[Array, "B T"],
    *,
    keys: int,
    block_size: int,
    causal: bool,
) -> Bool[Array, "B T J S"]:
    """Which of the ``keys`` key rows each list shows to its query."""
    blocks = -(-keys // block_size)
    listed = jnp.any(indices[..., None] == jnp.arange(blocks)[None, None, None, None, :], axis=3)
    visible = jnp.repeat(listed, block_size, axis=-1)[..., :keys]
    if causal:
        past = jnp.arange(keys)[None, None, :] <= positions[:, :, None]
        visible &= past[:, :, None, :]
    return visible


def block_sparse_attention(
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
    """The specification of the op; memory O(B T N S). Arguments as in the api."""
    query_heads, group = q.shape[2], q.shape[2] // k.shape[2]
    dtype = accumulation_dtype(q.dtype)
    k = jnp.repeat(k, group, axis=2).astype(dtype)
    v = jnp.repeat(v, group, axis=2).astype(dtype)
    visible = visible_keys(
        indices, positions, keys=k.shape[1], block_size=block_size, causal=causal
    )
    visible = jnp.repeat(visible, query_heads // indices.shape[2], axis=2)
    logits = scale * jnp.einsum("BTNH,BSNH->BTNS", q.astype(dtype), k)
    top = jnp.max(jnp.where(visible, logits, -jnp.inf), axis=-1, keepdims=True)
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, logits - top, 0.0)), 0.0)
    total = jnp.sum(weights, axis=-1)
    seen = total > 0
    safe_total = jnp.where(seen, total, 1.0)
    out = jnp.einsum("BTNS,BSNH->BTNH", weights / safe_total[..., None], v)
    lse = jnp.where(seen, jnp.log(safe_total) + top[..., 0], -jnp.inf)
    return AttentionOutput(out.astype(q.dtype), lse)
