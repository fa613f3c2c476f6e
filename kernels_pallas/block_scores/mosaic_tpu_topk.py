"""The best candidates of a tile of tokens, on chip, by counting instead of sorting (TPU kernels).

Candidates lie in VMEM as [rows, tokens] with ascending block numbers in every column. Scores become
integers of the same order; the P-th largest of a column is found bit by bit, 32 counts over the
candidates whatever P is; what reaches it moves to its place in the list, nearest block first where
only some of the equals fit. The list comes out ascending.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.block_scores.pooling import INITIAL_RANK, RECENT_RANK, UNSEEN_SCORE
from kernels_pallas.block_scores.ranking import Ranking

COUNTED = 4
"""Steps of candidates that a count reads at a time: enough registers to hide a loop's overhead."""
NEVER = int(np.iinfo(np.int32).min)
"""The key of a candidate that is not eligible; below the key of every float."""


class Candidates(NamedTuple):
    """References to int32 [rows, tokens]: sort keys, and the block numbers they belong to."""

    key: Any
    number: Any

    def put(self, at: Any, key: Int[Array, "rows tokens"], number: Int[Array, "rows tokens"]):
        """Replace the rows ``at``."""
        self.key[at, :] = key
        self.number[at, :] = number


class Eligible(NamedTuple):
    """First and last block that each token may select, int32 [1, tokens]; first >= 0."""

    first: Int[Array, "1 tokens"]
    last: Int[Array, "1 tokens"]


def sort_keys(
    ranking: Ranking,
    number: Int[Array, "rows tokens"],
    score: Float[Array, "rows tokens"],
    eligible: Eligible,
) -> Int[Array, "rows tokens"]:
    """Integers that order blocks as ``rank_blocks`` does, up to ties; ``NEVER`` if not eligible."""
    first, last = eligible
    key = _ordered(score)
    if ranking.floor is not None:
        key = jnp.where(score >= ranking.floor, key, NEVER)
    key = jnp.where(number < first + ranking.initial, _ordered_constant(INITIAL_RANK), key)
    key = jnp.where(number > last - ranking.recent, _ordered_constant(RECENT_RANK), key)
    return jnp.where((number >= first) & (number <= last), key, NEVER)


def outside_rows(ranking: Ranking) -> int:
    """How many rows :func:`outside` needs."""
    return ranking.initial + ranking.selected


def outside(
    ranking: Ranking,
    rows: int,
    begin: Int[Array, ""] | int,
    end: Int[Array, ""] | None,
    eligible: Eligible,
) -> tuple[Int[Array, "rows tokens"], Int[Array, "rows tokens"]]:
    """Keys and numbers of the blocks in [begin, end) that can be chosen though no token of the tile
    sees an entry of them: the forced initial ones and the nearest P. ``end=None``: no end.
    """
    first, last = eligible
    tokens = first.shape[1]
    row = jax.lax.broadcasted_iota(jnp.int32, (rows, tokens), 0)
    nearest = last if end is None else jnp.minimum(last, end - 1)
    lead = first + row
    is_lead = row < ranking.initial
    near = nearest - (ranking.initial + ranking.selected - 1) + row
    number = jnp.where(is_lead, lead, near)
    # A leading block among the nearest is in the list already.
    valid = (~is_lead | (lead <= nearest - ranking.selected)) & (number >= begin)
    valid = valid & (row < outside_rows(ranking))
    unseen = UNSEEN_SCORE if ranking.log else 0.0
    score = jnp.full((rows, tokens), unseen, jnp.float32)
    key = jnp.where(valid, sort_keys(ranking, number, score, eligible), NEVER)
    return key, number


