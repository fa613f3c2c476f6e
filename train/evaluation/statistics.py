"""Intervals of means: how far a figure from so many samples can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

Better = Literal["higher", "lower"]

RESAMPLES = 10_000
_CHUNK = 4_000_000


class Interval(NamedTuple):
    """A mean and the ends of its interval, which are nan if the samples say nothing about it."""

    mean: float
    low: float
    high: float


def bootstrap(
    values: Sequence[float] | Float[np.ndarray, "n"],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of the mean: quantiles of the means of ``resamples`` redrawn samples.

    Equal values and seeds give the same interval. One value has no interval.

    Raises:
      ValueError: if there is no value, or one is not finite, or ``level`` is not within (0, 1).
    """
    array = _checked(values, level)
    count = len(array)
    if count == 1:
        return Interval(float(array[0]), math.nan, math.nan)
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // count)
    means = np.concatenate(
        [
            array[rng.integers(0, count, (min(rows, resamples - done), count))].mean(axis=1)
            for done in range(0, resamples, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(array.mean()), float(low), float(high))


def wilson(successes: int, count: int, *, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share of ``count`` trials; never empty, within [0, 1].

    With z the normal quantile of (1 + level)/2 and p = successes/count::

        (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)

    Raises:
      ValueError: if ``successes`` is not within [0, count], or ``count`` is 0.
    """
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"{successes=} of {count=} is no share; count is at least 1")
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    share = successes / count
    centre = share + z2 / (2 * count)
    spread = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2)))
    scale = 1 + z2 / count
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == count else (centre + spread) / scale
    return Interval(share, low, high)


def interval(values: Sequence[float] | Float[np.ndarray, "n"], *, level: float = 0.95) -> Interval:
    """The interval a result row states: Wilson's if all values are 0 or 1, bootstrap otherwise.

    Ten right answers of ten redraw to ten right answers: the bootstrap would claim certainty.
    """
    array = _checked(values, level)
    if np.isin(array, (0.0, 1.0)).all():
        return wilson(round(float(array.sum())), len(array), level=level)
    return bootstrap(array, level=level)


def paired_difference(
    ours: Sequence[float] | Float[np.ndarray, "n"],
    theirs: Sequence[float] | Float[np.ndarray, "n"],
    *,
    level: float = 0.95,
) -> Interval:
    """Bootstrap of the mean of ``ours - theirs``, two runs over the same samples in the same order.

    Raises:
      ValueError: if they are not equally many.
    """
    if len(ours) != len(theirs):
        raise ValueError(
            f"{len(ours)} and {len(theirs)} values are not pairs; give the samples both have"
        )
    return bootstrap(np.asarray(ours, float) - np.asarray(theirs, float), level=level)


def suspicious(difference: Interval, better: Better) -> bool:
    """Whether sparse minus dense says that sparse is better, with an interval that excludes zero.

    Attending less should never help, so that such a cell is a suspected bug until explained. Of
    cells without any difference one in forty is flagged at the usual level of 0.95.
    """
    return difference.low > 0 if better == "higher" else difference.high < 0


def _checked(values: Sequence[float] | np.ndarray, level: float) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise ValueError(f"an interval needs finite values, one or more; got {array}")
    if not 0 < level < 1:
        raise ValueError(f"{level=} must lie within (0, 1), such as 0.95")
    return array
