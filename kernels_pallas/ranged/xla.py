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
    TileIndex,
    Tiles,
    covered,
    head_major,
    live_rows,
    pad_rows,
    precision_of,
    slab,
    tile_ranges,
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
    return ranged_forward(q, k, v, start, stop, scale=scale, tiles=tiles)


def _attend_fwd(q, k, v, start, stop, scale, tiles):
    out, lse = _attend(q, k, v, start, stop, scale, tiles)
    return (out, lse), (q, k, v, start, stop, out, lse)


def _attend_bwd(scale, tiles, residuals, cotangents):
    d_out, d_lse = cotangents
    gradients = ranged_backward(*residuals, d_out=d_out, d_lse=d_lse, scale=scale, tiles=tiles)
    return (*gradients, None, None)


_attend.defvjp(_attend_fwd, _attend_bwd)


def ranged_forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    *,
    scale: float,
    tiles: Tiles,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """``out`` and ``lse`` of ranged attention; not differentiable."""
    batch, rows, heads, _ = q.shape
    keys, kv_heads, width = v.shape[1:]
    group = heads // kv_heads
    dtype, precision = accumulation_dtype(q.dtype), precision_of(q.dtype)
    ranges = tile_ranges(start, stop, tiles, group, keys)
    live = covered(start, stop, keys)
    queries = pad_rows(q, tiles)
    padded = queries.shape[1]
    k, v = head_major(k, live), head_major(v, live)

    def tile(i, results):
        at = TileIndex.of(i, padded, kv_heads, group, tiles)
        first, length, low, high = jax.tree.map(lambda a: a[at.ranges], ranges)
        query = live_rows(at.take(queries, tiles.rows, group), length, dtype) * scale

        def step(j, softmax):
            floor = low + j * tiles.keys
            position = jnp.minimum(floor, keys - tiles.keys)
            key, value = (slab(a, at.head, position, tiles.keys) for a in (k, v))
            logits = jnp.matmul(query, key.T, precision=precision)
            mask = visible(position, floor, tiles.keys, first, length)
            return softmax.absorb(jnp.where(mask, logits, MASKED), value, precision)[0]

        steps = (jnp.maximum(high - low, 0) + tiles.keys - 1) // tiles.keys
        empty = Softmax.empty(tiles.rows * group, width, dtype)
        out, lse = jax.lax.fori_loop(0, steps, step, empty).finish()
        outs, lses = results
        return at.put(outs, out, tiles.rows), at.put(lses, lse[:, None], tiles.rows)

    empty = (
        jnp.zeros((batch, padded, heads, width), q.dtype),
        jnp.zeros((batch, padded, heads, 1), dtype),
    )
    out, lse = jax.lax.fori_loop(0, batch * kv_heads * padded // tiles.rows, tile, empty)
    return out[:, :rows], lse[:, :rows, :, 0]


def ranged_backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    out: Float[Array, "B T N Hv"],
    lse: Float[Array, "B T N"],
    *,
    d_out: Float[Array, "B T N Hv"],
    d_lse: Float[Array, "B T N"],
    scale: float,
    tiles: Tiles,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """Gradients of ranged attention by q, k and v, from the cotangents of out and lse."""
    dtype = accumulation_dtype(q.dtype)
    delta = jnp.sum(d_out.astype(dtype) * out.astype(dtype), axis=-1) - d_lse
    return ranged_gradients(q, k, v, start, stop, lse, delta, d_out=d_out, scale=scale, tiles=tiles)


def ranged_gradients(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    lse: Float[Array, "B T N"],
    delta: Float[Array, "B T N"],
    *,
    d_out: Float[Array, "B T N Hv"],
    scale: float,
    tiles: Tiles,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """Gradients by q, k and v, with delta = d_out . out - (cotangent of lse).

    The gradient by a logit is p * (dp - delta), dp = d_out . v and p = exp(logit - lse). ``lse``
    and ``out`` may be those of a softmax over more keys than these.
    """
    batch, rows, heads, width = q.shape
    keys, kv_heads, value_width = v.shape[1:]
    group = heads // kv_heads
    dtype, precision = accumulation_dtype(q.dtype), precision_of(q.dtype)
    ranges = tile_ranges(start, stop, tiles, group, keys)
    live = covered(start, stop, keys)
    k_major, v_major = head_major(k, live), head_major(v, live)
    queries, d_outs = pad_rows(q, tiles), pad_rows(d_out, tiles)
    statistics = pad_rows(jnp.stack([lse, delta], axis=-1), tiles)
    padded = queries.shape[1]

    def tile(i, carry):
        dqs, *sums = carry
        at = TileIndex.of(i, padded, kv_heads, group, tiles)
        first, length, low, high = jax.tree.map(lambda a: a[at.ranges], ranges)
        query, d_out, statistic = (
            live_rows(at.take(a, tiles.rows, group), length, dtype)
            for a in (queries, d_outs, statistics)
        )
        query = query * scale
        lse, delta = statistic.T[0], statistic.T[1]

        def step(j, sums):
            dq, dk, dv = sums
            floor = low + j * tiles.keys
            position = jnp.minimum(floor, keys - tiles.keys)
            key = slab(k_major, at.head, position, tiles.keys)
            value = slab(v_major, at.head, position, tiles.keys)
            # Keys by rows, [S, M]: dk and dv are then sums over columns, which run at full speed
            # and stay in the layout of the keys.
            logits = jnp.matmul(key, query.T, precision=precision)
            mask = visible(position, floor, tiles.keys, first, length).T
            p = jnp.exp(jnp.where(mask, logits, MASKED) - lse[None, :])
            ds = p * (jnp.matmul(value, d_out.T, precision=precision) - delta[None, :])
            dq = dq + jnp.matmul(key.T, ds, precision=precision)
            dk = _add_rows(dk, at.head, position, jnp.matmul(ds, query, precision=precision))
            dv = _add_rows(dv, at.head, position, jnp.matmul(p, d_out, precision=precision))
            return dq, dk, dv

        steps = (jnp.maximum(high - low, 0) + tiles.keys - 1) // tiles.keys
        zero = jnp.zeros((width, tiles.rows * group), dtype)
        dq, *sums = jax.lax.fori_loop(0, steps, step, (zero, *sums))
        return at.put(dqs, dq.T * scale, tiles.rows), *sums

    zeros = [jnp.zeros((batch * kv_heads, keys, size), dtype) for size in (width, value_width)]
    carry = (jnp.zeros((batch, padded, heads, width), q.dtype), *zeros)
    carry = jax.lax.fori_loop(0, batch * kv_heads * padded // tiles.rows, tile, carry)
    dq, dk, dv = carry
    dk, dv = (
        jnp.transpose(a.reshape(batch, kv_heads, keys, -1), (0, 2, 1, 3)).astype(q.dtype)
        for a in (dk, dv)
    )
    return dq[:, :rows], dk, dv


def _add_rows(
    total: Float[Array, "E S H"],
    head: Int[Array, ""],
    position: Int[Array, ""],
    part: Float[Array, "s H"],
) -> Float[Array, "E S H"]:
    at = (head, position, jnp.zeros((), jnp.int32))
    old = jax.lax.dynamic_slice(total, at, (1, *part.shape))
    return jax.lax.dynamic_update_slice(total, old + part[None], at)
