"""Selection by binary codes in XLA: ranks of one byte, bisected instead of sorted.

A key's rank is 0 if it is forced, 1 + its Hamming distance (summed over the group) if it is a
candidate, and more than any distance if it is neither. The best m keys are those up to some rank,
found by counting a few times; ties at that rank are cut at a position. Few rows (decode) score by
popcounts of packed words, the query codes of a list summed first; many rows by a product of signs,
which is the same number.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

from kernels_pallas.hamming.codes import WORD, Threshold, code_signs, sum_codes

PRODUCT_ROWS = 8
"""From this many query rows on, scores are products of signs."""

CHUNK_ELEMENTS = 2**19
"""Ranks [B, rows, J, S] that are alive at a time."""


class _Call(NamedTuple):
    """What every row of a call brings: ranges [B, T] as in the api, and its codes and budget."""

    q_codes: Any
    first: Any
    start: Any
    stop: Any
    last: Any
    budget: Any


def hamming_scores_xla(
    q_codes: UInt32[Array, "B T J G W"],
    k_codes: UInt32[Array, "B J W S"],
    *,
    bits: int,
    best_of: int = 1,
) -> Int[Array, "B T J S"]:
    """See :func:`kernels_pallas.hamming.hamming_scores`."""
    highest = q_codes.shape[3] // best_of * bits
    return highest - 2 * _distances(q_codes, k_codes, bits, best_of)(q_codes).astype(jnp.int32)


def hamming_threshold_xla(
    q_codes: UInt32[Array, "B T J G W"],
    k_codes: UInt32[Array, "B J W S"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    budget: Int[Array, "B T J"],
    *,
    bits: int,
    best_of: int = 1,
) -> Threshold:
    """See :func:`kernels_pallas.hamming.hamming_threshold`; O(chunk * S) memory."""
    highest, keys = q_codes.shape[3] // best_of * bits, k_codes.shape[3]
    distances = _distances(q_codes, k_codes, bits, best_of)

    def rows(call: _Call) -> Threshold:
        ranks = _ranks(distances(call.q_codes), call, highest)
        worst, _, cutoff = _cut(ranks, _wanted(call), highest)
        empty = worst == 0
        level = jnp.where(empty, highest, highest - 2 * (worst - 1))
        return Threshold(level, jnp.where(empty, keys, cutoff))

    stop = jnp.maximum(stop, start)
    call = _Call(q_codes, start, start, stop, stop, budget)
    return _in_chunks(rows, call, keys)


def hamming_select_xla(
    q_codes: UInt32[Array, "B T J G W"],
    k_codes: UInt32[Array, "B J W S"],
    first: Int[Array, "B T"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    last: Int[Array, "B T"],
    budget: Int[Array, "B T J"],
    *,
    bits: int,
    slots: int,
    best_of: int = 1,
) -> Int[Array, "B T J P"]:
    """See :func:`kernels_pallas.hamming.hamming_select`."""
    highest, keys = q_codes.shape[3] // best_of * bits, k_codes.shape[3]
    distances = _distances(q_codes, k_codes, bits, best_of)

    def rows(call: _Call) -> Array:
        ranks = _ranks(distances(call.q_codes), call, highest)
        wanted = _wanted(call)
        worst, ties, cutoff = _cut(ranks, wanted, highest)
        better = _words(ranks < worst[..., None].astype(ranks.dtype))
        member = jnp.where((wanted > 0)[..., None], better | _from_bit(ties, cutoff), 0)
        return _compact(jax.lax.optimization_barrier(member), slots)

    call = _Call(q_codes, first, start, stop, last, budget)
    return _in_chunks(rows, call, keys)


def _distances(q_codes: Array, k_codes: Array, bits: int, best_of: int) -> Callable[[Array], Array]:
    """The function from query codes [B, c, J, G, W] to distances [B, c, J, S]: the least of the
    sums of each part of the codes.
    """
    words, group = q_codes.shape[4], q_codes.shape[3] // best_of

    def least(distances: Callable[[Array], Array]) -> Callable[[Array], Array]:
        def of_parts(q_codes: Array) -> Array:
            parts = jnp.split(q_codes, best_of, axis=3)
            return functools.reduce(jnp.minimum, (distances(part) for part in parts))

        return of_parts

    if q_codes.shape[1] < PRODUCT_ROWS:

        def by_popcount(q_codes: Array) -> Array:
            majority, masks, constant = sum_codes(q_codes, bits)
            total = constant[..., None].astype(jnp.uint32)
            for w in range(words):
                x = majority[..., w, None] ^ k_codes[:, None, :, w]
                if group % 2:
                    total = total + jax.lax.population_count(x)
                for digit, mask in enumerate(masks):
                    counted = jax.lax.population_count(x & mask[..., w, None])
                    total = total + (counted << (digit + 1))
            return total

        return least(by_popcount)

    # Small integers: exact in either dtype. A group's signs add up before the product.
    dtype = jnp.float32 if jax.default_backend() == "cpu" or group * bits > 256 else jnp.bfloat16
    signs = code_signs(jnp.swapaxes(k_codes, 2, 3), bits, dtype)
    keys = jnp.swapaxes(signs, 2, 3)

    def by_product(q_codes: Array) -> Array:
        queries = jnp.sum(code_signs(q_codes, bits, dtype), axis=3)
        scores = jnp.matmul(jnp.moveaxis(queries, 1, 2), keys, preferred_element_type=jnp.float32)
        return jnp.moveaxis((group * bits - scores) * 0.5, 2, 1)

    return least(by_product)


def _ranks(distances: Array, call: _Call, highest: int) -> Int[Array, "B c J S"]:
    """Ranks in the narrowest dtype that holds them, padded to whole groups of keys."""
    dtype = jnp.uint8 if highest + 2 < 2**8 else jnp.uint16 if highest + 2 < 2**16 else jnp.int32
    s = jnp.arange(distances.shape[3], dtype=jnp.uint32)[None, None, None, :]

    def within(low: Array, high: Array) -> Array:
        """low <= s < high as one comparison: what lies below wraps around."""
        low, width = (x.astype(jnp.uint32)[:, :, None, None] for x in (low, high - low))
        return s - low < width

    ranks = distances.astype(jnp.uint32) + 1
    ranks = jnp.where(within(call.start, call.stop), ranks, 0)
    ranks = jnp.where(within(call.first, call.last), ranks, highest + 2).astype(dtype)
    padding = ((0, 0), (0, 0), (0, 0), (0, -ranks.shape[3] % WORD))
    ranks = jnp.pad(ranks, padding, constant_values=highest + 2)
    # Otherwise every pass that counts ranks computes all of them again.
    return jax.lax.optimization_barrier(ranks)


def _wanted(call: _Call) -> Int[Array, "B c J"]:
    """How many keys each list holds, the forced ones included."""
    count = (call.stop - call.start)[:, :, None]
    forced = (call.last - call.first)[:, :, None] - count
    return forced + jnp.clip(call.budget, 0, count)


def _cut(
    ranks: Int[Array, "B c J S"], wanted: Int[Array, "B c J"], highest: int
) -> tuple[Int[Array, "B c J"], UInt32[Array, "B c J S/32"], Int[Array, "B c J"]]:
    """The rank of the worst wanted key, the keys of that rank, and from where on they are taken.

    (0, anything, anything) where nothing is wanted.
    """
    low = jnp.zeros_like(wanted)
    high = jnp.full_like(wanted, highest + 1)
    better = jnp.zeros_like(wanted)
    # Invariant: at least `wanted` keys rank up to `high`; `better` keys rank below `low`.
    for _ in range(math.ceil(math.log2(highest + 2))):
        middle = (low + high) // 2
        count = _count(ranks <= middle[..., None].astype(ranks.dtype))
        enough = count >= wanted
        high = jnp.where(enough, middle, high)
        low = jnp.where(enough, low, jnp.minimum(middle + 1, high))
        better = jnp.where(enough, better, count)
    ties = _words(ranks == high[..., None].astype(ranks.dtype))
    ties = jax.lax.optimization_barrier(ties)
    return high, ties, _last_ones(ties, wanted - better)


def _count(mask: Bool[Array, "B c J S"]) -> Int[Array, "B c J"]:
    """Set entries, added up in bytes first: many more of them fit into a vector."""
    few = jnp.sum(mask.reshape(*mask.shape[:3], WORD, -1), axis=3, dtype=jnp.uint8)
    # Fused into the second sum, the first would be taken in its wide numbers.
    return jnp.sum(jax.lax.optimization_barrier(few), axis=3, dtype=jnp.int32)


def _last_ones(
    words: UInt32[Array, "B c J S/32"], count: Int[Array, "B c J"]
) -> Int[Array, "B c J"]:
    """The position of the ``count``-th set bit from the end; anything if it does not exist.

    It is looked for among runs of words, among the words of a run and in a word, so that running
    sums stay short.
    """
    words = jnp.pad(words, ((0, 0), (0, 0), (0, 0), (0, -words.shape[3] % WORD)))
    words = words.reshape(*words.shape[:3], -1, WORD)
    sizes = jnp.sum(jax.lax.population_count(words).astype(jnp.int32), axis=4)
    run, number = _part(sizes, jnp.sum(sizes, axis=3) - count)
    words = jnp.take_along_axis(words, run[..., None, None], axis=3)[..., 0, :]
    word, number = _part(jax.lax.population_count(words).astype(jnp.int32), number)
    last = jnp.take_along_axis(words, word[..., None], axis=3)[..., 0]
    return (run * WORD + word) * WORD + _nth_bit(last, number)


def _part(
    sizes: Int[Array, "B c J M"], number: Int[Array, "B c J"]
) -> tuple[Int[Array, "B c J"], Int[Array, "B c J"]]:
    """In which part of so many entries entry ``number`` (0-based) is, and its number in there."""
    running = jnp.cumsum(sizes, axis=3, dtype=jnp.int32)
    passed = running <= number[..., None]
    part = jnp.minimum(jnp.sum(passed, axis=3, dtype=jnp.int32), sizes.shape[3] - 1)
    return part, number - jnp.max(jnp.where(passed, running, 0), axis=3)


def _from_bit(
    words: UInt32[Array, "B c J S/32"], first: Int[Array, "B c J"]
) -> UInt32[Array, "B c J S/32"]:
    """The words without the set bits before position ``first``."""
    start = jnp.arange(words.shape[3], dtype=jnp.int32)[None, None, None, :] * WORD
    missing = jnp.clip(first[..., None] - start, 0, WORD)
    kept = words >> jnp.minimum(missing, WORD - 1).astype(jnp.uint32)
    kept = kept << jnp.minimum(missing, WORD - 1).astype(jnp.uint32)
    return jnp.where(missing < WORD, kept, 0)


def _compact(words: UInt32[Array, "B c J S/32"], slots: int) -> Int[Array, "B c J P"]:
    """Positions of set bits, ascending, -1 where there are fewer than ``slots``.

    A slot's entry is in the word before which no more entries lie than the slot's number: words are
    counted into the slot at which they end, and added up. (The running maximum of the words' first
    slots would say the same, but is slow in XLA on a CPU.) Work follows S/32 + P.
    """
    sizes = jax.lax.population_count(words).astype(jnp.int32)
    running = jnp.cumsum(sizes, axis=-1, dtype=jnp.int32)
    before = jax.lax.optimization_barrier(running - sizes)
    lists = math.prod(words.shape[:3])
    home = jnp.arange(lists, dtype=jnp.int32).reshape(*words.shape[:3], 1) * slots
    target = jnp.where(running < slots, home + running, lists * slots).reshape(-1)
    ended = jnp.zeros((lists * slots,), jnp.int32).at[target].add(1, mode="drop")
    ended = jax.lax.optimization_barrier(ended).reshape(*words.shape[:3], slots)
    word = jnp.minimum(jnp.cumsum(ended, axis=3, dtype=jnp.int32), words.shape[3] - 1)
    word = jax.lax.optimization_barrier(word)
    slot = jnp.arange(slots, dtype=jnp.int32)[None, None, None, :]
    inside = slot - jnp.take_along_axis(before, word, axis=3)
    position = word * WORD + _nth_bit(jnp.take_along_axis(words, word, axis=3), inside)
    return jnp.where(slot < running[..., -1:], position, -1)


def _words(mask: Bool[Array, "B c J S"]) -> UInt32[Array, "B c J S/32"]:
    """Entry s as bit s % 32 of word s // 32, by way of bytes."""
    lanes = mask.reshape(*mask.shape[:3], -1, 8).astype(jnp.uint8)
    shift = jnp.arange(8, dtype=jnp.uint8)[None, None, None, None, :]
    octets = jnp.sum(lanes << shift, axis=-1, dtype=jnp.uint8)
    octets = octets.reshape(*octets.shape[:3], -1, 4)
    return jax.lax.bitcast_convert_type(octets, jnp.uint32)


def _nth_bit(words: UInt32[Array, "*rest"], number: Int[Array, "*rest"]) -> Int[Array, "*rest"]:
    """The place of set bit ``number`` (0-based) of each word."""
    place = jnp.zeros_like(number)
    for width in (16, 8, 4, 2, 1):
        below = jnp.uint32(2**width - 1)
        part = (words >> place.astype(jnp.uint32)) & below
        count = jax.lax.population_count(part).astype(jnp.int32)
        higher = number >= count
        number = jnp.where(higher, number - count, number)
        place = jnp.where(higher, place + width, place)
    return place


def _in_chunks(function: Callable[[_Call], Any], call: _Call, keys: int) -> Any:
    """``function`` over as many rows at a time as keep the ranks small."""
    batch, rows, lists = call.budget.shape
    chunk = max(1, min(rows, CHUNK_ELEMENTS // (batch * lists * keys)))
    if chunk >= rows:
        return function(call)
    pad = -rows % chunk

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pad), *((0, 0) for _ in x.shape[2:])))
        return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(batch, rows + pad, *x.shape[3:])[:, :rows]

    return jax.tree.map(join, jax.lax.map(function, jax.tree.map(split, call)))
