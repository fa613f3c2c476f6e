"""Sizes of the block selection kernel for Hopper, and which blocks a tile of tokens visits.

Axes beside the project's alphabet: A tiles (of ``warpgroups * tokens`` consecutive tokens).
"""

from __future__ import annotations

import dataclasses
import itertools

import jax.numpy as jnp
from jaxtyping import Array, Int

from kernels_pallas.block_scores.pooling import Pooling
from kernels_pallas.block_scores.ranking import Ranking
from kernels_pallas.gpu import ROWS, SHARED_BYTES

__all__ = ["Tiles", "slots_of", "tiles_for", "visited_blocks"]

_ITEM = 2  # bytes of bfloat16 and float16
_RESERVED = 6 * 1024  # barriers, scratch, alignment
_LANES = 32
_COLUMNS = 256  # widest product
_RANKED = 2**13  # ranks of a stage: 64 registers of each thread of a warpgroup
_FURTHEST = 2**30


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of one call; none changes a result.

    Attributes:
      warpgroups: computing warpgroups that share the keys a tile visits: 1 or 2.
      tokens: tokens of a warpgroup, a multiple of 8.
      heads: query heads of one product; it has ``heads * tokens`` columns.
      steps: slots of the ring, of 64 keys each.
      stage: blocks that are ranked at a time, a multiple of 64.
    """

    warpgroups: int
    tokens: int
    heads: int
    steps: int
    stage: int

    def check(self, width: int, group: int) -> None:
        """Raise ``ValueError`` if a program does not fit in shared memory, or sizes make no sense.

        ``width`` is the padded head width, ``group`` the query heads of a list.
        """
        if self.warpgroups not in (1, 2) or self.tokens % 8 or min(self.tokens, self.steps) < 1:
            raise ValueError(
                f"{self}: warpgroups must be 1 or 2, tokens a multiple of 8, steps > 0"
            )
        if self.heads < 1 or group % self.heads or self.heads * self.tokens > _COLUMNS:
            raise ValueError(
                f"{self}: heads must divide {group} and heads * tokens be at most {_COLUMNS}"
            )
        if self.stage < ROWS or self.stage % ROWS:
            raise ValueError(f"{self}: stage must be a multiple of {ROWS}")
        needed = self.shared_bytes(width, group)
        if needed > SHARED_BYTES:
            raise ValueError(
                f"{self} with {group} heads of width {width} needs {needed} bytes of shared "
                f"memory, a program has {SHARED_BYTES}; use fewer tokens, slots or a shorter stage"
            )

    def shared_bytes(self, width: int, group: int) -> int:
        """Shared memory of a program: queries, ranks and the ring."""
        queries = self.warpgroups * group * self.tokens * width * _ITEM
        ranks = self.warpgroups * self.stage * self.tokens * 4
        return queries + ranks + self.steps * ROWS * width * _ITEM + _RESERVED


def slots_of(selected: int) -> int:
    """``selected`` rounded up to whole warps."""
    return -(-selected // _LANES) * _LANES


def tiles_for(width: int, group: int, selected: int, rows: int) -> Tiles:
    """Sizes for a padded head width, G heads of a list and ``rows`` = T. Not yet tuned on a chip.

    Products aim at 128 columns (64 registers of sums); a stage fills 64 registers with ranks. Keys
    are shared by two warpgroups because one alone would read them from the second-level cache
    faster than Hopper delivers. 8 to 32 tokens: fewer than 8 are no tile of ``wgmma``, with more
    the lists of chosen blocks would not stay in registers.

    Raises:
      NotImplementedError: where even 8 tokens do not fit.
    """
    slots = slots_of(selected)
    tokens = 8
    while tokens < 32 and 2 * tokens * group <= 128 and 2 * tokens * slots <= _RANKED // 2:
        tokens *= 2
    heads = max(h for h in range(1, group + 1) if group % h == 0 and h * tokens <= 128)
    if group <= _COLUMNS // tokens and heads * tokens < 64:  # a prime group, say
        heads = group
    whole = max(1, (_RANKED // tokens - slots) // ROWS)
    for warpgroups in (2, 1) if rows > tokens else (1,):
        for runs, steps in itertools.product((whole, -(-whole // 2), -(-whole // 4)), (4, 3, 2)):
            tiles = Tiles(warpgroups, tokens, heads, steps, runs * ROWS)
            if tokens * slots <= _RANKED // 2 and tiles.shared_bytes(width, group) <= SHARED_BYTES:
                return tiles
    raise NotImplementedError(
        f"groups of {group} query heads of width {width} with selected={selected} do not fit a "
        "tile of 8 tokens on Hopper; use implementation='xla'"
    )


def visited_blocks(
    rows: tuple[Int[Array, "B T"], ...], entries: int, ranking: Ranking, tokens: int
) -> Int[Array, "B A 8"]:
    """Which runs of 64 blocks matter to a tile: three ascending disjoint intervals of runs
    (from, to), then the interval of runs that have entries at all.

    ``rows`` are start, stop, first_block (>= 0) and last_block, T a multiple of ``tokens``. Blocks
    that no row of the tile has entries in can only be chosen near the last block, or as forced
    leading ones.
    """
    start, stop, first, last = (a.reshape(a.shape[0], -1, tokens) for a in rows)
    last = jnp.minimum(last, _FURTHEST)
    eligible = last >= first
    low, high = _blocks_with_entries(start, stop, entries, ranking.pooling)
    low, high = jnp.maximum(low, first), jnp.minimum(high, last + 1)
    near = jnp.maximum(first, last + 1 - ranking.selected)
    leading = jnp.minimum(first + ranking.initial, last + 1)
    seen = _runs(low, high, eligible)
    kinds = [seen, _runs(near, last + 1, eligible), _runs(first, leading, eligible)]
    spans = jnp.stack([jnp.stack(span, axis=-1) for span in kinds], axis=2)  # [B, A, 3, 2]
    order = jnp.argsort(spans[..., 0], axis=2)
    spans = jnp.take_along_axis(spans, order[..., None], axis=2)
    reached = jnp.zeros(spans.shape[:2], jnp.int32)
    parts = []
    for i in range(3):
        from_run = jnp.maximum(spans[:, :, i, 0], reached)
        reached = jnp.maximum(spans[:, :, i, 1], from_run)
        parts += [from_run, reached]
    return jnp.stack([*parts, *seen], axis=2)


def _blocks_with_entries(
    start: Int[Array, "B A t"], stop: Int[Array, "B A t"], entries: int, pooling: Pooling
) -> tuple[Int[Array, "B A t"], Int[Array, "B A t"]]:
    """Blocks [low, high) that touch at least one entry of [start, stop); low >= high if none."""
    reach = pooling.offset + len(pooling.weights) - 1
    low = jnp.maximum(-(-(start - reach) // pooling.stride), 0)
    high = jnp.minimum((stop - 1 - pooling.offset) // pooling.stride + 1, pooling.blocks(entries))
    return low, jnp.where(stop > start, high, 0)


def _runs(
    low: Int[Array, "B A t"], high: Int[Array, "B A t"], eligible: Int[Array, "B A t"]
) -> tuple[Int[Array, "B A"], Int[Array, "B A"]]:
    """The runs of 64 blocks between the first and the last of all rows' blocks [low, high)."""
    some = eligible & (high > low)
    low = jnp.min(jnp.where(some, low, _FURTHEST), axis=2) // ROWS
    high = -(-jnp.max(jnp.where(some, high, 0), axis=2) // ROWS)
    return jnp.minimum(low, high).astype(jnp.int32), high.astype(jnp.int32)
