"""What a task is, and how its samples are made to fill a length."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from train.evaluation.tasks.haystack import Haystack
from train.evaluation.tasks.sample import Sample, Span, prompt_tokens

if TYPE_CHECKING:
    from train.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Request:
    """What a task builds a draft from.

    Attributes:
      task: the task's name.
      seed: of the sample.
      length: limit of the sample in tokens.
      size: units of context: lines, words, pairs, as the task counts them.
      haystack: what the evidence is hidden in, for tasks that hide it.
      depth: where to hide it, 0 to 1; None is a random place.
    """

    task: str
    seed: int
    length: int
    size: int
    haystack: Haystack
    depth: float | None = None

    def rng(self, purpose: str) -> np.random.Generator:
        """A stream that depends on seed, task and purpose, and not on the size."""
        return np.random.default_rng([self.seed, zlib.crc32(f"{self.task}/{purpose}".encode())])


class ExhaustedError(ValueError):
    """A task has not as much material as was asked for."""


class Draft(NamedTuple):
    """A sample before it is known whether it fits; fields as in :class:`Sample`."""

    context: str
    question: str
    answers: Sequence[str]
    evidence: Sequence[Span]


@dataclasses.dataclass(frozen=True)
class Task:
    """How samples are built and scored.

    Attributes:
      build: a draft for a request; more tokens for a larger size.
      score: 0 to 1 for a generated text and the sample it continues.
      answer_tokens: tokens to generate.
      haystack: name of the usual one; None if the task makes its whole context itself.
      smallest: the smallest size.
      places: whether ``depth`` is heeded.
    """

    build: Callable[[Request], Draft]
    score: Callable[[str, Sample], float]
    answer_tokens: int
    haystack: str | None = None
    smallest: int = 1
    places: bool = False


def fill(task: Task, request: Request, tokenizer: Tokenizer, answer_tokens: int) -> Sample:
    """The largest sample that fits: start token, context, question and answer within the length.

    ``request.size`` is ignored: the size is found by doubling and then by halving the interval.

    Raises:
      ValueError: if the smallest sample does not fit.
      ExhaustedError: if there is not enough material to fill the length.
    """

    def fits(size: int) -> Sample | None:
        draft = task.build(dataclasses.replace(request, size=size))
        made = Sample(
            request.task,
            request.seed,
            draft.context,
            draft.question,
            tuple(draft.answers),
            tuple(draft.evidence),
            request.length,
            answer_tokens,
        )
        used = len(prompt_tokens(made, tokenizer).tokens) + answer_tokens
        if used <= request.length:
            return made
        if size == task.smallest:
            raise ValueError(
                f"task {request.task!r}, seed {request.seed}: the smallest sample takes {used} "
                f"tokens, {answer_tokens} of them for the answer, which is over "
                f"length={request.length}; use a larger length or fewer answer_tokens"
            )
        return None

    return _largest(fits, task.smallest)


def _largest(fits: Callable[[int], Sample | None], smallest: int) -> Sample:
    """The sample of the largest size that fits; ``smallest`` does.

    Doubling may ask for more material than there is although what fits needs less.
    """
    lacking: dict[int, ExhaustedError] = {}

    def tried(size: int) -> Sample | None:
        try:
            return fits(size)
        except ExhaustedError as error:
            lacking[size] = error
            return None

    best = fits(smallest)
    assert best is not None
    low, high = smallest, max(1, 2 * smallest)
    while (larger := tried(high)) is not None:
        best, low, high = larger, high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if (larger := tried(middle)) is None:
            high = middle
        else:
            best, low = larger, middle
    if high in lacking:
        raise lacking[high]
    return best
