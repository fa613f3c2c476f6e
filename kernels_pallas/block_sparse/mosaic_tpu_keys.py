"""dk and dv of block-sparse attention on TPUs: every key block walks its inverse list.

The tiles that visit a block are a segment of the list, as long as it is (the first block's holds
every tile); the walk is sequential and in order, so that gradients are bitwise repeatable.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from kernels_pallas import tpu
from kernels_pallas.block_sparse import cost
from kernels_pallas.block_sparse.mosaic_tpu_plan import Plan, bounds_row, segment, selected_rows
from kernels_pallas.interpreting import interpreter


def key_gradients(
    plan: Plan, bounds, entries, statistics, queries, cotangents, keys, values, dtype
):
    layout, kv_heads = plan.layout, plan.kv_heads
    lanes = layout.group * plan.width, layout.group * plan.value_width
    step = plan.tiles.tiles

    def block(width):
        shape = (1, plan.block_size, width)
        return pl.BlockSpec(shape, lambda h, j, r: (h // kv_heads, j, h % kv_heads))

    return pl.pallas_call(
        partial(_key_kernel, plan=plan),
        grid=(layout.batch * kv_heads, plan.blocks, plan.sharing),
        in_specs=[
            pl.BlockSpec(
                (1, 1, 1, tpu.LANES),
                lambda h, j, r: (plan.list_of(h * plan.sharing + r), bounds_row(j), 0, 0),
                memory_space=pltpu.SMEM,
            ),
            block(plan.width),
            block(plan.value_width),
            *[pl.BlockSpec(memory_space=pl.ANY)] * 4,
        ],
        out_specs=[block(plan.width), block(plan.value_width)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, dtype) for x in (keys, values)],
        scratch_shapes=[
            pltpu.SMEM((2, entries.shape[3]), jnp.int32),
            pltpu.VMEM((2, step, tpu.STATISTIC_ROWS, layout.matrix_rows), jnp.int32),
            pltpu.VMEM((2, step, layout.tokens, lanes[0]), queries.dtype),
            pltpu.VMEM((2, step, layout.tokens, lanes[1]), queries.dtype),
            pltpu.VMEM((plan.block_size, plan.width), jnp.float32),
            pltpu.VMEM((plan.block_size, plan.value_width), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2, 3)),
        ],
        compiler_params=tpu.compiler_params(("parallel", "arbitrary", "arbitrary")),
        cost_estimate=backward_cost(plan, queries.dtype.itemsize),
        interpret=interpreter("tpu"),
        name="block_sparse_attention_dkdv",
    )(bounds, keys, values, entries, statistics, queries, cotangents)


def _key_kernel(
    bounds,
    key,
    value,
    entries_hbm,
    statistics_hbm,
    q_hbm,
    d_out_hbm,
    dk,
    dv,
    entries,
    statistics,
    queries,
    cotangents,
    dk_sum,
    dv_sum,
    list_semaphores,
    semaphores,
    *,
    plan: Plan,
):
    size = plan.tiles.entries
    block, share = pl.program_id(1), pl.program_id(2)
    group = pl.program_id(0) * plan.sharing + share
    first, end = segment(bounds, block)
    first_row = first // size
    rows = jnp.where(end > first, (end + size - 1) // size - first_row, 0)

    @pl.when(share == 0)
    def _():
        dk_sum[...] = jnp.zeros(dk_sum.shape, jnp.float32)
        dv_sum[...] = jnp.zeros(dv_sum.shape, jnp.float32)

    def list_copy(i, at):
        source = entries_hbm.at[plan.list_of(group), first_row + i, 0]
        return [pltpu.make_async_copy(source, entries.at[at], list_semaphores.at[at])]

    def visit(i, at):
        before = (first_row + i) * size
        window = _Window(
            plan, entries, at, jnp.maximum(first - before, 0), jnp.minimum(end - before, size)
        )
        sources, buffers = (q_hbm, d_out_hbm, statistics_hbm), (queries, cotangents, statistics)
        copies = partial(window.copies, group, sources, buffers, semaphores)

        def compute(j, slot):
            parts = queries.at[slot], cotangents.at[slot], statistics.at[slot]
            careful = (block + 1) * plan.block_size - 1 > window.whole_to(j)
            run = partial(_absorb_tiles, window, j, block, parts, key, value, dk_sum, dv_sum)
            pl.when(careful)(partial(run, careful=True))
            pl.when(~careful)(partial(run, careful=False))

        tpu.start(copies(0, 0))
        tpu.stream(window.steps, copies=copies, compute=compute)

    pl.when(rows > 0)(lambda: tpu.start(list_copy(0, 0)))
    tpu.stream(rows, copies=list_copy, compute=visit)

    @pl.when(share == plan.sharing - 1)
    def _():
        dk[0] = (dk_sum[...] * plan.scale).astype(dk.dtype)
        dv[0] = dv_sum[...].astype(dv.dtype)


@dataclasses.dataclass(frozen=True)
class _Window:
    """Entries [low, high), not none, of the row of inverse lists in scalar memory at ``at``."""

    plan: Plan
    entries: Any
    at: Any
    low: Any
    high: Any

    @property
    def steps(self) -> Any:
        step = self.plan.tiles.tiles
        return (self.high - self.low + step - 1) // step

    def column(self, number: int, step: Any, place: int) -> tuple[Any, Any]:
        """Column ``number`` of entry ``place`` of a step, and whether there is such an entry; the
        last one stands in where there is none.
        """
        entry = self.low + step * self.plan.tiles.tiles + place
        at = jnp.minimum(entry, self.high - 1) + number * self.plan.tiles.entries
        return self.entries[self.at, at], entry < self.high

    def copies(self, group, sources, buffers, semaphores, step, slot) -> list[Any]:
        """Rows and statistics of the tiles of a step."""
        layout = self.plan.layout
        found = []
        for place in range(self.plan.tiles.tiles):
            tile, _ = self.column(0, step, place)
            token = pl.ds(pl.multiple_of(tile * layout.tokens, tpu.TOKEN_STEP), layout.tokens)
            parts = []
            for source, buffer in zip(sources[:2], buffers[:2], strict=True):
                width = buffer.shape[3]
                lane = pl.multiple_of(group % layout.lists * width, tpu.LANES)
                parts.append(source.at[group // layout.lists, token, pl.ds(lane, width)])
            parts.append(sources[2].at[group, tile])
            for number, (part, buffer) in enumerate(zip(parts, buffers, strict=True)):
                target = buffer.at[slot, place]
                found.append(pltpu.make_async_copy(part, target, semaphores.at[slot, number]))
        return found

    def whole_to(self, step: Any) -> Any:
        """The least ``whole_to`` of a step's tiles."""
        places = range(self.plan.tiles.tiles)
        found = [self.column(1 + self.plan.words, step, place)[0] for place in places]
        return jax.tree.reduce(jnp.minimum, found)

    def selected(self, step: Any) -> Int[Array, "1 rows"]:
        """1 for the rows of a step that selected the block."""
        rows = []
        for place in range(self.plan.tiles.tiles):
            columns = [self.column(1 + w, step, place) for w in range(self.plan.words)]
            words = [jnp.where(exists, word, 0) for word, exists in columns]
            rows.append(selected_rows(self.plan, words).astype(jnp.int32))
        return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1)


