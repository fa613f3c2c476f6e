"""A decoder-only language model around the attention mechanisms, and its plain-pytree form.

    decoder = Decoder(config, rngs=nnx.Rngs(0))
    graphdef, params, state = split(decoder)            # plain nested dicts, fit for jit
    output = merge(graphdef, params, state)(tokens)

Parameter names are ``embedding``, ``layers.<run>.attention.q``, ``layers.<run>.mlp.gate``,
``final_norm.scale`` and, untied, ``unembedding``. ``<run>`` is a layer number, or ``first-last``
for alike layers stacked along a leading axis (:attr:`ModelConfig.runs`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from models.config import ModelConfig, Remat, Run
from models.layers import Layer, RMSNorm, normal
from models.rope import RopeConfig, make_rope
from sparse_attn.parallel import SequenceParallel
from sparse_attn.types import Attend, Aux, Rope, Selection

__all__ = [
    "Decoder",
    "DecoderOutput",
    "HiddenOutput",
    "ModelConfig",
    "RopeConfig",
    "abstract",
    "count_parameters",
    "merge",
    "split",
]

Tree = dict[Any, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HiddenOutput:
    """The decoder up to and including its final norm.

    ``caches`` holds one cache a layer (None without). ``aux``: loss summed over layers, metrics
    averaged over the layers that report them, statistics ``layers.<run>.<name>`` with a leading
    axis over the layers of that run. ``selections``: with ``inspect=True`` one entry a layer, None
    for a layer that does not select; else empty. ``layer_metrics``: with ``inspect=True`` the
    metrics before averaging, ``<name>.<layer>``; else empty.
    """

    hidden: Float[Array, "B T D"]
    caches: tuple[Any, ...] | None
    aux: Aux
    selections: tuple[Selection | None, ...] = ()
    layer_metrics: dict[str, Float[Array, ""]] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderOutput:
    """As :class:`HiddenOutput`, with ``logits`` [B, T, V], at least float32."""

    logits: Float[Array, "B T V"]
    caches: tuple[Any, ...] | None
    aux: Aux
    selections: tuple[Selection | None, ...] = ()


class Decoder(nnx.Module):
    """Embedding, layers, final norm, logits; one call for training, prefill and decode."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.param_dtype)
        D, V = config.model_width, config.vocab_size
        self.config = config
        self.embedding = normal(rngs, (V, D), D**-0.5, dtype)
        if not config.tie_embeddings:
            self.unembedding = normal(rngs, (D, V), D**-0.5, dtype)
        self.final_norm = RMSNorm((D,), config.norm_epsilon, dtype)
        keys = jax.random.split(rngs.params(), config.layers)
        layers: dict[str, Layer] = {}
        for run in config.alike_runs:
            layers |= _build_run(config, run, keys[run.first : run.first + run.count])
        self.layers = nnx.Dict(layers)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        caches: Sequence[Any] | None = None,
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        attend: Attend = "sparse",
        inspect: bool = False,
        parallel: SequenceParallel | None = None,
    ) -> DecoderOutput:
        """Next-token logits for every token.

        ``caches=None`` is training; empty caches and T tokens are prefill; filled ones decode.
        ``segment_ids``: 0 is padding, documents are numbered upwards. ``positions`` (rotary)
        default to the place in the document, or after the cached tokens. ``attend`` and ``inspect``
        are static and go to the mechanisms. ``parallel`` says how attention is split over a mesh
        (:mod:`sparse_attn.parallel`); None leaves everything to the compiler.

        Raises:
          ValueError: if ``tokens`` are not [B, T] or ``caches`` are not one a layer.
          TypeError: if ``tokens`` are not integers.
        """
        output = self.hidden(
            tokens,
            caches,
            positions=positions,
            segment_ids=segment_ids,
            attend=attend,
            inspect=inspect,
            parallel=parallel,
        )
        return DecoderOutput(
            self.logits(output.hidden), output.caches, output.aux, output.selections
        )

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        caches: Sequence[Any] | None = None,
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        attend: Attend = "sparse",
        inspect: bool = False,
        parallel: SequenceParallel | None = None,
    ) -> HiddenOutput:
        """The same call without the logits, so that a loss can be computed in pieces."""
        config = self.config
        _check_tokens(tokens, caches, config)
        x = self.embed(tokens)
        if parallel is not None and caches is None:
            x = parallel.constrain(x)
        rope = make_rope(config.rope, config.head_width)
        call = functools.partial(
            _call_layer,
            rope=rope,
            positions=positions,
            segment_ids=segment_ids,
            attend=attend,
            inspect=inspect,
            parallel=parallel,
        )
        if caches is None:
            x, auxes = self._without_caches(x, call)
            new_caches = None
        else:
            x, new_caches, auxes = self._with_caches(x, tuple(caches), call)
        aux, selections = _combine(config, auxes, inspect)
        by_layer = _by_layer(config, auxes) if inspect else {}
        return HiddenOutput(self.final_norm(x), new_caches, aux, selections, by_layer)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What goes into the first layer."""
        config = self.config
        x = self.embedding[...][tokens].astype(jnp.dtype(config.compute_dtype))
        if config.embedding_multiplier != 1.0:
            x = x * jnp.asarray(config.embedding_multiplier, x.dtype)
        return x

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Scores over the vocabulary, products in the compute dtype, at least float32."""
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        if self.config.logit_multiplier != 1.0:
            hidden = hidden * jnp.asarray(self.config.logit_multiplier, hidden.dtype)
        if self.config.tie_embeddings:
            weight = self.embedding[...].astype(hidden.dtype)
            return jnp.einsum("...D,VD->...V", hidden, weight, preferred_element_type=wide)
        weight = self.unembedding[...].astype(hidden.dtype)
        return jnp.einsum("...D,DV->...V", hidden, weight, preferred_element_type=wide)

    def init_caches(
        self, batch: int, capacity: int, dtype: Any = None, *, rollback: int = 0
    ) -> tuple[Any, ...]:
        """Empty caches, one a layer, for ``capacity`` tokens a sequence.

        ``dtype`` defaults to the compute dtype; ``rollback`` tokens can be undone by ``truncate``.
        """
        dtype = jnp.dtype(self.config.compute_dtype if dtype is None else dtype)
        return tuple(
            self.layers[run.name].attention.mechanism.init_cache(
                batch, capacity, dtype, rollback=rollback
            )
            for run in self.config.runs
            for _ in range(run.count)
        )

    def update_state(self, statistics: dict[str, Array]) -> None:
        """Apply accumulated ``aux.statistics`` to the mechanisms, once a training step."""
        for run in self.config.alike_runs:
            prefix = f"layers.{run.name}."
            mine = {
                k.removeprefix(prefix): v for k, v in statistics.items() if k.startswith(prefix)
            }
            if not mine:
                continue
            if self.config.scan_layers and run.count > 1:
                _update_stacked(self.layers[run.name], mine)
                continue
            for i in range(run.count):
                layer = self.layers[str(run.first + i)]
                layer.attention.mechanism.update_state({k: v[i] for k, v in mine.items()})

    def unstacked(self) -> Decoder:
        """An equal decoder with one module a layer: the fast form for decoding."""
        return self._regrouped(dataclasses.replace(self.config, scan_layers=False), _unstack)

    def stacked(self) -> Decoder:
        """An equal decoder with alike layers stacked: the form that compiles fast for training."""
        return self._regrouped(dataclasses.replace(self.config, scan_layers=True), _stack)

    def _regrouped(
        self, config: ModelConfig, regroup: Callable[[Tree, ModelConfig], Tree]
    ) -> Decoder:
        if config == self.config:
            return self
        graphdef, _, _ = abstract(config)
        _, params, state = split(self)
        return merge(graphdef, regroup(params, config), regroup(state, config))

    def _without_caches(self, x: Array, call: Callable[..., Any]) -> tuple[Array, list[Aux]]:
        """Run after run; the Aux of each has a leading layer axis."""
        auxes = []
        for run in self.config.runs:
            graphdef, state = _pure(self.layers[run.name])

            def step(x: Array, state: Tree, graphdef: Any = graphdef) -> tuple[Array, Aux]:
                x, _, aux = call(graphdef, state, x, None)
                return x, aux

            if run.count == 1:
                x, aux = _remat(step, self.config.remat, scanned=False)(x, state)
                aux = jax.tree.map(lambda leaf: leaf[None], aux)
            else:
                x, aux = jax.lax.scan(_remat(step, self.config.remat, scanned=True), x, state)
            auxes.append(aux)
        return x, auxes

    def _with_caches(
        self, x: Array, caches: tuple[Any, ...], call: Callable[..., Any]
    ) -> tuple[Array, tuple[Any, ...], list[Aux]]:
        """Layer after layer, so that each cache is updated in place and never stacked."""
        new_caches, auxes = [], []
        for run in self.config.runs:
            graphdef, state = _pure(self.layers[run.name])
            mine = []
            for i in range(run.count):
                of_layer = state if run.count == 1 else jax.tree.map(lambda a, i=i: a[i], state)
                x, cache, aux = call(graphdef, of_layer, x, caches[run.first + i])
                new_caches.append(cache)
                mine.append(aux)
            auxes.append(jax.tree.map(lambda *leaves: jnp.stack(leaves), *mine))
        return x, tuple(new_caches), auxes


