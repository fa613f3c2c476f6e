"""One question with its context, its answers, and where the answers stand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int

if TYPE_CHECKING:
    from train.tokenizer import Tokenizer

Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt of two parts, and what a right continuation of it holds.

    Attributes:
      task: name in :data:`train.evaluation.tasks.TASKS`.
      seed: the sample is a function of (task, seed, length, tokenizer, haystack, depth) alone.
      context: everything before the question.
      question: the question, ending with the beginning of the answer.
      answers: the strings that are looked for.
      evidence: character spans [start, end) of ``context`` that hold what the question asks for,
        ascending and disjoint.
      length: limit in tokens; context, question, a start token and the answer fit into it.
      answer_tokens: tokens to generate, at most.
    """

    task: str
    seed: int
    context: str
    question: str
    answers: tuple[str, ...]
    evidence: tuple[Span, ...]
    length: int
    answer_tokens: int

    @property
    def prompt(self) -> str:
        """What the model reads: context and question."""
        return self.context + self.question

    @property
    def depth(self) -> float:
        """Where the first evidence begins: 0 is the beginning of the context, 1 its end."""
        return self.evidence[0][0] / len(self.context)


class Piece(NamedTuple):
    """A part of a context, and whether it is evidence."""

    text: str
    evidence: bool = False


class Prompt(NamedTuple):
    """Token ids (int32) of a sample's two parts."""

    context: Int[np.ndarray, "C"]
    question: Int[np.ndarray, "Q"]

    @property
    def tokens(self) -> Int[np.ndarray, "T"]:
        """Both parts."""
        return np.concatenate([self.context, self.question])


def join(pieces: Iterable[Piece], separator: str = "", before: str = "") -> tuple[str, list[Span]]:
    """The text of ``pieces`` after ``before``, and the spans of those that are evidence."""
    parts, spans, end = [before], [], len(before)
    for number, piece in enumerate(pieces):
        gap = separator if number else ""
        start = end + len(gap)
        end = start + len(piece.text)
        parts += [gap, piece.text]
        if piece.evidence:
            spans.append((start, end))
    return "".join(parts), spans


def prompt_tokens(sample: Sample, tokenizer: Tokenizer, *, start: bool = True) -> Prompt:
    """Context and question, encoded one by one so that every protocol reads the same tokens.

    ``start`` puts the tokenizer's start token in front.
    """
    context, question = tokenizer.encode(sample.context), tokenizer.encode(sample.question)
    if start:
        context = np.concatenate([np.array([tokenizer.bos_id], np.int32), context])
    return Prompt(context, question)


def evidence_tokens(
    sample: Sample, tokenizer: Tokenizer, *, start: bool = True
) -> Int[np.ndarray, "E"]:
    """Positions (int32, ascending) in the prompt of the tokens that touch the evidence.

    A token counts if it holds a byte of an evidence span. ``start`` as in :func:`prompt_tokens`.

    Raises:
      ValueError: if the tokenizer changes the text, so that its tokens cannot be placed in it.
    """
    ids = tokenizer.encode(sample.context)
    first, last = _token_bytes(ids, tokenizer, sample)
    found = np.zeros(len(ids), bool)
    for begin, end in _byte_spans(sample.context, sample.evidence):
        found |= (first < end) & (last > begin)
    return (np.flatnonzero(found) + start).astype(np.int32)


def _token_bytes(
    ids: np.ndarray, tokenizer: Tokenizer, sample: Sample
) -> tuple[np.ndarray, np.ndarray]:
    """First and last + 1 byte of the context that every token covers."""
    last = np.cumsum(tokenizer.token_bytes[ids], dtype=np.int64)
    size = len(sample.context.encode("utf-8"))
    # Llama 2's tokenizer and its like put one space in front of every text.
    extra = int(last[-1]) - size
    if extra not in (0, 1):
        raise ValueError(
            f"the {len(ids)} tokens of task {sample.task!r}, seed {sample.seed}, hold {last[-1]} "
            f"bytes, its context {size}: the tokenizer changes this text, so evidence has no place "
            "in it; use a haystack in the tokenizer's normal form (NFC)"
        )
    last -= extra
    return last - tokenizer.token_bytes[ids], last


def _byte_spans(text: str, spans: Sequence[Span]) -> list[Span]:
    """Spans of utf-8 bytes for ascending, disjoint spans of characters."""
    found, characters, size = [], 0, 0
    for start, end in spans:
        begin = size + len(text[characters:start].encode("utf-8"))
        characters, size = end, begin + len(text[start:end].encode("utf-8"))
        found.append((begin, size))
    return found
