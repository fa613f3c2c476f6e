"""Top blocks of many rows by one ``top_k``, with the tie rule in the order of the columns."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.block_scores.pooling import INITIAL_RANK, RECENT_RANK, UNSEEN_SCORE, Pooling


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The static rules by which a row turns values of entries into chosen blocks.

    Values are probabilities, or with ``log`` scores in log space (-inf where there is nothing); a
    block that is not forced then needs at least ``floor``, if there is one.
    """

    pooling: Pooling
    selected: int
    initial: int
    recent: int
    log: bool = False
    floor: float | None = None

    def top_blocks_below(
        self,
        values: Float[Array, "A C"],
        entries: Int[Array, ""],
        first_block: Int[Array, "A"],
        last_block: Int[Array, "A"],
        budget: Int[Array, "A"] | None = None,
    ) -> Int[Array, "A P"]:
        """:meth:`top_blocks` where values from ``entries`` on are 0 (-inf in log space).

        Its time follows ``entries``: a causal sequence has half of them in the future on average.
        """
        total = values.shape[1]
        parts = 4 if total >= 256 else 1
        widths = [-(-total * part // parts) for part in range(1, parts + 1)]
        branch = jnp.sum(entries > jnp.asarray(widths[:-1], jnp.int32))
        branches = [
            lambda values, *rows, width=width: self.top_blocks(values[:, :width], *rows)
            for width in widths
        ]
        return jax.lax.switch(branch, branches, values, first_block, last_block, budget)

    def top_blocks(
        self,
        values: Float[Array, "A C"],
        first_block: Int[Array, "A"],
        last_block: Int[Array, "A"],
        budget: Int[Array, "A"] | None = None,
    ) -> Int[Array, "A P"]:
        """Block numbers, ascending, -1 trailing; ``rank_blocks`` in reference.py specifies it.

        ``top_k`` prefers the first of equal columns, so columns run from the highest block down.
        Blocks past the last entry rank as blocks without entries; the ``selected`` nearest of them
        and the forced initial ones get columns of their own. ``budget``: slots a row may fill.
        """
        if self.log:
            importance = jnp.maximum(self.pooling.pool_log(values), UNSEEN_SCORE)
        else:
            importance = self.pooling.pool(values)
        unseen = UNSEEN_SCORE if self.log else 0.0
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
            if self.floor is not None:
                importance = jnp.where(importance >= self.floor, importance, -jnp.inf)
            rank = jnp.where(number < first + self.initial, INITIAL_RANK, importance)
            rank = jnp.where(number > last - self.recent, RECENT_RANK, rank)
            return jnp.where((number >= first) & (number <= last), rank, -jnp.inf)

        rank = jnp.concatenate(
            [
                ranked(beyond, jnp.full(beyond.shape, unseen, importance.dtype)),
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
        kept = rank > -jnp.inf
        if budget is not None:
            kept &= jnp.arange(self.selected, dtype=jnp.int32)[None, :] < budget[:, None]
        chosen = jnp.sort(jnp.where(kept, chosen, absent), axis=1)
        return jnp.where(chosen == absent, -1, chosen)
