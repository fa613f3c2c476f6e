"""Mosaic TPU: ranks of all keys of eight rows in vector memory, and the cut at the wanted number.

A grid step is eight rows (sublanes). Packed key codes stream from HBM; a key's rank is 0 if it is
forced, 1 + its summed Hamming distance if it is a candidate, and more than any distance if it is
neither. Ranks stay in vector memory, 32 bytes a key, where the worst wanted rank is bisected by
counting; ties at that rank are cut in one pass from the most recent key backwards, which finds the
stretch of 1024 keys in which the last wanted tie lies, and a bisection inside it.

Ranks lie as [128-key chunk, row, lane]: a vector register holds one chunk of all eight rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Int, UInt32

from kernels_pallas.tpu import LANES, start, stream

__all__ = ["FIELDS", "ROWS", "STRETCH", "Plan", "Row", "codes_of", "cut", "fill", "rows_of"]

ROWS = 8
"""Rows of a grid step: the sublanes of a register."""

STRETCH = 8 * LANES
"""Keys handled by one step of the inner loops: eight registers."""

FIELDS = 5
"""Numbers of a row ahead of its codes: first, start, stop, last, wanted."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes.

    Attributes:
      own: every row has keys of its own (rows are lists); otherwise all rows share a list's.
      group, words: G and W.
      best_of: parts of the G codes, of which the nearest counts.
      highest: G / best_of * bits, the largest distance.
      keys: S.
      padded: S in whole copies.
      copied: keys a copy brings.
      batch, lists: B and J.
      slots: P in whole lanes, 0 without lists.
    """

    own: bool
    group: int
    words: int
    best_of: int
    highest: int
    keys: int
    padded: int
    copied: int
    batch: int
    lists: int
    slots: int = 0

    @property
    def codes(self) -> int:
        """Query words of a row."""
        return self.group * self.words

    @property
    def chunks(self) -> int:
        """Chunks of 128 keys, in whole blocks of 128 chunks where lists are made."""
        chunks = self.padded // LANES
        return -(-chunks // LANES) * LANES if self.slots else chunks


class Row(NamedTuple):
    """What eight rows bring, each number repeated along the lanes [8, 128]."""

    first: Any
    start: Any
    stop: Any
    last: Any
    wanted: Any


def rows_of(fields: Int[Array, "F 128"], at: Any, which: int) -> Int[Array, "8 128"]:
    """Numbers of rows 8 at .. 8 at + 7 of the 128 that lie along the lanes, one a sublane."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)
    row = jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 0)
    line = jnp.broadcast_to(fields[which : which + 1], (ROWS, LANES))
    mine = jnp.where(lane == at * ROWS + row, line, 0)
    return jnp.broadcast_to(jnp.sum(mine, axis=1, keepdims=True), (ROWS, LANES))


def codes_of(fields: Int[Array, "F 128"], at: Any, which: int) -> UInt32[Array, "8 128"]:
    """:func:`rows_of` for a word of the rows' codes."""
    return jax.lax.bitcast_convert_type(rows_of(fields, at, which), jnp.uint32)


def positions(stretch: Any) -> Int[Array, "8 1 128"]:
    """Key positions of a stretch, in the layout of ranks."""
    chunk = jax.lax.broadcasted_iota(jnp.int32, (8, 1, LANES), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, (8, 1, LANES), 2)
    return stretch * STRETCH + chunk * LANES + lane


def distances(
    plan: Plan, words: list[UInt32[Array, "R 1024"]], codes: list[UInt32[Array, "8 128"]]
) -> Int[Array, "8 8 128"]:
    """Distances of a stretch, summed over a part's codes, the least of the parts; R is 8, or 1 if
    the rows share their keys.
    """
    totals = [jnp.zeros((8, ROWS, LANES), jnp.int32)] * plan.best_of
    for w, word in enumerate(words):
        parts = [word[:, n * LANES : (n + 1) * LANES] for n in range(8)]
        spread = jnp.broadcast_to(jnp.stack(parts), (8, ROWS, LANES))
        for g in range(plan.group):
            differing = spread ^ codes[g * plan.words + w][None]
            part = g * plan.best_of // plan.group
            totals[part] += jax.lax.population_count(differing).astype(jnp.int32)
    return functools.reduce(jnp.minimum, totals)


