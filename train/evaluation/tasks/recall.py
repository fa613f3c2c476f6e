"""Small recall tasks: passkey, JSON key-value, MQAR in words, induction, copying."""

from __future__ import annotations

import itertools

import numpy as np

from train.evaluation import mqar
from train.evaluation.tasks import scoring, words
from train.evaluation.tasks.needles import insert
from train.evaluation.tasks.sample import Piece, join
from train.evaluation.tasks.task import Draft, Request, Task

_PAIRS = 16
_COPIED = 16


def _place(request: Request, rng: np.random.Generator, pieces: int) -> int:
    """Pieces in front of the evidence."""
    return round((rng.random() if request.depth is None else request.depth) * pieces)


def _hidden(request: Request, sentence: str, announcement: str) -> tuple[str, list]:
    """The haystack with one sentence, which is the evidence."""
    hay = [Piece(piece) for piece in request.haystack.pieces(request.rng("hay"), request.size)]
    place = _place(request, request.rng("place"), len(hay))
    pieces = insert(hay, [Piece(sentence, evidence=True)], [place])
    return join(pieces, request.haystack.separator, before=announcement)


def passkey(request: Request) -> Draft:
    """A number of five digits, said twice in one place (arXiv 2305.16300)."""
    number = str(request.rng("number").integers(10_000, 100_000))
    context, evidence = _hidden(
        request,
        f"The pass key is {number}. Remember it. {number} is the pass key.",
        "Somewhere in the following text there is a pass key. Find it and remember it.\n",
    )
    return Draft(context + "\n", "What is the pass key? The pass key is", [number], evidence)


def copy(request: Request) -> Draft:
    """Sixteen words in a row that have to be said again."""
    passage = " ".join(words.draw("words", _COPIED, request.rng("words")))
    context, evidence = _hidden(
        request,
        f"The passage to copy is: {passage}.",
        "Somewhere in the following text there is a passage to copy. Remember it word for word.\n",
    )
    return Draft(context + "\n", "Copy the passage. The passage to copy is:", [passage], evidence)


def json_pairs(request: Request) -> Draft:
    """A JSON object of ``size`` pairs of identifiers; evidence is the pair asked for."""
    names = words.draw("uuids", request.size, request.rng("keys"))
    values = words.draw("uuids", request.size, request.rng("values"))
    lines = [
        Piece(f'"{n}": "{v}"', evidence=not i)
        for i, (n, v) in enumerate(zip(names, values, strict=True))
    ]
    place = _place(request, request.rng("place"), request.size - 1)
    text, evidence = join(
        insert(lines[1:], lines[:1], [place]), ",\n ", before="Find a value in this JSON object.\n{"
    )
    question = f'Question: What is the value of the key "{names[0]}"? Answer: The value is'
    return Draft(text + "}\n", question, values[:1], evidence)


def recall(request: Request) -> Draft:
    """:mod:`train.evaluation.mqar` in words: 16 nouns get an adjective, one is asked for later.

    ``size`` nouns that got none stand between. Only draws that use the answer once are taken.
    """
    nouns = words.nouns()
    adjectives = [word for word in words.adjectives() if not any(word in noun for noun in nouns)]
    half = min(len(nouns), len(adjectives))
    task = mqar.MQAR(2 * _PAIRS + request.size + 1, 2 * half, _PAIRS, request.size, 1e-9)
    seed = int(request.rng("bindings").integers(2**31))
    for number in itertools.count():
        drawn = mqar.draw_samples(task, seed, 1, first=number)
        tokens, asked = drawn.tokens[0].tolist(), int(drawn.evidence[0, -1]) // 2
        given = [adjectives[value - half] for value in tokens[1 : 2 * _PAIRS : 2]]
        if sum(given[asked] in other for other in given) == 1:
            break
    bound = [
        Piece(f"The {nouns[noun]} is {adjective}.", evidence=place == asked)
        for place, (noun, adjective) in enumerate(zip(tokens[: 2 * _PAIRS : 2], given, strict=True))
    ]
    fill = [Piece(f"{nouns[noun].capitalize()}.") for noun in tokens[2 * _PAIRS : -1]]
    context, evidence = join(bound + fill, " ", before="Note what these things are like.\n")
    return Draft(context, f" The {nouns[tokens[-1]]} is", [given[asked]], evidence)


def induction(request: Request) -> Draft:
    """``size`` random words, two of which occur once and side by side; then the first of the two.

    The answer is the word that followed it; evidence are both.
    """
    nouns = words.nouns()
    rng = request.rng("words")
    first, second = (nouns[place] for place in rng.permutation(len(nouns))[:2])
    others = [word for word in nouns if first not in word and second not in word]
    around = [Piece(others[place]) for place in rng.integers(0, len(others), request.size)]
    place = _place(request, request.rng("place"), request.size)
    context, evidence = join(
        insert(around, [Piece(f"{first} {second}", evidence=True)], [place]), " "
    )
    return Draft(context, f" {first}", [second], evidence)


TASKS = {
    "passkey": Task(passkey, scoring.begins_with_answer, 16, "noise", places=True),
    "json_kv": Task(json_pairs, scoring.all_answers, 64, places=True),
    "mqar": Task(recall, scoring.begins_with_answer, 8),
    "induction": Task(induction, scoring.begins_with_answer, 8, places=True),
    "copy": Task(copy, scoring.leading_words, 128, "noise", places=True),
}
