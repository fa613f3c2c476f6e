"""The TPU kernel that scores key blocks and keeps the best of each token on chip.

A tile of tokens steps over the entries that any of them sees. A step adds up the probabilities of
the heads (or takes their log-sum-exp), pools entries into blocks by strided slices, always in the
order of the weights so that equal entries tie exactly, and stores sort keys. When a segment of
blocks is full, or the entries end, only the best are kept (see mosaic_tpu_topk.py).
"""

from __future__ import annotations

import dataclasses
import functools
import math
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
    list_tiles,
    member_logits,
    row_tiles,
    seen_entries,
    spans_of,
    walk_entries,
)
from kernels_pallas.block_scores.mosaic_tpu_topk import (
    COUNTED,
    NEVER,
    Candidates,
    Eligible,
    keep_best,
    outside,
    outside_rows,
    sort_keys,
)
from kernels_pallas.block_scores.pooling import UNSEEN_SCORE
from kernels_pallas.block_scores.ranking import Ranking
from kernels_pallas.interpreting import interpreter


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static in one call of the kernel; ``width`` is padded to whole lanes."""

    ranking: Ranking
    scale: float
    layout: tpu.RowLayout
    blocks: int
    """Blocks of a step."""
    longest: int
    """Scored blocks that are held at most."""
    entries: int
    kv_heads: int
    width: int
    shifted: bool = False
    budgeted: bool = False

    @property
    def advance(self) -> int:
        """Entries from one step to the next."""
        return self.blocks * self.ranking.pooling.stride

    @property
    def window(self) -> int:
        """Entries a step reads: those of its blocks, what windows overlap included."""
        pooling = self.ranking.pooling
        last = pooling.stride * (self.blocks - 1) + len(pooling.weights)
        return tpu.round_up(last, tpu.TOKEN_STEP)

    @property
    def pooled_rows(self) -> int:
        """Rows of the buffer of which strided slices are taken, the last one's stride included."""
        weights = len(self.ranking.pooling.weights)
        return tpu.round_up(max(self.window, self.advance + weights), 8)

    @property
    def scored(self) -> int:
        """Blocks of all entries, in whole steps."""
        return tpu.round_up(max(1, self.ranking.pooling.blocks(self.entries)), self.blocks)

    @property
    def key_rows(self) -> int:
        """Rows of all keys in memory."""
        return self.scored * self.ranking.pooling.stride - self.advance + self.window

    @property
    def edge(self) -> int:
        """Candidates before and after the scored blocks, in whole steps."""
        return tpu.round_up(max(outside_rows(self.ranking), self.slots), self.blocks)

    @property
    def segment(self) -> int:
        """Scored blocks that are held; no more than there are."""
        return min(self.longest, self.scored)

    @property
    def candidates(self) -> int:
        """Rows of the buffer of candidates."""
        return self.segment + 2 * self.edge + COUNTED * self.blocks

    @property
    def slots(self) -> int:
        """Rows of the buffer of what is kept."""
        return tpu.round_up(self.ranking.selected, 8)

    def vmem_bytes(self, itemsize: int) -> int:
        """Inputs and outputs twice for the pipeline, buffers, and a step's scores as values."""
        tokens, members = self.layout.tokens, self.layout.group
        queries = tokens * members * self.width * itemsize
        keys = self.window * self.width * itemsize
        words = 2 * self.candidates + 3 * self.slots + self.pooled_rows + 4 * self.window
        return 2 * queries + 2 * keys + 4 * tokens * (words + 2 * (members + 16))


