"""The specification of ranged attention: a dense mask and a softmax. O(T*S) memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.common import AttentionOutput, accumulation_dtype


def ranged_attention_reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    *,
    scale: float,
) -> AttentionOutput:
    """See :func:`kernels_pallas.ranged.ranged_attention`; differentiable by autodiff."""
    batch, rows, heads, _ = q.shape
    kv_heads = k.shape[2]
    dtype = accumulation_dtype(q.dtype)
    visible = range_mask(start, stop, k.shape[1])
    # Zeroing what no row reads keeps whatever padding holds out of 0 * NaN products.
    q = jnp.where(jnp.any(visible, axis=2)[:, :, None, None], q, 0)
    k, v = (jnp.where(jnp.any(visible, axis=1)[:, :, None, None], a, 0) for a in (k, v))

    grouped = q.reshape(batch, rows, kv_heads, heads // kv_heads, -1).astype(dtype)
    logits = scale * jnp.einsum("BTKGH,BSKH->BTKGS", grouped, k.astype(dtype), precision="highest")
    mask = visible[:, :, None, None, :]
    top = jax.lax.stop_gradient(jnp.max(jnp.where(mask, logits, -jnp.inf), -1, keepdims=True))
    top = jnp.where(jnp.isneginf(top), 0, top)
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, logits - top, 0)), 0)
    total = jnp.sum(weights, axis=-1)
    seen = total > 0
    safe_total = jnp.where(seen, total, 1)
    out = jnp.einsum(
        "BTKGS,BSKV->BTKGV", weights / safe_total[..., None], v.astype(dtype), precision="highest"
    )
    lse = jnp.where(seen, jnp.log(safe_total) + top[..., 0], -jnp.inf)
    return AttentionOutput(
        out.reshape(batch, rows, heads, -1).astype(q.dtype), lse.reshape(batch, rows, heads)
    )


def range_mask(
    start: Int[Array, "B T"], stop: Int[Array, "B T"], keys: int
) -> Bool[Array, "B T S"]:
    """True where key s lies in [start, stop) of row t."""
    s = jnp.arange(keys, dtype=start.dtype)[None, None, :]
    return (s >= start[:, :, None]) & (s < stop[:, :, None])
