"""Mosaic GPU kernels of selection by codes: distances, and histograms of them (Hopper).

G query codes are one weighted count of bits (:func:`kernels_pallas.hamming.codes.sum_codes`).
Mosaic GPU has no population count: bits are added up in fields of a word. A histogram is kept by
every lane in bytes, four levels to a word.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int, UInt32

from kernels_pallas import tuned
from kernels_pallas.gpu import chip_kind
from kernels_pallas.hamming.codes import mask_count, sum_codes
from kernels_pallas.interpreting import interpreter

__all__ = ["Plan", "Tiles", "distances", "plan_for", "recount", "scores", "tables_of"]

_MOST_LEVELS = 4096
_MOST_CODES = 63
_MOST_COUNTED = 255
_MANY = 8  # query tokens from which on a call is not one of decoding


@dataclass(frozen=True)
class Tiles:
    """How the keys of a row are cut: vectors of ``lanes``, ``unroll`` of them a step, and programs.

    The loads of a step are all in flight before the first is used. ``rank_elements`` distances of
    two bytes each are in memory at a time (32 MB, which stay in the second-level cache), or those
    of one query of every sequence, if that is more.
    """

    lanes: int = 128
    unroll: int = 4
    steps: int = 16
    rank_elements: int = 2**24

    def __post_init__(self) -> None:
        if self.lanes % 128 or not 1 <= self.unroll * self.steps <= _MOST_COUNTED:
            raise ValueError(
                f"{self}: lanes must be a multiple of 128 and unroll * steps at most "
                f"{_MOST_COUNTED}, since every lane counts in bytes"
            )

    @property
    def step(self) -> int:
        """Keys of a step."""
        return self.lanes * self.unroll


@dataclass(frozen=True)
class Plan:
    """Static sizes of a call.

    A level (distance) is found in two histograms: of distances >> ``shift``, then of the distances
    that share one such bucket.
    """

    queries: int
    lists: int
    group: int
    words: int
    keys: int
    bits: int
    best_of: int
    tiles: Tiles

    @property
    def summed(self) -> int:
        """Codes of a part, whose distances are summed."""
        return self.group // self.best_of

    @property
    def highest(self) -> int:
        """The largest distance."""
        return self.summed * self.bits

    @property
    def planes(self) -> int:
        """Masks of a part's summed codes."""
        return mask_count(self.summed)

    @property
    def part(self) -> int:
        """Numbers of a part in a row's table."""
        return self.words * (1 + self.planes) + 1

    @property
    def shift(self) -> int:
        """Digits of a distance that the second histogram resolves."""
        return (self.highest.bit_length() + 1) // 2

    @property
    def coarse(self) -> int:
        """Words of the first histogram, four buckets each."""
        return -(-((self.highest >> self.shift) + 1) // 4)

    @property
    def fine(self) -> int:
        """Words of the second histogram."""
        return -(-(2**self.shift) // 4)

    @property
    def chunk(self) -> int:
        """Keys of a program."""
        return self.tiles.step * min(self.tiles.steps, -(-self.keys // self.tiles.step))

    @property
    def chunks(self) -> int:
        """Programs of a row."""
        return -(-self.keys // self.chunk)


def plan_for(
    q_codes: UInt32[Array, "B T J G W"],
    k_codes: UInt32[Array, "B J W S"],
    bits: int,
    best_of: int = 1,
    tiles: Tiles | None = None,
) -> Plan:
    """The plan of a call, with ``tiles``, measured ones or sizes by rule.

    Raises:
      NotImplementedError: for groups or codes beyond what bytes and two histograms hold.
    """
    _, queries, lists, group, words = q_codes.shape
    summed = group // best_of
    if summed > _MOST_CODES or summed * bits >= _MOST_LEVELS:
        raise NotImplementedError(
            f"hamming: a sum of {summed} codes of {bits} bits exceeds {_MOST_CODES} codes or "
            f"{_MOST_LEVELS - 1} levels; use implementation='xla'"
        )
    keys = k_codes.shape[3]
    tiles = tiles or tuned.choose(
        "hamming_select",
        chip_kind(),
        Tiles(),
        _check,
        length=keys,
        group=group,
        words=words,
        queries=min(queries, _MANY),
    )
    return Plan(queries, lists, group, words, keys, bits, best_of, tiles)


def _check(tiles: Tiles) -> None:
    if min(tiles.lanes, tiles.unroll, tiles.steps, tiles.rank_elements) < 1:
        raise ValueError(f"{tiles}: sizes must be positive")


def tables_of(
    q_codes: UInt32[Array, "B T J G W"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    plan: Plan,
) -> Int[Array, "rows columns"]:
    """What a program knows of its row (b, t, j), as int32.

    For each part W majority words, ``planes`` times W masks and the constant of the distance; then
    start and stop.
    """
    columns = []
    for part in jnp.split(q_codes, plan.best_of, axis=3):
        majority, masks, constant = sum_codes(part, plan.bits)
        words = jax.lax.bitcast_convert_type(jnp.concatenate([majority, *masks], -1), jnp.int32)
        columns += [words, constant[..., None]]
    ends = (jnp.broadcast_to(x[:, :, None, None], columns[-1].shape) for x in (start, stop))
    table = jnp.concatenate([*columns, *ends], axis=-1)
    return table.reshape(-1, table.shape[-1])


def distances(
    table: Int[Array, "rows columns"], k_codes: UInt32[Array, "B J W S"], plan: Plan
) -> tuple[Array, Array]:
    """Distances uint16 [rows, keys] and their first histogram [rows, chunks, 4 * coarse].

    Distances outside a row's candidates are undefined, and so are those past the keys.
    """

    def step(refs, first, counts):
        for at, words in _loaded(refs, first, plan):
            far = _distance(words, refs, plan)
            refs.ranks[refs.row, pl.ds(at, plan.tiles.lanes)] = far.astype(jnp.uint16)
            counts = _add(counts, _shifted(far, plan.shift), _candidates(refs, at, plan))
        return counts

    ranks, counts = _run(
        _counting(step, plan.coarse, plan),
        name="hamming_distances",
        plan=plan,
        operands={"table": table, "keys": _padded(k_codes, plan)},
        outputs={"ranks": _ranks_type(table, plan), "counts": _counts(table, plan.coarse, plan)},
    )
    return ranks, _levels(counts)


def recount(
    table: Int[Array, "rows columns"],
    ranks: Array,
    bucket: Int[Array, " rows"],
    plan: Plan,
) -> Int[Array, "rows chunks levels"]:
    """The second histogram: of the distances whose bucket of the first is ``bucket``."""

    def step(refs, first, counts):
        places = [first + i * plan.tiles.lanes for i in range(plan.tiles.unroll)]
        ranks = [refs.ranks[refs.row, pl.ds(at, plan.tiles.lanes)] for at in places]
        for at, far in zip(places, ranks, strict=True):
            within = far.astype(jnp.int32) - refs.base[refs.row]
            counts = _add(counts, within, _candidates(refs, at, plan))
        return counts

    (counts,) = _run(
        _counting(step, plan.fine, plan),
        name="hamming_levels",
        plan=plan,
        operands={"table": table, "ranks": ranks, "base": bucket << plan.shift},
        outputs={"counts": _counts(table, plan.fine, plan)},
    )
    return _levels(counts)[:, :, : 2**plan.shift]


def scores(
    table: Int[Array, "rows columns"], k_codes: UInt32[Array, "B J W S"], plan: Plan
) -> Int[Array, "rows S"]:
    """Scores of all keys, int32."""

    def body(refs):
        def step(number, _):
            first = refs.chunk * plan.chunk + number * plan.tiles.step
            for at, words in _loaded(refs, first, plan):
                far = _distance(words, refs, plan)
                refs.scores[refs.row, pl.ds(at, plan.tiles.lanes)] = plan.highest - (far + far)

        within = jnp.minimum(_whole(plan) - refs.chunk * plan.chunk, plan.chunk)
        lax.fori_loop(jnp.int32(0), lax.div(within, jnp.int32(plan.tiles.step)), step, None)

    (result,) = _run(
        body,
        name="hamming_scores",
        plan=plan,
        operands={"table": table, "keys": _padded(k_codes, plan)},
        outputs={"scores": jax.ShapeDtypeStruct((table.shape[0], _whole(plan)), jnp.int32)},
    )
    return result[:, : plan.keys]


def _whole(plan: Plan) -> int:
    """Keys rounded up to whole steps."""
    return -(-plan.keys // plan.tiles.step) * plan.tiles.step


def _padded(k_codes: UInt32[Array, "B J W S"], plan: Plan) -> Int[Array, "BJ W S2"]:
    """Codes as int32 in whole steps; a copy only where S is none: vectors must be aligned."""
    keys = jax.lax.bitcast_convert_type(k_codes, jnp.int32)
    keys = keys.reshape(-1, plan.words, plan.keys)
    return jnp.pad(keys, ((0, 0), (0, 0), (0, _whole(plan) - plan.keys)))


def _ranks_type(table: Array, plan: Plan) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((table.shape[0], plan.chunks * plan.chunk), jnp.uint16)


def _counts(table: Array, words: int, plan: Plan) -> jax.ShapeDtypeStruct:
    shape = (table.shape[0], plan.chunks, words, plan.tiles.lanes)
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _levels(counts: Int[Array, "rows chunks words lanes"]) -> Int[Array, "rows chunks levels"]:
    """Bytes of lanes as one count a level."""
    place = 8 * jnp.arange(4, dtype=jnp.int32)[None, None, None, :, None]
    bytes_ = (counts[:, :, :, None, :] >> place) & 255
    levels = jnp.sum(bytes_, axis=-1, dtype=jnp.int32)
    return levels.reshape(*levels.shape[:2], -1)


def _counting(
    step: Callable[[Any, Any, Any], Any], words: int, plan: Plan
) -> Callable[[Any], None]:
    """The body that counts over the steps of a chunk that hold candidates."""
    size = plan.tiles.step

    def body(refs):
        begin = refs.chunk * plan.chunk
        low = lax.div(jnp.clip(refs.start - begin, 0, plan.chunk), jnp.int32(size))
        high = lax.div(jnp.clip(refs.stop - begin, 0, plan.chunk) + (size - 1), jnp.int32(size))
        zero = plgpu.layout_cast(jnp.zeros((plan.tiles.lanes,), jnp.int32), _layout(plan))

        def visit(number, counts):
            return step(refs, begin + number * size, counts)

        counts = lax.fori_loop(low, jnp.maximum(low, high), visit, (zero,) * words)
        for word, count in enumerate(counts):
            refs.counts[refs.row, refs.chunk, word] = count

    return body


def _layout(plan: Plan) -> Any:
    """Lanes over the threads of a warpgroup, neighbours together."""
    return plgpu.Layout.WG_STRIDED((plan.tiles.lanes,), plan.tiles.lanes // 128)


def _candidates(refs: Any, first: jax.Array, plan: Plan) -> jax.Array:
    layout = _layout(plan)
    s = first + plgpu.broadcasted_iota(jnp.int32, (plan.tiles.lanes,), 0, layout=layout)
    return (s >= refs.start) & (s < refs.stop)


def _add(counts: tuple[jax.Array, ...], bucket: jax.Array, counted: jax.Array) -> Any:
    """One more in the byte of its bucket, where there is such a bucket."""
    one = lax.shift_left(jnp.full_like(bucket, 1), (bucket & 3) * 8)
    word = jnp.where(counted, _shifted(bucket, 2), -1)
    return tuple(count + jnp.where(word == n, one, 0) for n, count in enumerate(counts))


def _loaded(refs: Any, first: jax.Array, plan: Plan) -> list[tuple[jax.Array, list[jax.Array]]]:
    """(first key, words of the codes) of every vector of a step."""
    lanes = plan.tiles.lanes
    places = [first + i * lanes for i in range(plan.tiles.unroll)]
    return [
        (at, [refs.keys[refs.codes, w, pl.ds(at, lanes)] for w in range(plan.words)])
        for at in places
    ]


def _distance(words: list[jax.Array], refs: Any, plan: Plan) -> jax.Array:
    """Distances of keys: the least of the parts', each summed by its formula."""
    return functools.reduce(
        jnp.minimum,
        (_summed(words, refs.known[n * plan.part :], plan) for n in range(plan.best_of)),
    )


def _summed(words: list[jax.Array], known: list[Any], plan: Plan) -> jax.Array:
    """Distances to the codes of a part, summed; see :class:`SummedCodes`."""
    total = known[plan.part - 1]
    for w, key in enumerate(words):
        x = key ^ known[w]
        weighted = None
        for plane in reversed(range(plan.planes)):
            ones = _ones(x & known[plan.words * (1 + plane) + w])
            weighted = ones if weighted is None else weighted + weighted + ones
        if weighted is not None:
            folded = _folded(weighted)
            total = total + (folded + folded)
        if plan.summed % 2:
            total = total + _folded(_ones(x))
    return total


def _ones(x: jax.Array) -> jax.Array:
    """Set bits of each byte, in that byte."""
    x = x - (_shifted(x, 1) & 0x55555555)
    x = (x & 0x33333333) + (_shifted(x, 2) & 0x33333333)
    return (x + _shifted(x, 4)) & 0x0F0F0F0F


def _folded(x: jax.Array) -> jax.Array:
    """The sum of the bytes."""
    x = (x & 0x00FF00FF) + (_shifted(x, 8) & 0x00FF00FF)
    return (x + _shifted(x, 16)) & 0xFFFF


def _shifted(x: jax.Array, by: int) -> jax.Array:
    return lax.shift_right_logical(x, jnp.full_like(x, by))


def _run(
    body: Callable[[Any], None],
    *,
    name: str,
    plan: Plan,
    operands: Mapping[str, jax.Array],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
) -> tuple[jax.Array, ...]:
    """Run ``body(refs)`` in a warpgroup for every chunk of every row."""
    names = [*operands, *outputs]
    rows = operands["table"].shape[0]

    def kernel(*positional):
        refs = types.SimpleNamespace(**dict(zip(names, positional, strict=True)))
        program = lax.axis_index("program")
        refs.row = lax.div(program, jnp.int32(plan.chunks))
        refs.chunk = lax.rem(program, jnp.int32(plan.chunks))
        sequence = lax.div(refs.row, jnp.int32(plan.queries * plan.lists))
        refs.codes = sequence * plan.lists + lax.rem(refs.row, jnp.int32(plan.lists))
        ends = plan.best_of * plan.part
        # Read once: stores in a loop keep the compiler from doing so.
        refs.known = [refs.table[refs.row, n] for n in range(ends)] if "keys" in operands else []
        refs.start, refs.stop = refs.table[refs.row, ends], refs.table[refs.row, ends + 1]
        body(refs)

    kernel.__name__ = name
    return plgpu.kernel(
        kernel,
        out_type=tuple(outputs.values()),
        grid=(rows * plan.chunks,),
        grid_names=("program",),
        # The other semantics search for layouts, which takes long where all follow from the loads.
        # No kernel reads what it writes: without barriers around every store.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        interpret=interpreter("gpu"),
    )(*operands.values())
