"""Scores between 0 and 1 of a generated text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from train.evaluation.tasks.sample import Sample

_CONTROL = re.compile(r"[\x00-\x1f]")
_WORD = re.compile(r"[\w-]+")


def clean(prediction: str) -> str:
    """As RULER does before it compares: control characters become line breaks, ends are cut."""
    return _CONTROL.sub("\n", prediction.strip()).strip()


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """RULER's score for all but questions: share of the answers that occur, whatever their case.

    An answer inside of a longer word or number occurs too.
    """
    found = clean(prediction).lower()
    return sum(answer.lower() in found for answer in answers) / len(answers)


def string_match_part(prediction: str, answers: Sequence[str]) -> float:
    """RULER's score for questions: 1 if any of the answers occurs, whatever its case.

    The evaluation harness scores the same questions by :func:`string_match_all`.
    """
    found = clean(prediction).lower()
    return float(any(answer.lower() in found for answer in answers))


def all_answers(prediction: str, sample: Sample) -> float:
    """:func:`string_match_all` of a sample's answers."""
    return string_match_all(prediction, sample.answers)


def any_answer(prediction: str, sample: Sample) -> float:
    """:func:`string_match_part` of a sample's answers."""
    return string_match_part(prediction, sample.answers)


def begins_with_answer(prediction: str, sample: Sample) -> float:
    """1 if the generated words begin with the one answer, whatever case and punctuation."""
    (answer,) = map(_words, sample.answers)
    return float(_words(prediction)[: len(answer)] == answer)


def leading_words(prediction: str, sample: Sample) -> float:
    """Words of the one answer that are generated before the first wrong one, as a share."""
    (answer,) = map(_words, sample.answers)
    said = _words(prediction)
    right = 0
    while right < min(len(answer), len(said)) and answer[right] == said[right]:
        right += 1
    return right / len(answer)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
