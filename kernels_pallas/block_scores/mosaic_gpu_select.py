"""Scores of key blocks and the best of them, on chip (Mosaic GPU, Hopper).

A warpgroup serves ``tokens`` tokens of one list. Its products are transposed: 64 blocks are the
rows, the queries of all heads of all tokens the columns, head-major. The sum over the heads of a
group is then a sum of slices of registers, and entry number m of every block's window is a product
of its own, so pooling is elementwise too and needs no exchange between threads. Ranks go to shared
memory, [blocks, tokens] of one stage; from there each warp takes whole tokens into registers and
repeats: largest rank, last of its equals, cross it out. The best of earlier stages take part in
every later one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels_pallas import gpu
from kernels_pallas.block_scores.mosaic_gpu_tiles import Tiles, slots_of, visited_blocks
from kernels_pallas.block_scores.pooling import INITIAL_RANK, RECENT_RANK, UNSEEN_SCORE
from kernels_pallas.block_scores.ranking import Ranking
from kernels_pallas.gpu_tiles import pad_to

__all__ = ["select_on_gpu"]

_LOWEST = -(2**31)
_NEVER = _LOWEST + 2**23 - 1  # what _sortable makes of -inf
_TOKENS = 8
_TOKEN_MAJOR = plgpu.Layout.TILED(
    plgpu.Tiling(((4, 32), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)
"""[tokens, anything]: a token lies in one warp, so reductions over it are shuffles."""
_TOKEN = _TOKEN_MAJOR.reduce(1)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Everything static about a call."""

    ranking: Ranking
    scale: float
    tiles: Tiles
    lists: int
    group: int
    sharing: int  # lists that read one kv head
    tile_count: int  # tiles of a sequence
    keys_rows: int  # rows of one window entry in the copied keys
    shifted: bool

    @property
    def window(self) -> tuple[tuple[int, float], ...]:
        """(place, weight) of the entries of a block's window that can count."""
        return window_of(self.ranking)

    @property
    def slots(self) -> int:
        return slots_of(self.ranking.selected)

    @property
    def stage_runs(self) -> int:
        """Runs of 64 blocks in a stage."""
        return self.tiles.stage // gpu.ROWS

    @property
    def unseen(self) -> float:
        """Importance of a block without a visible entry."""
        return UNSEEN_SCORE if self.ranking.log else 0.0


def window_of(ranking: Ranking) -> tuple[tuple[int, float], ...]:
    pooling = ranking.pooling
    return tuple((pooling.offset + m, w) for m, w in enumerate(pooling.weights) if w > 0)


