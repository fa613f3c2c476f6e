import numpy as np
import pytest

from train.evaluation.evidence import chosen_keys, evidence_recall, listed_keys


def test_lists_hold_the_keys_of_their_blocks_up_to_the_query():
    indices = np.array([[0, 2, -1], [1, 2, 3]])
    keys = listed_keys(indices, 4, np.array([9, 13]))
    assert np.flatnonzero(keys[0]).tolist() == [0, 1, 2, 3, 8, 9]
    assert np.flatnonzero(keys[1]).tolist() == [4, 5, 6, 7, 8, 9, 10, 11, 12, 13]


def test_blocks_behind_the_last_query_hold_nothing():
    keys = listed_keys(np.array([[0, 5]]), 2, np.array([3]))
    assert keys.tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_listed_keys_equal_a_loop(block_size):
    rng = np.random.default_rng(0)
    indices = rng.integers(-1, 8, (5, 3, 4))
    query = rng.integers(0, 20, (5, 3))
    keys = listed_keys(indices, block_size, query)
    for row in range(5):
        for one in range(3):
            expected = {
                key
                for block in indices[row, one]
                if block >= 0
                for key in range(block * block_size, (block + 1) * block_size)
                if key <= query[row, one]
            }
            assert set(np.flatnonzero(keys[row, one]).tolist()) == expected


def test_recall_is_the_share_of_evidence_in_the_lists():
    indices = np.array([[[0, 1], [2, 3]], [[0, 3], [-1, -1]]])
    evidence = np.array([0, 3, 5])
    query = np.array([10, 11])
    # Blocks of two: the lists hold keys 0-3, 4-7, 0-1 and 6-7, none.
    assert evidence_recall(indices, 2, query, evidence) == pytest.approx((2 + 1 + 1 + 0) / 12)


def test_evidence_must_come_before_the_queries():
    indices, query = np.zeros((1, 1, 1), int), np.array([4])
    with pytest.raises(ValueError, match="0 evidence tokens"):
        evidence_recall(indices, 1, query, np.array([], int))
    with pytest.raises(ValueError, match="up to 5 for queries from 4"):
        evidence_recall(indices, 1, query, np.array([5]))


def test_chosen_keys_of_a_layer():
    assert chosen_keys(np.array([[0, 2], [1, -1]]), 2, 4) == ((0, 1, 4), (2, 3))
