"""Ranged attention as loops over tiles, for any XLA backend; measured on CPUs.

Forward: every query tile walks the keys of its span with an online softmax. Backward: one
query-major pass recomputes the weights of a tile, sums dq on the way and adds to dk and dv in
place, in a fixed order. Autodiff through the loops would store every step; there is a custom VJP.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.common import AttentionOutput, accumulation_dtype
from kernels_pallas.ranged.few_rows import FEW_ROWS, few_rows_forward
from kernels_pallas.ranged.tiling import (
    MASKED,
    Softmax,
    Tiles,
    covered,
    head_major,
    precision_of,
    slab,
    tile_ranges,
    tile_rows,
    untile_rows,
    visible,
)


def ranged_attention_xla(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    *,
    scale: float,
    tiles: Tiles | None = None,
) -> AttentionOutput:
    """See :func:`kernels_pallas.ranged.ranged_attention`; ``tiles`` overrides the tile sizes."""
    if tiles is None:
        tiles = Tiles.choose(q.shape[1], k.shape[1], q.shape[2] // k.shape[2])
    tiles = Tiles(tiles.rows, min(tiles.keys, k.shape[1]))
    return AttentionOutput(*_attend(q, k, v, start, stop, scale, tiles))


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k, v, start, stop, scale, tiles):
    if q.shape[1] <= FEW_ROWS:
        return few_rows_forward(q, k, v, start, stop, scale)
    return _forward(q, k, v, start, stop, scale, tiles)


def _attend_fwd(q, k, v, start, stop, scale, tiles):
    out, lse = _attend(q, k, v, start, stop, scale, tiles)
    return (out, lse), (q, k, v, start, stop, out, lse)


def _attend_bwd(scale, tiles, residuals, cotangents):
    return (*ranged_backward(*residuals, *cotangents, scale, tiles), None, None)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(q, k, v, start, stop, scale, tiles):
    batch, rows, heads, _ = q.shape
    keys, kv_heads, width = v.shape[1:]
    group = heads // kv_heads
    dtype, precision = accumulation_dtype(q.dtype), precision_of(q.dtype)
    ranges = tile_ranges(start, stop, tiles, group, keys)
    live = covered(start, stop, keys)
    queries = tile_rows(q, tiles, kv_heads, stop > start) * scale
    k, v = head_major(k, live), head_major(v, live)
    a_sequence = queries.shape[0] // (batch * kv_heads)

    def tile(i):
        head = i // a_sequence
        first, count, low, high = jax.tree.map(
            lambda a: a[head // kv_heads * a_sequence + i % a_sequence], ranges
        )

        def step(j, softmax):
            floor = low + j * tiles.keys
            position = jnp.minimum(floor, keys - tiles.keys)
            logits = jnp.matmul(
                queries[i], slab(k, head, position, tiles.keys).T, precision=precision
            )
            mask = visible(position, floor, tiles.keys, first, count)
            logits = jnp.where(mask, logits, MASKED)
            return softmax.absorb(logits, slab(v, head, position, tiles.keys), precision)[0]

        steps = (jnp.maximum(high - low, 0) + tiles.keys - 1) // tiles.keys
        empty = Softmax.empty(tiles.rows * group, width, dtype)
        return jax.lax.fori_loop(0, steps, step, empty).finish()

    out, lse = jax.lax.map(tile, jnp.arange(queries.shape[0], dtype=jnp.int32))
    out = untile_rows(out, batch, rows, kv_heads, tiles)
    lse = untile_rows(lse[:, :, None], batch, rows, kv_heads, tiles)[..., 0]
    return out.astype(q.dtype), lse


def ranged_backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    out: Float[Array, "B T N Hv"],
    lse: Float[Array, "B T N"],
    d_out: Float[Array, "B T N Hv"],
    d_lse: Float[Array, "B T N"],
    scale: float,
    tiles: Tiles,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """Gradients of ranged attention by q, k and v, from the cotangents of out and lse.

    With dp = d_out . v and delta = d_out . out - d_lse, the gradient by a logit is
    p * (dp - delta).
    """
    batch, rows, heads, width = q.shape
    keys, kv_heads, value_width = v.shape[1:]
    group = heads // kv_heads
    dtype, precision = accumulation_dtype(q.dtype), precision_of(q.dtype)
    ranges = tile_ranges(start, stop, tiles, group, keys)
    live_rows, live_keys = stop > start, covered(start, stop, keys)
    queries = tile_rows(q, tiles, kv_heads, live_rows) * scale
    d_outs = tile_rows(d_out, tiles, kv_heads, live_rows)
    k_major, v_major = head_major(k, live_keys), head_major(v, live_keys)

    delta = jnp.sum(d_out.astype(dtype) * out.astype(dtype), axis=-1) - d_lse
    statistics = jnp.stack([lse, delta], axis=-1)
    statistics = tile_rows(statistics, tiles, kv_heads, live_rows)
    a_sequence = queries.shape[0] // (batch * kv_heads)

    def tile(carry, i):
        head = i // a_sequence
        first, count, low, high = jax.tree.map(
            lambda a: a[head // kv_heads * a_sequence + i % a_sequence], ranges
        )
        query, d_out = queries[i], d_outs[i]
        lse, delta = statistics[i, :, 0, None], statistics[i, :, 1, None]

        def step(j, sums):
            dq, dk, dv = sums
            floor = low + j * tiles.keys
            position = jnp.minimum(floor, keys - tiles.keys)
            key = slab(k_major, head, position, tiles.keys)
            value = slab(v_major, head, position, tiles.keys)
            logits = jnp.matmul(query, key.T, precision=precision)
            mask = visible(position, floor, tiles.keys, first, count)
            p = jnp.exp(jnp.where(mask, logits, MASKED) - lse)
            ds = p * (jnp.matmul(d_out, value.T, precision=precision) - delta)
            dq = dq + jnp.matmul(ds, key, precision=precision)
            # Sums over rows run at full speed as [H, M] @ [M, S], so dk and dv are transposed.
            dk = _add_columns(dk, head, position, jnp.matmul(query.T, ds, precision=precision))
            dv = _add_columns(dv, head, position, jnp.matmul(d_out.T, p, precision=precision))
            return dq, dk, dv

        steps = (jnp.maximum(high - low, 0) + tiles.keys - 1) // tiles.keys
        zero = jnp.zeros((tiles.rows * group, width), dtype)
        dq, dk, dv = jax.lax.fori_loop(0, steps, step, (zero, *carry))
        return (dk, dv), dq

    zeros = tuple(jnp.zeros((batch * kv_heads, size, keys), dtype) for size in (width, value_width))
    (dk, dv), dq = jax.lax.scan(tile, zeros, jnp.arange(queries.shape[0], dtype=jnp.int32))
    dq = untile_rows(dq * scale, batch, rows, kv_heads, tiles).astype(q.dtype)
    dk, dv = (
        jnp.transpose(a.reshape(batch, kv_heads, -1, keys), (0, 3, 1, 2)).astype(q.dtype)
        for a in (dk, dv)
    )
    return dq, dk, dv


def _add_columns(
    total: Float[Array, "E H S"],
    head: Int[Array, ""],
    position: Int[Array, ""],
    part: Float[Array, "H s"],
) -> Float[Array, "E H S"]:
    at = (head, jnp.zeros((), jnp.int32), position)
    old = jax.lax.dynamic_slice(total, at, (1, *part.shape))
    return jax.lax.dynamic_update_slice(total, old + part[None], at)
