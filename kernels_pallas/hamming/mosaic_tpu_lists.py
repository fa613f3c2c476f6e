"""Mosaic TPU: members marked in vector memory become ascending lists of positions.

Nothing is sorted or scattered. Chunks of 128 keys become four words of bits and a running count
(products with constant matrices: the tensor unit adds small integers exactly). A register of 128
slots then looks up its chunks: those eight at a time whose counts enclose some of its slots, a
range that moves on with the slots, so that work follows S/128 + P. Inside its chunk a slot's key is
found by bisecting popcounts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from kernels_pallas.hamming.mosaic_tpu_ranks import ROWS, Plan, positions
from kernels_pallas.tpu import LANES

__all__ = ["compact", "counter_rows", "mark"]

_WORDS = LANES // 32
_HEIGHT = 8  # chunks of a register
_INCLUDED, _BEFORE = _WORDS, _WORDS + 1  # lanes of a chunk's running counts


def counter_rows(slots: int) -> int:
    """Rows of 128 numbers: the first register of chunks of every 128 slots, and one number more."""
    return slots // LANES // LANES + 1


def mark(
    wanted: Int[Array, "8 128"],
    worst: Int[Array, "8 128"],
    cutoff: Int[Array, "8 128"],
    low: Any,
    high: Any,
    ranks: Any,
) -> None:
    """Replace ranks by 1 for members of a row's list and 0 for others."""

    def one(u, carry):
        here = pl.ds(pl.multiple_of(u * 8, 8), 8)
        rank, s = ranks[here], positions(u)
        late = (rank == worst[None]) & (s >= cutoff[None])
        member = ((rank < worst[None]) | late) & (wanted > 0)[None]
        ranks[here] = jnp.where(member, 1, 0)
        return carry

    jax.lax.fori_loop(low, high, one, None)


def compact(plan: Plan, low, high, ranks, table, counters, scalars, arrived, out) -> None:
    """Write the members of all eight rows to ``out`` [1, 8, P/128, 128]."""
    out[...] = jnp.full(out.shape, -1, jnp.int32)

    def one(r, carry):
        _tabulate(plan, r, low, high, ranks, table, counters)
        copy = pltpu.make_async_copy(counters, scalars, arrived)
        copy.start()
        copy.wait()
        _write(plan, r, high, table, scalars, out)
        return carry

    jax.lax.fori_loop(0, ROWS, one, None)


