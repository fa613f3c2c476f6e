"""Tile sizes that were measured: tables of ``scripts/tune_tiles.py``, asked by every kernel.

``kernels_pallas/tiles/<chip>.json`` (:func:`table_path`) holds an object with what the chip calls
itself (``device``) and ``entries``, a list of :class:`Entry` as objects. An entry serves the calls
of its op and direction whose ``sizes`` are equal and which are at least as long as what was
measured; of several the longest. Where none does, tiles are chosen by rule.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "DIRECTIONS",
    "Direction",
    "Entry",
    "Question",
    "asked",
    "choose",
    "read_table",
    "table_path",
    "using",
    "write_table",
]

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, Direction] = ("forward", "backward")

FOLDER = Path(__file__).parent / "tiles"
_logger = logging.getLogger("sparse_attn")


@dataclasses.dataclass(frozen=True)
class Question:
    """What a kernel asks a table.

    Attributes:
      op: name of the function whose tiles are wanted.
      direction: the pass that takes them; ops with gradients in XLA have the forward one alone.
      length: what the work grows with: query tokens, or keys (of a list) in decoding.
      sizes: names and values of whatever else decides which tiles are good, in order of names.
      by_rule: the tiles that the backend's heuristic chooses.
    """

    op: str
    direction: Direction
    length: int
    sizes: tuple[tuple[str, int | str], ...]
    by_rule: Any


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of a table.

    Attributes:
      op, direction, length, sizes: as in :class:`Question`; ``length`` is that of the measurement.
      tiles: fields of the backend's ``Tiles`` and their values; fields left out stay as by rule.
      seconds: median of a call with these tiles; of forward and backward together if ``direction``
        is the backward one. None for candidates, which are never written.
      seconds_by_rule: the same with the tiles chosen by rule.
      jax, date: version and day (ISO) of the measurement.
    """

    op: str
    direction: Direction
    length: int
    sizes: Mapping[str, int | str]
    tiles: Mapping[str, int]
    seconds: float | None = None
    seconds_by_rule: float | None = None
    jax: str = ""
    date: str = ""

    def answers(self, question: Question) -> bool:
        """Whether this entry serves such calls."""
        mine = (self.op, self.direction, dict(self.sizes))
        theirs = (question.op, question.direction, dict(question.sizes))
        return mine == theirs and self.length <= question.length


_candidates: contextvars.ContextVar[Sequence[Entry] | None]
_candidates = contextvars.ContextVar("candidates", default=None)
_questions: contextvars.ContextVar[list[Question] | None]
_questions = contextvars.ContextVar("questions", default=None)


def choose[T](
    op: str,
    chip: str,
    by_rule: T,
    check: Callable[[T], Any],
    *,
    direction: Direction = "forward",
    length: int,
    **sizes: int | str,
) -> T:
    """The measured tiles of a call, or ``by_rule``.

    Args:
      chip: device kind that the call is traced for, "" for none: there are no tables then.
      by_rule: a frozen dataclass of integers, the heuristic's choice.
      check: raises ``ValueError`` or ``NotImplementedError`` for tiles that do not serve the call.
        An entry that it refuses is ignored, which is logged once.
      direction, length, sizes: see :class:`Question`.
    """
    question = Question(op, direction, length, tuple(sorted(sizes.items())), by_rule)
    questions, candidates = _questions.get(), _candidates.get()
    if questions is not None:
        questions.append(question)
    if candidates is not None:
        entry = _longest(candidates, question)
        return by_rule if entry is None else _checked(entry, by_rule, check)
    entry = _longest(read_table(table_path(chip)), question) if chip else None
    if entry is None:
        return by_rule
    try:
        return _checked(entry, by_rule, check)
    except (TypeError, ValueError, NotImplementedError) as error:
        _warn_once(f"measured tiles {dict(entry.tiles)} of {op} on {chip} are not used: {error}")
        return by_rule


def _longest(entries: Sequence[Entry], question: Question) -> Entry | None:
    serving = [entry for entry in entries if entry.answers(question)]
    return max(serving, key=lambda entry: entry.length, default=None)


def _checked[T](entry: Entry, by_rule: T, check: Callable[[T], Any]) -> T:
    if any(type(value) is not int for value in entry.tiles.values()):
        raise TypeError(f"tiles are integers, not {dict(entry.tiles)}")
    tiles: T = dataclasses.replace(by_rule, **entry.tiles)  # type: ignore[type-var]
    check(tiles)
    return tiles


@functools.cache
def _warn_once(message: str) -> None:
    _logger.warning("%s", message)


@contextlib.contextmanager
def using(candidates: Sequence[Entry]) -> Iterator[None]:
    """Kernels *traced* inside choose among ``candidates`` alone, whatever the chip; one that does
    not serve its call raises.
    """
    token = _candidates.set(tuple(candidates))
    try:
        yield
    finally:
        _candidates.reset(token)


@contextlib.contextmanager
def asked() -> Iterator[list[Question]]:
    """The questions of the kernels that are traced inside."""
    questions: list[Question] = []
    token = _questions.set(questions)
    try:
        yield questions
    finally:
        _questions.reset(token)


def table_path(chip: str) -> Path:
    """Where the table of a device kind is: "TPU v5 lite" has tiles/tpu_v5_lite.json."""
    return FOLDER / f"{re.sub('[^a-z0-9]+', '_', chip.lower()).strip('_')}.json"


@functools.cache
def read_table(path: Path) -> tuple[Entry, ...]:
    """The entries of a table, none if there is no such file; read once.

    Raises:
      ValueError: for a file that is no table.
    """
    if not path.exists():
        return ()
    try:
        return tuple(Entry(**entry) for entry in json.loads(path.read_text())["entries"])
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no table of tiles ({error}); tune again, or delete it") from (
            error
        )


def write_table(path: Path, device: str, entries: Sequence[Entry]) -> None:
    """Write measured entries in the place of those that were about the same calls.

    Raises:
      ValueError: for an entry without a measurement.
    """
    for entry in entries:
        if entry.seconds is None or entry.seconds_by_rule is None:
            raise ValueError(f"{entry} was not measured; tables hold measurements alone")
    new = {_call_of(entry): entry for entry in entries}
    kept = [entry for entry in read_table(path) if _call_of(entry) not in new]
    rows = sorted([*kept, *new.values()], key=_call_of)
    table: dict[str, Any] = {"device": device}
    table["entries"] = [dataclasses.asdict(row) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")
    read_table.cache_clear()


def _call_of(entry: Entry) -> tuple[Any, ...]:
    return entry.op, entry.direction, str(sorted(entry.sizes.items())), entry.length