def keep_best(
    candidates: Candidates,
    best: Candidates,
    steps: Int[Array, ""],
    step: int,
    slots: Int[Array, "1 tokens"],
) -> None:
    """Move the ``slots`` best of the first ``steps * step`` candidates of each token to ``best``.

    ``best`` ascends by block number; what is left of it holds key ``NEVER`` and number -1. Its keys
    may be None. ``candidates`` needs :data:`COUNTED` steps more, which are overwritten.
    """
    tokens = slots.shape[1]
    beyond = pl.ds(pl.multiple_of(steps * step, step), COUNTED * step)
    candidates.key[beyond, :] = jnp.full((COUNTED * step, tokens), NEVER, jnp.int32)
    count = functools.partial(_count, candidates.key, steps, step)
    threshold = _threshold(count, slots)
    above = count(lambda key: key > threshold)
    equal = count(lambda key: key == threshold)
    # Of equals the nearest fit: all but the last `slots - above` of them are skipped.
    skipped = jnp.where(threshold == NEVER, equal, equal - (slots - above))
    for kept, absent in zip(best, (NEVER, -1), strict=True):
        if kept is not None:
            kept[...] = jnp.full(kept.shape, absent, jnp.int32)

    def place(i, before):
        equal_before, chosen_before = before
        rows = pl.ds(pl.multiple_of(i * step, step), step)
        key, number = candidates.key[rows, :], candidates.number[rows, :]
        tied = key == threshold
        equal_here = equal_before + _running_count(tied)
        chosen = (key > threshold) | (tied & (equal_here > skipped))
        chosen_here = chosen_before + _running_count(chosen)
        slot = jnp.where(chosen, chosen_here - 1, -1)
        equal_after, chosen_after = equal_here[step - 1 :], chosen_here[step - 1 :]

        def fill(p, _):
            at, mine = pl.ds(p, 1), slot == p
            for kept, values, absent in zip(best, (key, number), (NEVER, -1), strict=True):
                if kept is not None:
                    found = jnp.max(jnp.where(mine, values, absent), axis=0, keepdims=True)
                    kept[at, :] = jnp.maximum(kept[at, :], found)
            return 0

        # Neighbouring tokens agree on most blocks, so the slots that a step can reach are few.
        jax.lax.fori_loop(jnp.min(chosen_before), jnp.max(chosen_after), fill, 0)
        return equal_after, chosen_after

    nothing = jnp.zeros_like(slots)
    jax.lax.fori_loop(0, steps, place, (nothing, nothing))


def _threshold(count: Callable[..., Any], slots: Int[Array, "1 tokens"]) -> Int[Array, "1 tokens"]:
    """The largest key that at least ``slots`` candidates reach; ``NEVER`` if fewer are eligible."""

    def try_bit(i, found):
        # Built from the highest bit as an unsigned number, compared as a signed one.
        trial = found | jnp.left_shift(jnp.int32(1), 31 - i)
        enough = count(lambda key: key >= (trial ^ NEVER)) >= slots
        return jnp.where(enough, trial, found)

    bits = jnp.int32(0), jnp.int32(32)
    return jax.lax.fori_loop(*bits, try_bit, jnp.zeros_like(slots)) ^ NEVER


def _count(
    keys: Any,
    steps: Int[Array, ""],
    step: int,
    test: Callable[[Array], Bool[Array, "rows tokens"]],
) -> Int[Array, "1 tokens"]:
    rows, tokens = COUNTED * step, keys.shape[1]

    def add(i, total):
        passed = jnp.where(test(keys[pl.ds(pl.multiple_of(i * rows, rows), rows), :]), 1, 0)
        return total + jnp.sum(passed.reshape(rows // 8, 8, tokens), axis=0)

    reads = (steps + COUNTED - 1) // COUNTED
    total = jax.lax.fori_loop(0, reads, add, jnp.zeros((8, tokens), jnp.int32))
    return jnp.sum(total, axis=0, keepdims=True)


def _running_count(test: Bool[Array, "rows tokens"]) -> Int[Array, "rows tokens"]:
    """How many of the rows up to each one pass: a product with a triangle of ones, exact."""
    rows = test.shape[0]
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (rows, rows), axis) for axis in (0, 1))
    triangle = jnp.where(column <= row, 1.0, 0.0).astype(jnp.bfloat16)
    ones = jnp.where(test, 1.0, 0.0).astype(jnp.bfloat16)
    return jnp.dot(triangle, ones, preferred_element_type=jnp.float32).astype(jnp.int32)


def _ordered(score: Float[Array, "rows tokens"]) -> Int[Array, "rows tokens"]:
    """Integers in the order of the floats; both zeros are one number."""
    bits = jax.lax.bitcast_convert_type(jnp.where(score == 0, 0.0, score), jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _ordered_constant(score: float) -> int:
    """:func:`_ordered` of a positive constant."""
    return int(np.float32(score).view(np.int32))
