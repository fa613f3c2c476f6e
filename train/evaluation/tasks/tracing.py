"""Variable tracking: a chain of assignments in a haystack (RULER's ``vt``, arXiv 2404.06654).

``VAR ABCDE = 12345``, later ``VAR FGHIJ = VAR ABCDE``, and so on; which variables hold 12345? One
small solved example stands in front.
"""

from __future__ import annotations

import numpy as np

from train.evaluation.tasks import scoring
from train.evaluation.tasks.haystack import Haystack
from train.evaluation.tasks.needles import insert
from train.evaluation.tasks.sample import Piece, join
from train.evaluation.tasks.task import Draft, Request, Task

_HOPS = 4
_LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_EXAMPLE_LINES = 8
_EXAMPLE_WORDS = 150
_ANNOUNCEMENT = "Keep track of the variables that are assigned in the following text.\n"


def _chain(rng: np.random.Generator, letters: int) -> tuple[list[str], int]:
    """Names of the variables, in the order of their assignment, and their value."""
    names: dict[str, None] = {}
    while len(names) <= _HOPS:
        names["".join(rng.choice(_LETTERS, letters))] = None
    return list(names), int(rng.integers(10_000, 100_000))


def _hide(
    rng: np.random.Generator, hay: list[str], names: list[str], value: int, separator: str
) -> tuple[str, list[tuple[int, int]]]:
    """The haystack with the assignments in their order at random places; and their spans."""
    sources = [str(value), *(f"VAR {name}" for name in names[:-1])]
    chain = [
        Piece(f"VAR {name} = {source}", evidence=True)
        for name, source in zip(names, sources, strict=True)
    ]
    places = np.sort(rng.integers(0, len(hay) + 1, len(chain))).tolist()
    return join(insert(list(map(Piece, hay)), chain, places), separator, before=_ANNOUNCEMENT)


def _question(names: list[str], value: int) -> str:
    return (
        f"Question: Which variables hold the value {value} in the text above? Answer: {len(names)} "
        f"variables hold the value {value}. They are:"
    )


def _example(rng: np.random.Generator, haystack: Haystack) -> tuple[str, int]:
    size = _EXAMPLE_LINES if haystack.separator == "\n" else _EXAMPLE_WORDS
    names, value = _chain(rng, 3)
    text, _ = _hide(rng, haystack.pieces(rng, size), names, value, haystack.separator)
    return f"{text}\n{_question(names, value)} {' '.join(names)}\n\n", value


def variable_tracking(request: Request) -> Draft:
    """One chain of four hops; its evidence are all five assignments."""
    example, other = _example(request.rng("example"), request.haystack)
    rng = request.rng("chain")
    names, value = _chain(rng, 5)
    while value == other:
        names, value = _chain(rng, 5)
    hay = request.haystack.pieces(request.rng("hay"), request.size)
    text, spans = _hide(rng, hay, names, value, request.haystack.separator)
    evidence = [(start + len(example), end + len(example)) for start, end in spans]
    return Draft(f"{example}{text}\n", _question(names, value), names, evidence)


TASKS = {"vt": Task(variable_tracking, scoring.all_answers, 30, "noise")}
