"""What teaches HashAttention's mappings: a relaxed score against the keys that attention prefers.

With u_q, u_k = phi of a query and a key and temperature tau, for list j of row t and key s:

    z[t, j, s] = mean over the list's query heads of sum_i tanh(u_q[i]/tau) tanh(u_k[s, i]/tau)
    target      y[t, j, s] = 1 for the ``fit_top`` candidates with the most attention
    bce         mean over candidates of  w softplus(-z) if y else softplus(z),  w = alpha + beta T
    ranking     mean over pairs (y = 1, y = 0) of  a^p softplus(z_negative - z_positive)

With ``hard_keys`` the bits of keys are signs here, with the gradient of tanh (straight-through,
Bengio et al. 2013). Candidates are the keys that are neither sinks nor recent. Attention is the
softmax probability, summed over the list's query heads (for one head: the order of q . k), times
|v| with ``value_aware_target``; a is that of the target, p the ``target_power``. T is the number of
tokens the row sees: its place in its own document, so that packing changes nothing. Rows with fewer
than ``fit_top`` candidates take them all.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, UInt32

from kernels_pallas.hamming import hamming_threshold, pack_codes
from sparse_attn.documents import Rows
from sparse_attn.hash_mapping import Mapping, level_bits
from sparse_attn.hash_selection import (
    Candidates,
    by_lists,
    candidates,
    packed,
    part_sums,
    sampled,
)
from sparse_attn.masked import map_rows, rows_per_chunk
from sparse_attn.shards import WHOLE, Shards

if TYPE_CHECKING:
    from sparse_attn.hash_attention import HashAttention

RANKING_NEGATIVES = 128
"""Keys a row is compared with by the ranking loss; all pairs would take O(32 * S) a row."""


def temperature(config: HashAttention, steps: Float[Array, ""]) -> Float[Array, ""]:
    """tau after ``steps`` training steps: geometrically from 1 to ``final_temperature``.

    ``anneal_steps`` = 0 keeps it at 1, as the paper does.
    """
    if config.anneal_steps == 0:
        return jnp.ones((), jnp.float32)
    progress = jnp.clip(steps.astype(jnp.float32) / config.anneal_steps, 0.0, 1.0)
    return jnp.float32(config.final_temperature) ** progress


def fit_loss(
    config: HashAttention,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    phi_q: Mapping,
    u_k: Float[Array, "B S J b"],
    rows: Rows,
    steps: Float[Array, ""],
    shards: Shards = WHOLE,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss on ``fit_rows`` rows, and how well the hard codes find its target.

    ``q`` and ``k`` are rotated; none of q, k and v receives a gradient, ``phi_q`` and ``u_k``, the
    numbers phi_k made of detached keys, do. Padding must hold finite numbers. Memory is
    O(fit_rows * S). ``rows`` are those of the whole sequence, ``shards`` may hold a part of ``q``.

    Returns:
      The loss (float32 scalar) and ``hash_recall`` (share of the targets of all lists that the
      codes select with the row's budget), ``hash_recall_worst`` (of the list where it is least),
      ``hash_temperature``.
    """
    q, k, v = jax.lax.stop_gradient((q, k, v))
    lists = u_k.shape[2]
    picked = pick_rows(k.shape[1], config.fit_rows, steps)
    rows_of_loss, q = sampled(rows, picked), shards.take(q, picked)
    place = candidates(config, rows_of_loss, lists)
    target, attention = targets(config, q, k, v, place)
    target = checkpoint_name(target, "selection")
    u_q = phi_q(by_lists(q, lists))
    tau = temperature(config, steps).astype(u_q.dtype)
    query, soft = jnp.mean(jnp.tanh(u_q / tau), axis=3), jnp.tanh(u_k / tau)
    key = soft
    if config.hard_keys:
        key = soft + jax.lax.stop_gradient(jnp.where(u_k > 0, 1.0, -1.0).astype(soft.dtype) - soft)
    if config.loss == "bce":
        loss = _bce(config, query, key, target, place, shards)
    else:
        weight = attention**config.target_power if config.target_power else None
        loss = _ranking(query, key, target, place, steps, weight, shards)
    if config.balance > 0:
        loss = loss + config.balance * (
            _imbalance(jnp.tanh(u_q / tau), rows_of_loss, shards)
            + _imbalance(soft[:, :, :, None], rows, shards)
        )
    metrics = recall(config, u_q, u_k, target, place, shards)
    metrics["hash_temperature"] = tau.astype(jnp.float32)
    return loss.astype(jnp.float32), metrics