def split(decoder: Decoder) -> tuple[nnx.GraphDef, Tree, Tree]:
    """``(graphdef, params, state)``: the static form (hashable), parameters, other variables.

    Both trees are nested dicts of arrays named as in the module docstring.
    """
    parts: Any = nnx.split(decoder, nnx.Param, ...)
    graphdef, params, state = parts
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(state)


def merge(graphdef: nnx.GraphDef, params: Tree, state: Tree) -> Decoder:
    """The inverse of :func:`split`."""
    return nnx.merge(graphdef, params, state)


def abstract(config: ModelConfig) -> tuple[nnx.GraphDef, Tree, Tree]:
    """:func:`split` of a decoder that is never allocated: shapes and dtypes only."""
    return split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))


def count_parameters(params: Decoder | Tree) -> int:
    """How many numbers are trained; takes a decoder, its params or their shapes."""
    tree = split(params)[1] if isinstance(params, Decoder) else params
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def _build_run(config: ModelConfig, run: Run, keys: Key[Array, " layers"]) -> dict[str, Layer]:
    """The modules of a run, stacked or one a layer; its values are drawn together either way."""

    def build(key: Key[Array, ""]) -> Layer:
        return Layer(config, run.attention, rngs=nnx.Rngs(params=key))

    graphdef, _ = _pure(nnx.eval_shape(build, keys[0]))
    states = jax.vmap(lambda key: _pure(build(key))[1])(keys)
    if config.scan_layers and run.count > 1:
        return {run.name: nnx.merge(graphdef, states)}
    return {
        str(run.first + i): nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], states))
        for i in range(run.count)
    }


