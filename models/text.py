"""Text in, text out: continuations with stop strings, handed out while they grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from models.generate import Sampling, stream
from models.transformer import Decoder

if TYPE_CHECKING:
    from train.tokenizer import Tokenizer

_BROKEN = "�"


def generate_text(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int,
    *,
    stop: Sequence[str] = (),
    sampling: Sampling | None = None,
    seed: int | Sequence[int] = 0,
    on_text: Callable[[int, str], Any] | None = None,
    on_token: Callable[[int], Any] | None = None,
    **options: Any,
) -> list[str]:
    """Continue every prompt until a stop string, the end token or ``max_new_tokens``.

    Args:
      decoder: the model; stacked or not.
      tokenizer: the one it was trained with.
      prompts: texts, which the tokenizer's start token is put in front of, or lists of token ids,
        which are taken as they are.
      max_new_tokens: at most, for each prompt.
      stop: strings that end a continuation; the continuation ends before the first of them.
      sampling: how tokens are drawn; None is greedy.
      seed: one number for all prompts or one for each.
      on_text: called with a prompt's number and the text that came to be certain: no character is
        cut in two and nothing of it is taken back by a stop string.
      on_token: called with a prompt's number for every token of its continuation.
      **options: of :func:`models.generate.stream`.

    Returns:
      The continuations, without prompt and stop string.

    Raises:
      ValueError: as :func:`models.generate.generate` does, and for an empty stop string.
    """
    if "" in stop:
        raise ValueError(f"stop={tuple(stop)} holds an empty string, which would end every text")
    encoded = [
        [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
        if isinstance(prompt, str)
        else list(prompt)
        for prompt in prompts
    ]
    texts = [Continuation(tokenizer, stop) for _ in encoded]

    def ended(row: int, tokens: list[int]) -> bool:
        if on_token is not None:
            on_token(row)
        certain = texts[row].read(tokens)
        if certain and on_text is not None:
            on_text(row, certain)
        return texts[row].stopped

    for _ in stream(
        decoder,
        encoded,
        max_new_tokens,
        sampling or Sampling(),
        seed,
        (tokenizer.eos_id,),
        ended=ended,
        **options,
    ):
        pass
    for row, text in enumerate(texts):
        rest = text.close()
        if rest and on_text is not None:
            on_text(row, rest)
    return [text.text for text in texts]


class Continuation:
    """The text of a growing list of tokens, up to the first stop string.

    ``text`` is what is certain, ``stopped`` says that a stop string was met.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._held = max((len(string) for string in stop), default=1) - 1
        self._tokens: list[int] = []
        self.text, self.stopped = "", False

    def read(self, tokens: Sequence[int]) -> str:
        """What became certain with ``tokens``, all there are so far."""
        self._tokens = list(tokens)
        whole = self._tokenizer.decode(self._tokens)
        ends = [place for place in (whole.find(string) for string in self._stop) if place >= 0]
        if ends:
            self.stopped = True
            return self._advance(whole[: min(ends)])
        # A character of several tokens is not complete yet, and a stop string may have begun.
        complete = whole.rstrip(_BROKEN)
        return self._advance(complete[: max(len(complete) - self._held, 0)])

    def close(self) -> str:
        """What was held back, once there are no more tokens."""
        return "" if self.stopped else self._advance(self._tokenizer.decode(self._tokens))

    def _advance(self, text: str) -> str:
        new = text[len(self.text) :]
        self.text += new
        return new
