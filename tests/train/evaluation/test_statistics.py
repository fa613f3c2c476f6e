import math

import numpy as np
import pytest
from scipy import stats

from train.evaluation.statistics import (
    Interval,
    bootstrap,
    interval,
    paired_difference,
    suspicious,
    wilson,
)


@pytest.mark.parametrize(("successes", "count"), [(0, 4), (1, 4), (10, 10), (37, 100)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_equals_scipy(successes, count, level):
    expected = stats.binomtest(successes, count).proportion_ci(level, method="wilson")
    found = wilson(successes, count, level=level)
    assert found.mean == successes / count
    assert found[1:] == pytest.approx([expected.low, expected.high])


def test_bootstrap_of_many_values_is_near_the_normal_interval():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    mean, low, high = bootstrap(values)
    spread = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert [low, high] == pytest.approx([mean - spread, mean + spread], abs=0.03)


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        _, low, high = bootstrap(rng.exponential(1.0, 40), level=0.9, resamples=400)
        covered += low <= 1.0 <= high
    assert 165 <= covered <= 195


def test_bootstrap_repeats_itself():
    values = np.random.default_rng(4).random(30)
    assert bootstrap(values) == bootstrap(values.tolist())
    assert bootstrap(values) != bootstrap(values, seed=1)


def test_chunks_cover_every_resample(monkeypatch):
    monkeypatch.setattr("train.evaluation.statistics._CHUNK", 70)
    values = np.random.default_rng(0).random(10)
    mean, low, high = bootstrap(values, resamples=1001)
    assert low < mean < high


def test_one_value_has_no_interval():
    mean, low, high = bootstrap([2.5])
    assert mean == 2.5
    assert math.isnan(low)
    assert math.isnan(high)


def test_rows_state_wilson_for_shares_and_bootstrap_for_the_rest():
    assert interval([1, 0, 1, 1]) == wilson(3, 4)
    assert interval([1.0] * 10).low == pytest.approx(0.722, abs=1e-3)
    assert interval([0.5, 1.0, 0.25]) == bootstrap([0.5, 1.0, 0.25])


def test_pairs_remove_what_samples_have_in_common():
    rng = np.random.default_rng(3)
    hard = rng.normal(0, 5, 50)
    ours, theirs = hard + 0.2 + rng.normal(0, 0.1, 50), hard
    difference = paired_difference(ours, theirs)
    assert difference.low > 0.15
    assert difference.high < 0.25
    assert paired_difference(theirs, theirs) == (0, 0, 0)


@pytest.mark.parametrize(
    ("difference", "better", "expected"),
    [
        (Interval(0.2, 0.1, 0.3), "higher", True),
        (Interval(0.2, -0.1, 0.3), "higher", False),
        (Interval(0.0, 0.0, 0.0), "higher", False),
        (Interval(-0.2, -0.3, -0.1), "higher", False),
        (Interval(-0.2, -0.3, -0.1), "lower", True),
        (Interval(0.2, 0.1, 0.3), "lower", False),
        (Interval(0.2, math.nan, math.nan), "higher", False),
        (Interval(-0.2, math.nan, math.nan), "lower", False),
    ],
)
def test_sparse_better_than_dense_is_suspicious(difference, better, expected):
    assert suspicious(difference, better) is expected


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="one or more"):
        bootstrap([])
    with pytest.raises(ValueError, match="finite"):
        interval([1.0, math.nan])
    with pytest.raises(ValueError, match=r"level=1\.5"):
        bootstrap([1.0, 2.0], level=1.5)
    with pytest.raises(ValueError, match="successes=5 of count=4"):
        wilson(5, 4)
    with pytest.raises(ValueError, match="2 and 3 values are not pairs"):
        paired_difference([1, 2], [1, 2, 3])
