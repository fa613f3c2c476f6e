"""Needles in a haystack: RULER's eight retrieval tasks (arXiv 2404.06654, table 2).

A needle is a sentence that gives a key a value; the question asks for the values of one key or of
several. Keys, values and what surrounds the needles differ between the tasks.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from train.evaluation.tasks import scoring, words
from train.evaluation.tasks.sample import Piece, join
from train.evaluation.tasks.task import Draft, Request, Task

_DEPTHS = 40


@dataclasses.dataclass(frozen=True)
class Needles:
    """A retrieval task.

    Attributes:
      keys: what keys are.
      values: what values are.
      count: keys in the context that are hidden like the one asked for.
      each: values of a key.
      asked: keys asked for.
      distractors: the haystack is made of needles too, ``size`` of them.
    """

    keys: words.Kind = "words"
    values: words.Kind = "numbers"
    count: int = 1
    each: int = 1
    asked: int = 1
    distractors: bool = False

    def __call__(self, request: Request) -> Draft:
        """The draft; its evidence are the needles asked for."""
        rng = request.rng("needles")
        hay = [] if self.distractors else request.haystack.pieces(request.rng("hay"), request.size)
        total = self.count + (request.size if self.distractors else 0)
        text = request.haystack.separator.join(hay)
        names = words.draw(self.keys, total, request.rng("keys"), without=text)
        values = words.draw(self.values, total * self.each, request.rng("values"), without=text)
        needles = [
            self._needle(name, value)
            for number, name in enumerate(names)
            for value in values[number * self.each : (number + 1) * self.each]
        ]
        hidden = [
            Piece(needle, evidence=number < self.asked * self.each)
            for number, needle in enumerate(needles[: self.count * self.each])
        ]
        around = [*map(Piece, hay), *map(Piece, needles[len(hidden) :])]
        separator = "\n" if self.distractors else request.haystack.separator
        places = self._places(rng, len(hidden), len(around), separator == " ", request.depth)
        pieces = insert(around, hidden, places)
        context, evidence = join(pieces, separator, before=self._announcement())
        return Draft(
            context + "\n",
            self._question(names[: self.asked]),
            values[: self.asked * self.each],
            evidence,
        )

    def _needle(self, name: str, value: str) -> str:
        return f"One of the special magic {self.values} for {name} is: {value}."

    @property
    def _single(self) -> bool:
        return self.asked * self.each == 1

    def _announcement(self) -> str:
        if self._single:
            hidden = f"A special magic {self.values[:-1]} is hidden"
        else:
            hidden = f"Some special magic {self.values} are hidden"
        return f"{hidden} in the following text. Remember: there will be a question about it.\n"

    def _question(self, names: list[str]) -> str:
        listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"
        where = f"for {listed} mentioned in the provided text"
        if self._single:
            kind = self.values[:-1]
            return f"What is the special magic {kind} {where}? The special magic {kind} {where} is"
        kind = self.values
        return (
            f"What are all the special magic {kind} {where}? The special magic {kind} {where} are"
        )

    def _places(
        self, rng: np.random.Generator, needles: int, pieces: int, spread: bool, depth: float | None
    ) -> list[int]:
        """Pieces in front of each needle: distinct depths in running text, any place in lines."""
        if spread:
            depths = rng.permutation(_DEPTHS)[:needles] / (_DEPTHS - 1)
        else:
            depths = rng.random(needles)
        if depth is not None:
            depths[: self.asked * self.each] = depth
        return np.round(depths * pieces).astype(int).tolist()


def insert(around: list[Piece], hidden: list[Piece], places: list[int]) -> list[Piece]:
    """``hidden`` among ``around``, each behind as many of them as its place says.

    Those with equal places stay in their order.
    """
    found, taken = [], 0
    for place, needle in sorted(zip(places, hidden, strict=True), key=lambda pair: pair[0]):
        found += [*around[taken:place], needle]
        taken = place
    return found + around[taken:]


def _task(haystack: str | None, needles: Needles) -> Task:
    return Task(needles, scoring.all_answers, 128, haystack, places=True)


TASKS = {
    "niah_single_1": _task("noise", Needles()),
    "niah_single_2": _task("text", Needles()),
    "niah_single_3": _task("text", Needles(values="uuids")),
    "niah_multikey_1": _task("text", Needles(count=4)),
    "niah_multikey_2": _task(None, Needles(distractors=True)),
    "niah_multikey_3": _task(None, Needles(keys="uuids", values="uuids", distractors=True)),
    "niah_multivalue": _task("text", Needles(each=4)),
    "niah_multiquery": _task("text", Needles(count=4, asked=4)),
}