def _pure(module: nnx.Module) -> tuple[nnx.GraphDef, Tree]:
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def _call_layer(
    graphdef: nnx.GraphDef, state: Tree, x: Array, cache: Any, *, rope: Rope, **call: Any
) -> tuple[Array, Any, Aux]:
    return nnx.merge(graphdef, state)(x, rope, cache, **call)


def _remat(step: Callable[..., Any], remat: Remat, *, scanned: bool) -> Callable[..., Any]:
    if remat == "none":
        return step
    policies = jax.checkpoint_policies
    policy = {
        "full": policies.nothing_saveable,
        "selection": policies.save_only_these_names("selection"),
        "dots": policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable,
            policies.save_only_these_names("selection"),
        ),
    }[remat]
    # Inside scan the loop itself keeps XLA from merging the two forward passes.
    return jax.checkpoint(step, policy=policy, prevent_cse=not scanned)


def _combine(
    config: ModelConfig, auxes: list[Aux], inspect: bool
) -> tuple[Aux, tuple[Selection | None, ...]]:
    """One Aux for the model from one a run (leading layer axis)."""
    loss = functools.reduce(jnp.add, [jnp.sum(aux.loss) for aux in auxes])
    reports: dict[str, list[Array]] = {}
    for aux in auxes:
        for name, values in aux.metrics.items():
            reports.setdefault(name, []).append(values)
    metrics = {name: jnp.mean(jnp.concatenate(values)) for name, values in reports.items()}
    selections: tuple[Selection | None, ...] = ()
    if inspect:
        selections = tuple(
            jax.tree.map(lambda leaf, i=i: leaf[i], aux.selection)
            for run, aux in zip(config.runs, auxes, strict=True)
            for i in range(run.count)
        )
    per_layer: dict[tuple[int, str], Array] = {}
    for run, aux in zip(config.runs, auxes, strict=True):
        for name, values in aux.statistics.items():
            for i in range(run.count):
                per_layer[run.first + i, name] = values[i]
    statistics = {}
    for run in config.alike_runs:
        names = sorted(name for layer, name in per_layer if layer == run.first)
        for name in names:
            statistics[f"layers.{run.name}.{name}"] = jnp.stack(
                [per_layer[run.first + i, name] for i in range(run.count)]
            )
    return Aux(loss=loss, metrics=metrics, statistics=statistics), selections


