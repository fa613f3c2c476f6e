"""The rules all policies share: budgets, forced keys, exact top-k by threshold, lists from masks.

Everything works on a chunk of query rows, takes O(rows * S) memory and carries no gradient.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

Budget = int | float | tuple[int | float, ...]
"""Keys beyond sinks and recent ones: a count, a share of the keys seen so far, or one per list."""

TILE = 2**16
"""Scores whose threshold is searched at a time on a CPU: they stay in its cache meanwhile."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queries:
    """A chunk of query rows: rotated ``q`` and, as in ``Rows``, ``index`` and ``start``."""

    q: Float[Array, "B c N H"]
    index: Int[Array, "B c"]
    start: Int[Array, "B c"]


def check_budget(budget: Budget) -> None:
    """Raise ``ValueError`` unless every entry is a count >= 0 or a share in (0, 1]."""
    entries = budget if isinstance(budget, tuple) else (budget,)
    if not entries:
        raise ValueError("budget=() names no list; give a number, or one number per list")
    for entry in entries:
        wrong = entry < 0 if isinstance(entry, int) else not 0 < entry <= 1
        if wrong:
            raise ValueError(
                f"budget={budget!r}: {entry!r} must be a count of keys (an int >= 0) or a share of "
                "the keys seen so far (a float in (0, 1])"
            )


def allowed_keys(budget: int | float, seen: Any) -> Any:
    """k_t: ``budget`` itself, or ceil(f * seen) for a share f of ``seen`` = t + 1 keys.

    ``seen`` is an int or an integer array. The share is the nearest fraction with a denominator up
    to 10,000, and all arithmetic is in integers, so that no rounding depends on the dtype.
    """
    if isinstance(budget, int):
        return budget + seen * 0
    share = Fraction(budget).limit_denominator(10_000)
    p, q = max(share.numerator, 1), share.denominator
    return seen // q * p + (seen % q * p + q - 1) // q


def allowed_per_list(budget: Budget, queries: Queries) -> Int[Array, "B c J"]:
    """k_t of every row and list (J = 1 if one number serves all lists)."""
    seen = jnp.maximum(queries.index - queries.start + 1, 0)
    entries = budget if isinstance(budget, tuple) else (budget,)
    return jnp.stack([allowed_keys(entry, seen) for entry in entries], axis=-1)


def visible_keys(queries: Queries, keys: int) -> Bool[Array, "B c 1 S"]:
    """The causal keys of each row's document; none for padding."""
    s = jnp.arange(keys, dtype=jnp.int32)[None, None, None, :]
    return (s >= queries.start[..., None, None]) & (s <= queries.index[..., None, None])


def forced_keys(queries: Queries, keys: int, sinks: int, recent: int) -> Bool[Array, "B c 1 S"]:
    """The document's first ``sinks`` keys and the last ``recent`` ones, the row's own included."""
    s = jnp.arange(keys, dtype=jnp.int32)[None, None, None, :]
    first = s < queries.start[..., None, None] + sinks
    last = s > queries.index[..., None, None] - recent
    return (first | last) & visible_keys(queries, keys)


