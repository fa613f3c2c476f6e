"""Our models for lm-evaluation-harness (the package ``lm_eval``), through the generator's caches.

    lm = HarnessLM(decoder, tokenizer, max_length=2048)
    lm_eval.simple_evaluate(lm, tasks=["lambada_openai"], limit=16)

Texts are scored and continued by :mod:`train.evaluation.protocols`, so that what the harness sees
is what decoding computes: sparse throughout (protocol C), or after a dense context (A).
``scripts/harness.py`` is the command line. Needs the extra ``harness``.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(f"{error}; install the extra: pip install '.[harness]'") from error
from tqdm import tqdm

from models.generate import Sampling
from models.text import Continuation, generate_text
from models.transformer import Decoder
from models.upcycle import densely
from sparse_attn.dense import Dense
from train.evaluation.protocols import Parts, answer, fill_caches, prefill, score
from train.tokenizer import Tokenizer

GENERATED = 256
"""Tokens of an answer where a task does not say; the harness's other models have it too."""

_log = logging.getLogger(__name__)
_NOTHING = np.zeros(0, np.int32)


class HarnessLM(TemplateLM):
    """A decoder as the harness knows models.

    Args:
      decoder: with the attention to evaluate.
      tokenizer: its own.
      protocol: "C", sparse throughout, or "A", where the context (all of the prompt) is read
        densely and the continuation sparsely.
      max_length: tokens of context and continuation together; longer contexts lose their beginning,
        which is logged once.
      start: whether texts begin with the tokenizer's start token, as in training.
      batch_size: prompts that are continued together under protocol C. Answers do not depend on it.

    Raises:
      ValueError: if an argument is out of range, or protocol A is asked of a model with several
        K/V branches.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        *,
        protocol: Literal["A", "C"] = "C",
        max_length: int = 4096,
        start: bool = True,
        batch_size: int = 1,
    ) -> None:
        super().__init__()
        if protocol not in ("A", "C"):
            raise ValueError(
                f"{protocol=}: the harness does not say where a question begins; use A or C"
            )
        if max_length < 2 or batch_size < 1:
            raise ValueError(f"{max_length=} must be at least 2 and {batch_size=} at least 1")
        self._decoder = self._prefilling = decoder.unstacked()
        config = self._decoder.config
        if protocol == "A" and any(run.attention != Dense() for run in config.runs):
            self._prefilling = densely(self._decoder)
        self._tokenizer, self._protocol, self._start = tokenizer, protocol, start
        self.max_length, self.batch_size = max_length, batch_size
        self._told = False

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        return self._tokenizer.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; with the start token unless ``add_special_tokens`` is false."""
        del kwargs
        start = self._start if add_special_tokens is None else add_special_tokens
        return [self._tokenizer.bos_id] * start + self._tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether greedy decoding gives it) of every request."""
        del kwargs
        found = []
        for texts, context, continuation in tqdm(requests, disable=disable_tqdm, desc="scoring"):
            parts = self._parts(context, len(continuation), np.asarray(continuation, np.int32))
            prefix = prefill(self._prefilling, parts, self._protocol)
            caches = fill_caches(self._decoder, parts, prefix)
            scored = score(self._decoder, parts, prefix, caches)
            found.append((-float(scored.nats.sum(dtype=np.float64)), scored.exact))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, found[-1])
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of whole texts, in windows of ``max_length`` that follow each other."""
        found = []
        for request in tqdm(requests, disable=disable_tqdm, desc="scoring"):
            (string,) = request.args
            windows = [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(string, add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length - 1,
                    context_len=1,
                )
            ]
            total = sum(nats for nats, _ in self._loglikelihood_tokens(windows, disable_tqdm=True))
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), total)
        return found

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of the strings in ``until``."""
        asked = [(request.args[0], _Wanted.of(request.args[1])) for request in requests]
        found: list[str] = []
        with tqdm(total=len(asked), disable=disable_tqdm, desc="generating") as bar:
            for wanted, prompts in self._batches(asked):
                for prompt, text in zip(prompts, self._continue(prompts, wanted), strict=True):
                    self.cache_hook.add_partial("generate_until", (prompt, wanted.arguments), text)
                    found.append(text)
                bar.update(len(prompts))
        return found

    def _batches(self, asked: Sequence[tuple[str, _Wanted]]) -> Iterator[tuple[_Wanted, list[str]]]:
        """Neighbours that want the same."""
        size = self.batch_size if self._protocol == "C" else 1
        begin = 0
        while begin < len(asked):
            wanted, end = asked[begin][1], begin + 1
            while end < min(begin + size, len(asked)) and asked[end][1] == wanted:
                end += 1
            yield wanted, [prompt for prompt, _ in asked[begin:end]]
            begin = end

    def _continue(self, prompts: list[str], wanted: _Wanted) -> list[str]:
        parts = [self._parts(self.tok_encode(p), wanted.tokens, _NOTHING) for p in prompts]
        if self._protocol == "C":
            return generate_text(
                self._decoder,
                self._tokenizer,
                [part.context.tolist() for part in parts],
                wanted.tokens,
                stop=wanted.until,
                sampling=wanted.sampling,
            )
        if wanted.sampling != Sampling():
            raise ValueError("protocol A continues greedily; use C to draw at random")
        (part,) = parts
        text = Continuation(self._tokenizer, wanted.until)

        def ended(_: int, tokens: list[int]) -> bool:
            text.read(tokens)
            return text.stopped

        prefix = prefill(self._prefilling, part, "A")
        caches = fill_caches(self._decoder, part, prefix)
        stop_tokens = (self._tokenizer.eos_id,)
        answer(self._decoder, part, prefix, caches, stop_tokens=stop_tokens, ended=ended)
        text.close()
        return [text.text]

    def _parts(self, context: list[int], count: int, continuation: np.ndarray) -> Parts:
        """Context and continuation (``count`` tokens, zeros if they are to be found)."""
        room = self.max_length - count
        if room < 1:
            raise ValueError(
                f"a continuation of {count} tokens leaves no context within max_length="
                f"{self.max_length}; raise it"
            )
        if len(context) > room and not self._told:
            self._told = True
            _log.warning(
                "a context of %d tokens loses its beginning: %d are left beside the continuation "
                "within max_length=%d",
                *(len(context), room, self.max_length),
            )
        given = np.asarray(context[-room:], np.int32)
        return Parts(given, _NOTHING, continuation if len(continuation) else np.zeros(count, int))


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What a task asks of a continuation."""

    tokens: int
    until: tuple[str, ...]
    sampling: Sampling
    arguments: dict[str, Any] = dataclasses.field(compare=False)

    @staticmethod
    def of(arguments: dict[str, Any]) -> _Wanted:
        until = arguments.get("until") or ()
        temperature = float(arguments.get("temperature") or 0)
        drawn = bool(arguments.get("do_sample", temperature > 0))
        sampling = Sampling()
        if drawn and temperature > 0:
            sampling = Sampling(temperature, arguments.get("top_k"), arguments.get("top_p"))
        return _Wanted(
            int(arguments.get("max_gen_toks", GENERATED)),
            tuple(text for text in ([until] if isinstance(until, str) else until) if text),
            sampling,
            arguments,
        )