def _by_layer(config: ModelConfig, auxes: list[Aux]) -> dict[str, Array]:
    """The metrics of single layers, ``<name>.<layer>``."""
    return {
        f"{name}.{run.first + i}": values[i]
        for run, aux in zip(config.runs, auxes, strict=True)
        for name, values in aux.metrics.items()
        for i in range(run.count)
    }


def _update_stacked(layer: Layer, statistics: dict[str, Array]) -> None:
    """``update_state`` of every layer of a stack, in place."""
    mechanism = layer.attention.mechanism
    graphdef, state = _pure(mechanism)

    def update(state: Tree, statistics: dict[str, Array]) -> Tree:
        one = nnx.merge(graphdef, state)
        one.update_state(statistics)
        return _pure(one)[1]

    nnx.update(mechanism, jax.vmap(update)(state, statistics))


def _unstack(tree: Tree, config: ModelConfig) -> Tree:
    """Regroup the ``layers`` of params or state: one entry a layer."""
    if "layers" not in tree:
        return tree
    layers: Tree = {}
    for run in config.alike_runs:
        if run.name not in tree["layers"]:
            continue
        stacked = tree["layers"][run.name]
        for i in range(run.count):
            one = stacked if run.count == 1 else jax.tree.map(lambda a, i=i: a[i], stacked)
            layers[str(run.first + i)] = one
    return {**tree, "layers": layers}


def _stack(tree: Tree, config: ModelConfig) -> Tree:
    """The inverse of :func:`_unstack`."""
    if "layers" not in tree:
        return tree
    layers: Tree = {}
    for run in config.alike_runs:
        parts = [tree["layers"].get(str(run.first + i)) for i in range(run.count)]
        if parts[0] is None:
            continue
        layers[run.name] = (
            parts[0] if run.count == 1 else jax.tree.map(lambda *a: jnp.stack(a), *parts)
        )
    return {**tree, "layers": layers}


def _check_tokens(tokens: Array, caches: Sequence[Any] | None, config: ModelConfig) -> None:
    if tokens.ndim != 2:
        raise ValueError(f"tokens.shape={tokens.shape} must be [B, T]; add a batch axis")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens are {tokens.dtype}; the decoder takes integer token ids")
    if caches is not None and len(caches) != config.layers:
        raise ValueError(
            f"{len(caches)} caches were given for layers={config.layers}; "
            "make them with decoder.init_caches"
        )