def _absorb_tiles(window, step, block, parts, key, value, dk_sum, dv_sum, *, careful):
    """Add what the tiles of a step contribute to the gradients of a key block."""
    plan = window.plan
    places = range(plan.tiles.tiles)
    query, cotangent = (
        jnp.concatenate([tpu.stack_heads(x[i], plan.layout.group) for i in places], axis=0)
        for x in parts[:2]
    )
    rows = jnp.concatenate([parts[2][i] for i in places], axis=1)
    limit = jnp.where(window.selected(step) > 0, plan.block_size, -1)
    if careful:
        last = tpu.row_of(rows, tpu.LIMITS)
        limit = jnp.minimum(limit, last - block * plan.block_size)
    lane = jax.lax.broadcasted_iota(jnp.int32, (plan.block_size, rows.shape[1]), 0)
    visible = lane <= limit
    logits = tpu.product(key[0], query, "nt") * (plan.scale * tpu.LOG2_E)
    dweights = tpu.product(value[0], cotangent, "nt")
    if careful:
        dweights = jnp.where(visible, dweights, 0.0)
        query, cotangent = (tpu.clear_unseeing(visible, x) for x in (query, cotangent))
    weights, slopes = tpu.weights_and_slopes(
        jnp.where(visible, logits, tpu.MASKED),
        dweights,
        tpu.float_row_of(rows, 0),
        tpu.float_row_of(rows, 1),
    )
    dv_sum[...] += tpu.product(weights.astype(cotangent.dtype), cotangent, "nn")
    dk_sum[...] += tpu.product(slopes.astype(query.dtype), query, "nn")


def backward_cost(plan: Plan, itemsize: int) -> pl.CostEstimate:
    """About half of the backward pass, for full lists and unions of 1.5 lists."""
    layout = plan.layout
    heads, widths = layout.lists * layout.group, (plan.width, plan.value_width)
    pairs = layout.batch * layout.queries * min(plan.slots * plan.block_size, plan.keys)
    moved = cost.backward_bytes(
        layout.batch * layout.queries,
        layout.batch * plan.keys,
        layout.batch * layout.tiles * min(3 * plan.slots // 2, plan.blocks),
        layout.tokens,
        plan.block_size,
        heads,
        layout.lists,
        *widths,
        itemsize,
    )
    return pl.CostEstimate(
        flops=cost.backward_flops(pairs, heads, *widths) // 2,
        transcendentals=cost.exponentials(pairs, heads),
        bytes_accessed=moved // 2,
    )
