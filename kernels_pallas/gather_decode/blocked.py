"""Gathered decoding from a cache that keeps every block in one piece, keys transposed.

A block of a token-major cache [B, S, K, H] is scattered over block_size rows, and products with its
keys read them the slow way round. In the blocked layout a listed block is one contiguous copy that
goes into both products as it lies.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.common import AttentionOutput, accumulation_dtype
from kernels_pallas.gather_decode import reference
from kernels_pallas.gather_decode.walk import walk_blocks

__all__ = ["as_tokens", "gather_blocks_reference", "gather_blocks_xla"]


def as_tokens(
    k: Float[Array, "B K M H L"], v: Float[Array, "B K M L Hv"]
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """The same keys and values token-major, S = M * L; copies everything."""
    batch, kv_heads, blocks, width, length = k.shape
    k = jnp.transpose(k, (0, 2, 4, 1, 3)).reshape(batch, blocks * length, kv_heads, width)
    v = jnp.transpose(v, (0, 2, 3, 1, 4)).reshape(batch, blocks * length, kv_heads, -1)
    return k, v


def gather_blocks_reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K M H L"],
    v: Float[Array, "B K M L Hv"],
    indices: Int[Array, "B T J P"],
    *,
    positions: Int[Array, "B T"],
    causal: bool,
    scale: float,
) -> AttentionOutput:
    """Block-sparse attention over the token-major copy."""
    return reference.gather_decode(
        q,
        *as_tokens(k, v),
        indices,
        block_size=k.shape[4],
        positions=positions,
        causal=causal,
        scale=scale,
    )


def gather_blocks_xla(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K M H L"],
    v: Float[Array, "B K M L Hv"],
    indices: Int[Array, "B T J P"],
    *,
    positions: Int[Array, "B T"],
    causal: bool,
    scale: float,
) -> AttentionOutput:
    """Arguments and results as in the api: a walk on CPUs, gathers elsewhere and for gradients."""
    if causal and jax.default_backend() == "cpu":
        return AttentionOutput(*_walked(q, k, v, indices, positions, scale))
    return gathered(q, k, v, indices, positions=positions, causal=causal, scale=scale)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _walked(q, k, v, indices, positions, scale):
    return tuple(walk_blocks(q, k, v, indices, positions=positions, scale=scale))


def _walked_fwd(q, k, v, indices, positions, scale):
    return _walked(q, k, v, indices, positions, scale), (q, k, v, indices, positions)


def _walked_bwd(scale, residuals, cotangents):
    *arrays, indices, positions = residuals
    _, pull = jax.vjp(
        lambda q, k, v: tuple(
            gathered(q, k, v, indices, positions=positions, causal=True, scale=scale)
        ),
        *arrays,
    )
    return (*pull(cotangents), None, None)


_walked.defvjp(_walked_fwd, _walked_bwd)


def gathered(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K M H L"],
    v: Float[Array, "B K M L Hv"],
    indices: Int[Array, "B T J P"],
    *,
    positions: Int[Array, "B T"],
    causal: bool,
    scale: float,
) -> AttentionOutput:
    """All lists at once (on a CPU one after the other); memory O(B T J P L), whatever M is."""
    batch, queries, query_heads, width = q.shape
    kv_heads, blocks, _, length = k.shape[1:]
    dtype = accumulation_dtype(q.dtype)
    lists, slots = max(indices.shape[2], kv_heads), indices.shape[3]
    group = query_heads // lists
    indices = jnp.broadcast_to(indices.astype(jnp.int32), (batch, queries, lists, slots))
    last = jnp.full((batch, queries), blocks * length - 1, jnp.int32)
    if causal:
        last = jnp.minimum(positions.astype(jnp.int32), last)
    # One major axis of whole blocks: gathers along it are plain copies.
    keys, values = k.reshape(-1, width, length), v.reshape(-1, length, v.shape[4])

    def attend(item):
        row, heads, listed = item
        sequence, head = row // (queries * lists), row % lists // (lists // kv_heads)
        source = (sequence * kv_heads + head) * blocks + jnp.clip(listed, 0, blocks - 1)
        key = keys.at[source].get(mode="promise_in_bounds")
        value = values.at[source].get(mode="promise_in_bounds")
        # Fused into what follows, the copies would become element-wise loops.
        key, value = (x.astype(dtype) for x in jax.lax.optimization_barrier((key, value)))
        logits = jnp.matmul((scale * heads.astype(dtype))[None], key)  # [P, G, L]
        lane = jnp.arange(length, dtype=jnp.int32)[None, :]
        room = (last.reshape(-1)[row // lists] - listed * length)[:, None]
        visible = ((listed >= 0)[:, None] & (lane <= room)).reshape(1, slots * length)
        logits = jnp.swapaxes(logits, 0, 1).reshape(group, slots * length)
        logits = jnp.where(visible, logits, -jnp.inf)
        top = jax.lax.stop_gradient(jnp.max(logits, axis=1, keepdims=True))
        top = jnp.where(jnp.isneginf(top), 0.0, top)
        weights = jnp.exp(logits - top)
        total = jnp.sum(weights, axis=1, keepdims=True)
        seen = total > 0
        safe = jnp.where(seen, total, 1.0)
        out = jnp.matmul(weights, value.reshape(slots * length, -1)) / safe
        lse = jnp.where(seen, top + jnp.log(safe), -jnp.inf)
        return out.astype(q.dtype), lse[:, 0]

    items = batch * queries * lists
    arguments = (
        jnp.arange(items, dtype=jnp.int32),
        q.reshape(items, group, width),
        indices.reshape(items, slots),
    )
    one_by_one = jax.default_backend() == "cpu"
    out, lse = jax.lax.map(attend, arguments) if one_by_one else jax.vmap(attend)(arguments)
    out = out.reshape(batch, queries, query_heads, v.shape[4])
    return AttentionOutput(out, lse.reshape(batch, queries, query_heads))
