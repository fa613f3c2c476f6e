"""Block-sparse attention as masked dense attention: the execution for short key sequences.

Below the break-even length, building lists costs more than it saves: chunks of queries meet all
keys and the selection is a mask of the chunk. Memory O(chunk * S), with the chunk so small that
this stays below a fixed number of elements.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.block_sparse.reference import visible_keys
from kernels_pallas.common import AttentionOutput, accumulation_dtype

__all__ = ["backward", "forward"]


def _split(array: Array, chunk: int) -> Array:
    """[B, T, ...] -> [chunks, B, chunk, ...], padded with zeros."""
    batch, queries = array.shape[:2]
    chunks = -(-queries // chunk)
    padding = ((0, 0), (0, chunks * chunk - queries)) + ((0, 0),) * (array.ndim - 2)
    parts = jnp.pad(array, padding).reshape(batch, chunks, chunk, *array.shape[2:])
    return jnp.moveaxis(parts, 1, 0)


def _join(parts: Array, queries: int) -> Array:
    """Inverse of :func:`_split`."""
    array = jnp.moveaxis(parts, 0, 1)
    return array.reshape(array.shape[0], -1, *array.shape[3:])[:, :queries]


def _chunk(q: Float[Array, "B T N H"], keys: int, elements: int) -> int:
    """Queries of a chunk, such that its logits have at most about ``elements`` elements."""
    batch, queries, query_heads = q.shape[:3]
    return max(1, min(queries, elements // (batch * query_heads * keys)))


def _visible(
    indices: Int[Array, "B T A P"],
    last: Int[Array, "B T"],
    kv_heads: int,
    keys: int,
    block_size: int,
) -> Bool[Array, "B K A/K T S"]:
    """Visible keys of a chunk, ready to broadcast over the heads of a list."""
    visible = visible_keys(indices, last, keys=keys, block_size=block_size, causal=True)
    batch, queries, lists = indices.shape[:3]
    visible = visible.reshape(batch, queries, kv_heads, lists // kv_heads, keys)
    return jnp.transpose(visible, (0, 2, 3, 1, 4))


def _clean(array: Float[Array, "B S K A"], last: Int[Array, "B T"]) -> Float[Array, "B S K A"]:
    """Zero the rows beyond the last visible one: 0 * NaN must not reach an output."""
    row = jnp.arange(array.shape[1], dtype=jnp.int32)[None, :]
    seen = row <= jnp.max(last, axis=1, keepdims=True)
    return jnp.where(seen[:, :, None, None], array, 0).astype(accumulation_dtype(array.dtype))


def _group(array: Float[Array, "B T N A"], kv_heads: int) -> Float[Array, "B K G T A"]:
    batch, queries, query_heads, width = array.shape
    array = array.reshape(batch, queries, kv_heads, query_heads // kv_heads, width)
    return jnp.transpose(array, (0, 2, 3, 1, 4)).astype(accumulation_dtype(array.dtype))


def _ungroup(array: Float[Array, "B K G T A"]) -> Float[Array, "B T N A"]:
    batch, kv_heads, group, queries, width = array.shape
    array = jnp.transpose(array, (0, 3, 1, 2, 4))
    return array.reshape(batch, queries, kv_heads * group, width)


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    indices: Int[Array, "B T A P"],
    last: Int[Array, "B T"],
    *,
    block_size: int,
    scale: float,
    elements: int,
) -> AttentionOutput:
    """Attention of each query over its listed blocks, keys up to row ``last``."""
    queries, keys, kv_heads = q.shape[1], k.shape[1], k.shape[2]
    chunk = _chunk(q, keys, elements)
    clean_k, clean_v = _clean(k, last), _clean(v, last)

    def attend(part):
        q_part, indices_part, last_part = part
        logits = scale * jnp.einsum("BKGTH,BSKH->BKGTS", _group(q_part, kv_heads), clean_k)
        visible = _visible(indices_part, last_part, kv_heads, keys, block_size)
        group = logits.shape[2]
        visible = jnp.repeat(visible, group // visible.shape[2], axis=2)
        top = jnp.max(jnp.where(visible, logits, -jnp.inf), axis=-1, keepdims=True)
        top = jnp.where(jnp.isneginf(top), 0.0, top)
        weights = jnp.where(visible, jnp.exp(logits - top), 0.0)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        seen = total > 0
        safe_total = jnp.where(seen, total, 1.0)
        out = jnp.einsum("BKGTS,BSKH->BKGTH", weights, clean_v) / safe_total
        lse = jnp.where(seen, top + jnp.log(safe_total), -jnp.inf)
        return _ungroup(out).astype(q.dtype), _ungroup(lse)[..., 0]

    # Padded queries would otherwise see key row 0.
    parts = (_split(q, chunk), _split(indices, chunk), _split(last + 1, chunk) - 1)
    if parts[0].shape[0] == 1:
        return AttentionOutput(*attend(tuple(part[0] for part in parts)))
    out, lse = jax.lax.map(attend, parts)
    return AttentionOutput(_join(out, queries), _join(lse, queries))


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    indices: Int[Array, "B T A P"],
    last: Int[Array, "B T"],
    lse: Float[Array, "B T N"],
    delta: Float[Array, "B T N"],
    out_cotangent: Float[Array, "B T N Hv"],
    *,
    block_size: int,
    scale: float,
    elements: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """Gradients of q, k and v: ds = p (dp - delta) with delta = sum(do * out) - dlse."""
    queries, keys, kv_heads = q.shape[1], k.shape[1], k.shape[2]
    chunk = _chunk(q, keys, elements)
    clean_k, clean_v = _clean(k, last), _clean(v, last)
    safe_lse = jnp.where(jnp.isneginf(lse), 0.0, lse)

    def accumulate(carry, part):
        dk, dv = carry
        q_part, indices_part, last_part, lse_part, delta_part, cotangent_part = part
        # Rows that see nothing may hold anything; their weights are zero, 0 * NaN is not.
        alive = (last_part >= 0)[:, :, None, None]
        q_part = _group(jnp.where(alive, q_part, 0), kv_heads)
        cotangent_part = _group(jnp.where(alive, cotangent_part, 0), kv_heads)
        lse_part = _group(lse_part[..., None], kv_heads)
        delta_part = _group(delta_part[..., None], kv_heads)
        logits = scale * jnp.einsum("BKGTH,BSKH->BKGTS", q_part, clean_k)
        visible = _visible(indices_part, last_part, kv_heads, keys, block_size)
        visible = jnp.repeat(visible, logits.shape[2] // visible.shape[2], axis=2)
        weights = jnp.where(visible, jnp.exp(logits - lse_part), 0.0)
        dweights = jnp.einsum("BKGTH,BSKH->BKGTS", cotangent_part, clean_v)
        dlogits = scale * jnp.where(visible, weights * (dweights - delta_part), 0.0)
        dv += jnp.einsum("BKGTS,BKGTH->BSKH", weights, cotangent_part)
        dk += jnp.einsum("BKGTS,BKGTH->BSKH", dlogits, q_part)
        dq = jnp.einsum("BKGTS,BSKH->BKGTH", dlogits, clean_k)
        return (dk, dv), _ungroup(dq).astype(q.dtype)

    arrays = (q, indices, last + 1, safe_lse, delta, out_cotangent)
    parts = [_split(array, chunk) for array in arrays]
    parts[2] = parts[2] - 1
    zero = (jnp.zeros_like(clean_k), jnp.zeros_like(clean_v))
    if parts[0].shape[0] == 1:
        (dk, dv), dq = accumulate(zero, [part[0] for part in parts])
    else:
        (dk, dv), dq = jax.lax.scan(accumulate, zero, parts)
        dq = _join(dq, queries)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)