def select_on_gpu(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C K H"],
    rows: tuple[Int[Array, "B T"], Int[Array, "B T"], Int[Array, "B T"], Int[Array, "B T"]],
    shift: Float[Array, "B T N"] | None,
    budget: Int[Array, "B T J"] | None,
    *,
    ranking: Ranking,
    lists: int,
    scale: float,
    tiles: Tiles,
) -> Int[Array, "B T J P"]:
    """Chosen blocks of every row and list, ascending, -1 trailing.

    ``rows`` are start, stop, first_block and last_block. ``shift`` (finite) is taken off the
    logits before they are exponentiated or compared; None: nothing is. J = ``lists``.
    """
    batch, length, heads, _ = q.shape
    tokens = tiles.warpgroups * tiles.tokens
    padded = -(-length // tokens) * tokens
    plan = _Plan(
        ranking=ranking,
        scale=scale,
        tiles=tiles,
        lists=lists,
        group=heads // lists,
        sharing=lists // k.shape[2],
        tile_count=padded // tokens,
        keys_rows=-(-max(1, ranking.pooling.blocks(k.shape[1])) // gpu.ROWS) * gpu.ROWS,
        shifted=shift is not None,
    )
    start, stop, first, last = rows
    fill = ((0, 0), (0, padded - length))
    last = jnp.pad(last, fill, constant_values=-1)
    start, stop, first = (jnp.pad(x, fill) for x in (start, stop, jnp.maximum(first, 0)))
    rows = (start, stop, first, last)
    operands = {
        "q": pad_to(pad_to(q, 1, padded), 3, -(-q.shape[3] // 64) * 64),
        "k": _window_keys(plan, k),
        "visits": visited_blocks(rows, k.shape[1], ranking, tokens),
        **dict(zip(("start", "stop", "first", "last"), rows, strict=True)),
    }
    if shift is not None:
        operands["shift"] = jnp.transpose(pad_to(shift.astype(jnp.float32), 1, padded), (0, 2, 1))
    if budget is not None:
        operands["budget"] = jnp.transpose(pad_to(budget.astype(jnp.int32), 1, padded), (0, 2, 1))
    chosen = _run(plan, batch, padded, operands)
    chosen = jnp.transpose(chosen[:, :, :length, plan.slots - ranking.selected :], (0, 2, 1, 3))
    absent = jnp.iinfo(jnp.int32).max
    chosen = jnp.sort(jnp.where(chosen < 0, absent, chosen), axis=3)
    return jnp.where(chosen == absent, -1, chosen)


def _window_keys(plan: _Plan, k: Float[Array, "B C K H"]) -> Float[Array, "B R K H"]:
    """Keys by their place in the window, then by block: the copy of 64 blocks is contiguous.

    Entries that do not exist repeat others; no row sees them.
    """
    block = jnp.arange(plan.keys_rows, dtype=jnp.int32) * plan.ranking.pooling.stride
    places = [place for place, _ in plan.window] or [0]
    entry = jnp.concatenate([block + place for place in places])
    k = jnp.take(k, jnp.clip(entry, 0, k.shape[1] - 1), axis=1)
    return pad_to(k, 3, -(-k.shape[3] // 64) * 64)


def _run(
    plan: _Plan, batch: int, padded: int, operands: dict[str, jax.Array]
) -> Int[Array, "B J T R"]:
    tiles = plan.tiles
    width = operands["q"].shape[3]

    def body(refs):
        # Later tiles of a sequence visit more blocks: they start first.
        at = batch * plan.lists * plan.tile_count - 1 - refs.program

        @pl.when(refs.warpgroup < tiles.warpgroups)
        def _():
            gpu.take_registers(tiles.warpgroups, computes=True)
            _choose(plan, refs, at)

        @pl.when(refs.warpgroup == tiles.warpgroups)
        def _():
            gpu.take_registers(tiles.warpgroups, computes=False)
            _copy_keys(plan, refs, at)

    (chosen,) = gpu.run_kernel(
        body,
        name="select_blocks",
        programs=batch * plan.lists * plan.tile_count,
        warpgroups=tiles.warpgroups,
        operands=operands,
        outputs={
            "chosen": jax.ShapeDtypeStruct((batch, plan.lists, padded, plan.slots), jnp.int32)
        },
        scratch={
            "q_shared": gpu.shared_matrix(
                (tiles.warpgroups, plan.group * tiles.tokens, width), operands["q"].dtype
            ),
            "k_shared": gpu.shared_matrix((tiles.steps, gpu.ROWS, width), operands["k"].dtype),
            # Stores of wider rows than 8 tokens would meet in the same banks.
            "ranks": plgpu.SMEM(
                (tiles.warpgroups, tiles.tokens // _TOKENS, tiles.stage, _TOKENS), jnp.float32
            ),
            "q_ready": plgpu.Barrier(num_arrivals=plan.group, num_barriers=tiles.warpgroups),
            "k_ready": plgpu.Barrier(num_barriers=tiles.steps),
            "k_consumed": plgpu.Barrier(num_arrivals=tiles.warpgroups, num_barriers=tiles.steps),
        },
    )
    return chosen


class _Place:
    """Where a program's tile lies; all scalars."""

    def __init__(self, plan: _Plan, refs: Any, at: jax.Array):
        of_list, tile = (
            lax.div(at, gpu.integer(plan.tile_count)),
            lax.rem(at, gpu.integer(plan.tile_count)),
        )
        self.batch = lax.div(of_list, gpu.integer(plan.lists))
        self.list = lax.rem(of_list, gpu.integer(plan.lists))
        self.kv_head = lax.div(self.list, gpu.integer(plan.sharing))
        self.first_token = (tile * plan.tiles.warpgroups + refs.warpgroup) * plan.tiles.tokens
        self.tokens = pl.ds(self.first_token, plan.tiles.tokens)
        visits = [refs.visits[self.batch, tile, i] for i in range(8)]
        self.seen_from, self.seen_to = visits[6:]
        self.lows = visits[0:6:2]
        # Number of visited runs before each interval and after the last.
        self.before = [gpu.integer(0)]
        for low, high in zip(visits[0:6:2], visits[1:6:2], strict=True):
            self.before.append(self.before[-1] + high - low)

    @property
    def runs(self) -> jax.Array:
        return self.before[3]

    def skipped(self, visit: jax.Array, unit: int) -> jax.Array:
        """What to add to ``visit``, counted in ``unit`` a run, for the number it stands for."""
        first, second, third = (
            (low - n) * unit for low, n in zip(self.lows, self.before[:3], strict=True)
        )
        later = (visit >= self.before[1] * unit).astype(jnp.int32)
        latest = (visit >= self.before[2] * unit).astype(jnp.int32)
        return later * (second - first) + latest * (third - second) + first


def _copy_keys(plan: _Plan, refs: Any, at: jax.Array) -> None:
    """What the copying warpgroup does: all window entries of all runs that have entries."""
    place = _Place(plan, refs, at)
    phases = gpu.integer(max(1, len(plan.window)))

    def load(c, slot):
        run, phase = place.seen_from + lax.div(c, phases), lax.rem(c, phases)
        row = phase * plan.keys_rows + run * gpu.ROWS
        source = refs.k.at[place.batch, pl.ds(row, gpu.ROWS), place.kv_head]
        return [
            partial(plgpu.copy_gmem_to_smem, source, refs.k_shared.at[slot], refs.k_ready.at[slot])
        ]

    count = (place.seen_to - place.seen_from) * len(plan.window)
    gpu.stream(count, plan.tiles.steps, load, [refs.k_consumed])


def _choose(plan: _Plan, refs: Any, at: jax.Array) -> None:
    """What a computing warpgroup does."""
    place = _Place(plan, refs, at)
    tokens, mine = plan.tiles.tokens, refs.warpgroup
    for head in range(plan.group):
        plgpu.copy_gmem_to_smem(
            refs.q.at[place.batch, place.tokens, place.list * plan.group + head],
            refs.q_shared.at[mine, pl.ds(head * tokens, tokens)],
            refs.q_ready.at[mine],
        )
    columns = {
        name: plgpu.load(
            getattr(refs, name).at[place.batch, place.tokens], layout=gpu.COLUMN, optimized=False
        )
        for name in ("start", "stop", "first", "last")
    }
    shifts = [
        plgpu.load(
            refs.shift.at[place.batch, place.list * plan.group + head, place.tokens],
            layout=gpu.COLUMN,
            optimized=False,
        )
        for head in range(plan.group if plan.shifted else 0)
    ]
    plgpu.barrier_wait(refs.q_ready.at[mine])

    def rank_run(visit, _, *, stage):
        run = visit + place.skipped(visit, 1)
        importance = _importance(plan, refs, place, run, columns, shifts)
        rank = _rank(plan, run, columns, importance)
        row = (visit - stage * plan.stage_runs) * gpu.ROWS
        for part in range(tokens // _TOKENS):
            refs.ranks[mine, part, pl.ds(row, gpu.ROWS)] = rank[
                :, part * _TOKENS : (part + 1) * _TOKENS
            ]

    def rank_stage(stage, best):
        first = stage * plan.stage_runs
        last = lax.min(first + plan.stage_runs, place.runs)
        lax.fori_loop(first, last, partial(rank_run, stage=stage), None)
        return _extract(plan, refs, place, first, last - first, best)

    stages = lax.div(place.runs + (plan.stage_runs - 1), gpu.integer(plan.stage_runs))
    _, numbers = lax.fori_loop(gpu.integer(0), stages, rank_stage, _empty(plan))
    if hasattr(refs, "budget"):
        budget = plgpu.load(
            refs.budget.at[place.batch, place.list, place.tokens], layout=_TOKEN, optimized=False
        )
        shape = (tokens, plan.slots)
        allowed = _iota(shape) > _of_token(plan.slots - 1 - budget, shape)
        numbers = jnp.where(allowed, numbers, -1)
    refs.chosen[place.batch, place.list, place.tokens] = numbers


def _importance(
    plan: _Plan,
    refs: Any,
    place: _Place,
    run: jax.Array,
    columns: dict[str, jax.Array],
    shifts: list[jax.Array],
) -> jax.Array:
    """Importance of 64 blocks for every token, [64, tokens]."""
    shape = (gpu.ROWS, plan.tiles.tokens)
    stride, window = plan.ranking.pooling.stride, plan.window
    entry = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=gpu.MATRIX) * stride

    def pool(_, importance):
        for phase, (offset, weight) in enumerate(window):
            c = (run - place.seen_from) * len(window) + phase
            slot = lax.rem(c, gpu.integer(plan.tiles.steps))
            plgpu.barrier_wait(refs.k_ready.at[slot])
            value = _group_value(plan, refs, refs.k_shared.at[slot], shifts)
            plgpu.barrier_arrive(refs.k_consumed.at[slot])
            key = run * (gpu.ROWS * stride) + offset
            seen = entry >= gpu.across_rows(columns["start"] - key, shape)
            seen &= entry < gpu.across_rows(columns["stop"] - key, shape)
            if plan.ranking.log:
                value = value if weight == 1.0 else value + math.log(weight)
                importance = jnp.maximum(importance, jnp.where(seen, value, UNSEEN_SCORE))
                continue
            value = jnp.where(seen, weight * value, 0.0)
            if plan.ranking.pooling.reducer == "max":
                importance = jnp.maximum(importance, value)
            else:
                importance = importance + value
        return importance

    known = (run >= place.seen_from) & (run < place.seen_to)
    return lax.fori_loop(
        gpu.integer(0), known.astype(jnp.int32), pool, gpu.zeros(shape, plan.unseen)
    )


def _group_value(plan: _Plan, refs: Any, keys: Any, shifts: list[jax.Array]) -> jax.Array:
    """Of one entry of 64 blocks: sum of probabilities over the heads, or its logarithm."""
    shape = (gpu.ROWS, plan.tiles.tokens)
    total = gpu.zeros(shape)
    if not plan.ranking.log:
        for scores in _scores(plan, refs, keys, shifts, gpu.LOG2E):
            for score in scores:
                total = total + jnp.exp2(score)
        return total
    if plan.group == 1:
        ((score,),) = _scores(plan, refs, keys, shifts, 1.0)
        return score
    top = gpu.zeros(shape, gpu.NOTHING)
    for scores in _scores(plan, refs, keys, shifts, 1.0):
        new_top = functools.reduce(jnp.maximum, scores, top)
        total = total * jnp.exp2((top - new_top) * gpu.LOG2E)
        for score in scores:
            total = total + jnp.exp2((score - new_top) * gpu.LOG2E)
        top = new_top
    return top + jnp.log(total)


def _scores(
    plan: _Plan, refs: Any, keys: Any, shifts: list[jax.Array], unit: float
) -> Iterator[list[jax.Array]]:
    """unit * (scale * q . k - shift) of the heads of one product after the other."""
    tokens, heads = plan.tiles.tokens, plan.tiles.heads
    shape = (gpu.ROWS, tokens)
    for first in range(0, plan.group, heads):
        queries = refs.q_shared.at[refs.warpgroup, pl.ds(first * tokens, heads * tokens)]
        logits = gpu.product(keys, gpu.transposed(queries), (gpu.ROWS, heads * tokens))
        scores = []
        for head in range(heads):
            score = logits[:, head * tokens : (head + 1) * tokens] * (plan.scale * unit)
            if shifts:
                score = score - gpu.across_rows(shifts[first + head] * unit, shape)
            scores.append(score)
        yield scores


def _rank(
    plan: _Plan, run: jax.Array, columns: dict[str, jax.Array], importance: jax.Array
) -> jax.Array:
    """Importance with forced blocks above all others, and -inf for those that cannot be chosen."""
    shape, ranking = (gpu.ROWS, plan.tiles.tokens), plan.ranking
    number = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=gpu.MATRIX)
    first, last = (columns[name] - run * gpu.ROWS for name in ("first", "last"))
    rank = importance
    if ranking.floor is not None:
        rank = jnp.where(rank >= ranking.floor, rank, -jnp.inf)
    rank = jnp.where(number < gpu.across_rows(first + ranking.initial, shape), INITIAL_RANK, rank)
    rank = jnp.where(number > gpu.across_rows(last - ranking.recent, shape), RECENT_RANK, rank)
    eligible = number >= gpu.across_rows(first, shape)
    eligible &= number <= gpu.across_rows(last, shape)
    return jnp.where(eligible, rank, -jnp.inf)


def _extract(
    plan: _Plan,
    refs: Any,
    place: _Place,
    first_run: jax.Array,
    runs: jax.Array,
    best: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Merge a stage of ranks into the ``best`` (keys and block numbers, [tokens, slots] each).

    Rank s is kept in slot ``slots - 1 - s``, so that of equal ranks the higher block always lies
    further right: among the best, and in the stage, whose blocks come after all of these.
    """
    tokens, slots, stage = plan.tiles.tokens, plan.slots, plan.tiles.stage
    old_keys, old_numbers = best
    parts = [
        plgpu.load(
            refs.ranks.at[refs.warpgroup, part].transpose((1, 0)),
            layout=_TOKEN_MAJOR,
            optimized=False,
        )
        for part in range(tokens // _TOKENS)
    ]
    keys = _sortable(parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0))
    position, slot = _iota((tokens, stage)), _iota((tokens, slots))
    keys = jnp.where(position < runs * gpu.ROWS, keys, _LOWEST)
    first_visit = first_run * gpu.ROWS

    def take(s, carry):
        keys, old_keys, new_keys, new_numbers = carry
        top = jnp.maximum(jnp.max(keys, axis=1), jnp.max(old_keys, axis=1))
        at_stage = _last(keys, top, position)
        at_old = jnp.where(at_stage < 0, _last(old_keys, top, slot), -1)
        # A constant as the first choice of `where` would make the keys unsigned in Mosaic.
        keys = jnp.where(position != _of_token(at_stage, keys.shape), keys, _LOWEST)
        was = _of_token(at_old, slot.shape)
        old_keys = jnp.where(slot != was, old_keys, _LOWEST)
        visit = at_stage + first_visit
        number = jnp.where(
            at_stage < 0,
            jnp.max(jnp.where(slot == was, old_numbers, -1), axis=1),
            visit + place.skipped(visit, gpu.ROWS),
        )
        number = jnp.where(top > _NEVER, number, -1)
        here = slot == slots - 1 - s
        new_keys = jnp.where(here, _of_token(top, slot.shape), new_keys)
        new_numbers = jnp.where(here, _of_token(number, slot.shape), new_numbers)
        return keys, old_keys, new_keys, new_numbers

    carry = (keys, old_keys, *_empty(plan))
    carry = lax.fori_loop(gpu.integer(0), gpu.integer(plan.ranking.selected), take, carry)
    return carry[2], carry[3]


def _sortable(x: jax.Array) -> jax.Array:
    """int32 in the order of float32: reductions of integers are single instructions."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0.0, 0.0, x), jnp.int32)
    return bits ^ (lax.shift_right_arithmetic(bits, gpu.integer(31)) & 0x7FFFFFFF)


def _last(keys: jax.Array, top: jax.Array, position: jax.Array) -> jax.Array:
    """Last position of every token's keys that equals ``top``, -1 if none does."""
    return jnp.max(jnp.where(keys == _of_token(top, keys.shape), position, -1), axis=1)


def _of_token(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, [0]), _TOKEN_MAJOR)


def _iota(shape: tuple[int, int]) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=_TOKEN_MAJOR)


def _empty(plan: _Plan) -> tuple[jax.Array, jax.Array]:
    """Keys and numbers of no block."""
    shape = (plan.tiles.tokens, plan.slots)
    keys, numbers = (jnp.full(shape, value, jnp.int32) for value in (_LOWEST, -1))
    return plgpu.layout_cast(keys, _TOKEN_MAJOR), plgpu.layout_cast(numbers, _TOKEN_MAJOR)
