"""Hand counts of gathered decoding; the compiler cannot see into a kernel."""

from __future__ import annotations

from typing import Any

__all__ = ["gathered_bytes", "gathered_cost", "gathered_flops"]


def gathered_flops(*, items: int, rows: int, keys: int, widths: tuple[int, ...]) -> int:
    """Multiply-adds count twice.

    Args:
      items: lists, over all sequences and query rows.
      rows: query heads that attend one list.
      keys: keys of a list.
      widths: numbers of a key and of a value, or of both in one, which both products then meet.
    """
    met = widths[0] + widths[-1]
    return 2 * items * rows * keys * met


def gathered_bytes(
    *, items: int, rows: int, keys: int, widths: tuple[int, ...], key_bytes: int
) -> int:
    """HBM traffic: listed keys and values once a list, queries, output and lists.

    ``key_bytes`` is what fetching a number costs: 4 where two 16-bit heads come at once.
    """
    cache = items * keys * sum(widths) * key_bytes
    queries = items * rows * (widths[0] + widths[-1]) * 4
    return cache + queries + 2 * items * keys * 4


def gathered_cost(
    *, items: int, rows: int, keys: int, widths: tuple[int, ...], key_bytes: int
) -> Any:
    """The counts as a ``pl.CostEstimate``; transcendentals are one exponential a logit."""
    from jax.experimental import pallas as pl

    return pl.CostEstimate(
        flops=gathered_flops(items=items, rows=rows, keys=keys, widths=widths),
        bytes_accessed=gathered_bytes(
            items=items, rows=rows, keys=keys, widths=widths, key_bytes=key_bytes
        ),
        transcendentals=items * rows * keys,
    )
