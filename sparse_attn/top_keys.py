"""Exact top-k over keys without a sort, with the latest of equals first, and lists from masks."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Num

TILE = 2**16
"""Scores whose threshold is searched at a time on a CPU: they stay in its cache meanwhile."""


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
    tied = jnp.where(level, weights, 0)
    # No step at all where every row takes all of its ties, as it nearly always does.
    all_fit = jnp.all(jnp.sum(tied, axis=-1, dtype=weights.dtype) <= rest)
    cut = _threshold(places, tied, rest, keys.bit_length(), skip=all_fit)
    return above | (level & (places >= cut[:, None]))


def _threshold(
    order: Array,
    weights: Array,
    needed: Num[Array, "*rows"],
    bits: int,
    skip: Bool[Array, ""] | bool = False,
) -> Array:
    """The largest unsigned x of ``bits`` bits with sum of weights where order >= x >= needed.

    0 with ``skip``.
    """
    one = jnp.ones((), order.dtype)

    def fix_bit(i: Array, found: Array) -> Array:
        candidate = found | (one << (bits - 1 - i).astype(order.dtype))
        inside = jnp.where(order >= candidate[..., None], weights, 0)
        enough = jnp.sum(inside, axis=-1, dtype=weights.dtype) >= needed
        return jnp.where(enough, candidate, found)

    steps = jnp.where(skip, 0, bits)
    return jax.lax.fori_loop(0, steps, fix_bit, jnp.zeros(needed.shape, order.dtype))


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
