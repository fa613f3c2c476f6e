"""Facts about a small world, scattered over unrelated text (after BABILong, arXiv 2406.10149).

People walk between rooms, take things and put them down. One, two or three facts answer the
question. The world is our own, in the manner of bAbI's tasks 1 to 3 (arXiv 1502.05698).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal, NamedTuple

import numpy as np

from train.evaluation.tasks.needles import insert
from train.evaluation.tasks.sample import Piece, Sample, join
from train.evaluation.tasks.task import Draft, Request, Task

Facts = Literal[1, 2, 3]

PEOPLE = ("Alice", "Boris", "Clara", "Dmitri")
ROOMS = ("kitchen", "garden", "attic", "cellar", "hallway", "bedroom")
THINGS = ("lantern", "apple", "basket")
_FACTS = {1: 8, 2: 16, 3: 32}
_INSTRUCTION = {
    1: "where a person is",
    2: "where a thing is",
    3: "where a thing was before it came to a room",
}


class Stay(NamedTuple):
    """A thing is in a room, as the facts with the numbers in ``known_from`` show."""

    room: str
    known_from: tuple[int, ...]


@dataclasses.dataclass
class World:
    """What has happened so far."""

    facts: list[str] = dataclasses.field(default_factory=list)
    rooms: dict[str, Stay] = dataclasses.field(default_factory=dict)
    holders: dict[str, tuple[str, int]] = dataclasses.field(default_factory=dict)
    stays: dict[str, list[Stay]] = dataclasses.field(default_factory=dict)

    def move(self, person: str, room: str) -> None:
        """``person``, with all they hold, goes to ``room``."""
        number = len(self.facts)
        self.facts.append(f"{person} went to the {room}.")
        self.rooms[person] = Stay(room, (number,))
        for thing, (holder, taken) in self.holders.items():
            if holder == person:
                self.stays[thing].append(Stay(room, (taken, number)))

    def take(self, person: str, thing: str) -> None:
        """``person`` takes ``thing``, which is where they are."""
        here = self.rooms[person]
        self.holders[thing] = (person, len(self.facts))
        self.facts.append(f"{person} took the {thing}.")
        self.stays.setdefault(thing, [Stay(here.room, (*here.known_from, len(self.facts) - 1))])

    def drop(self, person: str, thing: str) -> None:
        """``person`` puts ``thing`` down."""
        room, known_from = self.stays[thing][-1]
        self.stays[thing][-1] = Stay(room, (*known_from, len(self.facts)))
        self.facts.append(f"{person} put down the {thing}.")
        del self.holders[thing]


def live(rng: np.random.Generator, count: int) -> World:
    """A world of ``count`` random facts."""
    world = World()
    hidden = {thing: ROOMS[rng.integers(len(ROOMS))] for thing in THINGS}
    while len(world.facts) < count:
        person = PEOPLE[rng.integers(len(PEOPLE))]
        room = world.rooms[person].room if person in world.rooms else None
        held = [thing for thing, (holder, _) in world.holders.items() if holder == person]
        near = [
            thing
            for thing in THINGS
            if thing not in world.holders
            and (world.stays[thing][-1].room if thing in world.stays else hidden[thing]) == room
        ]
        chance = rng.random()
        if near and chance < 0.6:
            world.take(person, near[rng.integers(len(near))])
        elif held and chance < 0.2:
            world.drop(person, held[rng.integers(len(held))])
        else:
            others = [other for other in ROOMS if other != room]
            world.move(person, others[rng.integers(len(others))])
    return world


class Asked(NamedTuple):
    """A question about a world; ``known_from`` are the numbers of the facts that answer it."""

    text: str
    answer: str
    known_from: tuple[int, ...]


def _ask(world: World, facts: Facts, rng: np.random.Generator) -> Asked | None:
    """A question that takes so many facts; None if this world allows none."""
    if facts == 1:
        person = list(world.rooms)[rng.integers(len(world.rooms))]
        room, known_from = world.rooms[person]
        return Asked(f"Where is {person}?", room, known_from)
    carried = [thing for thing, stays in world.stays.items() if len(stays) >= facts]
    if not carried:
        return None
    thing = carried[rng.integers(len(carried))]
    *_, before, last = world.stays[thing]
    if facts == 2:
        return Asked(f"Where is the {thing}?", last.room, last.known_from)
    if sum(stay.room == last.room for stay in world.stays[thing]) > 1:
        return None
    known_from = tuple(sorted({*before.known_from, *last.known_from}))
    return Asked(f"Where was the {thing} before the {last.room}?", before.room, known_from)


def _story(facts: Facts, rng: np.random.Generator) -> tuple[list[str], Asked]:
    while True:
        world = live(rng, _FACTS[facts])
        asked = _ask(world, facts, rng)
        if asked is not None:
            return world.facts, asked


@dataclasses.dataclass(frozen=True)
class Story:
    """A question that ``facts`` facts answer, after an instruction with one example."""

    facts: Facts

    def __call__(self, request: Request) -> Draft:
        """Facts in their order at random places of the haystack; evidence answers the question."""
        example, solved = _story(self.facts, request.rng("example"))
        told, asked = _story(self.facts, request.rng("story"))
        hay = [Piece(piece) for piece in request.haystack.pieces(request.rng("hay"), request.size)]
        places = np.sort(request.rng("places").integers(0, len(hay) + 1, len(told))).tolist()
        pieces = [
            Piece(fact, evidence=number in asked.known_from) for number, fact in enumerate(told)
        ]
        before = (
            f"Facts about people and things are hidden in a text. Say {_INSTRUCTION[self.facts]}, "
            f"in one word.\nExample: {' '.join(example)} Question: {solved.text} Answer: "
            f"{solved.answer}\nText: "
        )
        context, evidence = join(
            insert(hay, pieces, places), request.haystack.separator, before=before
        )
        return Draft(f"{context}\n", f"Question: {asked.text} Answer:", [asked.answer], evidence)


def score(prediction: str, sample: Sample) -> float:
    """BABILong's: 1 if the first sentence names the right room and no other.

    Rooms that the question names do not count.
    """
    sentence = re.split(r"[.!?\n]", prediction.strip().lower(), maxsplit=1)[0]
    asked = sample.question.lower()
    named = {room for room in ROOMS if room in sentence and room not in asked}
    return float(named == set(sample.answers))


TASKS = {
    f"babilong_qa{facts}": Task(Story(facts), score, 16, "text")  # type: ignore[arg-type]
    for facts in (1, 2, 3)
}