def _tabulate(plan, r, low, high, ranks, table, counters):
    """Words and running counts of one row's chunks; per 128 slots the register they begin in."""
    line = jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1)
    bit = line - 32 * lane
    lower, upper = (_powers(bit - 16 * half) for half in range(2))
    ones = jnp.ones((LANES, LANES), jnp.bfloat16)
    until = _narrow(lane <= line)
    first, last = low * 8, high * 8
    begin, end = first // LANES, (last + LANES - 1) // LANES

    def product(a, b):
        return jnp.dot(a, b, preferred_element_type=jnp.float32)

    def block(b, carry):
        total, passed = carry
        chunk = b * LANES + line
        here = pl.ds(pl.multiple_of(b * LANES, LANES), LANES)
        member = _narrow((ranks[here, r, :] > 0) & (chunk >= first) & (chunk < last))
        words = product(member, lower).astype(jnp.int32)
        words = words | (product(member, upper).astype(jnp.int32) << 16)
        count = product(member, ones)
        running = product(until, count.astype(jnp.bfloat16)).astype(jnp.int32) + total
        before = running - count.astype(jnp.int32)
        counts = jnp.where(lane == _INCLUDED, running, before)
        table[here] = jnp.where(lane < _WORDS, words, counts)
        # Registers that end before slot 128 t, for 128 values of t a row of counters.
        ended = [
            jnp.sum(
                jnp.where((line % _HEIGHT == _HEIGHT - 1) & (running <= t * LANES), 1, 0),
                axis=0,
                keepdims=True,
            )
            for t in (n * LANES + lane for n in range(len(passed)))
        ]
        passed = tuple(x + y for x, y in zip(passed, ended, strict=True))
        return running[LANES - 1 :], passed

    # What lies before the first block counts as ended.
    skipped = jnp.full((1, LANES), 0, jnp.int32) + begin * (LANES // _HEIGHT)
    passed = (skipped,) * counter_rows(plan.slots)
    total, passed = jax.lax.fori_loop(begin, end, block, (jnp.zeros_like(skipped), passed))
    for n, x in enumerate(passed):
        counters[pl.ds(n, 1)] = x
    counters[pl.ds(len(passed), 1)] = total


def _narrow(mask):
    return jnp.where(mask, 1.0, 0.0).astype(jnp.bfloat16)


def _powers(bit: Int[Array, "128 128"]) -> Array:
    """2^bit where 0 <= bit < 16, in the first lanes; 0 elsewhere."""
    lane = jax.lax.broadcasted_iota(jnp.int32, bit.shape, 1)
    inside = (bit >= 0) & (bit < 16) & (lane < _WORDS)
    return jnp.where(inside, 1 << jnp.clip(bit, 0, 15), 0).astype(jnp.float32).astype(jnp.bfloat16)


def _write(plan, r, high, table, scalars, out):
    """Look up the keys of one row, 128 slots at a time."""
    total = scalars[counter_rows(plan.slots), 0]
    lane = jax.lax.broadcasted_iota(jnp.int32, (_HEIGHT, LANES), 1)
    height = jax.lax.broadcasted_iota(jnp.int32, (_HEIGHT, LANES), 0)

    def some(t, carry):
        slot = t * LANES + lane

        def look(g, found):
            chunks = table[pl.ds(pl.multiple_of(g * _HEIGHT, _HEIGHT), _HEIGHT)]
            after, before = (chunks[:, i : i + 1] for i in (_INCLUDED, _BEFORE))
            here = (before <= slot) & (slot < after)
            values = [chunks[:, i : i + 1] for i in range(_WORDS)]
            values += [before, g * _HEIGHT + height]
            return tuple(x + jnp.where(here, y, 0) for x, y in zip(found, values, strict=True))

        nothing = (jnp.zeros((_HEIGHT, LANES), jnp.int32),) * (_WORDS + 2)
        first = scalars[t // LANES, t % LANES]
        last = jnp.minimum(scalars[(t + 1) // LANES, (t + 1) % LANES] + 1, high)
        found = jax.lax.fori_loop(first, last, look, nothing)
        *words, before, chunk = (jnp.sum(x, axis=0, keepdims=True) for x in found)
        at = slot[:1]
        place = chunk * LANES + _nth(words, at - before)
        out[0, r, pl.ds(t, 1)] = jnp.where(at < total, place, -1)
        return carry

    tiles = jnp.minimum((total + LANES - 1) // LANES, plan.slots // LANES)
    jax.lax.fori_loop(0, tiles, some, None)


def _nth(words: list[Int[Array, "1 128"]], number: Int[Array, "1 128"]) -> Int[Array, "1 128"]:
    """The place of set bit ``number`` (0-based) among the bits of all words."""
    word, place = words[0], jnp.zeros_like(number)
    rest, before = number, jnp.zeros_like(number)
    for n, following in enumerate(words[1:]):
        before = before + jax.lax.population_count(words[n])
        later = number >= before
        word = jnp.where(later, following, word)
        rest = jnp.where(later, number - before, rest)
        place = jnp.where(later, (n + 1) * 32, place)
    inner = jnp.zeros_like(number)
    for width in (16, 8, 4, 2, 1):
        part = jax.lax.shift_right_logical(word, inner) & (2**width - 1)
        count = jax.lax.population_count(part)
        higher = rest >= count
        rest = jnp.where(higher, rest - count, rest)
        inner = jnp.where(higher, inner + width, inner)
    return place + inner
