"""The two ways to score a text: one teacher-forced forward, and one step a token from the cache."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models.transformer import Decoder, Tree, merge, split


@dataclasses.dataclass(frozen=True)
class Windows:
    """Documents of different lengths as right-padded rows.

    ``tokens`` [B, T] start with bos; ``lengths`` [B] counts the valid ones. ``scored`` [B, T] marks
    the tokens that are predicted *and* stand for text: neither bos nor eos, which have no bytes.
    """

    tokens: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, " B"]
    scored: Bool[np.ndarray, "B T"]

    @property
    def segment_ids(self) -> Int[np.ndarray, "B T"]:
        """1 for the document, 0 for padding."""
        return (np.arange(self.tokens.shape[1])[None] < self.lengths[:, None]).astype(np.int32)

    def batches(self, size: int) -> list[Windows]:
        """Rows in groups of ``size``; the last group is filled up with empty rows."""
        rows = -len(self.tokens) % size
        fill = [((0, rows), (0, 0)), ((0, rows),), ((0, rows), (0, 0))]
        arrays = [
            np.pad(array, pad)
            for array, pad in zip((self.tokens, self.lengths, self.scored), fill, strict=True)
        ]
        return [
            Windows(*(array[i : i + size] for array in arrays))
            for i in range(0, len(self.tokens), size)
        ]


def make_windows(
    documents: Sequence[Int[np.ndarray, "T"]], token_bytes: Int[np.ndarray, "V"], multiple: int = 1
) -> Windows:
    """Rows of equal length, rounded up to ``multiple``.

    Raises:
      ValueError: if there is no document.
    """
    if not documents:
        raise ValueError("there is no document to score")
    lengths = np.array([len(tokens) for tokens in documents], np.int32)
    width = -(-int(lengths.max()) // multiple) * multiple
    tokens = np.zeros((len(documents), width), np.int32)
    for row, document in enumerate(documents):
        tokens[row, : len(document)] = document
    inside = np.arange(width)[None] < lengths[:, None]
    scored = inside & (token_bytes[tokens] > 0)
    scored[:, 0] = False
    return Windows(tokens, lengths, scored)


def teacher_forced(decoder: Decoder, windows: Windows) -> tuple[np.ndarray, dict[str, float]]:
    """Score all tokens with one forward.

    Returns:
      Nats [B, T] of each scored token given all tokens before it (0 elsewhere), and the metrics of
      the selections (density, recall, ...), averaged over layers.
    """
    graphdef, params, state = split(decoder)
    nats, metrics = _teacher_forced(graphdef)(
        params, state, windows.tokens, windows.segment_ids, windows.scored
    )
    return np.asarray(nats), {name: float(value) for name, value in metrics.items()}


def decoded(decoder: Decoder, windows: Windows) -> np.ndarray:
    """Score the same tokens with single-token steps: nothing is prefilled, all state is cache.

    Returns:
      Nats [B, T], as :func:`teacher_forced`.
    """
    graphdef, params, state = split(decoder.unstacked())
    return np.asarray(
        _decoded(graphdef)(params, state, windows.tokens, windows.segment_ids, windows.scored)
    )


def bits_per_byte(nats: float, scored_bytes: int) -> float:
    """Total nats over exact utf-8 bytes, in bits."""
    return nats / math.log(2) / scored_bytes


@functools.lru_cache(maxsize=8)
def _teacher_forced(graphdef: nnx.GraphDef) -> Any:
    @jax.jit
    def run(
        params: Tree,
        state: Tree,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        scored: Bool[Array, "B T"],
    ) -> tuple[Float[Array, "B T"], dict[str, Array]]:
        decoder = merge(graphdef, params, state)
        output = decoder.hidden(tokens, segment_ids=segment_ids, inspect=True)

        def row(arrays: tuple[Array, Array]) -> Float[Array, " T"]:
            # One row's logits at a time: [B, T, V] is the largest array otherwise.
            hidden, targets = arrays
            return _nats(decoder.logits(hidden[:-1]), targets[1:])

        nats = jnp.pad(jax.lax.map(row, (output.hidden, tokens)), ((0, 0), (1, 0)))
        return jnp.where(scored, nats, 0.0), output.aux.metrics

    return run


@functools.lru_cache(maxsize=8)
def _decoded(graphdef: nnx.GraphDef) -> Any:
    @jax.jit
    def run(
        params: Tree,
        state: Tree,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        scored: Bool[Array, "B T"],
    ) -> Float[Array, "B T"]:
        decoder = merge(graphdef, params, state)

        def step(caches: Any, column: tuple[Array, Array, Array]) -> tuple[Any, Array]:
            token, segment, following = column
            output = decoder(token[:, None], caches, segment_ids=segment[:, None])
            return output.caches, _nats(output.logits[:, 0], following)

        columns = (tokens[:, :-1].T, segment_ids[:, :-1].T, tokens[:, 1:].T)
        _, nats = jax.lax.scan(step, decoder.init_caches(*tokens.shape), columns)
        return jnp.where(scored, jnp.pad(nats.T, ((0, 0), (1, 0))), 0.0)

    return run


def _nats(logits: Float[Array, "A V"], targets: Int[Array, " A"]) -> Float[Array, " A"]:
    """-log softmax(logits)[target]."""
    found = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - found
