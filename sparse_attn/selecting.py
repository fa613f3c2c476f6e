"""The grids of block selection: which entries a row sees, which blocks it may select.

Entry i covers keys [i*d, i*d + l); selection block j covers keys [j*L, (j+1)*L). All indices are
0-based, and grids start at the document (documents start on a selection block, so the grid of the
buffer is the grid of every document).
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.block_scores import Pooling
from sparse_attn.documents import Rows

FINEST_SHARE = 10_000
"""Budgets that are shares of the keys seen are rounded to a denominator up to this."""


def allowed_keys(budget: int | float, seen: Any, finest: int = FINEST_SHARE) -> Any:
    """k_t: ``budget`` itself, or ceil(f * seen) for a share f of ``seen`` = t + 1 keys.

    ``seen`` is an int or an integer array. The share is the nearest fraction with a denominator up
    to ``finest``, and all arithmetic is in integers, so that no rounding depends on the dtype.
    """
    if isinstance(budget, int):
        return budget + seen * 0
    share = Fraction(budget).limit_denominator(finest)
    p, q = max(share.numerator, 1), share.denominator
    return seen // q * p + (seen % q * p + q - 1) // q


def visible_entries(
    rows: Rows, block: int, stride: int
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The range of entries each row sees: whole entries of its document, t >= i*d + l - 1.

    An entry that crosses into another document ends after every row of the first and starts before
    every row of the second, so it is in nobody's range.
    """
    start = rows.start // stride
    stop = (rows.index + 1 - block) // stride + 1
    return start, jnp.where(rows.valid, jnp.maximum(stop, start), start)


def eligible_blocks(
    rows: Rows, selection_block: int
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """First and last block a row may select: its document's first, its own; (0, -1) for padding."""
    first = jnp.where(rows.valid, rows.start // selection_block, 0)
    last = jnp.where(rows.valid, rows.index // selection_block, -1)
    return first, last


def pool_entries(
    p: Float[Array, "*rest C"], pooling: Pooling, blocks: int
) -> Float[Array, "*rest blocks"]:
    """Importance of the first ``blocks`` blocks from whole rows of entry probabilities."""
    importance = pooling.pool(p)[..., :blocks]
    missing = blocks - importance.shape[-1]
    return jnp.pad(importance, [*([(0, 0)] * (p.ndim - 1)), (0, missing)])


def selected_tokens(
    indices: Int[Array, "B T J P"], block_size: int, keys: Int[Array, " S"]
) -> Bool[Array, "B T J S"]:
    """Membership of ``keys`` in the listed blocks. O(rows * S): for sampled rows and tests only."""
    blocks = keys // block_size

    def member(one: Int[Array, " P"]) -> Bool[Array, " S"]:
        return jnp.any(one[:, None] == blocks[None, :], axis=0)

    return jax.vmap(jax.vmap(jax.vmap(member)))(indices)
