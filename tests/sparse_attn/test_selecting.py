"""The block grids of NSA against brute-force geometry."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn import NSA
from sparse_attn.documents import place_rows
from sparse_attn.selecting import (
    eligible_blocks,
    pool_entries,
    selected_tokens,
    visible_entries,
)


@pytest.mark.parametrize(
    ("block", "stride", "selection"), [(32, 16, 64), (4, 2, 8), (8, 2, 8), (6, 3, 12), (8, 8, 8)]
)
def test_eq9_weighs_entries_by_their_overlap_with_the_block(block, stride, selection):
    config = NSA(compression_block=block, compression_stride=stride, selection_block=selection)
    entries, blocks = 40, 9
    # Overlap in tokens of entry [i*d, i*d+l) with block [j*L, (j+1)*L), in units of d.
    overlap = np.zeros((entries, blocks))
    for i in range(entries):
        for token in range(i * stride, i * stride + block):
            if token // selection < blocks:
                overlap[i, token // selection] += 1 / stride
    got = pool_entries(jnp.eye(entries), config.pooling, blocks)
    np.testing.assert_allclose(got, overlap, atol=1e-6)


def test_paper_sizes_weigh_entries_1_2_2_2_1():
    pooling = NSA().pooling
    assert pooling.weights == (1.0, 2.0, 2.0, 2.0, 1.0)
    assert (pooling.offset, pooling.stride) == (-1, 4)


def test_rows_see_whole_entries_of_their_own_document():
    ids = jnp.asarray([[1] * 13 + [0] * 3 + [2] * 8])
    rows = place_rows(1, 24, length=None, positions=None, segment_ids=ids, alignment=8)
    start, stop = visible_entries(rows, 4, 2)
    starts = {1: 0, 2: 16}
    for t, document in enumerate(ids[0].tolist()):
        want = [i for i in range(20) if document and i * 2 >= starts[document] and i * 2 + 3 <= t]
        assert list(range(int(start[0, t]), int(stop[0, t]))) == want
    first, last = eligible_blocks(rows, 8)
    assert first[0, [0, 12, 14, 16, 23]].tolist() == [0, 0, 0, 2, 2]
    assert last[0, [0, 12, 14, 16, 23]].tolist() == [0, 1, -1, 2, 2]


def test_selected_tokens_expands_blocks():
    member = selected_tokens(jnp.asarray([[[[0, 2, -1]]]]), 2, jnp.arange(7))
    assert member[0, 0, 0].tolist() == [True, True, False, False, True, True, False]
