"""Gradients of ranged attention on TPUs: dq tile by tile, dk and dv key block by key block."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas import tpu
from kernels_pallas.interpreting import interpreter
from kernels_pallas.ranged import cost
from kernels_pallas.ranged.mosaic_tpu_plan import (
    Plan,
    key_visits,
    tile_spans,
    visible_keys,
    walk,
    walk_keys,
)


def gradients(
    plan: Plan,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    out: Float[Array, "B T N Hv"],
    lse: Float[Array, "B T N"],
    d_out: Float[Array, "B T N Hv"],
    d_lse: Float[Array, "B T N"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """Gradients by q, k and v: with dp = d_out . v and delta = d_out . out - d_lse, that by a
    logit is p * (dp - delta).
    """
    layout = plan.layout
    queries, outs, cotangents = (layout.pack(x) for x in (q, out, d_out))
    keys, values = (tpu.side_by_side(x, plan.padded_keys) for x in (k, v))
    spans = tile_spans(plan, start, stop)
    limits = tpu.stack_rows(layout.per_token(start, 0), layout.per_token(stop, 0))
    rows = (limits, layout.per_row(lse), layout.per_row(d_lse))
    dq, statistics = _query_gradient(plan, spans, *rows, queries, outs, cotangents, keys, values)
    dk, dv = _key_gradients(plan, spans, statistics, queries, cotangents, keys, values)
    return layout.unpack(dq, q.shape[3]), tpu.apart(dk, k), tpu.apart(dv, v)


def _query_gradient(plan: Plan, spans, limits, lse, d_lse, queries, outs, cotangents, keys, values):
    """dq, and the statistics of all rows for the gradients by keys and values."""
    layout, kv_heads = plan.layout, plan.kv_heads
    rows = layout.matrix_rows

    def tile(width):
        shape = (1, layout.tokens, layout.group * width)
        return pl.BlockSpec(shape, lambda h, i: (h // kv_heads, i, h % kv_heads))

    def row(height):
        return pl.BlockSpec((1, 1, height, rows), lambda h, i: (h, i, 0, 0))

    return pl.pallas_call(
        partial(_query_kernel, plan=plan),
        grid=(layout.batch * kv_heads, layout.tiles),
        in_specs=[
            pl.BlockSpec(
                (1, 1, 1, tpu.LANES), lambda h, i: (h // kv_heads, i, 0, 0), memory_space=pltpu.SMEM
            ),
            pl.BlockSpec((1, 1, tpu.STATISTIC_ROWS, rows), lambda h, i: (h // kv_heads, i, 0, 0)),
            row(1),
            row(1),
            tile(plan.width),
            tile(plan.value_width),
            tile(plan.value_width),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=[tile(plan.width), row(tpu.STATISTIC_ROWS)],
        out_shape=[
            jax.ShapeDtypeStruct(queries.shape, queries.dtype),
            jax.ShapeDtypeStruct((*lse.shape[:2], tpu.STATISTIC_ROWS, rows), jnp.int32),
        ],
        scratch_shapes=[
            pltpu.VMEM((rows, plan.width), queries.dtype),
            pltpu.VMEM((rows, plan.value_width), queries.dtype),
            pltpu.VMEM((2, plan.block, plan.width), keys.dtype),
            pltpu.VMEM((2, plan.block, plan.value_width), values.dtype),
            pltpu.VMEM((plan.width, rows), jnp.float32),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.SemaphoreType.DMA((2, 2)),
        ],
        compiler_params=tpu.compiler_params(("parallel", "arbitrary")),
        cost_estimate=_cost(plan, queries.dtype.itemsize),
        interpret=interpreter("tpu"),
        name="ranged_attention_dq",
    )(spans, limits, lse, d_lse, queries, outs, cotangents, keys, values)


def _query_kernel(
    spans,
    limits,
    lse,
    d_lse,
    q,
    out,
    d_out,
    k_hbm,
    v_hbm,
    dq,
    statistics,
    query,
    cotangent,
    keys,
    values,
    sums,
    slot,
    semaphores,
    *,
    plan: Plan,
):
    group = plan.layout.group
    query[...] = tpu.stack_heads(q[0], group)
    cotangent[...] = tpu.stack_heads(d_out[0], group)
    sums[...] = jnp.zeros(sums.shape, jnp.float32)
    tpu.store_statistics(
        statistics,
        lse[0, 0],
        d_lse[0, 0],
        tpu.stack_heads(out[0], group),
        cotangent[...],
        limits[0, 0],
    )

    def compute(block, at, *, whole):
        rows = statistics[0, 0]
        key, value = keys[at], values[at]
        logits = tpu.product(key, query[...], "nt") * (plan.scale * tpu.LOG2_E)
        dweights = tpu.product(value, cotangent[...], "nt")
        if not whole:
            visible = visible_keys(rows, tpu.LIMITS, block * plan.block, plan.block)
            logits = jnp.where(visible, logits, tpu.MASKED)
            key = tpu.clear_unread(visible, key)
            dweights = jnp.where(visible, dweights, 0.0)
        _, slopes = tpu.weights_and_slopes(
            logits, dweights, tpu.float_row_of(rows, 0), tpu.float_row_of(rows, 1)
        )
        sums[...] += tpu.product(key, slopes.astype(key.dtype), "tn")

    walk_keys(spans, slot, (k_hbm, v_hbm), (keys, values), semaphores, compute, plan)
    tpu.store_heads(dq, jnp.transpose(sums[...]) * plan.scale, group)


def _key_gradients(plan: Plan, spans, statistics, queries, cotangents, keys, values):
    layout, kv_heads = plan.layout, plan.kv_heads
    lanes = layout.group * plan.width, layout.group * plan.value_width

    def block(width):
        shape = (1, plan.block, width)
        return pl.BlockSpec(shape, lambda h, j: (h // kv_heads, j, h % kv_heads))

    return pl.pallas_call(
        partial(_key_kernel, plan=plan),
        grid=(layout.batch * kv_heads, plan.blocks),
        in_specs=[
            pl.BlockSpec(
                (1, 1, 1, tpu.LANES), lambda h, j: (h // kv_heads, j, 0, 0), memory_space=pltpu.SMEM
            ),
            block(plan.width),
            block(plan.value_width),
            *[pl.BlockSpec(memory_space=pl.ANY)] * 4,
        ],
        out_specs=[block(plan.width), block(plan.value_width)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (keys, values)],
        scratch_shapes=[
            pltpu.SMEM((2, tpu.LANES), jnp.int32),
            pltpu.VMEM((2, tpu.STATISTIC_ROWS, layout.matrix_rows), jnp.int32),
            pltpu.VMEM((2, layout.tokens, lanes[0]), queries.dtype),
            pltpu.VMEM((2, layout.tokens, lanes[1]), queries.dtype),
            pltpu.VMEM((plan.block, plan.width), jnp.float32),
            pltpu.VMEM((plan.block, plan.value_width), jnp.float32),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.SemaphoreType.DMA((2, 4)),
        ],
        compiler_params=tpu.compiler_params(("parallel", "arbitrary")),
        cost_estimate=_cost(plan, queries.dtype.itemsize),
        interpret=interpreter("tpu"),
        name="ranged_attention_dkdv",
    )(key_visits(plan, spans), keys, values, spans, statistics, queries, cotangents)


def _key_kernel(
    visits,
    key,
    value,
    spans_hbm,
    statistics_hbm,
    q_hbm,
    d_out_hbm,
    dk,
    dv,
    spans,
    statistics,
    queries,
    cotangents,
    dk_sum,
    dv_sum,
    slot,
    semaphores,
    *,
    plan: Plan,
):
    layout = plan.layout
    number = pl.program_id(0)
    batch, head = number // plan.kv_heads, number % plan.kv_heads
    block = pl.program_id(1)
    position = block * plan.block
    dk_sum[...] = jnp.zeros(dk_sum.shape, jnp.float32)
    dv_sum[...] = jnp.zeros(dv_sum.shape, jnp.float32)

    def copies(tile, at):
        token = pl.ds(pl.multiple_of(tile * layout.tokens, tpu.TOKEN_STEP), layout.tokens)
        sources = [spans_hbm.at[batch, tile, 0], statistics_hbm.at[number, tile]]
        for source, buffer in ((q_hbm, queries), (d_out_hbm, cotangents)):
            width = buffer.shape[2]
            lane = pl.ds(pl.multiple_of(head * width, tpu.LANES), width)
            sources.append(source.at[batch, token, lane])
        buffers = (spans, statistics, queries, cotangents)
        return [
            pltpu.make_async_copy(source, buffer.at[at], semaphores.at[at, i])
            for i, (source, buffer) in enumerate(zip(sources, buffers, strict=True))
        ]

    def compute(_, at, *, whole):
        rows = statistics[at]
        query = tpu.stack_heads(queries[at], layout.group)
        cotangent = tpu.stack_heads(cotangents[at], layout.group)
        logits = tpu.product(key[0], query, "nt") * (plan.scale * tpu.LOG2_E)
        dweights = tpu.product(value[0], cotangent, "nt")
        if not whole:
            visible = visible_keys(rows, tpu.LIMITS, position, plan.block)
            logits = jnp.where(visible, logits, tpu.MASKED)
            dweights = jnp.where(visible, dweights, 0.0)
            query, cotangent = (tpu.clear_unseeing(visible, x) for x in (query, cotangent))
        weights, slopes = tpu.weights_and_slopes(
            logits, dweights, tpu.float_row_of(rows, 0), tpu.float_row_of(rows, 1)
        )
        dv_sum[...] += tpu.product(weights.astype(cotangent.dtype), cotangent, "nn")
        dk_sum[...] += tpu.product(slopes.astype(query.dtype), query, "nn")

    def step(tile, at):
        whole = (block >= spans[at, 2]) & (block < spans[at, 3])
        pl.when(whole)(partial(compute, tile, at, whole=True))
        pl.when(~whole)(partial(compute, tile, at, whole=False))

    walk(visits, slot, copies, step)
    dk[0] = (dk_sum[...] * plan.scale).astype(dk.dtype)
    dv[0] = dv_sum[...].astype(dv.dtype)


def _cost(plan: Plan, itemsize: int) -> pl.CostEstimate:
    """About half of the backward pass; dq and dk/dv do nearly the same work."""
    layout = plan.layout
    heads, widths = plan.kv_heads * layout.group, (plan.width, plan.value_width)
    pairs = layout.batch * layout.queries * plan.keys // 2
    return pl.CostEstimate(
        flops=cost.backward_flops(pairs, heads, *widths) // 2,
        transcendentals=cost.exponentials(pairs, heads),
        bytes_accessed=cost.backward_bytes(
            layout.batch * layout.queries,
            layout.batch * plan.keys,
            pairs // layout.tokens,
            pairs // plan.block,
            heads,
            plan.kv_heads,
            *widths,
            itemsize,
        )
        // 2,
    )