def pick_rows(tokens: int, count: int, steps: Float[Array, ""]) -> Int[Array, " r"]:
    """One row of each of ``count`` equal stretches of [0, T), another one at every step.

    A hash of the step and the stretch decides: the same call always takes the same rows.
    """
    count = min(count, tokens)
    edges = (jnp.arange(count + 1) * tokens) // count
    low, width = edges[:-1], jnp.diff(edges)
    shift = scramble(jnp.arange(count, dtype=jnp.uint32), steps) % width.astype(jnp.uint32)
    return (low + shift.astype(low.dtype)).astype(jnp.int32)


def scramble(x: UInt32[Array, "*rest"], steps: Float[Array, ""]) -> UInt32[Array, "*rest"]:
    """A well mixed 32-bit hash of (x, step)."""
    x = x * jnp.uint32(0x9E3779B1) + steps.astype(jnp.uint32) * jnp.uint32(0x85EBCA77)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def targets(
    config: HashAttention,
    q: Float[Array, "B r N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    place: Candidates,
) -> tuple[Int[Array, "B r J F"], Float[Array, "B r J F"]]:
    """Positions of the F = ``fit_top`` candidates with the most attention, best first, -1 trailing.

    Of equals the most recent come first. Also the attention each of them gets (0 where there is
    none).
    """
    B, S, K, H = k.shape
    N, lists = q.shape[2], place.budget.shape[2]
    G, top = N // K, min(config.fit_top, S)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    keys = jnp.transpose(k, (0, 2, 3, 1)).astype(dtype)
    s = jnp.arange(S, dtype=jnp.int32)[None, None, :]
    # log|v|, where a value of zero is the least of all but still a candidate.
    norm = jnp.linalg.norm(v.astype(dtype), axis=-1)
    log_norm = jnp.log(jnp.maximum(norm, jnp.finfo(dtype).tiny)).transpose(0, 2, 1)

    def best(inputs: Any) -> tuple[Array, Array]:
        q, place = inputs
        c = q.shape[1]
        grouped = jnp.transpose(q.reshape(B, c, K, G, H), (0, 2, 3, 1, 4)).astype(dtype)
        logits = jnp.matmul(grouped.reshape(B, K, G * c, H), keys) * H**-0.5
        logits = logits.reshape(B, K, G, c, S)
        first, start, stop, last = (x[:, :, None] for x in place[:4])
        visible = ((s >= first) & (s < last))[:, None, None]
        logits = jnp.where(visible, logits, -jnp.inf)
        lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        wanted = logits - jnp.where(jnp.isneginf(lse), 0.0, lse)
        if lists == K and G > 1:
            wanted = jax.nn.logsumexp(wanted, axis=2)[:, :, None]
        if config.value_aware_target:
            wanted = wanted + log_norm[:, :, None, None]
        wanted = jnp.where(((s >= start) & (s < stop))[:, None, None], wanted, -jnp.inf)
        # top_k prefers the first of equals: hand it the most recent key first.
        value, place_of = jax.lax.top_k(wanted.reshape(B, lists, c, S)[..., ::-1], top)
        position = jnp.where(jnp.isneginf(value), -1, S - 1 - place_of)
        return jnp.moveaxis(position.astype(jnp.int32), 2, 1), jnp.moveaxis(jnp.exp(value), 2, 1)

    chunk = rows_per_chunk(q.shape[1], B * N * S)
    return jax.lax.stop_gradient(map_rows(best, (q, place), chunk=chunk))


def recall(
    config: HashAttention,
    u_q: Float[Array, "B r J E b"],
    u_k: Float[Array, "B S J b"],
    target: Int[Array, "B r J F"],
    place: Candidates,
    shards: Shards = WHOLE,
) -> dict[str, Float[Array, ""]]:
    """Share of the targets among the keys that the hard codes select; 1 without any target."""
    u_q, u_k = jax.lax.stop_gradient((u_q, u_k))
    bits = level_bits(u_q, config.query_levels, config.code_temperature)
    threshold = hamming_threshold(
        pack_codes(bits),
        packed(pack_codes(u_k > 0)),
        place.start,
        place.stop,
        place.budget,
        bits=config.bits,
        best_of=config.best_of(bits.shape[3]),
        implementation=config.implementation,
    )
    signs = jnp.where(u_k > 0, 1.0, -1.0)
    queries = part_sums(config, jnp.where(bits, 1.0, -1.0))
    scores = functools.reduce(jnp.maximum, (_scores_at(x, signs, target) for x in queries))
    level, cutoff = (x[..., None] for x in threshold)
    found = (scores > level) | ((scores == level) & (target >= cutoff))
    listed = target >= 0
    hits, wanted = shards.batch_total(
        tuple(jnp.sum(x, axis=(0, 1, 3)).astype(jnp.float32) for x in (found & listed, listed))
    )

    def share(hits: Array, wanted: Array) -> Array:
        return jnp.where(wanted > 0, hits / jnp.maximum(wanted, 1.0), 1.0)

    return {
        "hash_recall": share(jnp.sum(hits), jnp.sum(wanted)),
        "hash_recall_worst": jnp.min(share(hits, wanted)),
    }


def _scores_at(
    query: Float[Array, "B r J b"],
    key: Float[Array, "B S J b"],
    positions: Int[Array, "B r J F"],
) -> Float[Array, "B r J F"]:
    """Scores of the keys at ``positions`` (any number where that is negative)."""
    batch = jnp.arange(key.shape[0])[:, None, None, None]
    lists = jnp.arange(key.shape[2])[None, None, :, None]
    return jnp.einsum("BrJb,BrJFb->BrJF", query, key[batch, jnp.maximum(positions, 0), lists])


def _bce(
    config: HashAttention,
    query: Array,
    key: Array,
    target: Array,
    place: Candidates,
    shards: Shards,
) -> Float[Array, ""]:
    """Weighted binary cross-entropy, mean over all candidates of all rows and lists.

    Every candidate counts as a negative first, in chunks of rows; the few targets are put right.
    """
    B, S, J, _ = key.shape
    keys = jnp.transpose(key, (0, 2, 3, 1))
    s = jnp.arange(S, dtype=jnp.int32)[None, None, None, :]

    def negatives(inputs: Any) -> Array:
        query, start, stop = inputs
        z = jnp.matmul(jnp.moveaxis(query, 1, 2), keys)
        legal = (s >= start[:, None, :, None]) & (s < stop[:, None, :, None])
        return jnp.sum(jnp.where(legal, jax.nn.softplus(z), 0.0), axis=(1, 3))

    chunk = rows_per_chunk(query.shape[1], B * J * S)
    total = jnp.sum(map_rows(negatives, (query, place.start, place.stop), chunk=chunk))
    z = _scores_at(query, key, target)
    seen = (place.last - place.first)[:, :, None, None].astype(z.dtype)
    weight = config.positive_weight + config.positive_weight_per_token * seen
    corrected = weight * jax.nn.softplus(-z) - jax.nn.softplus(z)
    total = total + jnp.sum(jnp.where(target >= 0, corrected, 0.0))
    pairs = J * jnp.sum((place.stop - place.start).astype(total.dtype))
    total, pairs = shards.batch_total((total, pairs))
    return total / jnp.maximum(pairs, 1.0)


def _ranking(
    query: Array,
    key: Array,
    target: Array,
    place: Candidates,
    steps: Array,
    weight: Array | None,
    shards: Shards,
) -> Float[Array, ""]:
    """Bradley-Terry: targets above other candidates, of which each row draws some by a hash."""
    width = (place.stop - place.start)[:, :, None]
    draw = jnp.arange(RANKING_NEGATIVES, dtype=jnp.uint32)[None, None, :]
    draw = draw + place.last[:, :, None].astype(jnp.uint32) * jnp.uint32(RANKING_NEGATIVES)
    shift = scramble(draw, steps) % jnp.maximum(width, 1).astype(jnp.uint32)
    negative = jnp.where(width > 0, place.start[:, :, None] + shift.astype(jnp.int32), -1)
    negative = jnp.broadcast_to(negative[:, :, None], (*target.shape[:3], RANKING_NEGATIVES))
    is_target = jnp.any(negative[..., None] == target[..., None, :], axis=-1)
    usable = (target >= 0)[..., :, None] & ((negative >= 0) & ~is_target)[..., None, :]
    gap = (
        _scores_at(query, key, target)[..., :, None]
        - _scores_at(query, key, negative)[..., None, :]
    )
    pairs = jnp.where(usable, jax.nn.softplus(-gap), 0.0)
    if weight is None:
        total, count = shards.batch_total((jnp.sum(pairs), jnp.sum(usable)))
        return total / jnp.maximum(count, 1)
    counted = jnp.sum(jnp.where(usable, weight[..., None], 0.0))
    total, counted = shards.batch_total((jnp.sum(pairs * weight[..., None]), counted))
    return total / jnp.maximum(counted, jnp.finfo(weight.dtype).tiny)


def _imbalance(relaxed: Float[Array, "B T J E b"], rows: Rows, shards: Shards) -> Float[Array, ""]:
    """Mean over bits of the squared mean of the bit: 0 if every bit is set half of the time."""
    valid = rows.valid[:, :, None, None, None]
    total, count = shards.batch_total(
        (jnp.sum(jnp.where(valid, relaxed, 0.0), axis=(0, 1, 3)), jnp.sum(valid))
    )
    mean = total / (jnp.maximum(count, 1) * relaxed.shape[3])
    return jnp.mean(mean**2)
