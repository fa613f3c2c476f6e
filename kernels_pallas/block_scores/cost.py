"""Work of block scores counted by hand: what a kernel tells the compiler, and rooflines.

All counts are upper bounds in which every row sees every entry; a causal sequence does half.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Cost(NamedTuple):
    """Floating-point operations, bytes to and from memory, and exponentials or logarithms."""

    flops: int
    bytes_accessed: int
    transcendentals: int

    def estimate(self) -> Any:
        """The same for ``pl.pallas_call(cost_estimate=...)``."""
        from jax.experimental import pallas as pl

        return pl.CostEstimate(
            flops=self.flops,
            bytes_accessed=self.bytes_accessed,
            transcendentals=self.transcendentals,
        )


def selection(
    *,
    rows: int,
    heads: int,
    lists: int,
    width: int,
    entries: int,
    blocks: int,
    weights: int,
    selected: int,
    tile: int,
    itemsize: int,
) -> Cost:
    """Scoring all entries, pooling them and keeping the best: one pass over the keys a tile.

    ``rows`` counts all tokens of the batch. A logit costs ``2 * width`` operations and 4 more on
    its way into the sum over heads; a block ``2 * weights`` and 3 in
    each of the 32 counts of the threshold search.
    """
    pairs = rows * heads * entries
    flops = pairs * (2 * width + 4) + rows * lists * blocks * (2 * weights + 3 * 32)
    moved = (
        rows * heads * (width * itemsize + 4)
        + lists * -(-rows // tile) * entries * width * itemsize
        + rows * lists * (selected + 5) * 4
    )
    return Cost(flops, moved, pairs)


def normalizer(
    *,
    rows: int,
    heads: int,
    kv_heads: int,
    width: int,
    entries: int,
    tile: int,
    itemsize: int,
) -> Cost:
    """``entry_lse``: one pass over the keys a tile, no values."""
    pairs = rows * heads * entries
    moved = (
        rows * heads * (width * itemsize + 4)
        + kv_heads * -(-rows // tile) * entries * width * itemsize
        + rows * 2 * 4
    )
    return Cost(pairs * (2 * width + 6), moved, pairs)
