"""Attention over ranges of a split sequence: gathered keys, neighbours' keys, a ring, or heads.

Every function takes the rotated queries, keys and values of this device's tokens, and ranges
[start, stop) in numbers of the whole sequence.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.ranged import ranged_attention
from sparse_attn.shards import Shards
from sparse_attn.types import AttentionOutput, Implementation, merge


def range_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    *,
    shards: Shards,
    window: int | None = None,
    implementation: Implementation = "auto",
) -> AttentionOutput:
    """:func:`kernels_pallas.ranged.ranged_attention` by the strategy of ``shards``.

    ``window``: no row reaches back over more keys than this, its own included; what "halo" needs.
    Differentiable in q, k and v, through ``out`` and through ``lse``.

    Raises:
      ValueError: if "ulysses" cannot split the heads.
    """
    attend = partial(ranged_attention, implementation=implementation)
    if not shards.split:
        return attend(q, k, v, start, stop)
    if shards.strategy == "ring":
        return AttentionOutput(*_ring(shards, implementation, q, k, v, start, stop))
    if shards.strategy == "ulysses":
        return _by_heads(shards, attend, q, k, v, start, stop)
    if shards.strategy == "halo" and window is not None:
        return _near(shards, attend, q, k, v, start, stop, window)
    return attend(q, shards.gather(k), shards.gather(v), start, stop)


def cached_range_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    *,
    shards: Shards,
    implementation: Implementation = "auto",
) -> AttentionOutput:
    """The same over a cache, of which this device may hold a part; see :meth:`Shards.merged`."""
    first = shards.cache_first(k.shape[1])
    part = ranged_attention(q, k, v, start - first, stop - first, implementation=implementation)
    return shards.merged(part)


def _near(
    shards: Shards,
    attend: Any,
    q: Array,
    k: Array,
    v: Array,
    start: Array,
    stop: Array,
    window: int,
) -> AttentionOutput:
    """Keys of this device and the window - 1 before them; nothing else moves."""
    tokens = q.shape[1]
    width = min(window - 1, (shards.count - 1) * tokens)
    keys, values = (jnp.concatenate([shards.before(x, width), x], axis=1) for x in (k, v))
    offset = shards.first(tokens) - width
    return attend(q, keys, values, start - offset, stop - offset)


def _by_heads(
    shards: Shards, attend: Any, q: Array, k: Array, v: Array, start: Array, stop: Array
) -> AttentionOutput:
    """Ulysses: tokens are exchanged for heads, whole sequences are attended, and back.

    Where there are fewer kv heads than devices, each goes to all devices that need it.
    """
    count, (N, K) = shards.count, (q.shape[2], k.shape[2])
    if N % count or (K % count and count % K):
        raise ValueError(
            f'strategy="ulysses" needs query_heads={N} to be a multiple of the {count} devices of '
            f'a sequence, and kv_heads={K} to be a multiple or a divisor; use "gather" or "ring"'
        )
    if K % count:
        k, v = (jnp.repeat(x, count // K, axis=2) for x in (k, v))
    swap = partial(jax.lax.all_to_all, axis_name=shards.axis, tiled=True)
    q, k, v = (swap(x, split_axis=2, concat_axis=1) for x in (q, k, v))
    out, lse = attend(q, k, v, shards.gather(start), shards.gather(stop))
    out, lse = swap(out, split_axis=1, concat_axis=2), swap(lse, split_axis=1, concat_axis=2)
    return AttentionOutput(out, lse)


def _attend_chunk(
    shards: Shards,
    implementation: Implementation,
    owner: Array,
    q: Array,
    k: Array,
    v: Array,
    start: Array,
    stop: Array,
) -> AttentionOutput:
    """Attention to the keys of device ``owner``: one stretch, or with zig-zag order two."""
    tokens, size = k.shape[1], k.shape[1] // (1 if shards.order == "natural" else 2)
    firsts = [owner * size]
    if shards.order == "zigzag":
        firsts.append((2 * shards.count - 1 - owner) * size)
    parts = [
        ranged_attention(
            q,
            k[:, at : at + size],
            v[:, at : at + size],
            start - first,
            stop - first,
            implementation=implementation,
        )
        for first, at in zip(firsts, range(0, tokens, size), strict=True)
    ]
    return parts[0] if len(parts) == 1 else merge(*parts)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(
    shards: Shards,
    implementation: Implementation,
    q: Array,
    k: Array,
    v: Array,
    start: Array,
    stop: Array,
) -> tuple[Array, Array]:
    """Keys and values travel around the devices; each step attends what has just arrived.

    Memory is that of one device's keys, backward as well: there they travel again, followed by
    their gradients, and every chunk's attention is computed a second time.
    """
    attend = partial(_attend_chunk, shards, implementation)
    device = jax.lax.axis_index(shards.axis)

    def step(i: Array, state: Any) -> Any:
        keys, found = state
        k, v = keys = _pass_on(shards, keys)
        part = attend((device - i - 1) % shards.count, q, k, v, start, stop)
        # Kept in the dtype of the sums, so that rounding does not grow with the steps.
        part = AttentionOutput(part.out.astype(part.lse.dtype), part.lse)
        return keys, merge(found, part)

    found = attend(device, q, k, v, start, stop)
    found = AttentionOutput(found.out.astype(found.lse.dtype), found.lse)
    _, (out, lse) = jax.lax.fori_loop(0, shards.count - 1, step, ((k, v), found))
    return out.astype(q.dtype), lse


def _ring_fwd(
    shards: Shards, implementation: Implementation, *operands: Array
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    out, lse = _ring(shards, implementation, *operands)
    return (out, lse), (*operands, out, lse)


def _ring_bwd(
    shards: Shards, implementation: Implementation, residuals: Any, cotangents: Any
) -> tuple[Array | None, ...]:
    """With weight w_i = exp(lse_i - lse) of chunk i, d out_i = w_i d_out and
    d lse_i = w_i (d_out . (out_i - out) + d_lse).
    """
    q, k, v, start, stop, out, lse = residuals
    d_out, d_lse = cotangents
    dtype = lse.dtype
    out, d_out = out.astype(dtype), d_out.astype(dtype)
    device = jax.lax.axis_index(shards.axis)

    def back(owner: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        def chunk(q: Array, k: Array, v: Array) -> AttentionOutput:
            return _attend_chunk(shards, implementation, owner, q, k, v, start, stop)

        part, pull = jax.vjp(chunk, q, k, v)
        weight = jnp.where(jnp.isneginf(part.lse), 0.0, jnp.exp(part.lse - lse))
        d_part = weight[..., None] * d_out
        inner = jnp.sum(d_out * (part.out.astype(dtype) - out), axis=-1) + d_lse
        d_lse_part = jnp.where(weight > 0, weight * inner, 0.0)
        return pull(AttentionOutput(d_part.astype(part.out.dtype), d_lse_part))

    def step(i: Array, state: Any) -> Any:
        keys, dq, sums = state
        keys, sums = _pass_on(shards, (keys, sums))
        more, *of_keys = back((device - i - 1) % shards.count, *keys)
        return keys, dq + more, tuple(a + b for a, b in zip(sums, of_keys, strict=True))

    wide = jax.tree.map(lambda x: x.astype(dtype), back(device, k, v))
    state = ((k, v), wide[0], wide[1:])
    _, dq, sums = jax.lax.fori_loop(0, shards.count - 1, step, state)
    # One more step brings the gradients home.
    dk, dv = _pass_on(shards, sums)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_ring.defvjp(_ring_fwd, _ring_bwd)


def _pass_on(shards: Shards, arrays: Any) -> Any:
    """Everything to the next device of the ring."""
    pairs = [(device, (device + 1) % shards.count) for device in range(shards.count)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, shards.axis, pairs), arrays)
