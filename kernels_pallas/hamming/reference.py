"""The specification of selection by binary codes: dot products of signs, one stable sort."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from kernels_pallas.hamming.codes import Threshold, code_signs


def hamming_scores_reference(
    q_codes: UInt32[Array, "B T J G W"],
    k_codes: UInt32[Array, "B J W S"],
    *,
    bits: int,
    best_of: int = 1,
) -> Int[Array, "B T J S"]:
    """See :func:`kernels_pallas.hamming.hamming_scores`."""
    queries = code_signs(q_codes, bits, jnp.int32)
    keys = code_signs(jnp.swapaxes(k_codes, 2, 3), bits, jnp.int32)
    scores = jnp.einsum("BTJGb,BJSb->BTJGS", queries, keys)
    parts = scores.reshape(*scores.shape[:3], best_of, -1, scores.shape[4])
    return jnp.max(jnp.sum(parts, axis=4), axis=3)


def hamming_threshold_reference(
    q_codes: UInt32[Array, "B T J G W"],
    k_codes: UInt32[Array, "B J W S"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    budget: Int[Array, "B T J"],
    *,
    bits: int,
    best_of: int = 1,
) -> Threshold:
    """See :func:`kernels_pallas.hamming.hamming_threshold`; O(T*S) memory and a sort."""
    scores = hamming_scores_reference(q_codes, k_codes, bits=bits, best_of=best_of)
    keys = scores.shape[3]
    highest = q_codes.shape[3] // best_of * bits
    s = jnp.arange(keys, dtype=jnp.int32)[None, None, None, :]
    candidate = (s >= start[:, :, None, None]) & (s < stop[:, :, None, None])
    # From the most recent key backwards, so that a stable sort keeps recent ones ahead of equals.
    penalty = jnp.where(candidate, -scores, highest + 1)[..., ::-1]
    order = keys - 1 - jnp.argsort(penalty, axis=-1, stable=True).astype(jnp.int32)
    count = jnp.maximum(stop - start, 0)[:, :, None]
    taken = jnp.clip(budget, 0, count)
    worst = jnp.take_along_axis(order, jnp.maximum(taken - 1, 0)[..., None], axis=-1)
    level = jnp.take_along_axis(scores, worst, axis=-1)[..., 0]
    return Threshold(
        level=jnp.where(taken > 0, level, highest).astype(jnp.int32),
        cutoff=jnp.where(taken > 0, worst[..., 0], keys).astype(jnp.int32),
    )


def hamming_select_reference(
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
    options = {"bits": bits, "best_of": best_of}
    threshold = hamming_threshold_reference(q_codes, k_codes, start, stop, budget, **options)
    scores = hamming_scores_reference(q_codes, k_codes, **options)
    keys = scores.shape[3]
    positions = jnp.arange(keys, dtype=jnp.int32)
    s = positions[None, None, None, :]
    low, begin, end, high = (x[:, :, None, None] for x in (first, start, stop, last))
    chosen = (s >= begin) & (s < end) & threshold.selects(scores, positions)
    forced = ((s >= low) & (s < begin)) | ((s >= end) & (s < high))
    ordered = jnp.sort(jnp.where(chosen | forced, s, keys), axis=-1)[..., :slots]
    ordered = jnp.pad(
        ordered, ((0, 0), (0, 0), (0, 0), (0, max(slots - keys, 0))), constant_values=keys
    )
    return jnp.where(ordered < keys, ordered, -1)
