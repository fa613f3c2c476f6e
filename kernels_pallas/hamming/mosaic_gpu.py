"""Selection by binary codes on Hopper (Mosaic GPU): the backends of the three calls.

Two kernels over (row, chunk of keys) do what grows with T * S: distances with a coarse histogram,
then a histogram of the one bucket in which the worst selected key lies. Level, cutoff among equals
and the chunk it lies in follow from the histograms, which are small. Distances are kept, in two
bytes, for as many rows at a time as ``Tiles.rank_elements`` lets (32 MB), never for all of T * S.
XLA compacts lists from them by way of one bit a key: Mosaic GPU has neither prefix sums nor
scattered stores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from kernels_pallas.gpu import check_device
from kernels_pallas.hamming import xla
from kernels_pallas.hamming.codes import WORD, Threshold
from kernels_pallas.hamming.mosaic_gpu_ranks import (
    Plan,
    Tiles,
    distances,
    plan_for,
    recount,
    scores,
    tables_of,
)

__all__ = ["hamming_scores", "hamming_select", "hamming_threshold"]


class _Call(NamedTuple):
    """What every row of a call brings: codes, ranges [B, T] as in the api, and budget."""

    q_codes: Any
    first: Any
    start: Any
    stop: Any
    last: Any
    budget: Any


class _Cut(NamedTuple):
    """Distances [rows, keys] and, a row: how many are taken, up to which, ties from where on."""

    ranks: Any
    taken: Any
    level: Any
    cutoff: Any


def hamming_scores(
    q_codes: UInt32[Array, "B T J G W"],
    k_codes: UInt32[Array, "B J W S"],
    *,
    bits: int,
    best_of: int = 1,
    tiles: Tiles | None = None,
) -> Int[Array, "B T J S"]:
    """See :func:`kernels_pallas.hamming.hamming_scores`.

    Raises:
      NotImplementedError: off Hopper; for groups above 63 codes or 4095 bits.
    """
    check_device()
    plan = plan_for(q_codes, k_codes, bits, best_of, tiles)
    nothing = jnp.zeros(q_codes.shape[:2], jnp.int32)
    result = scores(tables_of(q_codes, nothing, nothing, plan), k_codes, plan)
    return result.reshape(*q_codes.shape[:3], plan.keys)


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
    """See :func:`kernels_pallas.hamming.hamming_threshold`; memory as this page says.

    Raises:
      NotImplementedError: as :func:`hamming_scores`.
    """
    check_device()
    plan = plan_for(q_codes, k_codes, bits, best_of, tiles)

    def rows(call: _Call) -> Threshold:
        cut = _cut(call, k_codes, plan)
        some = cut.taken > 0
        level = jnp.where(some, plan.highest - 2 * cut.level, plan.highest)
        cutoff = jnp.where(some, cut.cutoff, plan.keys)
        shape = call.budget.shape
        return Threshold(level.reshape(shape), cutoff.reshape(shape))

    call = _Call(q_codes, start, start, jnp.maximum(stop, start), stop, budget)
    return _in_chunks(rows, call, plan)


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
    """See :func:`kernels_pallas.hamming.hamming_select`; memory as this page says.

    Raises:
      NotImplementedError: as :func:`hamming_scores`.
    """
    check_device()
    plan = plan_for(q_codes, k_codes, bits, best_of, tiles)

    def rows(call: _Call) -> Array:
        cut = _cut(call, k_codes, plan)
        shape = call.budget.shape
        ranks = cut.ranks.reshape(*shape, -1)
        ranks = jnp.pad(ranks, ((0, 0), (0, 0), (0, 0), (0, -ranks.shape[3] % WORD)))
        s = jnp.arange(ranks.shape[3], dtype=jnp.int32)[None, None, None, :]
        low, begin, end, high = (
            x[:, :, None, None] for x in (call.first, call.start, call.stop, call.last)
        )
        taken, level, cutoff = (x.reshape(shape)[..., None] for x in cut[1:])
        far = ranks.astype(jnp.int32)
        better = (far < level) | ((far == level) & (s >= cutoff))
        chosen = (s >= begin) & (s < end) & better & (taken > 0)
        forced = ((s >= low) & (s < begin)) | ((s >= end) & (s < high))
        members = jax.lax.optimization_barrier(xla._words(chosen | forced))
        return xla._compact(members, slots)

    call = _Call(q_codes, first, start, stop, last, budget)
    return _in_chunks(rows, call, plan)


def _cut(call: _Call, k_codes: Array, plan: Plan) -> _Cut:
    """Find the worst selected key of every row (b, t, j) from two histograms."""
    plan = dataclasses.replace(plan, queries=call.budget.shape[1])
    table = tables_of(call.q_codes, call.start, call.stop, plan)
    ranks, coarse = distances(table, k_codes, plan)
    count = jnp.broadcast_to((call.stop - call.start)[:, :, None], call.budget.shape)
    taken = jnp.clip(call.budget, 0, count).reshape(-1)
    bucket, wanted = _reached(jnp.sum(coarse, axis=1), taken)
    fine = recount(table, ranks, bucket, plan)
    level, ties = _reached(jnp.sum(fine, axis=1), wanted)
    equal = jnp.take_along_axis(fine, level[:, None, None], axis=2)[:, :, 0]
    level = (bucket << plan.shift) + level
    return _Cut(ranks, taken, level, _cutoff(ranks, equal, level, ties, call, plan))


def _reached(
    counts: Int[Array, "rows levels"], wanted: Int[Array, " rows"]
) -> tuple[Int[Array, " rows"], Int[Array, " rows"]]:
    """The first level up to which ``wanted`` lie, and how many of them lie at that level."""
    running = jnp.cumsum(counts, axis=1, dtype=jnp.int32)
    level = jnp.sum(running < wanted[:, None], axis=1, dtype=jnp.int32)
    level = jnp.minimum(level, counts.shape[1] - 1)
    before = jnp.take_along_axis(running - counts, level[:, None], axis=1)[:, 0]
    return level, wanted - before


def _cutoff(
    ranks: Int[Array, "rows keys"],
    equal: Int[Array, "rows chunks"],
    level: Int[Array, " rows"],
    ties: Int[Array, " rows"],
    call: _Call,
    plan: Plan,
) -> Int[Array, " rows"]:
    """Where the last ``ties`` keys of distance ``level`` begin, of which chunks hold ``equal``."""
    backwards = equal[:, ::-1]
    number, ties = _reached(backwards, ties)
    chunk = plan.chunks - 1 - number
    by_chunk = ranks.reshape(-1, plan.chunks, plan.chunk)
    inside = jnp.take_along_axis(by_chunk, chunk[:, None, None], axis=1)[:, 0].astype(jnp.int32)
    s = chunk[:, None] * plan.chunk + jnp.arange(plan.chunk, dtype=jnp.int32)[None, :]
    start, stop = (
        jnp.broadcast_to(x[:, :, None], call.budget.shape).reshape(-1, 1)
        for x in (call.start, call.stop)
    )
    tied = (inside == level[:, None]) & (s >= start) & (s < stop)
    from_end = jnp.cumsum(tied[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1]
    return jnp.max(jnp.where(tied & (from_end == ties[:, None]), s, 0), axis=1)


def _in_chunks(function: Callable[[_Call], Any], call: _Call, plan: Plan) -> Any:
    """``function`` over as many queries at a time as keep the distances small."""
    batch, queries, lists = call.budget.shape
    a_query = batch * lists * plan.chunks * plan.chunk
    size = max(1, min(queries, plan.tiles.rank_elements // a_query))
    if size >= queries:
        return function(call)
    pad = -queries % size

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pad), *((0, 0) for _ in x.shape[2:])))
        return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(batch, queries + pad, *x.shape[3:])[:, :queries]

    return jax.tree.map(join, jax.lax.map(function, jax.tree.map(split, call)))
