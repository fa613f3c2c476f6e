"""Ranged attention on TPUs (Pallas, Mosaic): tiles of rows stream the key blocks of their span.

Forward and dq: a tile of Tq tokens times G heads visits the key blocks of [min start, max stop),
as many as its rows need; rows mask the rest, blocks that all rows see whole skip the mask. dk and
dv: a key block visits the tiles from the first to the last whose span meets it, in order, so that
gradients are bitwise repeatable. See :mod:`kernels_pallas.tpu` for the layout.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas import tpu, tuned
from kernels_pallas.common import AttentionOutput
from kernels_pallas.interpreting import interpreter
from kernels_pallas.ranged import cost, mosaic_tpu_backward
from kernels_pallas.ranged.mosaic_tpu_plan import (
    Plan,
    Tiles,
    plan_for,
    tile_spans,
    visible_keys,
    walk_keys,
)

__all__ = ["Tiles", "ranged_attention"]


def ranged_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    *,
    scale: float,
    tiles: Tiles | None = None,
) -> AttentionOutput:
    """See :func:`kernels_pallas.ranged.ranged_attention`; ``tiles`` overrides the tile sizes.

    Raises:
      NotImplementedError: for dtypes other than float32 and bfloat16, empty arrays, and heads too
        many or too wide for vector memory.
    """
    tpu.check_arrays("ranged_attention", q=q, k=k, v=v)
    plans = tuple(plan_for(q, k, v, scale, tiles, direction) for direction in tuned.DIRECTIONS)
    return AttentionOutput(*_attend(plans, q, k, v, start, stop))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plans, q, k, v, start, stop):
    return _forward(plans[0], q, k, v, start, stop)


def _attend_fwd(plans, q, k, v, start, stop):
    out, lse = _forward(plans[0], q, k, v, start, stop)
    return (out, lse), (q, k, v, start, stop, out, lse)


def _attend_bwd(plans, residuals, cotangents):
    gradients = mosaic_tpu_backward.gradients(plans[1], *residuals, *cotangents)
    return (*gradients, None, None)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(plan: Plan, q, k, v, start, stop):
    layout = plan.layout
    k, v = (tpu.side_by_side(x, plan.padded_keys) for x in (k, v))
    limits = tpu.stack_rows(layout.per_token(start, 0), layout.per_token(stop, 0))
    spans = tile_spans(plan, start, stop)
    out, lse = _walk_tiles(plan, spans, limits, layout.pack(q), k, v)
    return layout.unpack(out, plan.out_width), layout.from_rows(lse)


def _walk_tiles(plan: Plan, spans, limits, q, k, v):
    """The kernel: packed out and lse in the order of matrix rows."""
    layout = plan.layout
    tokens, group, rows = layout.tokens, layout.group, layout.matrix_rows
    kv_heads, width, value_width = plan.kv_heads, plan.width, plan.value_width
    return pl.pallas_call(
        partial(_forward_kernel, plan=plan),
        grid=(layout.batch * kv_heads, layout.tiles),
        in_specs=[
            pl.BlockSpec(
                (1, 1, 1, tpu.LANES), lambda h, i: (h // kv_heads, i, 0, 0), memory_space=pltpu.SMEM
            ),
            pl.BlockSpec((1, 1, tpu.STATISTIC_ROWS, rows), lambda h, i: (h // kv_heads, i, 0, 0)),
            pl.BlockSpec((1, tokens, group * width), lambda h, i: (h // kv_heads, i, h % kv_heads)),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=[
            pl.BlockSpec(
                (1, tokens, group * value_width), lambda h, i: (h // kv_heads, i, h % kv_heads)
            ),
            pl.BlockSpec((1, 1, 1, rows), lambda h, i: (h, i, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(
                (layout.batch, layout.padded, kv_heads * group * value_width), q.dtype
            ),
            jax.ShapeDtypeStruct((layout.batch * kv_heads, layout.tiles, 1, rows), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((rows, width), q.dtype),
            pltpu.VMEM((2, plan.block, width), k.dtype),
            pltpu.VMEM((2, plan.block, value_width), v.dtype),
            pltpu.VMEM((1, rows), jnp.float32),
            pltpu.VMEM((1, rows), jnp.float32),
            pltpu.VMEM((value_width, rows), jnp.float32),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.SemaphoreType.DMA((2, 2)),
        ],
        compiler_params=tpu.compiler_params(("parallel", "arbitrary")),
        cost_estimate=_forward_cost(plan, q.dtype.itemsize),
        interpret=interpreter("tpu"),
        name="ranged_attention_forward",
    )(spans, limits, q, k, v)


def _forward_kernel(
    spans,
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
    query[...] = tpu.stack_heads(q[0], plan.layout.group)
    tpu.start_softmax(top, total, sums)

    def compute(block, at, *, whole):
        value = values[at]
        logits = tpu.product(keys[at], query[...], "nt") * (plan.scale * tpu.LOG2_E)
        if not whole:
            visible = visible_keys(limits[0, 0], 0, block * plan.block, plan.block)
            logits = jnp.where(visible, logits, tpu.MASKED)
            value = tpu.clear_unread(visible, value)
        tpu.absorb(top, total, sums, logits, value)

    walk_keys(spans, slot, (k_hbm, v_hbm), (keys, values), semaphores, compute, plan)
    result, row_lse = tpu.finish_softmax(top, total, sums)
    tpu.store_heads(out, result, plan.layout.group)
    lse[0, 0] = row_lse


def _forward_cost(plan: Plan, itemsize: int) -> pl.CostEstimate:
    layout = plan.layout
    heads, widths = plan.kv_heads * layout.group, (plan.width, plan.value_width)
    pairs = layout.batch * layout.queries * plan.keys // 2
    return pl.CostEstimate(
        flops=cost.forward_flops(pairs, heads, *widths),
        transcendentals=cost.exponentials(pairs, heads),
        bytes_accessed=cost.forward_bytes(
            layout.batch * layout.queries,
            pairs // layout.tokens,
            heads,
            plan.kv_heads,
            *widths,
            itemsize,
        ),
    )
