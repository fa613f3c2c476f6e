"""Multi-query associative recall (MQAR, arXiv 2312.04927): bindings first, questions much later.

    k1 v1 k2 v2 ... kP vP | at least ``gap`` tokens of filler | ... k3 ... filler ... k1 ...

At every question, a key that was bound at the beginning, the next token to predict is its value.
The inputs after the bindings hold keys and filler but no values, so the answer can only come from
the binding itself, ``gap`` or more tokens back. Keys are drawn from the lower half of the
vocabulary (0 is never used), values from the upper half; filler are keys that are not bound in the
sample.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True)
class MQAR:
    """Sizes of the task.

    Attributes:
      length: T, tokens of a sample.
      vocab_size: V, an even number.
      pairs: P, bindings of a sample.
      gap: tokens between the last binding and the first question, at least.
      question_rate: share of the later tokens that are questions.

    Raises:
      ValueError: if a sample has no room for a question, or the vocabulary is too small.
    """

    length: int = 512
    vocab_size: int = 512
    pairs: int = 16
    gap: int = 64
    question_rate: float = 0.5

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.gap < 0 or 2 * self.pairs + self.gap >= self.length:
            raise ValueError(
                f"length={self.length} leaves no question after pairs={self.pairs} bindings of two "
                f"tokens and gap={self.gap}; use a length above {2 * self.pairs + self.gap}"
            )
        if self.vocab_size % 2 or self.vocab_size < 2 * (self.pairs + 2):
            raise ValueError(
                f"vocab_size={self.vocab_size} must be even and at least {2 * (self.pairs + 2)}: "
                "half of it are keys, and some of them must stay unbound"
            )
        if not 0 < self.question_rate <= 1:
            raise ValueError(f"question_rate={self.question_rate} must lie in (0, 1]")

    @property
    def first_question(self) -> int:
        """The earliest position of a question."""
        return 2 * self.pairs + self.gap


@dataclasses.dataclass(frozen=True)
class Samples:
    """``tokens`` and ``targets`` [B, T] int32, ``weights`` [B, T] float32: 1 at questions.

    ``evidence`` [B, T]: position of the value that answers the question, -1 elsewhere.
    """

    tokens: Int[np.ndarray, "B T"]
    targets: Int[np.ndarray, "B T"]
    weights: Float[np.ndarray, "B T"]
    evidence: Int[np.ndarray, "B T"]


def draw_samples(task: MQAR, seed: int, count: int, first: int = 0) -> Samples:
    """Samples ``first .. first + count - 1``; each is a function of (seed, its number) alone."""
    half, P, T = task.vocab_size // 2, task.pairs, task.length
    tokens = np.zeros((count, T), np.int32)
    targets = np.zeros((count, T), np.int32)
    evidence = np.full((count, T), -1, np.int32)
    for row in range(count):
        rng = np.random.default_rng([seed, first + row])
        keys = 1 + rng.permutation(half - 1)
        bound, unbound = keys[:P], keys[P:]
        values = rng.integers(half, task.vocab_size, P)
        tokens[row, 0 : 2 * P : 2], tokens[row, 1 : 2 * P : 2] = bound, values
        tokens[row, 2 * P :] = unbound[rng.integers(0, len(unbound), T - 2 * P)]
        asked = np.flatnonzero(rng.random(T - task.first_question) < task.question_rate)
        if not len(asked):
            asked = np.array([T - 1 - task.first_question])
        at, which = task.first_question + asked, rng.integers(0, P, len(asked))
        tokens[row, at], targets[row, at] = bound[which], values[which]
        evidence[row, at] = 2 * which + 1
    return Samples(tokens, targets, (evidence >= 0).astype(np.float32), evidence)
