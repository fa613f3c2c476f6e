"""The order-2 byte model: what counting three bytes in a row already knows.

It is the yardstick of the quickstart: a network that does not beat it has learnt no more than
letter statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np
from jaxtyping import Float, Int, UInt8

_VALUES = 256


class ByteModel:
    """Interpolated order-2 byte model with Witten-Bell smoothing.

    The probability of byte b after the context c of m bytes, c' being c without its oldest byte::

        P_m(b | c) = (count(c b) + distinct(c) P_{m-1}(b | c')) / (count(c) + distinct(c))

    with m = 0, 1, 2, and P_{-1} = 1/256. ``distinct(c)`` counts the different bytes seen after c; a
    context that was never seen passes the shorter one's probability through. Nothing is tuned, so
    nothing but the training text is needed. The counts never run across a document's border.
    """

    def __init__(self) -> None:
        self._after = [np.zeros((_VALUES**order, _VALUES), np.uint32) for order in (0, 1, 2)]
        self._totals: list[np.ndarray] | None = None
        self._distinct: list[np.ndarray] | None = None

    @classmethod
    def fit(cls, documents: Iterable[bytes]) -> Self:
        """Count ``documents``.

        Raises:
          ValueError: if they hold no byte.
        """
        model = cls()
        for document in documents:
            text = np.frombuffer(document, np.uint8).astype(np.int64)
            codes = np.zeros_like(text)
            for order in (0, 1, 2):
                if len(text) <= order:
                    break
                codes = text if order == 0 else codes[:-1] * _VALUES + text[order:]
                seen, counts = np.unique(codes, return_counts=True)
                model._after[order].reshape(-1)[seen] += counts.astype(np.uint32)
        if not model._after[0].any():
            raise ValueError("the byte model needs training text; it was given no byte")
        model._totals = [counts.sum(axis=1, dtype=np.int64) for counts in model._after]
        model._distinct = [np.count_nonzero(counts, axis=1) for counts in model._after]
        return model

    def probabilities(self, text: UInt8[np.ndarray, "S"], first: int = 0) -> Float[np.ndarray, "T"]:
        """Float64 probability of each byte from ``first`` on; earlier bytes are context only."""
        if self._totals is None or self._distinct is None:
            raise ValueError("the byte model was not fitted; use ByteModel.fit(documents)")
        wide = text.astype(np.int64)
        where = np.arange(first, len(wide))
        byte = wide[where]
        probability = np.full(len(where), 1.0 / _VALUES)
        context: Int[np.ndarray, "T"] = np.zeros(len(where), np.int64)
        for order in (0, 1, 2):
            if order:
                context = context + wide[np.maximum(where - order, 0)] * _VALUES ** (order - 1)
            total = self._totals[order][context]
            distinct = self._distinct[order][context]
            known = (where >= order) & (total > 0)
            count = self._after[order][context, byte]
            smoothed = (count + distinct * probability) / np.where(known, total + distinct, 1)
            probability = np.where(known, smoothed, probability)
        return probability

    def bits(self, text: bytes, first: int = 0) -> float:
        """Bits the model needs for ``text[first:]``, given ``text[:first]``."""
        return float(-np.log2(self.probabilities(np.frombuffer(text, np.uint8), first)).sum())

    def bits_per_byte(self, texts: Sequence[tuple[bytes, int]]) -> float:
        """Mean bits a byte over (text, first scored byte) pairs.

        Raises:
          ValueError: if no byte is scored.
        """
        scored = sum(len(text) - first for text, first in texts)
        if scored <= 0:
            raise ValueError(f"no byte to score in {len(texts)} texts")
        return sum(self.bits(text, first) for text, first in texts) / scored
