"""Which keys HashAttention attends, and attention over them.

A list is one set of selected keys: J = K lists a row where the group shares them, J = N where every
query head has its own. N/J query heads stand behind a list, with E codes in all; scores are summed
within each of ``config.best_of(E)`` parts, and a key has the score of its best part.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, UInt32

from kernels_pallas.gather_decode import gather_tokens
from kernels_pallas.hamming import Threshold, code_signs, hamming_select, hamming_threshold
from sparse_attn.documents import Rows
from sparse_attn.masked import masked_attention
from sparse_attn.one_head import apart, by_kv_head, map_kv_heads
from sparse_attn.selecting import allowed_keys
from sparse_attn.shards import WHOLE, Shards

if TYPE_CHECKING:
    from sparse_attn.hash_attention import HashAttention
    from sparse_attn.hash_cache import HashCache

FEW_ROWS = 8
"""Up to so many rows a decode step gathers the listed keys instead of masking all of them."""

FINEST_FRACTION = 2**14
"""Fractional budgets are rounded to a denominator up to this."""

Amount = int | float


class Candidates(NamedTuple):
    """The keys of a row: sinks [first, start), candidates [start, stop), recent ones [stop, last).

    All but ``budget`` are [B, T]; a padding row has nothing anywhere.
    """

    first: Int[Array, "B T"]
    start: Int[Array, "B T"]
    stop: Int[Array, "B T"]
    last: Int[Array, "B T"]
    budget: Int[Array, "B T J"]


def candidates(config: HashAttention, rows: Rows, lists: int) -> Candidates:
    """Where each row may choose, and how many keys: k_t, or ceil(f * (t + 1)) for a fraction f."""
    first = rows.start
    last = jnp.where(rows.valid, rows.index + 1, first)
    start = jnp.minimum(first + config.sinks, last)
    stop = jnp.maximum(last - config.recent, start)
    seen = last - first
    amounts = config.amounts(lists)
    if len(set(amounts)) == 1:
        budget = jnp.broadcast_to(budget_at(amounts[0], seen)[:, :, None], (*seen.shape, lists))
    else:
        budget = jnp.stack([budget_at(amount, seen) for amount in amounts], axis=2)
    return Candidates(first, start, stop, last, budget)


def budget_at(amount: Amount, seen: Any) -> Any:
    """Keys to select where ``seen`` tokens of the document are visible, in integers throughout."""
    return allowed_keys(amount, seen, FINEST_FRACTION)


def slots(config: HashAttention, capacity: int, lists: int) -> int:
    """P: the longest list of any row within ``capacity`` tokens."""
    most = max(budget_at(amount, capacity) for amount in config.amounts(lists))
    return min(capacity, config.sinks + config.recent + most)


def by_lists(q: Float[Array, "B T N H"], lists: int) -> Float[Array, "B T J E H"]:
    """Query heads, sorted to the lists they stand behind."""
    B, T, N, H = q.shape
    return q.reshape(B, T, lists, N // lists, H)


def key_lists(k: Float[Array, "B S K H"], lists: int) -> Float[Array, "B S J 1 H"]:
    """What each list hashes: its kv head's key."""
    B, S, K, H = k.shape
    spread = jnp.broadcast_to(k[:, :, :, None], (B, S, K, lists // K, H))
    return spread.reshape(B, S, lists, 1, H)


def select(
    config: HashAttention,
    q_codes: UInt32[Array, "B T J E W"],
    k_codes: UInt32[Array, "B J W S"],
    rows: Rows,
    capacity: int,
) -> Int[Array, "B T J P"]:
    """The lists of all rows, sinks and recent keys included. O(T * P) memory."""
    lists = q_codes.shape[2]
    place = candidates(config, rows, lists)
    return hamming_select(
        q_codes,
        k_codes,
        place.start,
        place.stop,
        place.budget,
        bits=config.bits,
        best_of=config.best_of(q_codes.shape[3]),
        slots=slots(config, capacity, lists),
        first=place.first,
        last=place.last,
        implementation=config.implementation,
    )


def gathered(
    config: HashAttention,
    q: Float[Array, "B T N H"],
    cache: HashCache,
    q_codes: UInt32[Array, "B T J E W"],
    rows: Rows,
    shards: Shards = WHOLE,
) -> Float[Array, "B T N Hv"]:
    """Attention of a few rows over their selections: work beyond the scan follows P, not S.

    Every device scans all codes; ``shards`` may split the tokens, which are attended where they
    are.
    """
    here = cache.capacity
    keys = here * shards.count if shards.cache_split else here
    indices = checkpoint_name(select(config, q_codes, cache.codes, rows, keys), "selection")
    part = gather_tokens(
        q,
        cache.kv,
        shards.own_list(indices, here),
        positions=rows.index - shards.cache_first(here),
        implementation=config.implementation,
    )
    return shards.merged(part).out


def masked(
    config: HashAttention,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    q_codes: UInt32[Array, "B T J E W"],
    k_codes: UInt32[Array, "B J W S2"],
    rows: Rows,
    live: Bool[Array, "B S"] | None,
) -> Float[Array, "B T N Hv"]:
    """Attention of many rows over their selections, in chunks.

    A selection is kept as score threshold and tie cut-off: O(T) memory, also for the backward
    pass, which compares scores with them again. Keys, values, signs and their gradients are
    O(S) in float32, of one kv head at a time where that is much.
    """
    keys, kv_heads = k.shape[1:3]
    place = candidates(config, rows, q_codes.shape[2])
    threshold = hamming_threshold(
        q_codes,
        k_codes,
        place.start,
        place.stop,
        place.budget,
        bits=config.bits,
        best_of=config.best_of(q_codes.shape[3]),
        implementation=config.implementation,
    )
    threshold = Threshold(*(checkpoint_name(x, "selection") for x in threshold))
    positions = jnp.arange(keys, dtype=jnp.int32)
    s = positions[None, None, None, :]

    def attend(parts: tuple[Any, ...]) -> Array:
        q, k, v, q_codes, k_codes, threshold = parts
        signs = code_signs(jnp.swapaxes(k_codes[..., :keys], 2, 3), config.bits, jnp.float32)
        signs = jnp.swapaxes(signs, 2, 3)

        def member(inputs: Any) -> Bool[Array, "B c J S"]:
            q_codes, place, threshold = inputs
            queries = part_sums(config, code_signs(q_codes, config.bits, jnp.float32))
            by_part = (jnp.matmul(jnp.moveaxis(part, 1, 2), signs) for part in queries)
            scores = jnp.moveaxis(functools.reduce(jnp.maximum, by_part), 2, 1)
            first, start, stop, last = (x[:, :, None, None] for x in place)
            chosen = threshold.selects(scores, positions) | (s < start) | (s >= stop)
            return chosen & (s >= first) & (s < last)

        return masked_attention(
            q,
            k,
            v,
            member,
            (q_codes, place[:4], threshold),
            live=live,
            implementation=config.implementation,
        ).out

    if not apart(k):
        return attend((q, k, v, q_codes, k_codes, threshold))
    *heads, level, cutoff = (by_kv_head(x, kv_heads) for x in (q, k, v, q_codes, *threshold))
    codes = by_kv_head(k_codes, kv_heads, axis=1)
    return map_kv_heads(attend, (*heads, codes, Threshold(level, cutoff)))


def part_sums(
    config: HashAttention, signs: Float[Array, "B T J E b"]
) -> list[Float[Array, "B T J b"]]:
    """Query signs, added up within each part; a score is the greatest product with a key's."""
    return [jnp.sum(x, axis=3) for x in jnp.split(signs, config.best_of(signs.shape[3]), axis=3)]


def packed(codes: Array) -> Array:
    """Key codes [B, S, J, W] in the order they are scanned in, [B, J, W, S]."""
    return jnp.transpose(codes, (0, 2, 3, 1))


def sampled(rows: Rows, index: Int[Array, " r"]) -> Rows:
    """Some of the rows."""
    return dataclasses.replace(
        rows,
        index=rows.index[:, index],
        start=rows.start[:, index],
        positions=rows.positions[:, index],
        valid=rows.valid[:, index],
    )
