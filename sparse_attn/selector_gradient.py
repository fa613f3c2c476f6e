"""Ways to teach a block selector by gradient, besides through the compressed output.

Index sets carry no gradient. The two options here add one: a KL loss towards pooled dense attention
(the SeerAttention and DSA recipe, detached inputs), and a straight-through weight per block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparse_attn.documents import Rows
from sparse_attn.metrics import dense_probabilities, sample_rows
from sparse_attn.selecting import pool_entries, visible_entries
from sparse_attn.shards import WHOLE, Shards
from sparse_attn.types import AttentionOutput

if TYPE_CHECKING:
    from sparse_attn.nsa import NSA

KL_ROWS = 64
STRAIGHT_THROUGH_ROWS = 32


def pooled_kl(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    k_cmp: Float[Array, "B C K H"],
    rows: Rows,
    config: NSA,
    shards: Shards = WHOLE,
) -> Float[Array, ""]:
    """KL(dense attention pooled into blocks || block importance), mean over sampled rows.

    Both sides are summed over the heads of a group and normalised over blocks. Rows that see no
    compressed entry yet are left out. Gradient goes where the inputs are not detached: the caller
    detaches ``q`` and ``k``, so that only phi_K learns. ``rows`` are those of the whole sequence,
    of which ``shards`` may hold a part of ``q``.
    """
    B, S, K, _ = k.shape
    N = q.shape[2]
    size = config.selection_block
    blocks = -(-S // size)
    sampled = sample_rows(S, KL_ROWS)
    q, start, index = shards.take(q, sampled), rows.start[:, sampled], rows.index[:, sampled]
    target = jnp.sum(dense_probabilities(q, k, start, index), axis=3)
    target = jnp.pad(target, ((0, 0), (0, 0), (0, 0), (0, blocks * size - S)))
    target = jnp.sum(target.reshape(B, -1, K, blocks, size), axis=-1) / (N // K)

    first, stop = visible_entries(rows, config.compression_block, config.compression_stride)
    first, stop = first[:, sampled], stop[:, sampled]
    p = dense_probabilities(q, k_cmp, first, stop - 1)
    importance = jnp.sum(pool_entries(p, config.pooling, blocks), axis=3)
    total = jnp.sum(importance, axis=-1, keepdims=True)
    usable = total[..., 0] > 0
    share = importance / jnp.where(total > 0, total, 1.0)
    tiny = 1e-9
    # A block without any visible entry (the row's own, at first) cannot be ranked: leave it out.
    ranked = share > 0
    target = jnp.where(ranked, target, 0.0)
    mass = jnp.sum(target, axis=-1, keepdims=True)
    target = target / jnp.where(mass > 0, mass, 1.0)
    terms = target * (jnp.log(target + tiny) - jnp.log(jnp.where(ranked, share, 1.0) + tiny))
    divergence = jnp.sum(jnp.where(ranked, terms, 0.0), axis=-1)
    total, count = shards.batch_total(
        (jnp.sum(jnp.where(usable, divergence, 0.0)), jnp.sum(usable))
    )
    return (total / jnp.maximum(count, 1)).astype(jnp.float32)


def straight_through(
    selected: AttentionOutput,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    k_cmp: Float[Array, "B C K H"],
    lse: Float[Array, "B T N"],
    indices: Int[Array, "B T K P"],
    rows: Rows,
    config: NSA,
) -> AttentionOutput:
    """Weigh the contribution of each selected block by 1 + p - stop_gradient(p).

    p is the block's importance, averaged over the group and scaled so that all blocks sum to at
    most 1. The forward value is unchanged; backward, p receives the inner product of the output's
    cotangent with the block's contribution. Runs in chunks of rows, O(chunk * P * L) memory.
    """
    B, T, N, H = q.shape
    K, Hv = k.shape[2], v.shape[3]
    G, L = N // K, config.selection_block
    chunk = min(STRAIGHT_THROUGH_ROWS, T)
    pad = -T % chunk
    scale = H**-0.5
    pooling = config.pooling
    per_entry = config.compression_block // config.compression_stride
    first, stop = visible_entries(rows, config.compression_block, config.compression_stride)
    k, v, slc_lse = jax.lax.stop_gradient((k, v, selected.lse))
    batch_index = jnp.arange(B)[:, None, None, None, None]
    head_index = jnp.arange(K)[None, None, :, None, None]

    def chunked(x: Array, fill: int = 0) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pad), *((0, 0) for _ in x.shape[2:])), constant_values=fill)
        return jnp.moveaxis(x.reshape(B, -1, chunk, *x.shape[2:]), 1, 0)

    def gather(source: Array, index: Array) -> Array:
        safe = jnp.clip(index, 0, source.shape[1] - 1)
        return source[batch_index, safe, head_index]

    @jax.checkpoint
    def extra(block: tuple[Array, ...]) -> Array:
        q, lse, slc_lse, indices, row, first, stop = block
        grouped = q.reshape(B, chunk, K, G, H)
        listed = (indices >= 0)[..., None]
        # The importance p of every listed block, differentiable.
        entry = indices[..., None] * pooling.stride + pooling.offset
        entry = entry + jnp.arange(len(pooling.weights))[None, None, None, None]
        seen = listed & (entry >= first[:, :, None, None, None])
        seen = seen & (entry < stop[:, :, None, None, None])
        logits = jnp.einsum("BcKGH,BcKPmH->BcKGPm", grouped, gather(k_cmp, entry)) * scale
        shift = lse.reshape(B, chunk, K, G)[..., None, None]
        p = jnp.exp(jnp.where(seen[:, :, :, None], logits - shift, -jnp.inf))
        weights = jnp.asarray(pooling.weights, p.dtype)[None, None, None, None, None]
        p = jnp.sum(p * weights, axis=(3, 5)) / (G * per_entry)
        # What each listed block contributes to the output, constant.
        token = indices[..., None] * L + jnp.arange(L)[None, None, None, None]
        seen = listed & (token <= row[:, :, None, None, None])
        logits = jnp.einsum(
            "BcKGH,BcKPsH->BcKGPs", jax.lax.stop_gradient(grouped), gather(k, token)
        )
        shift = slc_lse.reshape(B, chunk, K, G)[..., None, None]
        a = jnp.exp(jnp.where(seen[:, :, :, None], logits * scale - shift, -jnp.inf))
        a = jnp.where(seen[:, :, :, None], a, 0.0)
        contribution = jnp.einsum("BcKGPs,BcKPsH->BcKGPH", a.astype(v.dtype), gather(v, token))
        weight = (p - jax.lax.stop_gradient(p)).astype(contribution.dtype)
        out = jnp.einsum("BcKP,BcKGPH->BcKGH", weight, jax.lax.stop_gradient(contribution))
        return out.reshape(B, chunk, N, Hv)

    # A row that sees nothing has lse = -inf, and exp(-inf - -inf) is not a number.
    finite = [jnp.where(jnp.isneginf(x), 0.0, x) for x in (lse, slc_lse)]
    parts = (q, *finite, indices, rows.index, first, stop)
    fills = (0, 0, 0, -1, -1, 0, 0)
    added = jax.lax.map(extra, tuple(chunked(x, f) for x, f in zip(parts, fills, strict=True)))
    added = jnp.moveaxis(added, 0, 1).reshape(B, T + pad, N, Hv)[:, :T]
    return AttentionOutput(selected.out + added.astype(selected.out.dtype), selected.lse)
