"""What of a sample is attended sparsely, and how all mechanisms share the dense part of the work.

    A   the whole prompt dense, the answer sparse
    B   the context dense; the question and the answer, or the last tokens of a text, sparse
    C   sparse throughout

Under A and B every mechanism starts from the same dense pass, which is done once: what went into
each layer is kept, and from it each mechanism fills its own caches (codes, page bounds, running
sums) through ``attend="dense"``, whose output nobody needs and the compiler leaves out. Budgets
only change what is selected, so one set of caches serves all budgets of a mechanism.

    prefix = prefill(dense, parts, "B")
    caches = fill_caches(quest, parts, prefix)
    score(quest, parts, prefix, caches)            # and again with other budgets

Answers are scored by teacher forcing: each answer token given the true ones before it. All of them
are the likeliest exactly where greedy decoding begins with the answer, in one pass instead of one
a token. Layers run one by one through programs that alike layers share, so that trying many
mechanisms compiles little.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models.generate import Ended, Sampling, go_on
from models.rope import RopeConfig, make_rope
from models.transformer import Decoder, Tree
from sparse_attn.types import Attend, Selection

Protocol = Literal["A", "B", "C"]

BUCKET = 64
"""Lengths are padded to multiples of it, so that samples share programs."""

LOGIT_ROWS = 64
"""Rows whose logits exist at a time."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """The tokens of a sample: ``answer`` is what is scored, the rest is given.

    Raises:
      ValueError: if there is no answer, or nothing before it.
    """

    context: Int[np.ndarray, "C"]
    question: Int[np.ndarray, "Q"]
    answer: Int[np.ndarray, "A"]

    def __post_init__(self) -> None:
        if not len(self.answer) or not len(self.context) + len(self.question):
            raise ValueError(
                f"a sample of {len(self.context)} context, {len(self.question)} question and "
                f"{len(self.answer)} answer tokens cannot be scored; it needs an answer, and "
                "something before it"
            )

    @property
    def length(self) -> int:
        """All tokens."""
        return len(self.context) + len(self.question) + len(self.answer)

    def split(self, protocol: Protocol) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that are read densely, and those after them that are read sparsely.

        The last answer token is only predicted, never read.
        """
        everything = np.concatenate([self.context, self.question, self.answer[:-1]])
        dense = {
            "A": len(self.context) + len(self.question),
            "B": len(self.context),
            "C": 0,
        }[protocol]
        return everything[:dense].astype(np.int32), everything[dense:].astype(np.int32)


def text_parts(tokens: Int[np.ndarray, "T"], last: int) -> Parts:
    """A text whose ``last`` tokens are scored, the row that predicts the first of them sparse.

    Raises:
      ValueError: if the text is not longer than that.
    """
    if len(tokens) < last + 2:
        raise ValueError(f"a text of {len(tokens)} tokens has no context before its {last=} tokens")
    return Parts(tokens[: -last - 1], tokens[-last - 1 : -last], tokens[-last:])


