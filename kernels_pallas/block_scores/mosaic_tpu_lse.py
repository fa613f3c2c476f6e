"""The TPU kernel of ``entry_lse``: an online log-sum-exp over the entries a tile of tokens sees."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas import tpu
from kernels_pallas.block_scores import cost
from kernels_pallas.block_scores.mosaic_tpu_tiles import (
    Tiles,
    common_specs,
    for_members,
    from_list_tiles,
    list_spec,
    member_logits,
    row_tiles,
    seen_entries,
    spans_of,
    walk_entries,
)
from kernels_pallas.interpreting import interpreter
from kernels_pallas.ranged.tiling import MASKED, START


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static in one call of the kernel; ``width`` is padded to whole lanes."""

    scale: float
    layout: tpu.RowLayout
    step: int
    """Entries of a step."""
    kv_heads: int
    width: int

    def vmem_bytes(self, itemsize: int) -> int:
        """Inputs and outputs twice for the pipeline, sums, and the logits of a step as values."""
        tokens, members = self.layout.tokens, self.layout.group
        queries = tokens * members * self.width * itemsize
        keys = self.step * self.width * itemsize
        words = 4 * self.step + 4 * tpu.round_up(members, 8) + 16
        return 2 * queries + 2 * keys + 4 * tokens * words


def plan_lse(
    q: Float[Array, "B T N H"], k: Float[Array, "B C K H"], scale: float, tiles: Tiles
) -> Plan:
    """The plan of a call.

    Raises:
      NotImplementedError: if the tile does not fit vector memory.
    """
    batch, queries, heads, head_width = q.shape
    entries, kv_heads = k.shape[1:3]
    layout = tpu.RowLayout(batch, queries, kv_heads, heads // kv_heads, tiles.tokens)
    step = min(tiles.entries, tpu.round_up(entries, tpu.TOKEN_STEP))
    plan = Plan(scale, layout, step, kv_heads, tpu.round_up(head_width, tpu.LANES))
    tpu.check_vmem(
        "entry_lse",
        plan.vmem_bytes(q.dtype.itemsize),
        f"{layout.group} heads of {head_width} a kv head, {tiles}",
    )
    return plan


def lse_on_tpu(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C K H"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    *,
    scale: float,
    tiles: Tiles,
) -> Float[Array, "B T N"]:
    """As in the api, float32.

    Raises:
      NotImplementedError: if the tile does not fit vector memory.
    """
    plan = plan_lse(q, k, scale, tiles)
    batch, _, heads, _ = q.shape
    entries, kv_heads = k.shape[1:3]
    layout, width, step = plan.layout, plan.width, plan.step
    numbers = row_tiles(layout, (start, 0), (stop, 0))
    low, high = seen_entries(numbers, entries)
    shape = (batch * kv_heads, layout.tiles, layout.group, layout.tokens)
    grid, specs = common_specs(layout, 2, width)
    lse = pl.pallas_call(
        functools.partial(_kernel, plan),
        grid=grid,
        in_specs=[*specs, pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=list_spec(layout, layout.group),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        scratch_shapes=[
            pltpu.SMEM((1,), jnp.int32),
            pltpu.VMEM((2, step, width), k.dtype),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.VMEM((layout.group, layout.tokens), jnp.float32),
            pltpu.VMEM((layout.group, layout.tokens), jnp.float32),
        ],
        compiler_params=tpu.compiler_params(("parallel", "arbitrary")),
        cost_estimate=cost.normalizer(
            rows=batch * layout.padded,
            heads=heads,
            kv_heads=kv_heads,
            width=width,
            entries=entries,
            tile=layout.tokens,
            itemsize=q.dtype.itemsize,
        ).estimate(),
        interpret=interpreter("tpu"),
        name="entry_lse",
    )(
        spans_of(low // step, (high + step - 1) // step),
        numbers,
        layout.pack(q),
        tpu.side_by_side(k, tpu.round_up(entries, step)),
    )
    return from_list_tiles(layout, lse).reshape(q.shape[:3])


def _kernel(
    plan: Plan,
    spans: Any,
    rows: Any,
    queries: Any,
    memory: Any,
    lse: Any,
    slot: Any,
    keys: Any,
    arrived: Any,
    tops: Any,
    totals: Any,
) -> None:
    start, stop = rows[0, 0, 0:1, :], rows[0, 0, 1:2, :]
    tops[...] = jnp.full(tops.shape, START, jnp.float32)
    totals[...] = jnp.zeros(totals.shape, jnp.float32)

    def visit(step, at):
        key = keys[at]
        entry = jax.lax.broadcasted_iota(jnp.int32, (plan.step, plan.layout.tokens), 0)
        entry = step * plan.step + entry
        visible = (entry >= start) & (entry < stop)

        def absorb(g, state):
            logits = member_logits(key, queries, g, plan.scale)
            logits = jnp.where(visible, logits, MASKED)
            member = pl.ds(g, 1)
            before = tops[member, :]
            top = jnp.maximum(before, jnp.max(logits, axis=0, keepdims=True))
            weight = jnp.sum(jnp.exp(logits - top), axis=0, keepdims=True)
            totals[member, :] = totals[member, :] * jnp.exp(before - top) + weight
            tops[member, :] = top
            return state

        for_members(plan.layout.group, absorb, 0)

    walk_entries(
        spans, slot, memory, keys, arrived, visit,
        layout=plan.layout, kv_heads=plan.kv_heads, advance=plan.step,
    )  # fmt: skip
    total = totals[...]
    seen = total > 0
    sums = tops[...] + jnp.log(jnp.where(seen, total, 1.0))
    lse[0, 0] = jnp.where(seen, sums, -jnp.inf)
