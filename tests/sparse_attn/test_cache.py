"""Rings and per-sequence appends against plain lists."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.cache import (
    check_capacity,
    checked_truncation,
    read_ring,
    window_slots,
    write_ring,
    write_rows,
)
from sparse_attn.documents import place_rows


def test_write_rows_touches_only_kept_rows():
    buffer = jnp.zeros((2, 4, 1))
    chunk = jnp.asarray([[[1.0], [2.0]], [[3.0], [4.0]]])
    index = jnp.asarray([[1, 2], [3, 4]])
    keep = jnp.asarray([[True, False], [True, True]])
    assert write_rows(buffer, chunk, index, keep)[..., 0].tolist() == [[0, 1, 0, 0], [0, 0, 0, 3]]


def test_ring_holds_the_latest_tokens_in_order():
    rng = np.random.default_rng(0)
    size, history = 5, [[], []]
    ring, length = jnp.zeros((2, size, 1)), jnp.zeros((2,), jnp.int32)
    for tokens in (3, 1, 7, 2, 12, 1):
        counts = [tokens, int(rng.integers(0, tokens + 1))]
        ids = jnp.asarray([[1] * c + [0] * (tokens - c) for c in counts])
        rows = place_rows(2, tokens, length=length, positions=None, segment_ids=ids)
        chunk = rng.standard_normal((2, tokens, 1)).astype(np.float32)
        ring = write_ring(ring, jnp.asarray(chunk), length, rows)
        length = length + rows.appended
        for b, count in enumerate(counts):
            history[b] += chunk[b, :count, 0].tolist()
        ordered = np.asarray(read_ring(ring, length))[..., 0]
        for b in range(2):
            want = history[b][-size:]
            np.testing.assert_array_equal(ordered[b, size - len(want) :], np.float32(want))


def test_window_slots_cover_exactly_the_window():
    size = 7
    for first in range(12):
        for last in range(first - 1, first + size):
            ranges = window_slots(jnp.asarray([[first]]), jnp.asarray([[last]]), size)
            a0, a1, b0, b1 = (int(x[0, 0]) for x in ranges)
            slots = [*range(a0, a1), *range(b0, b1)]
            assert sorted(slots) == sorted(p % size for p in range(first, last + 1))


def test_overflow_and_truncation_errors_carry_the_numbers():
    with pytest.raises(ValueError, match=r"capacity 8 .* \[9, 3\]"):
        check_capacity(jnp.asarray([4, 0]), jnp.asarray([5, 3]), 8)
    with pytest.raises(ValueError, match="rollback=2"):
        checked_truncation(jnp.asarray([9]), jnp.asarray([6]), rollback=2)
    assert checked_truncation(jnp.asarray([9]), jnp.asarray([7]), rollback=2).tolist() == [7]
