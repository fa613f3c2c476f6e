"""Hand counts of ranged attention: what the work costs, whatever executes it.

``pairs`` is the number of visible (token, key) pairs, summed over the batch: T * S / 2 for causal
attention over T = S, about T * window for a sliding window.
"""

from __future__ import annotations


def forward_flops(pairs: int, query_heads: int, width: int, value_width: int) -> int:
    """Multiplications and additions of q k^T and p v."""
    return 2 * pairs * query_heads * (width + value_width)


def backward_flops(pairs: int, query_heads: int, width: int, value_width: int) -> int:
    """q k^T and do v^T in both the dq and the dk/dv pass; ds k, ds^T q and p^T do once."""
    return 2 * pairs * query_heads * (4 * width + 3 * value_width)


def exponentials(pairs: int, query_heads: int, *, backward: bool = False) -> int:
    """exp calls: one a logit, in the backward pass two (dq and dk/dv)."""
    return (2 if backward else 1) * pairs * query_heads


def forward_bytes(
    tokens: int,
    keys_read: int,
    query_heads: int,
    kv_heads: int,
    width: int,
    value_width: int,
    itemsize: int,
) -> int:
    """HBM traffic: q and out once, keys and values as often as tiles read them.

    ``tokens`` is B * T; ``keys_read`` the key rows that all tiles of a kv head read together, which
    is ``pairs`` over the tokens of a tile where spans are dense.
    """
    rows = tokens * query_heads * ((width + value_width) * itemsize + 4)
    return rows + keys_read * kv_heads * (width + value_width) * itemsize


def backward_bytes(
    tokens: int,
    keys: int,
    keys_read: int,
    tokens_read: int,
    query_heads: int,
    kv_heads: int,
    width: int,
    value_width: int,
    itemsize: int,
) -> int:
    """HBM traffic of dq (rows once, keys per tile) and of dk/dv (keys once, rows per key block).

    ``keys`` is B * S; ``tokens_read`` the tokens that all key blocks of a kv head read together.
    """
    key_row = kv_heads * (width + value_width) * itemsize
    row = query_heads * ((width + value_width) * itemsize + 8)
    query_major = tokens * (row + query_heads * width * itemsize) + keys_read * key_row
    key_major = 2 * keys * key_row + tokens_read * row
    return query_major + key_major
