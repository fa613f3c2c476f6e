"""Block scores of a handful of rows (decode): all entries in one product.

The caller's cache should hold keys as [B, K, H, C] and values as [B, K, C, Hv] and pass their
transposed views: the transpositions below then cancel, and both products stream memory in order.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.block_scores.ranking import Ranking
from kernels_pallas.common import accumulation_dtype
from kernels_pallas.ranged.tiling import precision_of

WHOLE_ENTRIES = 8192
"""Up to this capacity all entries are read, visible or not; beyond, only the visible ones."""


def score_few_rows(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C K H"],
    v: Float[Array, "B C K Hv"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    first_block: Int[Array, "B T"],
    last_block: Int[Array, "B T"],
    ranking: Ranking,
    scale: float,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"], Int[Array, "B T K P"]]:
    """``out``, ``lse`` and ``indices`` as in the api; O(B T N C) memory."""
    B, T, N, _ = q.shape
    C, K, Hv = v.shape[1:]
    dtype, precision = accumulation_dtype(q.dtype), precision_of(q.dtype)
    values = jnp.swapaxes(v, 1, 2).astype(dtype)
    logits = entry_logits(q, k, start, stop, scale)
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(jnp.isneginf(top), 0.0, top))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    seen = total > 0
    safe_total = jnp.where(seen, total, 1.0)
    lse = jnp.where(seen, top + jnp.log(safe_total), -jnp.inf)
    weights = weights / safe_total

    def attend(values: Array) -> Array:
        return jnp.matmul(weights.reshape(B, K, -1, C), values, precision=precision)

    def attend_what_is_seen() -> Array:
        entry = jnp.arange(C, dtype=jnp.int32)[None, None, :]
        visible = (entry >= start[..., None]) & (entry < stop[..., None])
        someone = jnp.any(visible, axis=1)[:, None, :, None]
        return attend(jnp.where(someone, values, 0))

    # Unwritten entries may hold anything and 0 * NaN is not 0; masking them costs a second pass
    # over the values, so it waits until it is needed.
    out = attend(values)
    out = jax.lax.cond(jnp.all(jnp.isfinite(out)), lambda: out, attend_what_is_seen)
    out = jnp.swapaxes(out.reshape(B, K, T, N // K, Hv), 1, 2).reshape(B, T, N, Hv)
    lse = jnp.swapaxes(lse[..., 0], 1, 2).reshape(B, T, N)

    shares = jnp.swapaxes(jnp.sum(weights, axis=3), 1, 2).reshape(B * T * K, C)
    first, last = (jnp.repeat(blocks.reshape(-1), K) for blocks in (first_block, last_block))
    indices = ranking.top_blocks(shares, first, last).reshape(B, T, K, -1)
    return out.astype(q.dtype), lse, indices


def select_few_rows(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C K H"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    first_block: Int[Array, "B T"],
    last_block: Int[Array, "B T"],
    lse: Float[Array, "B T N"] | None,
    budget: Int[Array, "B T J"] | None,
    ranking: Ranking,
    share: bool,
    scale: float,
) -> Int[Array, "B T J P"]:
    """``select_blocks`` as in the api; O(B T N C) memory."""
    B, T, N, _ = q.shape
    C, K = k.shape[1:3]
    G = N // K
    logits = entry_logits(q, k, start, stop, scale)
    if (share and G > 1) or ranking.floor is not None:
        if lse is None:
            shift = jax.nn.logsumexp(logits, axis=-1)
        else:
            given = jnp.swapaxes(lse.reshape(B, T, K, G), 1, 2).astype(logits.dtype)
            missing = jnp.isneginf(given)
            shift = jax.lax.cond(
                jnp.any(missing),
                lambda: jnp.where(missing, jax.nn.logsumexp(logits, axis=-1), given),
                lambda: given,
            )
        logits = logits - jnp.where(jnp.isneginf(shift), 0.0, shift)[..., None]
    scores = _sum_group(logits) if share and G > 1 else logits
    lists = K if share else N
    scores = jnp.swapaxes(scores, 1, 2).reshape(B * T * lists, C)
    first, last = (jnp.repeat(blocks.reshape(-1), lists) for blocks in (first_block, last_block))
    slots = None if budget is None else budget.reshape(-1)
    return ranking.top_blocks(scores, first, last, slots).reshape(B, T, lists, -1)


def _sum_group(logits: Float[Array, "B K T G C"]) -> Float[Array, "B K T 1 C"]:
    """The log-sum-exp over a group's heads; unrolled, which CPUs run faster than a reduction."""
    heads = [logits[:, :, :, g] for g in range(logits.shape[3])]
    top = functools.reduce(jnp.maximum, heads)
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    total = sum(jnp.exp(head - top) for head in heads)
    # Fused into the pooling, every overlap of an entry and a block would sum again.
    return jax.lax.optimization_barrier(top + jnp.log(total))[:, :, :, None]


def entry_logits(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C K H"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B K T G C"]:
    """scale * q . k of a few rows, -inf for entries out of sight: one product a kv head."""
    B, T, N, H = q.shape
    C, K = k.shape[1:3]
    dtype, precision = accumulation_dtype(q.dtype), precision_of(q.dtype)
    keys = jnp.transpose(k, (0, 2, 3, 1)).astype(dtype)
    queries = jnp.swapaxes(q.reshape(B, T, K, N // K, H), 1, 2).reshape(B, K, -1, H).astype(dtype)
    logits = jnp.matmul(queries * scale, keys, precision=precision).reshape(B, K, T, N // K, C)
    entry = jnp.arange(C, dtype=jnp.int32)[None, None, :]
    visible = (entry >= start[..., None]) & (entry < stop[..., None])
    return jnp.where(visible[:, None, :, None], logits, -jnp.inf)
