"""Packing loses no token, crosses no document and keeps the alignment."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from train.packing import (
    SPREAD_PARTS,
    Alphabets,
    build_row,
    check_segments,
    cut_documents,
    plan_packing,
    repeat_spans,
    spread_positions,
)

PAD = 99


def _documents(lengths):
    """Documents of ``length`` inputs each, every token of the stream different."""
    bounds = np.concatenate([[0], np.cumsum(np.asarray(lengths) + 1)]).astype(np.int64)
    return np.arange(1000, 1000 + bounds[-1]), bounds


def _rows(lengths, sequence_length, alignment, seed=0, epoch=0):
    tokens, bounds = _documents(lengths)
    plan = plan_packing(np.array(lengths), sequence_length, alignment, seed, epoch)
    rows = [build_row(plan, i, tokens, bounds, PAD) for i in range(plan.rows)]
    return plan, {key: np.stack([row[key] for row in rows]) for key in rows[0]}, tokens, bounds


@hypothesis.settings(derandomize=True, max_examples=80, deadline=None, database=None)
@hypothesis.given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=25).filter(any),
    shape=st.sampled_from([(8, 1), (8, 8), (16, 4), (24, 8), (64, 16)]),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 2),
)
def test_every_input_once_with_its_target(lengths, shape, seed, epoch):
    sequence_length, alignment = shape
    plan, batch, tokens, bounds = _rows(lengths, sequence_length, alignment, seed, epoch)
    live = batch["segment_ids"] > 0
    # Each input token once: all tokens but the last of each document.
    inputs = np.setdiff1d(tokens, tokens[bounds[1:] - 1])
    np.testing.assert_array_equal(np.sort(batch["tokens"][live]), inputs)
    # The token after x in its document is x + 1, across cuts too; a document's last token is
    # never an input, so no target belongs to another document.
    np.testing.assert_array_equal(batch["targets"][live], batch["tokens"][live] + 1)
    np.testing.assert_array_equal(batch["weights"], live.astype(np.float32))
    for key in ("tokens", "targets"):
        assert (batch[key][~live] == PAD).all()
    assert (batch["positions"][~live] == 0).all()

    check_segments(batch["segment_ids"], alignment)
    document = np.searchsorted(bounds, batch["tokens"] - 1000, side="right")
    for row in range(plan.rows):
        ids = batch["segment_ids"][row]
        for segment in range(1, ids.max() + 1):
            places = np.flatnonzero(ids == segment)
            assert places[0] % alignment == 0
            np.testing.assert_array_equal(batch["positions"][row, places], np.arange(len(places)))
            assert len(set(document[row, places])) == 1
            np.testing.assert_array_equal(np.diff(batch["tokens"][row, places]), 1)
    report = plan.report()
    assert report.tokens == sum(lengths) == live.sum()
    assert report.efficiency == pytest.approx(live.mean())
    assert report.rows == len(live)


def test_plan_depends_on_seed_and_epoch_and_on_nothing_else():
    lengths = np.random.default_rng(0).integers(1, 300, 60)
    fields = ("document", "start", "length", "offset", "row_bounds")

    def values(seed, epoch):
        plan = plan_packing(lengths, 64, 8, seed, epoch)
        return [getattr(plan, field).tolist() for field in fields]

    assert values(3, 1) == values(3, 1)
    assert values(3, 1) != values(4, 1)
    assert values(3, 1) != values(3, 2)


def test_short_documents_stay_whole_and_cuts_move_between_epochs():
    lengths = np.array([5, 64, 65, 200])
    first = cut_documents(lengths, 64, 8)
    np.testing.assert_array_equal(first[0], [0, 1, 2, 2, 3, 3, 3, 3])
    np.testing.assert_array_equal(first[1], [0, 0, 0, 64, 0, 64, 128, 192])
    np.testing.assert_array_equal(first[2], [5, 64, 64, 1, 64, 64, 64, 8])
    starts = set()
    for epoch in range(1, 9):
        plan = plan_packing(lengths, 64, 8, 0, epoch)
        assert set(plan.length[plan.document < 2].tolist()) == {5, 64}
        starts |= set(plan.start[plan.document == 3].tolist())
    assert len(starts) > 8
    assert all(start % 8 == 0 for start in starts)


def test_what_was_said_comes_again():
    tokens = np.arange(100, 1124)
    row = {
        "segment_ids": np.repeat([1, 2, 0], [900, 100, 24]),
        "tokens": tokens,
        "targets": tokens + 1,
        "positions": np.arange(1024),
    }
    alphabets = Alphabets(3, 60, tuple(range(70, 80)))
    got = repeat_spans(row, 0.4, alphabets, np.random.default_rng(0))
    assert got["positions"] is row["positions"]
    assert (row["tokens"] == tokens).all()
    first = got["tokens"][:900]
    assert (got["targets"][:899] == first[1:]).all()
    np.testing.assert_array_equal(got["tokens"][1000:], tokens[1000:])
    again = [at for at in range(300, 896) if _said_before(first, at)]
    assert 0.2 < len(again) / 600 < 0.6
    assert (first < 60).any()
    assert np.isin(first, alphabets.digits).any()
    # The beginning holds nothing that was said before but for random tokens and digits.
    assert not any(_said_before(first, at) for at in range(2, 220) if first[at] >= 100)
    other = repeat_spans(row, 0.4, alphabets, np.random.default_rng(1))
    assert (other["tokens"] != got["tokens"]).any()


def _said_before(tokens, at):
    """Whether the four tokens from ``at`` on are in the text before."""
    windows = np.lib.stride_tricks.sliding_window_view(tokens[:at], 4) if at >= 4 else []
    return any((window == tokens[at : at + 4]).all() for window in windows)


def test_spread_documents_stay_below_the_limit_and_keep_their_order():
    ids = np.repeat([1, 2, 0], [20, 8, 4])
    row = {"segment_ids": ids, "positions": np.r_[:20, :8, [0] * 4], "tokens": np.arange(32)}
    last = []
    for seed in range(20):
        spread = spread_positions(row, 100, np.random.default_rng(seed))
        assert spread["tokens"] is row["tokens"]
        for number in (1, 2):
            positions = spread["positions"][ids == number]
            assert (np.diff(positions) >= 1).all()
            assert (np.diff(positions) > 1).sum() <= SPREAD_PARTS - 1
            assert positions[-1] < 100
            last.append(positions[-1])
        assert (spread["positions"][ids == 0] == 0).all()
    assert max(last) > 90
    assert len(set(last)) > 20
    same = spread_positions(row, 8, np.random.default_rng(0))
    np.testing.assert_array_equal(same["positions"], row["positions"])


def test_length_bins_share_the_tokens_and_lose_none():
    lengths, bins = [5, 900, 2000, 33, 1400, 0], (32, 96, 192, 256)
    plan = plan_packing(lengths, 256, 16, seed=1, length_bins=bins)
    held = np.zeros(len(lengths), int)
    np.add.at(held, plan.document, plan.length)
    assert held.tolist() == lengths
    for document in range(len(lengths)):
        mine = plan.document == document
        order = np.argsort(plan.start[mine])
        start, length = plan.start[mine][order], plan.length[mine][order]
        np.testing.assert_array_equal(start, np.cumsum(length) - length)
    shares = np.bincount(np.searchsorted(bins, plan.length), plan.length) / sum(lengths)
    assert shares.shape == (4,)
    assert shares.min() > 0.15
    assert shares.max() < 0.35
    again = plan_packing(lengths, 256, 16, seed=1, epoch=1, length_bins=bins)
    assert again.length.tolist() != plan.length.tolist()
    with pytest.raises(ValueError, match="ends above sequence_length=256"):
        plan_packing(lengths, 256, 16, length_bins=(128, 512))


def test_best_fit_fills_the_fullest_row_that_has_room():
    # 6 opens a row, 5 another; 3 fits best beside 5, 2 beside 6.
    plan = plan_packing(np.array([6, 5, 3, 2]), 8)
    rows = [
        sorted(plan.document[a:b].tolist())
        for a, b in zip(plan.row_bounds[:-1], plan.row_bounds[1:], strict=True)
    ]
    assert sorted(rows) == [[0, 3], [1, 2]]
    assert plan.report().efficiency == 1.0


def test_realistic_lengths_pack_tightly():
    lengths = np.random.default_rng(1).lognormal(6, 1, 2000).astype(int) + 1
    assert plan_packing(lengths, 1024, 32).report().efficiency > 0.95


@pytest.mark.parametrize(
    ("lengths", "sequence_length", "alignment", "message"),
    [
        ([5], 60, 32, "sequence_length=60 is not a positive multiple of alignment=32"),
        ([5], 64, 0, "alignment=0"),
        ([5, -1], 64, 32, "numbers >= 0"),
        ([0, 0], 64, 32, "2 documents hold no input token"),
    ],
)
def test_bad_requests(lengths, sequence_length, alignment, message):
    with pytest.raises(ValueError, match=message):
        plan_packing(np.array(lengths), sequence_length, alignment)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 1, 1, 2, 2, 2, 0, 0], r"not multiples of 4; .*\[\(1, 0\), \(2, 3\)\]"),
        ([0, 1, 1, 1, 0, 0, 0, 0], r"not multiples of 4; .*\[\(1, 1\)\]"),
        ([1, 1, 1, 1, 3, 3, 3, 3], r"1, 2, 3, \.\.\.; .*\[\(1, 0\), \(3, 4\)\]"),
        ([2, 2, 2, 2, 0, 0, 0, 0], r"1, 2, 3, \.\.\.; .*\[\(2, 0\)\]"),
        ([1, 0, 0, 0, 1, 0, 0, 0], r"contiguous .*\[\(1, 0\), \(1, 4\)\]"),
        ([2, 2, 2, 2, 1, 1, 1, 1], r"contiguous .*\[\(2, 0\), \(1, 4\)\]"),
        ([-1, 0, 0, 0, 0, 0, 0, 0], r"contiguous .*\[\(-1, 0\)\]"),
    ],
)
def test_segments_that_break_the_contract(ids, message):
    good = [1, 1, 0, 0, 2, 2, 2, 0]
    with pytest.raises(ValueError, match="row 1: segment ids .*" + message):
        check_segments(np.array([good, ids, good]), 4)


def test_segments_that_keep_the_contract():
    check_segments(np.array([[1, 1, 0, 0, 2, 2, 2, 2], [0] * 8, [1] * 8]), 4)
    with pytest.raises(ValueError, match=r"shape \(8,\), expected \[B, T\]"):
        check_segments(np.ones(8, int), 4)
