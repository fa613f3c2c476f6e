"""Hand counts of block-sparse attention: what the work costs, whatever executes it.

``pairs`` is the number of visible (token, key) pairs summed over the batch, about
``B * T * P * block_size``; ``visited`` the (tile, block) pairs that a kv head visits, which is
``B * tiles`` times the mean union of a tile. What a tile computes and masks is no work.
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
    visited: int,
    block_size: int,
    query_heads: int,
    kv_heads: int,
    width: int,
    value_width: int,
    itemsize: int,
) -> int:
    """HBM traffic: q and out once, a block of keys and values and 8 bytes of list per visit."""
    rows = tokens * query_heads * ((width + value_width) * itemsize + 4)
    block = block_size * (width + value_width) * itemsize
    return rows + visited * kv_heads * (block + 8)


def backward_bytes(
    tokens: int,
    keys: int,
    visited: int,
    tokens_of_tile: int,
    block_size: int,
    query_heads: int,
    kv_heads: int,
    width: int,
    value_width: int,
    itemsize: int,
) -> int:
    """HBM traffic of dq (a block per visit) and dk/dv (a tile's rows per visit); ``keys`` is B * S.

    ``tokens`` is B * T.
    """
    both = (width + value_width) * itemsize
    query_major = tokens * query_heads * (both + (width + value_width) * itemsize + 8)
    query_major += visited * kv_heads * (block_size * both + 8)
    key_major = 2 * keys * kv_heads * both
    key_major += visited * (tokens_of_tile * query_heads * (both + 8) + kv_heads * 12)
    return query_major + key_major