@dataclasses.dataclass(frozen=True)
class Prefix:
    """A dense pass over the tokens that a protocol reads densely (none under C).

    ``inputs`` [1, T, D] is what went into each layer and ``hidden`` [1, T, D] what came out of the
    final norm, right-padded; the first ``length`` rows count.
    """

    protocol: Protocol
    length: int
    inputs: tuple[Float[Array, "1 T D"], ...]
    hidden: Float[Array, "1 T D"] | None


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What the layers selected for the inspected rows: those read sparsely after the context.

    ``layers``: figures of :func:`sparse_attn.metrics.measure` by layer, over all rows read sparsely
    (empty where a layer does not select, or nothing was inspected). ``queries`` [Q]: positions of
    the inspected rows. ``selections``: by layer, their lists [Q, J, P]; None where a layer does not
    select.
    """

    layers: tuple[dict[str, float], ...]
    queries: Int[np.ndarray, "Q"]
    selections: tuple[Selection | None, ...]


@dataclasses.dataclass(frozen=True)
class Score:
    """How a sample's answer was predicted.

    ``nats`` [A] and ``greedy`` [A]: -log p of each answer token, and whether it was the likeliest.
    ``inspection`` is filled with ``inspect=True``.
    """

    nats: Float[np.ndarray, "A"]
    greedy: Bool[np.ndarray, "A"]
    inspection: Inspection

    @property
    def layers(self) -> tuple[dict[str, float], ...]:
        """Figures of the selections by layer."""
        return self.inspection.layers

    @property
    def exact(self) -> bool:
        """Whether greedy decoding begins with the answer."""
        return bool(self.greedy.all())


def prefill(dense: Decoder, parts: Parts, protocol: Protocol) -> Prefix:
    """The dense pass that all mechanisms share.

    Args:
      dense: the model with dense attention in every layer, one module a layer.
      parts: the sample.
      protocol: how much of it is read densely.

    Raises:
      ValueError: if the protocol is unknown.
    """
    if protocol not in get_args(Protocol):
        raise ValueError(f"{protocol=} is unknown; use one of {get_args(Protocol)}")
    tokens, _ = parts.split(protocol)
    if not len(tokens):
        return Prefix(protocol, 0, (), None)
    padded, segment_ids = _padded(tokens)
    x, inputs = dense.embed(padded), []
    for layer in _layers(dense):
        inputs.append(x)
        x, _, _ = layer.call(x, None, segment_ids, "dense", inspect=False)
    return Prefix(protocol, len(tokens), tuple(inputs), dense.final_norm(x))


def fill_caches(decoder: Decoder, parts: Parts, prefix: Prefix) -> tuple[Any, ...]:
    """The caches of ``decoder``'s mechanisms after ``prefix``, with room for all of the sample.

    ``decoder`` has the weights of the model that made the prefix. The caches also serve decoders
    whose mechanisms differ in their budgets, sinks and recent keys only.
    """
    capacity = _round_up(parts.length)
    caches = decoder.init_caches(1, capacity)
    if not prefix.length:
        return caches
    segment_ids = _segments(prefix.length, prefix.inputs[0].shape[1])
    return tuple(
        layer.fill(x, cache, segment_ids)
        for layer, x, cache in zip(_layers(decoder), prefix.inputs, caches, strict=True)
    )


def score(
    decoder: Decoder,
    parts: Parts,
    prefix: Prefix,
    caches: Sequence[Any],
    *,
    inspect: bool = False,
) -> Score:
    """Read the rest of the sample sparsely and score its answer; ``caches`` stay as they are.

    Args:
      decoder: the model with the mechanism to try, one module a layer.
      parts: the sample.
      prefix: its dense part.
      caches: of :func:`fill_caches`.
      inspect: whether to measure the selections of the sparse rows as well.
    """
    _, tokens = parts.split(prefix.protocol)
    wanted, rows = len(parts.answer), []
    read = _Read.nothing(decoder)
    if wanted > len(tokens):  # the last prompt row, dense under protocol A
        assert prefix.hidden is not None
        rows.append(prefix.hidden[:, prefix.length - 1 : prefix.length])
    if len(tokens):
        read = _Read.of(decoder, tokens, prefix.length, caches, inspect=inspect)
        rows.append(read.hidden[:, max(len(tokens) - wanted, 0) :])
    nats, greedy = _predictions(decoder, jnp.concatenate(rows, axis=1)[0], parts.answer)
    return Score(nats, greedy, read.inspection(len(parts.context)))


def answer(
    decoder: Decoder,
    parts: Parts,
    prefix: Prefix,
    caches: Sequence[Any],
    *,
    stop_tokens: Sequence[int] = (),
    ended: Ended | None = None,
    inspect: bool = False,
) -> tuple[list[int], Inspection]:
    """Generate greedily up to as many tokens as ``parts.answer`` has, whatever they are, through
    the program that :func:`models.generate.generate` decodes with; ``caches`` stay as they are.

    Args:
      decoder, parts, prefix, caches: as for :func:`score`.
      stop_tokens: that end the answer without being part of it.
      ended: asked after every token, see :data:`models.generate.Ended`.
      inspect: whether to look at the selections of the sparse prompt rows, or, where there are
        none (protocol A), at those of the rows that read the generated tokens.

    Returns:
      The tokens, and what was selected.
    """
    given = len(parts.context) + len(parts.question)
    tokens = np.concatenate([parts.context, parts.question])[prefix.length :].astype(np.int32)
    read = _Read.nothing(decoder)
    if len(tokens):
        read = _Read.of(decoder, tokens, prefix.length, caches, inspect=inspect)
        hidden, own = read.hidden[:, -1], read.caches
    else:
        assert prefix.hidden is not None
        hidden = prefix.hidden[:, prefix.length - 1]
        # Decoding uses its caches up, and these serve other budgets.
        own = tuple(jax.tree.map(jnp.copy, cache) for cache in caches)
    new = jnp.argmax(decoder.logits(hidden), axis=-1).astype(jnp.int32)
    steps = go_on(
        decoder,
        new,
        np.asarray([given], np.int32),
        own,
        len(parts.answer),
        Sampling(),
        jnp.zeros((1,), jnp.uint32),
        stop_tokens,
        ended=ended,
    )
    found = [token for (token,) in steps if token is not None]
    if inspect and not len(tokens) and len(found) > 1:
        read = _Read.of(decoder, np.asarray(found[:-1], np.int32), given, caches, inspect=True)
    return found, read.inspection(len(parts.context))


@dataclasses.dataclass(frozen=True)
class _Read:
    """A sparse pass over the tokens from ``begin`` on: final hidden states, caches, and what each
    layer reported and selected.
    """

    begin: int
    hidden: Float[Array, "1 T D"]
    caches: tuple[Any, ...]
    found: list[tuple[dict[str, Array], Selection | None]]

    @staticmethod
    def of(
        decoder: Decoder,
        tokens: Int[np.ndarray, "T"],
        begin: int,
        caches: Sequence[Any],
        *,
        inspect: bool,
    ) -> _Read:
        padded, segment_ids = _padded(tokens)
        x, after, found = decoder.embed(padded), [], []
        for layer, cache in zip(_layers(decoder), caches, strict=True):
            x, cache, seen = layer.call(x, cache, segment_ids, "sparse", inspect=inspect)
            after.append(cache)
            found.append(seen)
        return _Read(begin, decoder.final_norm(x)[:, : len(tokens)], tuple(after), found)

    @staticmethod
    def nothing(decoder: Decoder) -> _Read:
        """Of no token, before anything was read."""
        config = decoder.config
        return _Read(0, jnp.zeros((1, 0, config.model_width)), (), [({}, None)] * config.layers)

    def inspection(self, context: int) -> Inspection:
        """Selections of the rows from position ``context`` on."""
        count = self.hidden.shape[1]
        first = min(max(context - self.begin, 0), count)
        selections = tuple(
            None
            if selection is None
            else Selection(selection.indices[0, first:count], selection.block_size)
            for _, selection in self.found
        )
        layers = tuple({name: float(v) for name, v in report.items()} for report, _ in self.found)
        queries = np.arange(self.begin + first, self.begin + count)
        return Inspection(layers, queries, selections)


def layer_heads(
    dense: Decoder, prefix: Prefix
) -> list[tuple[Float[Array, "1 T N H"], Float[Array, "1 T K H"]]]:
    """Rotated queries and keys of every layer in the dense pass, without padding."""
    rope = make_rope(dense.config.rope, dense.config.head_width)
    found = []
    for run, x in zip(dense.config.runs, prefix.inputs, strict=True):
        layer, x = dense.layers[run.name], x[:, : prefix.length]
        q, k, _ = layer.attention.heads(layer.attention_norm(x))
        positions = jnp.arange(prefix.length)[None]
        found.append((rope(q, positions), rope(k[0], positions)))
    return found


@dataclasses.dataclass(frozen=True)
class _Layer:
    graphdef: nnx.GraphDef
    state: Tree
    rope: tuple[RopeConfig, int]

    def call(
        self, x: Array, cache: Any, segment_ids: Array, attend: Attend, *, inspect: bool
    ) -> tuple[Array, Any, tuple[dict[str, Array], Selection | None]]:
        run = _call(self.graphdef, self.rope, attend, inspect)
        return run(self.state, x, cache, segment_ids)

    def fill(self, x: Array, cache: Any, segment_ids: Array) -> Any:
        return _fill(self.graphdef, self.rope)(self.state, x, cache, segment_ids)


def _layers(decoder: Decoder) -> list[_Layer]:
    config = decoder.config
    if config.scan_layers and len(config.runs) < config.layers:
        raise ValueError("alike layers are stacked; pass decoder.unstacked()")
    layers = []
    for run in config.runs:
        graphdef, state = nnx.split(decoder.layers[run.name])
        rope = (config.rope, config.head_width)
        layers.append(_Layer(graphdef, nnx.to_pure_dict(state), rope))
    return layers


@functools.lru_cache(maxsize=512)
def _call(
    graphdef: nnx.GraphDef, rope: tuple[RopeConfig, int], attend: Attend, inspect: bool
) -> Any:
    """Jitted: one layer. Alike layers have equal graph definitions and share it."""

    @jax.jit
    def call(state: Tree, x: Array, cache: Any, segment_ids: Array) -> Any:
        layer = nnx.merge(graphdef, state)
        x, cache, aux = layer(
            x, make_rope(*rope), cache, segment_ids=segment_ids, attend=attend, inspect=inspect
        )
        return x, cache, (aux.metrics, aux.selection)

    return call


@functools.lru_cache(maxsize=512)
def _fill(graphdef: nnx.GraphDef, rope: tuple[RopeConfig, int]) -> Any:
    """Jitted: a layer's cache after its input; what the layer puts out is never computed."""

    @jax.jit
    def fill(state: Tree, x: Array, cache: Any, segment_ids: Array) -> Any:
        layer = nnx.merge(graphdef, state)
        return layer.attention(
            layer.attention_norm(x),
            make_rope(*rope),
            cache,
            segment_ids=segment_ids,
            attend="dense",
        )[1]

    return fill


def _predictions(
    decoder: Decoder, hidden: Float[Array, "A D"], answer: Int[np.ndarray, "A"]
) -> tuple[np.ndarray, np.ndarray]:
    nats, greedy = [], []
    for begin in range(0, len(answer), LOGIT_ROWS):
        logits = decoder.logits(hidden[begin : begin + LOGIT_ROWS])
        targets = jnp.asarray(answer[begin : begin + LOGIT_ROWS])
        found = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        nats.append(np.asarray(jax.nn.logsumexp(logits, axis=-1) - found))
        greedy.append(np.asarray(jnp.argmax(logits, axis=-1) == targets))
    return np.concatenate(nats), np.concatenate(greedy)


def _padded(tokens: Int[np.ndarray, "T"]) -> tuple[Int[Array, "1 T"], Int[Array, "1 T"]]:
    width = _round_up(len(tokens))
    padded = np.zeros((1, width), np.int32)
    padded[0, : len(tokens)] = tokens
    return jnp.asarray(padded), _segments(len(tokens), width)


def _segments(length: int, width: int) -> Int[Array, "1 T"]:
    return jnp.asarray((np.arange(width) < length).astype(np.int32))[None]


def _round_up(length: int) -> int:
    return -(-length // BUCKET) * BUCKET
