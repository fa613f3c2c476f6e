"""Selection by binary codes on TPUs: xor and popcount on vectors, levels bisected, ties cut.

Rows lie along sublanes, eight to a grid step. With many query rows they are rows of one list and
share its key codes; with few (decode) they are lists, each with key codes of its own.

Memory beyond the results: the operands arranged for the kernel, O(T J (G W + 5)) numbers; a copy of
the key codes if S is not a multiple of 1024; lists in whole lanes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int, UInt32

from kernels_pallas import tuned
from kernels_pallas.hamming import mosaic_tpu_lists as lists_of
from kernels_pallas.hamming.codes import Threshold
from kernels_pallas.hamming.cost import selection_cost
from kernels_pallas.hamming.mosaic_tpu_ranks import (
    FIELDS,
    ROWS,
    STRETCH,
    Plan,
    Row,
    codes_of,
    cut,
    distances,
    fill,
    rows_of,
)
from kernels_pallas.interpreting import interpreter
from kernels_pallas.tpu import LANES, chip_kind, round_up

__all__ = ["Tiles", "hamming_scores", "hamming_select", "hamming_threshold", "tiles_for"]

VECTOR_MEMORY = 48 * 2**20
"""What a kernel may ask for: ranks take 32 bytes a key."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of the kernel.

    Attributes:
      copied: most keys a copy brings, a multiple of 1024.
      own_rows: up to so many query rows, grid steps are made of lists instead of rows.
    """

    copied: int = 8192
    own_rows: int = ROWS - 1

    def __post_init__(self) -> None:
        if self.copied < STRETCH or self.copied % STRETCH:
            raise ValueError(f"copied={self.copied} must be a multiple of {STRETCH}")


def tiles_for(chip: str, words: int) -> Tiles:
    """Sizes by rule.

    Two buffers of eight rows of keys should cover a microsecond of HBM and stay below 4 MiB.
    """
    del chip
    return Tiles(copied=8192 if words <= 4 else 4096)


def hamming_scores(
    q_codes: UInt32[Array, "B T J G W"],
    k_codes: UInt32[Array, "B J W S"],
    *,
    bits: int,
    best_of: int = 1,
    tiles: Tiles | None = None,
) -> Int[Array, "B T J S"]:
    """Arguments and results as in the api."""
    B, T, J, G, W = q_codes.shape
    plan = _plan_for(q_codes, k_codes, bits, best_of, tiles, own=False)
    keys = _whole(plan, k_codes)
    codes = _fields(plan, q_codes, ())
    rows = codes.shape[2]
    subs, written = _sub_rows(T)
    out = pl.pallas_call(
        lambda *refs: _scores(plan, *refs),
        grid=(B * J, rows // LANES, subs, plan.padded // plan.copied),
        in_specs=[
            pl.BlockSpec((1, codes.shape[1], LANES), lambda n, t, i, c: (n, 0, t)),
            pl.BlockSpec((1, 1, W, plan.copied), lambda n, t, i, c: (n // J, n % J, 0, c)),
        ],
        out_specs=pl.BlockSpec(
            (1, ROWS, plan.copied), lambda n, t, i, c: (n, t * (LANES // ROWS) + i, c)
        ),
        out_shape=jax.ShapeDtypeStruct((B * J, written, plan.padded), jnp.int32),
        scratch_shapes=[pltpu.VMEM((plan.codes, ROWS, LANES), jnp.uint32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=selection_cost(
            scans=B * J * rows // ROWS,
            rows=B * J * T,
            keys=plan.padded,
            group=G,
            words=W,
            highest=plan.highest,
            slots=plan.padded,
        ),
        interpret=interpreter("tpu"),
        name="hamming_scores",
    )(codes, keys)
    return jnp.moveaxis(out.reshape(B, J, written, -1)[:, :, :T, : plan.keys], 2, 1)


def _scores(plan, fields, keys, out, codes):
    sub = pl.program_id(2)
    for n in range(plan.codes):
        codes[n] = codes_of(fields[0], sub, n)

    def one(u, carry):
        here = pl.ds(pl.multiple_of(u * STRETCH, STRETCH), STRETCH)
        words = [keys[0, 0, pl.ds(w, 1), here] for w in range(plan.words)]
        score = plan.highest - 2 * distances(plan, words, [codes[n] for n in range(plan.codes)])
        out[0, :, here] = jnp.concatenate([score[n] for n in range(8)], axis=1)
        return carry

    jax.lax.fori_loop(0, plan.copied // STRETCH, one, None)


def hamming_threshold(
    q_codes: UInt32[Array, "B T J G W"],
    k_codes: UInt32[Array, "B J W S"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    budget: Int[Array, "B T J"],
    *,
    bits: int,
    best_of: int = 1,
    tiles: Tiles | None = None,
) -> Threshold:
    """Arguments and results as in the api; O(T) memory.

    Raises:
      NotImplementedError: if the ranks of eight rows do not fit into vector memory.
    """
    plan = _plan_for(q_codes, k_codes, bits, best_of, tiles)
    keys = _whole(plan, k_codes)
    stop = jnp.maximum(stop, start)
    fields = _fields(plan, q_codes, _ranges(start, start, stop, stop, budget))
    out = _call(plan, fields, keys, q_codes.shape)
    return Threshold(*(_apart(plan, out[:, n], q_codes.shape) for n in range(2)))


def hamming_select(
    q_codes: UInt32[Array, "B T J G W"],
    k_codes: UInt32[Array, "B J W S"],
    first: Int[Array, "B T"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    last: Int[Array, "B T"],
    budget: Int[Array, "B T J"],
    *,
    bits: int,
    slots: int,
    best_of: int = 1,
    tiles: Tiles | None = None,
) -> Int[Array, "B T J P"]:
    """Arguments and results as in the api; O(T P) memory.

    Raises:
      NotImplementedError: if the ranks of eight rows and their lists do not fit into vector memory.
    """
    plan = _plan_for(q_codes, k_codes, bits, best_of, tiles, slots=slots)
    keys = _whole(plan, k_codes)
    fields = _fields(plan, q_codes, _ranges(first, start, stop, last, budget))
    out = _call(plan, fields, keys, q_codes.shape)
    return _apart(plan, out.reshape(*out.shape[:2], -1)[..., :slots], q_codes.shape)


def _plan_for(
    q_codes: Array,
    k_codes: Array,
    bits: int,
    best_of: int,
    tiles: Tiles | None,
    *,
    own: bool | None = None,
    slots: int = 0,
) -> Plan:
    """The plan of a call, with ``tiles``, measured ones or sizes by rule.

    ``own`` says whether rows have keys of their own, None that the tiles do.
    """
    _, T, _, G, W = q_codes.shape

    def plan_with(tiles: Tiles) -> Plan:
        mine = tiles.own_rows >= T if own is None else own
        plan = _plan(q_codes, k_codes, bits, best_of, tiles, own=mine, slots=slots)
        if own is None:
            _check_memory(plan)
        return plan

    return plan_with(
        tiles
        or tuned.choose(
            "hamming_scores" if own is not None else "hamming_select",
            chip_kind(),
            tiles_for(chip_kind(), W),
            plan_with,
            length=k_codes.shape[3],
            group=G,
            words=W,
            queries=min(T, ROWS),
        )
    )


def _plan(
    q_codes: Array,
    k_codes: Array,
    bits: int,
    best_of: int,
    tiles: Tiles,
    *,
    own: bool,
    slots: int = 0,
) -> Plan:
    B, _, J, G, W = q_codes.shape
    keys = k_codes.shape[3]
    stretches = -(-keys // STRETCH)
    most = tiles.copied // STRETCH
    # The largest copy that needs no more padding than whole stretches do.
    copied = max(n for n in range(1, most + 1) if stretches % n == 0)
    copied = most if copied < min(most, stretches) // 2 else copied
    return Plan(
        own=own,
        group=G,
        words=W,
        best_of=best_of,
        highest=G // best_of * bits,
        keys=keys,
        padded=round_up(stretches, copied) * STRETCH,
        copied=copied * STRETCH,
        batch=B,
        lists=J,
        slots=round_up(slots, LANES),
    )


def _whole(plan: Plan, k_codes: UInt32[Array, "B J W S"]) -> UInt32[Array, "B J W S2"]:
    """Key codes in whole copies. Nothing is done to those that fit: whatever touches them copies
    them.
    """
    added = ((0, 0), (0, 0), (0, 0), (0, plan.padded - plan.keys))
    return jnp.pad(k_codes, added) if plan.padded > plan.keys else k_codes


def _ranges(first, start, stop, last, budget) -> tuple[Array, ...]:
    """The numbers of every row, [B, T] or [B, T, J], the forced keys among the wanted ones."""
    count = stop - start
    forced = (last - first - count)[:, :, None]
    return first, start, stop, last, forced + jnp.clip(budget, 0, count[:, :, None])


def _fields(plan: Plan, q_codes: Array, ranges: tuple[Array, ...]) -> Int[Array, "groups F rows"]:
    """Ranges and codes with the rows along the lanes, rows of a grid row in whole lanes."""
    B, T, J, _, _ = q_codes.shape
    codes = jax.lax.bitcast_convert_type(q_codes, jnp.int32).reshape(B, T, J, plan.codes)
    numbers = [
        jnp.broadcast_to(x[:, :, None] if x.ndim == 2 else x, (B, T, J))[..., None] for x in ranges
    ]
    x = jnp.concatenate([*numbers, codes], axis=3)
    if plan.own:
        x = jnp.transpose(x, (1, 3, 0, 2)).reshape(T, -1, B * J)
    else:
        x = jnp.transpose(x, (0, 2, 3, 1)).reshape(B * J, -1, T)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % LANES)))


def _apart(plan: Plan, x: Int[Array, "groups rows *rest"], shape: Any) -> Int[Array, "B T J *rest"]:
    """Inverse of the arrangement of :func:`_fields`."""
    B, T, J = shape[:3]
    rest = x.shape[2:]
    if plan.own:
        return jnp.moveaxis(x[:, : B * J].reshape(T, B, J, *rest), 0, 1)
    return jnp.moveaxis(x[:, :T].reshape(B, J, T, *rest), 2, 1)


def _call(plan: Plan, fields: Int[Array, "groups F rows"], keys: Array, shape: Any) -> Array:
    """Thresholds [groups, 8, rows] (level, cutoff, nothing) or lists [groups, rows, P/128, 128]."""
    groups, width, rows = fields.shape
    B, T, J = shape[:3]
    real = B * J if plan.own else T
    subs, written = _sub_rows(real)
    slots = plan.slots // LANES
    counters = lists_of.counter_rows(plan.slots) + 1
    scratch = [
        pltpu.VMEM((plan.chunks, ROWS, LANES), jnp.int32),
        pltpu.VMEM((plan.codes, ROWS, LANES), jnp.uint32),
        pltpu.VMEM((2, plan.words, ROWS if plan.own else 1, plan.copied), jnp.uint32),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.VMEM((8, ROWS, LANES), jnp.int32),
    ]
    kernel: Any = _select if slots else _threshold
    out_shape: tuple[int, ...]
    if slots:
        out_spec = pl.BlockSpec(
            (1, ROWS, slots, LANES), lambda n, t, i: (n, t * (LANES // ROWS) + i, 0, 0)
        )
        out_shape = (groups, written, slots, LANES)
        scratch += [
            pltpu.VMEM((plan.chunks, LANES), jnp.int32),
            pltpu.VMEM((counters, LANES), jnp.int32),
            pltpu.SMEM((counters, LANES), jnp.int32),
            pltpu.SemaphoreType.DMA,
        ]
    else:
        out_spec = pl.BlockSpec((1, ROWS, LANES), lambda n, t, i: (n, 0, t))
        out_shape = (groups, ROWS, rows)
    return pl.pallas_call(
        lambda *refs: kernel(plan, *refs),
        grid=(groups, rows // LANES, subs),
        in_specs=[
            pl.BlockSpec((1, width, LANES), lambda n, t, i: (n, 0, t)),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=out_spec,
        out_shape=jax.ShapeDtypeStruct(out_shape, jnp.int32),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VECTOR_MEMORY,
        ),
        cost_estimate=selection_cost(
            scans=groups * real if plan.own else groups * -(-real // ROWS),
            rows=groups * real,
            keys=plan.padded,
            group=plan.group,
            words=plan.words,
            highest=plan.highest,
            slots=plan.slots or 2,
        ),
        interpret=interpreter("tpu"),
        name="hamming_select" if slots else "hamming_threshold",
    )(fields, keys)


def _sub_rows(rows: int) -> tuple[int, int]:
    """Grid steps to 128 rows, and the rows they write in all."""
    if rows > LANES:
        return LANES // ROWS, round_up(rows, LANES)
    return -(-rows // ROWS), round_up(rows, ROWS)


def _check_memory(plan: Plan) -> None:
    ranks = plan.chunks * ROWS * LANES
    buffers = 2 * plan.words * ROWS * plan.copied
    lists = plan.chunks * LANES + 2 * ROWS * round_up(plan.slots // LANES, 8) * LANES
    needed = 4 * (ranks + buffers + (lists if plan.slots else 0)) + 2**21
    if needed > VECTOR_MEMORY:
        raise NotImplementedError(
            f"selection by codes on TPUs keeps the ranks of S={plan.keys} keys and P={plan.slots} "
            f"slots of eight rows in vector memory: {needed / 2**20:.0f} MiB of "
            f"{VECTOR_MEMORY // 2**20}; use implementation='xla'"
        )


def _ranked(plan, fields, keys, ranks, codes, buffer, arrived, ties):
    """Rows, the filled stretches, and the cut of one grid step."""
    tile, sub = pl.program_id(1), pl.program_id(2)
    row = Row(*(rows_of(fields[0], sub, n) for n in range(FIELDS)))
    for n in range(plan.codes):
        codes[n] = codes_of(fields[0], sub, FIELDS + n)
    low, high = fill(plan, row, codes, keys, tile, sub, ranks, buffer, arrived)
    worst, cutoff = cut(plan, row.wanted, low, high, ranks, ties)
    return row, low, high, worst, cutoff


def _threshold(plan, fields, keys, out, ranks, codes, buffer, arrived, ties):
    _, _, _, worst, cutoff = _ranked(plan, fields, keys, ranks, codes, buffer, arrived, ties)
    sub = pl.program_id(2)
    empty = worst == 0
    level = jnp.where(empty, plan.highest, plan.highest - 2 * (worst - 1))
    cutoff = jnp.where(empty, plan.keys, cutoff)
    lane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)
    line = jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 0)
    mine = lane == sub * ROWS + line
    level, cutoff = (jnp.sum(jnp.where(mine, x, 0), axis=0, keepdims=True) for x in (level, cutoff))
    placed = jnp.where(line == 0, level, jnp.where(line == 1, cutoff, 0))
    # Eight of the 128 rows that lie along the lanes; the others are done by other grid steps.
    out[0] = jnp.where(lane // ROWS == sub, placed, out[0])


def _select(
    plan, fields, keys, out, ranks, codes, buffer, arrived, ties, table, counters, scalars, moved
):
    row, low, high, worst, cutoff = _ranked(plan, fields, keys, ranks, codes, buffer, arrived, ties)
    lists_of.mark(row.wanted, worst, cutoff, low, high, ranks)
    lists_of.compact(plan, low, high, ranks, table, counters, scalars, moved, out)