def fill(plan, row, codes, keys, tile, sub, ranks, buffer, arrived):
    """Rank every key between the first and the last one any row may list.

    Returns the stretches [low, high) that were filled; empty ranges give low == high.
    """
    listed = row.last > row.first
    low = jnp.min(jnp.where(listed, row.first, plan.padded)) // plan.copied
    high = (jnp.max(jnp.where(listed, row.last, 0)) + plan.copied - 1) // plan.copied
    low = jnp.minimum(low, high)

    wanted = tile * LANES + sub * ROWS if plan.own else pl.program_id(0)
    # Rows past the last list read that list again.
    sources = [jnp.minimum(wanted + r, plan.batch * plan.lists - 1) for r in range(buffer.shape[2])]

    def copies(i, slot):
        here = pl.ds(pl.multiple_of((low + i) * plan.copied, plan.copied), plan.copied)
        return [
            pltpu.make_async_copy(
                keys.at[source // plan.lists, source % plan.lists, w, here],
                buffer.at[slot, w, r],
                arrived.at[slot],
            )
            for r, source in enumerate(sources)
            for w in range(plan.words)
        ]

    stretches = plan.copied // STRETCH

    def rank(i, slot):
        def one(u, carry):
            here = pl.ds(pl.multiple_of(u * STRETCH, STRETCH), STRETCH)
            words = [buffer[slot, w, :, here] for w in range(plan.words)]
            stretch = (low + i) * stretches + u
            s = positions(stretch)
            value = distances(plan, words, [codes[n] for n in range(plan.codes)]) + 1
            value = jnp.where((s >= row.start[None]) & (s < row.stop[None]), value, 0)
            inside = (s >= row.first[None]) & (s < row.last[None])
            value = jnp.where(inside, value, plan.highest + 2)
            ranks[pl.ds(pl.multiple_of(stretch * 8, 8), 8)] = value
            return carry

        jax.lax.fori_loop(0, stretches, one, None)

    @pl.when(low < high)
    def _():
        start(copies(0, 0))

    stream(high - low, copies=copies, compute=rank)
    return low * stretches, high * stretches


def _counted(mask: Bool[Array, "8 8 128"]) -> Int[Array, "8 128"]:
    """Set entries of every row, by lane."""
    return jnp.sum(jnp.where(mask, 1, 0), axis=0)


def _along(x: Int[Array, "8 128"]) -> Int[Array, "8 128"]:
    """The sum of a row's lanes, in all of them."""
    return jnp.broadcast_to(jnp.sum(x, axis=1, keepdims=True), x.shape)


def _load(ranks, stretch):
    return ranks[pl.ds(pl.multiple_of(stretch * 8, 8), 8)]


def cut(
    plan: Plan, wanted: Int[Array, "8 128"], low: Any, high: Any, ranks: Any, ties: Any
) -> tuple[Int[Array, "8 128"], Int[Array, "8 128"]]:
    """The rank of the worst wanted key, and the position from which keys of that rank are taken.

    Rank 0 where nothing is wanted. ``ties`` is scratch of one stretch.
    """

    def halve(_, carry):
        bottom, top, better = carry
        middle = (bottom + top) >> 1

        def count(u, total):
            return total + _counted(_load(ranks, u) <= middle[None])

        found = _along(jax.lax.fori_loop(low, high, count, jnp.zeros_like(wanted)))
        enough = found >= wanted
        return (
            jnp.where(enough, bottom, jnp.minimum(middle + 1, top)),
            jnp.where(enough, middle, top),
            jnp.where(enough, better, found),
        )

    zero = jnp.zeros_like(wanted)
    # Invariant: at least `wanted` keys rank up to `top`; `better` keys rank below `bottom`.
    steps = math.ceil(math.log2(plan.highest + 2))
    initial = (zero, jnp.full_like(wanted, plan.highest + 1), zero)
    _, worst, better = jax.lax.fori_loop(0, steps, halve, initial)
    needed = wanted - better

    def backwards(i, carry):
        passed, at, rest = carry
        u = high - 1 - i
        tied = jnp.where(_load(ranks, u) == worst[None], 1, 0)
        after = passed + _along(jnp.sum(tied, axis=0))
        here = (passed < needed) & (after >= needed)
        ties[...] = jnp.where(here[None], tied, ties[...])
        return after, jnp.where(here, u, at), jnp.where(here, needed - passed, rest)

    ties[...] = jnp.zeros(ties.shape, jnp.int32)
    _, at, rest = jax.lax.fori_loop(0, high - low, backwards, (zero, zero, zero))
    tied, s = ties[...], positions(0)

    def narrow(_, carry):
        # The cut-off is the last place with at least `rest` ties from there on.
        bottom, top = carry
        middle = (bottom + top + 1) >> 1
        found = _along(jnp.sum(jnp.where(s >= middle[None], tied, 0), axis=0))
        enough = found >= rest
        return jnp.where(enough, middle, bottom), jnp.where(enough, top, middle - 1)

    bounds = (zero, jnp.full_like(wanted, STRETCH - 1))
    place, _ = jax.lax.fori_loop(0, int(math.log2(STRETCH)), narrow, bounds)
    return worst, at * STRETCH + place