def logits(
    q: Float[Array, "B c N H"], keys: Float[Array, "B K H S"], scale: float
) -> Float[Array, "B c N S"]:
    """scale * q . k in at least float32, as one batched product."""
    B, c, N, H = q.shape
    K, S = keys.shape[1], keys.shape[3]
    grouped = jnp.transpose(q.reshape(B, c, K, N // K, H), (0, 2, 3, 1, 4)).astype(keys.dtype)
    product = jnp.matmul(grouped.reshape(B, K, N // K * c, H) * scale, keys)
    return jnp.transpose(product.reshape(B, N, c, S), (0, 2, 1, 3))


def log_probabilities(
    scores: Float[Array, "B c N S"], visible: Bool[Array, "B c 1 S"]
) -> Float[Array, "B c N S"]:
    """log softmax over the visible keys, -inf elsewhere (and for rows that see nothing).

    In logarithms the ranking survives where probabilities would underflow, in every dtype.
    """
    scores = jnp.where(visible, scores, -jnp.inf)
    total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    return scores - jnp.where(jnp.isneginf(total), 0.0, total)


def vote(
    scores: Float[Array, "B c N S"], visible: Bool[Array, "B c 1 S"], lists: int
) -> Float[Array, "B c J S"]:
    """Scores of J shared lists: log of the softmax probabilities summed over N/J query heads.

    One list per query head ranks by its scores as they are.
    """
    B, c, N, S = scores.shape
    if lists == N:
        return scores
    log_p = log_probabilities(scores, visible).reshape(B, c, lists, N // lists, S)
    return jax.nn.logsumexp(log_p, axis=3)


def heaviest(
    scores: Num[Array, "*rows S"], weights: Num[Array, "*rows S"], needed: Num[Array, "*rows"]
) -> Bool[Array, "*rows S"]:
    """The fewest keys, by falling score, whose weights sum to at least ``needed``.

    Of equal scores the later key comes first. All keys with a weight where there is not enough of
    it; none where ``needed`` is 0. With weights 1 and 0 these are the ``needed`` best of the
    eligible keys: an exact top-k in O(S) memory, without a sort.

    Args:
      scores: floats without NaN, or unsigned integers.
      weights: not negative; keys of weight 0 are never taken.
      needed: in the unit of the weights.
    """
    keys = scores.shape[-1]
    flat = (scores.reshape(-1, keys), weights.reshape(-1, keys), needed.reshape(-1))
    rows = flat[2].shape[0]
    if jax.default_backend() != "cpu" or rows * keys <= 2 * TILE:
        return _heaviest(flat).reshape(scores.shape)
    tile = math.gcd(rows, max(1, TILE // keys))
    tiles = jax.tree.map(lambda x: x.reshape(rows // tile, tile, *x.shape[1:]), flat)
    return jax.lax.map(_heaviest, tiles).reshape(scores.shape)


def _heaviest(
    operands: tuple[Num[Array, "A S"], Num[Array, "A S"], Num[Array, " A"]],
) -> Bool[Array, "A S"]:
    """Find the score of the last key taken, then how far back the keys of that score go."""
    scores, weights, needed = operands
    keys = scores.shape[1]
    some = weights > 0
    order = _sortable(jnp.where(some, scores, jnp.zeros((), scores.dtype)))
    threshold = _threshold(order, weights, needed, order.dtype.itemsize * 8)
    above = some & (order > threshold[:, None])
    level = some & (order == threshold[:, None])
    rest = needed - jnp.sum(jnp.where(above, weights, 0), axis=-1, dtype=weights.dtype)
    places = jnp.broadcast_to(jnp.arange(keys, dtype=jnp.uint32)[None, :], level.shape)
    cut = _threshold(places, jnp.where(level, weights, 0), rest, keys.bit_length())
    return above | (level & (places >= cut[:, None]))


def _threshold(order: Array, weights: Array, needed: Num[Array, "*rows"], bits: int) -> Array:
    """The largest unsigned x of ``bits`` bits with sum of weights where order >= x >= needed."""
    one = jnp.ones((), order.dtype)

    def fix_bit(i: Array, found: Array) -> Array:
        candidate = found | (one << (bits - 1 - i).astype(order.dtype))
        inside = jnp.where(order >= candidate[..., None], weights, 0)
        enough = jnp.sum(inside, axis=-1, dtype=weights.dtype) >= needed
        return jnp.where(enough, candidate, found)

    return jax.lax.fori_loop(0, bits, fix_bit, jnp.zeros(needed.shape, order.dtype))


def _sortable(scores: Array) -> Array:
    """Unsigned integers in the order of the scores."""
    if jnp.issubdtype(scores.dtype, jnp.unsignedinteger):
        return scores
    scores = jnp.where(scores == 0, 0.0, scores)  # -0 equals +0, but not in its bits
    width = scores.dtype.itemsize * 8
    unsigned = {32: jnp.uint32, 64: jnp.uint64}[width]
    bits = jax.lax.bitcast_convert_type(scores, unsigned)
    sign = jnp.ones((), unsigned) << (width - 1)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def listed(member: Bool[Array, "*rows S"], slots: int) -> Int[Array, "*rows P"]:
    """The first ``slots`` members of each row: ascending, -1 in unused trailing slots."""
    keys = member.shape[-1]
    count = jnp.cumsum(member.reshape(-1, keys), axis=-1, dtype=jnp.int32)
    wanted = jnp.arange(1, slots + 1, dtype=jnp.int32)
    found = jax.vmap(lambda row: jnp.searchsorted(row, wanted))(count).astype(jnp.int32)
    return jnp.where(found < keys, found, -1).reshape(*member.shape[:-1], slots)


def members(lists: Int[Array, "*rows P"], keys: int) -> Bool[Array, "*rows S"]:
    """The inverse of :func:`listed`."""
    flat = lists.reshape(-1, lists.shape[-1])
    rows = jnp.arange(flat.shape[0], dtype=jnp.int32)[:, None]
    mask = jnp.zeros((flat.shape[0], keys), bool)
    mask = mask.at[rows, jnp.where(flat < 0, keys, flat)].set(True, mode="drop")
    return mask.reshape(*lists.shape[:-1], keys)
