"""Selection by binary codes: the public calls, their checks and their choice of a backend.

Axis alphabet: see :mod:`sparse_attn.types`. A list is what selects one set of keys: J lists a row,
each with one key code and G query codes, whose scores are summed (the query heads of a group that
share a list; G = 1 if every query head selects for itself), or summed in ``best_of`` parts of which
the best counts (the heads, where each has several codes).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

from kernels_pallas.common import Implementation, dispatch, kernels
from kernels_pallas.hamming import reference, xla
from kernels_pallas.hamming.codes import Threshold, word_count

_SCORES = {
    "reference": reference.hamming_scores_reference,
    "xla": xla.hamming_scores_xla,
    **kernels("hamming", "hamming_scores"),
}
_THRESHOLD = {
    "reference": reference.hamming_threshold_reference,
    "xla": xla.hamming_threshold_xla,
    **kernels("hamming", "hamming_threshold"),
}
_SELECT = {
    "reference": reference.hamming_select_reference,
    "xla": xla.hamming_select_xla,
    **kernels("hamming", "hamming_select"),
}


def hamming_scores(
    q_codes: UInt32[Array, "B T J G W"],
    k_codes: UInt32[Array, "B J W S"],
    *,
    bits: int,
    best_of: int = 1,
    implementation: Implementation = "auto",
) -> Int[Array, "B T J S"]:
    """How well codes agree, summed over the group.

        score[t, j, s] = sum_g (bits - 2 popcount(q[t, j, g] ^ k[j, s])) = sum_g sign_q . sign_k

    int32 in [-G * bits, G * bits] (G / best_of in place of G), all of one parity. O(T*S) memory:
    for tests and few rows.

    Args:
      q_codes: packed codes of the queries (:func:`kernels_pallas.hamming.pack_codes`), W words.
      k_codes: packed codes of the keys, positions last, which is the order they are scanned in.
      bits: length of a code; the unused bits of the last word must be 0 on both sides.
      best_of: number of equal parts of the G codes, neighbours together: scores are summed within
        a part, and a key has the score of its best part.
      implementation: backend name, see :func:`kernels_pallas.common.dispatch`.

    Raises:
      ValueError: on shapes or dtypes that do not fit together.
    """
    _check_codes(q_codes, k_codes, bits, best_of)
    options = {"bits": bits, "best_of": best_of}
    return dispatch("hamming_scores", implementation, _SCORES, q_codes, k_codes, **options)


def hamming_threshold(
    q_codes: UInt32[Array, "B T J G W"],
    k_codes: UInt32[Array, "B J W S"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    budget: Int[Array, "B T J"],
    *,
    bits: int,
    best_of: int = 1,
    implementation: Implementation = "auto",
) -> Threshold:
    """The ``budget`` best keys of every list among the candidates [start, stop), in O(T) memory.

    Scores are those of :func:`hamming_scores`; of equal ones the more recent key is better. Exact:
    a histogram over the G * bits + 1 score levels is cut, nothing is sorted. Keys without a place
    among the candidates may hold any code.

    Args:
      q_codes: packed codes of the queries.
      k_codes: packed codes of the keys.
      start: first candidate of each row, clipped to [0, S].
      stop: one past the last candidate; ``stop <= start`` leaves nothing to select.
      budget: keys to select; more than there are candidates selects all, 0 or less none.
      bits: length of a code.
      best_of: parts of the G codes, of which a key's best counts.
      implementation: backend name.

    Returns:
      :class:`Threshold`: score and position of the worst selected key. Never differentiated.

    Raises:
      ValueError: on shapes or dtypes that do not fit together.
    """
    _check_codes(q_codes, k_codes, bits, best_of)
    _check_rows(q_codes, budget, start=start, stop=stop)
    keys = k_codes.shape[3]
    start, stop = (jnp.clip(x, 0, keys).astype(jnp.int32) for x in (start, stop))
    return dispatch(
        "hamming_threshold",
        implementation,
        _THRESHOLD,
        q_codes,
        k_codes,
        start,
        stop,
        budget.astype(jnp.int32),
        bits=bits,
        best_of=best_of,
    )


def hamming_select(
    q_codes: UInt32[Array, "B T J G W"],
    k_codes: UInt32[Array, "B J W S"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    budget: Int[Array, "B T J"],
    *,
    bits: int,
    slots: int,
    first: Int[Array, "B T"] | None = None,
    last: Int[Array, "B T"] | None = None,
    best_of: int = 1,
    implementation: Implementation = "auto",
) -> Int[Array, "B T J P"]:
    """The selection of :func:`hamming_threshold` as lists of positions, with forced neighbours.

    Every list holds the keys [first, start), the ``budget`` best candidates in [start, stop) and
    the keys [stop, last): sinks and recent keys surround the candidates and are not scored.

    Args:
      q_codes: packed codes of the queries.
      k_codes: packed codes of the keys.
      start: first candidate of each row.
      stop: one past the last candidate; taken as ``start`` where it is less.
      budget: candidates to select.
      bits: length of a code.
      best_of: parts of the G codes, of which a key's best counts.
      slots: P. A list that needs more keeps its P earliest keys, so give it room for the forced
        keys and the budget.
      first: first forced key, default ``start``.
      last: one past the last forced key, default ``stop``.
      implementation: backend name.

    Returns:
      int32 positions, ascending, unique, -1 trailing. Never differentiated.

    Raises:
      ValueError: on shapes or dtypes that do not fit together, ``slots < 1``, and, where the
        ranges and the budget are concrete, on a list that does not fit into its slots.
    """
    first = start if first is None else first
    last = stop if last is None else last
    _check_codes(q_codes, k_codes, bits, best_of)
    _check_rows(q_codes, budget, start=start, stop=stop, first=first, last=last)
    if slots < 1:
        raise ValueError(f"slots={slots} must be at least 1")
    keys = k_codes.shape[3]
    first, start, stop, last = (
        jnp.clip(x, 0, keys).astype(jnp.int32) for x in (first, start, stop, last)
    )
    start = jnp.maximum(start, first)
    stop = jnp.maximum(stop, start)
    last = jnp.maximum(last, stop)
    _check_slots(first, start, stop, last, budget, slots)
    return dispatch(
        "hamming_select",
        implementation,
        _SELECT,
        q_codes,
        k_codes,
        first,
        start,
        stop,
        last,
        budget.astype(jnp.int32),
        bits=bits,
        best_of=best_of,
        slots=slots,
    )


def _check_codes(q_codes: Array, k_codes: Array, bits: int, best_of: int) -> None:
    if q_codes.ndim != 5 or k_codes.ndim != 4:
        raise ValueError(
            f"q_codes {q_codes.shape} must be [B, T, J, G, W] and k_codes {k_codes.shape} "
            "[B, J, W, S]"
        )
    if q_codes.dtype != jnp.uint32 or k_codes.dtype != jnp.uint32:
        raise ValueError(
            f"q_codes {q_codes.dtype} and k_codes {k_codes.dtype} must be uint32 words; "
            "make them with pack_codes"
        )
    B, _, J, _, W = q_codes.shape
    if k_codes.shape[:3] != (B, J, W):
        raise ValueError(
            f"q_codes {q_codes.shape} [B, T, J, G, W] and k_codes {k_codes.shape} [B, J, W, S] "
            "must agree in B, J and W"
        )
    if bits < 1 or word_count(bits) != W:
        raise ValueError(f"bits={bits} take {word_count(max(bits, 0))} words, the codes have {W}")
    if best_of < 1 or q_codes.shape[3] % best_of:
        raise ValueError(f"best_of={best_of} must divide the G={q_codes.shape[3]} codes of a list")
    if 0 in q_codes.shape or 0 in k_codes.shape:
        raise ValueError(f"q_codes {q_codes.shape} and k_codes {k_codes.shape} must not be empty")


def _check_rows(q_codes: Array, budget: Array, **rows: Array) -> None:
    for name, value in rows.items():
        if value.shape != q_codes.shape[:2]:
            raise ValueError(f"{name} {value.shape} must be [B, T] = {q_codes.shape[:2]}")
        if not jnp.issubdtype(value.dtype, jnp.integer):
            raise ValueError(f"{name} has dtype {value.dtype}; it must be an integer dtype")
    if budget.shape != q_codes.shape[:3]:
        raise ValueError(f"budget {budget.shape} must be [B, T, J] = {q_codes.shape[:3]}")
    if not jnp.issubdtype(budget.dtype, jnp.integer):
        raise ValueError(f"budget has dtype {budget.dtype}; it must be an integer dtype")


def _check_slots(
    first: Array, start: Array, stop: Array, last: Array, budget: Array, slots: int
) -> None:
    if any(isinstance(x, jax.core.Tracer) for x in (first, start, stop, last, budget)):
        return
    count, forced = np.asarray(stop - start), np.asarray(last - stop + start - first)
    needed = forced[:, :, None] + np.clip(np.asarray(budget), 0, count[:, :, None])
    if needed.size and needed.max() > slots:
        raise ValueError(
            f"a list needs {needed.max()} slots, slots={slots} are given; "
            "give room for the forced keys and the budget"
        )
