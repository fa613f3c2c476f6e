"""Gradients of block-sparse attention on TPUs: chunks of queries, and dq over the tiles' lists."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas import tpu
from kernels_pallas.block_sparse.mosaic_tpu_keys import backward_cost, key_gradients
from kernels_pallas.block_sparse.mosaic_tpu_plan import (
    Plan,
    inverse_rows,
    query_rows,
    tile_lists,
    walk_list,
    whole_to,
)
from kernels_pallas.interpreting import interpreter


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The cut of a sequence of ``queries`` into the plan's chunks."""

    plan: Plan
    queries: int

    def take(self, x: Array, number: Any) -> Array:
        """Chunk ``number`` of x [B, T, ..]; added rows are zero, for integers -1."""
        if self.plan.chunks == 1:
            return x
        size = self.plan.layout.queries
        added = self.plan.chunks * size - self.queries
        fill = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
        x = jnp.pad(x, [(0, added if i == 1 else 0) for i in range(x.ndim)], constant_values=fill)
        return jax.lax.dynamic_slice_in_dim(x, number * size, size, axis=1)

    def join(self, x: Array) -> Array:
        """Chunks [chunks, B, Tc, ..] -> [B, T, ..]."""
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : self.queries]


def gradients(
    plan: Plan,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    indices: Int[Array, "B T J P"],
    last: Int[Array, "B T"],
    out: Float[Array, "B T N Hv"],
    lse: Float[Array, "B T N"],
    d_out: Float[Array, "B T N Hv"],
    d_lse: Float[Array, "B T N"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """Gradients by q, k and v: with dp = d_out . v and delta = d_out . out - d_lse, that by a
    logit is p * (dp - delta). Lists are built again, chunk by chunk.
    """
    keys, values = (tpu.side_by_side(x, plan.padded_keys) for x in (k, v))
    chunks = Chunks(plan, q.shape[1])
    rows = (q, indices, last, out, lse, d_out, d_lse)

    def chunk(number, dtype):
        taken = (chunks.take(x, number) for x in rows)
        return _chunk_gradients(plan, keys, values, dtype, *taken)

    if plan.chunks == 1:
        dq, dk, dv = chunk(0, k.dtype)
        return dq, tpu.apart(dk, k), tpu.apart(dv, v)

    def add(sums, number):
        dq, dk, dv = chunk(number, jnp.float32)
        return (sums[0] + dk, sums[1] + dv), dq

    zeros = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(add, zeros, jnp.arange(plan.chunks, dtype=jnp.int32))
    return chunks.join(dq), tpu.apart(dk, k), tpu.apart(dv, v)


def _chunk_gradients(plan: Plan, keys, values, dtype, q, indices, last, out, lse, d_out, d_lse):
    layout = plan.layout
    lists = tile_lists(plan, indices)
    whole = whole_to(plan, lists, last)
    queries, outs, cotangents = (layout.pack(x) for x in (q, out, d_out))
    limits = tpu.stack_rows(layout.per_token(last, -1))
    dq, statistics = _query_gradient(
        plan,
        query_rows(plan, lists, whole),
        limits,
        layout.per_row(lse),
        layout.per_row(d_lse),
        queries,
        outs,
        cotangents,
        keys,
        values,
    )
    inverse = inverse_rows(plan, lists, whole)
    dk, dv = key_gradients(plan, *inverse, statistics, queries, cotangents, keys, values, dtype)
    return layout.unpack(dq, q.shape[3]), dk, dv


def _query_gradient(plan: Plan, row, limits, lse, d_lse, queries, outs, cotangents, keys, values):
    """dq, and the statistics of all rows for the gradients by keys and values."""
    layout = plan.layout
    groups, parts, rows = layout.lists, plan.parts, layout.matrix_rows
    step = plan.tiles.blocks * plan.block_size

    def tile(width):
        shape = (1, layout.tokens, layout.group * width)
        return pl.BlockSpec(shape, lambda h, i: (h // groups, i // parts, h % groups))

    def per_row(height):
        return pl.BlockSpec((1, 1, height, rows), lambda h, i: (h, i // parts, 0, 0))

    return pl.pallas_call(
        partial(_query_kernel, plan=plan),
        grid=(layout.batch * groups, layout.tiles * parts),
        in_specs=[
            pl.BlockSpec(
                (1, 1, 1, row.shape[3]),
                lambda h, i: (plan.list_of(h), i, 0, 0),
                memory_space=pltpu.SMEM,
            ),
            pl.BlockSpec(
                (1, 1, tpu.STATISTIC_ROWS, rows), lambda h, i: (h // groups, i // parts, 0, 0)
            ),
            per_row(1),
            per_row(1),
            tile(plan.width),
            tile(plan.value_width),
            tile(plan.value_width),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=[tile(plan.width), per_row(tpu.STATISTIC_ROWS)],
        out_shape=[
            jax.ShapeDtypeStruct(queries.shape, queries.dtype),
            jax.ShapeDtypeStruct((*lse.shape[:2], tpu.STATISTIC_ROWS, rows), jnp.int32),
        ],
        scratch_shapes=[
            pltpu.VMEM((rows, plan.width), queries.dtype),
            pltpu.VMEM((rows, plan.value_width), queries.dtype),
            pltpu.VMEM((2, step, plan.width), keys.dtype),
            pltpu.VMEM((2, step, plan.value_width), values.dtype),
            pltpu.VMEM((plan.width, rows), jnp.float32),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.SemaphoreType.DMA((2, 2)),
        ],
        compiler_params=tpu.compiler_params(("parallel", "arbitrary")),
        cost_estimate=backward_cost(plan, queries.dtype.itemsize),
        interpret=interpreter("tpu"),
        name="block_sparse_attention_dq",
    )(row, limits, lse, d_lse, queries, outs, cotangents, keys, values)


def _query_kernel(
    row,
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
    part = pl.program_id(1) % plan.parts

    @pl.when(part == 0)
    def _():
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

    def compute(at, visible, *, careful):
        rows = statistics[0, 0]
        key = tpu.clear_unread(visible, keys[at]) if careful else keys[at]
        logits = tpu.product(keys[at], query[...], "nt") * (plan.scale * tpu.LOG2_E)
        dweights = tpu.product(values[at], cotangent[...], "nt")
        _, slopes = tpu.weights_and_slopes(
            jnp.where(visible, logits, tpu.MASKED),
            jnp.where(visible, dweights, 0.0),
            tpu.float_row_of(rows, 0),
            tpu.float_row_of(rows, 1),
        )
        sums[...] += tpu.product(key, slopes.astype(key.dtype), "tn")

    sources, buffers = (k_hbm, v_hbm), (keys, values)
    walk_list(plan, row, slot, sources, buffers, semaphores, lambda: limits[0, 0, 0:1], compute)

    @pl.when(part == plan.parts - 1)
    def _():
        tpu.store_heads(dq, jnp.transpose(sums[...]) * plan.scale, group)
