"""Block-sparse attention on TPUs (Pallas, Mosaic): tiles of rows stream the union of their blocks.

Tq consecutive tokens times the heads that share a list are a tile; it visits every block that one
of its tokens selected once, bits say which rows see it (:mod:`.lists`). dk and dv walk the inverse
lists, key block by key block, so that gradients are bitwise repeatable. Lists reach scalar memory
part by part, and exist for :data:`.mosaic_tpu_plan.SELECTED` slots at a time only. See
:mod:`kernels_pallas.tpu` for the layout.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas import tpu, tuned
from kernels_pallas.block_sparse import cost, mosaic_tpu_backward
from kernels_pallas.block_sparse.mosaic_tpu_plan import (
    Plan,
    Tiles,
    plan_for,
    query_rows,
    tile_lists,
    walk_list,
    whole_to,
)
from kernels_pallas.common import AttentionOutput
from kernels_pallas.interpreting import interpreter

__all__ = ["Tiles", "block_sparse_attention"]


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
    tiles: Tiles | None = None,
) -> AttentionOutput:
    """Arguments and results as in the api; ``tiles`` overrides the tile sizes.

    Keys after the last position of every query that lists their block are not read, nor are
    queries that see nothing.

    Raises:
      NotImplementedError: for dtypes other than float32 and bfloat16, empty arrays, blocks that
        are no multiple of 16, and heads too many or too wide for vector memory.
    """
    tpu.check_arrays("block_sparse_attention", q=q, k=k, v=v)
    plans = tuple(
        plan_for(q, k, v, indices, block_size, scale, tiles, direction)
        for direction in tuned.DIRECTIONS
    )
    last = jnp.full(q.shape[:2], k.shape[1] - 1, jnp.int32)
    if causal:
        last = jnp.minimum(positions.astype(jnp.int32), last)
    indices = indices.astype(jnp.int32)
    # Blocks that start after the query's last key are visited by nobody.
    in_reach = (indices <= (last // block_size)[:, :, None, None]) & (last >= 0)[:, :, None, None]
    indices = jnp.where(in_reach, indices, -1)
    return AttentionOutput(*_attend(plans, q, k, v, indices, last))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plans, q, k, v, indices, last):
    return _forward(plans[0], q, k, v, indices, last)


def _attend_fwd(plans, q, k, v, indices, last):
    out, lse = _forward(plans[0], q, k, v, indices, last)
    return (out, lse), (q, k, v, indices, last, out, lse)


def _attend_bwd(plans, residuals, cotangents):
    gradients = mosaic_tpu_backward.gradients(plans[1], *residuals, *cotangents)
    return (*gradients, None, None)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(plan: Plan, q, k, v, indices, last):
    k, v = (tpu.side_by_side(x, plan.padded_keys) for x in (k, v))
    chunks = mosaic_tpu_backward.Chunks(plan, q.shape[1])

    def chunk(number):
        return _forward_chunk(plan, k, v, *(chunks.take(x, number) for x in (q, indices, last)))

    if plan.chunks == 1:
        return chunk(0)
    out, lse = jax.lax.map(chunk, jnp.arange(plan.chunks, dtype=jnp.int32))
    return chunks.join(out), chunks.join(lse)


def _forward_chunk(plan: Plan, k, v, q, indices, last):
    layout = plan.layout
    lists = tile_lists(plan, indices)
    row = query_rows(plan, lists, whole_to(plan, lists, last))
    limits = tpu.stack_rows(layout.per_token(last, -1))
    out, lse = _walk_tiles(plan, row, limits, layout.pack(q), k, v)
    return layout.unpack(out, plan.out_width), layout.from_rows(lse)


def _walk_tiles(plan: Plan, row, limits, q, k, v):
    """The kernel: packed out and lse in the order of matrix rows."""
    layout = plan.layout
    groups, parts, rows = layout.lists, plan.parts, layout.matrix_rows
    lanes, value_lanes = layout.group * plan.width, layout.group * plan.value_width
    return pl.pallas_call(
        partial(_forward_kernel, plan=plan),
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
            pl.BlockSpec(
                (1, layout.tokens, lanes), lambda h, i: (h // groups, i // parts, h % groups)
            ),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=[
            pl.BlockSpec(
                (1, layout.tokens, value_lanes), lambda h, i: (h // groups, i // parts, h % groups)
            ),
            pl.BlockSpec((1, 1, 1, rows), lambda h, i: (h, i // parts, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((layout.batch, layout.padded, groups * value_lanes), q.dtype),
            jax.ShapeDtypeStruct((layout.batch * groups, layout.tiles, 1, rows), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((rows, plan.width), q.dtype),
            pltpu.VMEM((2, plan.tiles.blocks * plan.block_size, plan.width), k.dtype),
            pltpu.VMEM((2, plan.tiles.blocks * plan.block_size, plan.value_width), v.dtype),
            pltpu.VMEM((1, rows), jnp.float32),
            pltpu.VMEM((1, rows), jnp.float32),
            pltpu.VMEM((plan.value_width, rows), jnp.float32),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.SemaphoreType.DMA((2, 2)),
        ],
        compiler_params=tpu.compiler_params(("parallel", "arbitrary")),
        cost_estimate=_cost(plan, q.dtype.itemsize),
        interpret=interpreter("tpu"),
        name="block_sparse_attention_forward",
    )(row, limits, q, k, v)


def _forward_kernel(
    row,
    limits,
    q,
    k_hbm,
    v_hbm,
    out,
    lse,
    query,
    keys,
    values,
    top,
    total,
    sums,
    slot,
    semaphores,
    *,
    plan: Plan,
):
    part = pl.program_id(1) % plan.parts

    @pl.when(part == 0)
    def _():
        query[...] = tpu.stack_heads(q[0], plan.layout.group)
        tpu.start_softmax(top, total, sums)

    def compute(at, visible, *, careful):
        logits = tpu.product(keys[at], query[...], "nt") * (plan.scale * tpu.LOG2_E)
        value = tpu.clear_unread(visible, values[at]) if careful else values[at]
        tpu.absorb(top, total, sums, jnp.where(visible, logits, tpu.MASKED), value)

    sources, buffers = (k_hbm, v_hbm), (keys, values)
    walk_list(plan, row, slot, sources, buffers, semaphores, lambda: limits[0, 0, 0:1], compute)

    @pl.when(part == plan.parts - 1)
    def _():
        result, row_lse = tpu.finish_softmax(top, total, sums)
        tpu.store_heads(out, result, plan.layout.group)
        lse[0, 0] = row_lse


def _cost(plan: Plan, itemsize: int) -> pl.CostEstimate:
    """For full lists and unions of 1.5 lists, what neighbours that agree have."""
    layout = plan.layout
    heads, widths = layout.lists * layout.group, (plan.width, plan.value_width)
    pairs = layout.batch * layout.queries * min(plan.slots * plan.block_size, plan.keys)
    visited = layout.batch * layout.tiles * min(3 * plan.slots // 2, plan.blocks)
    return pl.CostEstimate(
        flops=cost.forward_flops(pairs, heads, *widths),
        transcendentals=cost.exponentials(pairs, heads),
        bytes_accessed=cost.forward_bytes(
            layout.batch * layout.queries,
            visited,
            plan.block_size,
            heads,
            layout.lists,
            *widths,
            itemsize,
        ),
    )
