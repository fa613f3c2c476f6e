"""Hand counts of selection by codes; the compiler cannot see into a kernel."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["selection_bytes", "selection_cost", "selection_operations"]


def selection_operations(*, rows: int, keys: int, group: int, words: int, highest: int) -> int:
    """Integer operations on single numbers.

    A key of a row takes xor, popcount and sum per group and word, eight operations for its rank,
    two for every halving of the levels and six for the cut among ties.

    Args:
      rows: lists of all query rows, B * T * J.
      keys: keys scanned for each.
      group, words: G and W.
      highest: G * bits, the largest distance.
    """
    halvings = math.ceil(math.log2(highest + 2))
    return rows * keys * (3 * group * words + 8 + 2 * halvings + 6)


def selection_bytes(*, scans: int, rows: int, keys: int, group: int, words: int, slots: int) -> int:
    """HBM traffic: codes of the keys once a scan, codes and ranges of the rows, the result.

    ``scans`` is how often a key's code is read: once for every eight rows, or once for each if
    rows have their own keys. ``slots`` is P, 2 for a threshold.
    """
    return 4 * (scans * keys * words + rows * (group * words + 5) + rows * slots)


def selection_cost(
    *, scans: int, rows: int, keys: int, group: int, words: int, highest: int, slots: int
) -> Any:
    """The counts as a ``pl.CostEstimate``."""
    from jax.experimental import pallas as pl

    return pl.CostEstimate(
        flops=selection_operations(rows=rows, keys=keys, group=group, words=words, highest=highest),
        bytes_accessed=selection_bytes(
            scans=scans, rows=rows, keys=keys, group=group, words=words, slots=slots
        ),
        transcendentals=0,
    )
