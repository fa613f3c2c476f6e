"""Top blocks of many rows by one ``top_k``, with the tie rule in the order of the columns."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.block_scores.pooling import INITIAL_RANK, RECENT_RANK, Pooling


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The static rules by which a row turns probabilities of entries into chosen blocks."""

    pooling: Pooling
    selected: int
    initial: int
    recent: int

    def top_blocks_below(
        self,
        probabilities: Float[Array, "A C"],
        entries: Int[Array, ""],
        first_block: Int[Array, "A"],
        last_block: Int[Array, "A"],
    ) -> Int[Array, "A P"]:
        """:meth:`top_blocks` where probabilities from ``entries`` on are 0, in time that follows
        ``entries``: a causal sequence has half of its entries in the future on average.
        """
        total = probabilities.shape[1]
        parts = 4 if total >= 256 else 1
        widths = [-(-total * part // parts) for part in range(1, parts + 1)]
        branch = jnp.sum(entries > jnp.asarray(widths[:-1], jnp.int32))
        branches = [
            lambda p, *blocks, width=width: self.top_blocks(p[:, :width], *blocks)
            for width in widths
        ]
        return jax.lax.switch(branch, branches, probabilities, first_block, last_block)

    def top_blocks(
        self,
        probabilities: Float[Array, "A C"],
        first_block: Int[Array, "A"],
        last_block: Int[Array, "A"],
    ) -> Int[Array, "A P"]:
        """Block numbers, ascending, -1 trailing; ``rank_blocks`` in reference.py specifies it.

        ``top_k`` prefers the first of equal columns, so columns run from the highest block down.
        Blocks past the last entry have importance 0; the ``selected`` nearest of them and the
        forced initial ones get columns of their own.
        """
        importance = self.pooling.pool(probabilities)
        blocks = importance.shape[1]
        first = jnp.maximum(first_block, 0)[:, None]
        last = last_block[:, None]
        nearest = last - jnp.arange(self.selected, dtype=jnp.int32)[None, :]
        leading = first + jnp.arange(self.initial - 1, -1, -1, dtype=jnp.int32)[None, :]
        leading = jnp.where(leading <= last - self.selected, leading, -1)
        beyond = jnp.concatenate([nearest, leading], axis=1)
        beyond = jnp.where(beyond >= blocks, beyond, -1)
        inside = jnp.arange(blocks - 1, -1, -1, dtype=jnp.int32)[None, :]

        def ranked(number, importance):
            rank = jnp.where(number < first + self.initial, INITIAL_RANK, importance)
            rank = jnp.where(number > last - self.recent, RECENT_RANK, rank)
            return jnp.where((number >= first) & (number <= last), rank, -1)

        rank = jnp.concatenate(
            [
                ranked(beyond, jnp.zeros(beyond.shape, importance.dtype)),
                ranked(inside, jnp.flip(importance, axis=1)),
            ],
            axis=1,
        )
        rank, column = jax.lax.top_k(rank, self.selected)
        column = column.astype(jnp.int32)
        columns = self.selected + self.initial
        chosen = jnp.where(
            column < self.selected,
            last - column,
            jnp.where(
                column < columns, first + columns - 1 - column, blocks - 1 + columns - column
            ),
        )
        absent = jnp.iinfo(jnp.int32).max
        chosen = jnp.sort(jnp.where(rank >= 0, chosen, absent), axis=1)
        return jnp.where(chosen == absent, -1, chosen)