def plan_selection(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C K H"],
    *,
    ranking: Ranking,
    lists: int,
    scale: float,
    tiles: Tiles,
) -> Plan:
    """The plan of a call that selects ``lists`` lists a token.

    Raises:
      NotImplementedError: if the tile does not fit vector memory.
    """
    batch, queries, heads, _ = q.shape
    entries, kv_heads, head_width = k.shape[1:]
    layout = tpu.RowLayout(batch, queries, lists, heads // lists, tiles.tokens)
    width = tpu.round_up(head_width, tpu.LANES)
    plan = Plan(ranking, scale, layout, tiles.blocks, tiles.segment, entries, kv_heads, width)
    tpu.check_vmem(
        "block selection",
        plan.vmem_bytes(q.dtype.itemsize),
        f"{layout.group} heads of {head_width} a list, selected={ranking.selected}, "
        f"{ranking.pooling}, {tiles}",
    )
    return plan


def select_on_tpu(
    plan: Plan,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C K H"],
    rows: tuple[Int[Array, "B T"], ...],
    shift: Float[Array, "B T N"] | None = None,
    budget: Int[Array, "B T J"] | None = None,
) -> Int[Array, "B T J P"]:
    """Block numbers as in the api; ``rows`` are start, stop, first and last block.

    ``shift`` is subtracted from the logits: lse, which probabilities need, and finite in log space.
    """
    layout, ranking, width = plan.layout, plan.ranking, plan.width
    plan = dataclasses.replace(plan, shifted=shift is not None, budgeted=budget is not None)
    tokens = layout.tokens
    numbers = row_tiles(layout, *zip(rows, (0, 0, 0, -1), strict=True))
    grid, specs = common_specs(layout, 4, width)
    operands = [_spans(plan, numbers), numbers, layout.pack(q)]
    if shift is not None:
        operands.append(list_tiles(layout, shift))
        specs.append(list_spec(layout, layout.group))
    if budget is not None:
        operands.append(list_tiles(layout, budget.astype(jnp.int32)))
        specs.append(list_spec(layout, 1))
    operands.append(_keys_from(k, ranking.pooling.offset, plan.key_rows))
    specs.append(pl.BlockSpec(memory_space=pl.ANY))
    chosen = pl.pallas_call(
        functools.partial(_kernel, plan),
        grid=grid,
        in_specs=specs,
        out_specs=list_spec(layout, plan.slots),
        out_shape=jax.ShapeDtypeStruct((*grid, plan.slots, tokens), jnp.int32),
        scratch_shapes=[
            pltpu.SMEM((1,), jnp.int32),
            pltpu.VMEM((2, plan.window, width), k.dtype),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.VMEM((tokens // tpu.LANES, plan.pooled_rows, tpu.LANES), jnp.float32),
            pltpu.VMEM((plan.candidates, tokens), jnp.int32),
            pltpu.VMEM((plan.candidates, tokens), jnp.int32),
            pltpu.VMEM((plan.slots, tokens), jnp.int32),
            pltpu.VMEM((plan.slots, tokens), jnp.int32),
        ],
        compiler_params=tpu.compiler_params(("parallel", "arbitrary")),
        cost_estimate=cost.selection(
            rows=layout.batch * layout.padded,
            heads=q.shape[2],
            lists=layout.lists,
            width=width,
            entries=plan.entries,
            blocks=ranking.pooling.blocks(plan.entries),
            weights=len(ranking.pooling.weights),
            selected=ranking.selected,
            tile=tokens,
            itemsize=q.dtype.itemsize,
        ).estimate(),
        interpret=interpreter("tpu"),
        name="select_blocks",
    )(*operands)
    return from_list_tiles(layout, chosen)[..., : ranking.selected]


def _spans(plan: Plan, numbers: Int[Array, "B tiles 4 tokens"]) -> Int[Array, "B tiles 1 128"]:
    """The steps that hold every block of which some token of the tile sees an entry."""
    pooling = plan.ranking.pooling
    low, high = seen_entries(numbers, plan.entries)
    first = jnp.maximum(low - pooling.offset - len(pooling.weights) + 1, 0) // plan.advance
    end = (jnp.maximum(high - pooling.offset, 0) + plan.advance - 1) // plan.advance
    return spans_of(first, jnp.where(high > 0, end, 0))


def _keys_from(k: Float[Array, "B C K H"], first: int, rows: int) -> Float[Array, "B rows KHp"]:
    """Entries from number ``first`` on (zeros before entry 0), in ``rows`` rows of memory."""
    k = k[:, max(0, first) : max(0, first + rows)]
    k = jnp.pad(k, ((0, 0), (max(0, -first), 0), (0, 0), (0, 0)))
    return tpu.side_by_side(k, rows)


def _kernel(plan: Plan, *references: Any) -> None:
    spans, rows, queries, *others = references
    shifts = others.pop(0) if plan.shifted else None
    budgets = others.pop(0) if plan.budgeted else None
    memory, chosen, slot, keys, arrived, pooled, key, number, kept_key, kept_number = others
    several = plan.segment < plan.scored
    candidates = Candidates(key, number)
    best = Candidates(kept_key if several else None, kept_number)
    ranking = plan.ranking
    start, stop, first, last = (rows[0, 0, i : i + 1, :] for i in range(4))
    eligible = Eligible(jnp.maximum(first, 0), last)
    wanted = jnp.full(start.shape, ranking.selected, jnp.int32)
    if budgets is not None:
        wanted = jnp.clip(budgets[0, 0], 0, ranking.selected)
    first_step, end_step = spans[0, 0, 0, 0], spans[0, 0, 0, 1]
    edge_steps, segment_steps = plan.edge // plan.blocks, plan.segment // plan.blocks
    before = outside(ranking, plan.edge, 0, first_step * plan.blocks, eligible)
    candidates.put(pl.ds(0, plan.edge), *before)

    def visit(step, at):
        done = step - first_step
        if several:

            @pl.when((done > 0) & (done % segment_steps == 0))
            def _():
                steps = jnp.int32(edge_steps + segment_steps)
                keep_best(candidates, best, steps, plan.blocks, wanted)
                _start_over(candidates, best, plan)

        values = _entry_scores(plan, keys[at], queries, shifts)
        entry = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
        entry = step * plan.advance + ranking.pooling.offset + entry
        hidden = -jnp.inf if ranking.log else 0.0
        # Masked once for all heads: what unseen entries hold, NaN included, ends here.
        values = jnp.where((entry >= start) & (entry < stop), values, hidden)
        for lanes in range(pooled.shape[0]):  # strided slices come out of 128 lanes only
            part = values[:, lanes * tpu.LANES : (lanes + 1) * tpu.LANES]
            pooled[lanes, pl.ds(0, plan.window), :] = part
        score = _pool(ranking, pooled, plan.blocks)
        number = step * plan.blocks + jax.lax.broadcasted_iota(jnp.int32, score.shape, 0)
        row = plan.edge + done % segment_steps * plan.blocks
        row = pl.multiple_of(row, plan.blocks)
        key = sort_keys(ranking, number, score, eligible)
        candidates.put(pl.ds(row, plan.blocks), key, number)

    walk_entries(
        spans, slot, memory, keys, arrived, visit,
        layout=plan.layout, kv_heads=plan.kv_heads, advance=plan.advance,
    )  # fmt: skip
    steps = end_step - first_step
    held = jnp.where(steps > 0, (steps - 1) % segment_steps + 1, 0) + edge_steps
    after = pl.ds(pl.multiple_of(held * plan.blocks, plan.blocks), plan.edge)
    end = end_step * plan.blocks
    candidates.put(after, *outside(ranking, plan.edge, end, None, eligible))
    keep_best(candidates, best, held + edge_steps, plan.blocks, wanted)
    chosen[0, 0] = kept_number[...]


def _start_over(candidates: Candidates, best: Candidates, plan: Plan) -> None:
    """Make the kept blocks the first candidates of the next segment."""
    nothing = jnp.full((plan.edge, plan.layout.tokens), NEVER, jnp.int32)
    candidates.put(pl.ds(0, plan.edge), nothing, nothing)
    candidates.put(pl.ds(0, plan.slots), best.key[...], best.number[...])


def _entry_scores(
    plan: Plan, key: Float[Array, "entries width"], queries: Any, shifts: Any
) -> Float[Array, "entries tokens"]:
    """Probability summed over the heads of a list, or the log-sum-exp of their shifted logits."""
    members, shape = plan.layout.group, (key.shape[0], plan.layout.tokens)

    def shift(g):
        return shifts[0, 0, pl.ds(g, 1), :]

    def add(g, total):
        logits = member_logits(key, queries, g, plan.scale * tpu.LOG2_E)
        return total + jnp.exp2(logits - shift(g) * tpu.LOG2_E)

    def shifted(g):
        logits = member_logits(key, queries, g, plan.scale)
        return logits if shifts is None else logits - shift(g)

    def join(g, state):
        top, total = state
        logits = shifted(g)
        smaller = jnp.exp(-jnp.abs(logits - top))
        total = jnp.where(logits > top, total * smaller + 1.0, total + smaller)
        return jnp.maximum(top, logits), total

    if not plan.ranking.log:
        return for_members(members, add, jnp.zeros(shape, jnp.float32))
    if members == 1:
        return shifted(0)
    # Finite, so that the first logit replaces it without inf - inf.
    empty = jnp.full(shape, 2 * UNSEEN_SCORE, jnp.float32), jnp.zeros(shape, jnp.float32)
    top, total = for_members(members, join, empty)
    return top + jnp.log(total)


def _pool(ranking: Ranking, values: Any, blocks: int) -> Float[Array, "blocks tokens"]:
    """Scores of the blocks of a step; the same operations in the same order for every block."""
    pooling = ranking.pooling

    def part(m):
        rows = pl.ds(m, blocks, stride=None if pooling.stride == 1 else pooling.stride)
        parts = [values[lanes, rows, :] for lanes in range(values.shape[0])]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)

    parts = []
    for m, weight in enumerate(pooling.weights):
        if weight == 0:
            continue
        if not ranking.log:
            parts.append(part(m) * weight)
        else:
            parts.append(part(m) if weight == 1 else part(m) + math.log(weight))
    if not parts:
        empty = UNSEEN_SCORE if ranking.log else 0.0
        return jnp.full((blocks, values.shape[0] * tpu.LANES), empty, jnp.float32)
    combine = jnp.add if pooling.reducer == "sum" else jnp.maximum
    score = functools.reduce(combine, parts)
    return jnp.maximum(score, UNSEEN_SCORE) if ranking.log else score
