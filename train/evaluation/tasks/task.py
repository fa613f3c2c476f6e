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
    """

    def sample(size: int) -> tuple[Sample, int]:
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
        return made, len(prompt_tokens(made, tokenizer).tokens) + answer_tokens

    best, used = sample(task.smallest)
    if used > request.length:
        raise ValueError(
            f"task {request.task!r}, seed {request.seed}: the smallest sample takes {used} tokens, "
            f"{answer_tokens} of them for the answer, which is over length={request.length}; "
            "use a larger length or fewer answer_tokens"
        )
    low, high = task.smallest, 2 * task.smallest
    while True:
        tried, used = sample(high)
        if used > request.length:
            break
        best, low, high = tried, high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        tried, used = sample(middle)
        if used > request.length:
            high = middle
        else:
            best, low = tried, middle
    return best
