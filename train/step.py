"""The training state and the step that advances it: plain pytrees in, plain pytrees out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from models.transformer import Decoder, Tree, abstract, merge, split
from train.config import RunConfig
from train.optimizer import learning_rate_schedule, make_optimizer, parameter_name
from train.sharding import (
    Placement,
    abstract_with,
    batch_sharding,
    sequence_parallel,
    tree_shardings,
)

Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]

LAYER_RECALL = "recall_beyond."
"""What inspection reports of single layers begins with it; the layer number follows."""

# What a batch holds, each [B, T]: see train.packing.build_row.
BATCH_DTYPES = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "weights": jnp.float32,
    "segment_ids": jnp.int32,
    "positions": jnp.int32,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that changes from step to step, as a pytree.

    ``step`` (int32) counts finished updates. ``params`` are all parameters, ``state`` are the
    mechanisms' other variables, ``opt_state`` belongs to the parameters that are trained
    (:func:`trained`), ``rng`` is the run's key: randomness of step s comes from
    ``fold_in(rng, s)``.
    """

    step: Int[Array, ""]
    params: dict[Any, Any]
    state: dict[Any, Any]
    opt_state: Any
    rng: Array


def next_token_loss(
    logits: Callable[[Array], Array],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int,
    z_loss: float = 0.0,
    shards: tuple[int, int] = (1, 1),
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """sum_bt weights_bt * -log softmax(logits(hidden_bt))[targets_bt] and, apart, z_loss *
    sum_bt weights_bt * logsumexp(logits_bt)^2 (PaLM's, which keeps logits from drifting), in at
    least float32.

    At most about ``chunk`` tokens of a device have their logits in memory at a time: longer inputs
    are worked through in pieces whose logits are computed again on the way back. ``shards``: parts
    that B and T are split into over devices; a piece holds tokens of every part. Differentiable in
    ``hidden`` and in what ``logits`` closes over.

    Raises:
      ValueError: if T cannot be split into its parts.
    """

    def piece(hidden: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
        scores = logits(hidden)
        scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        picked = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
        total = jax.nn.logsumexp(scores, axis=-1)
        drift = jnp.sum(weights * total**2) if z_loss else jnp.zeros((), scores.dtype)
        return jnp.sum(weights * (total - picked)), z_loss * drift

    B, T = targets.shape
    if T % shards[1]:
        raise ValueError(f"T={T} cannot be split into {shards[1]} parts; use a multiple")
    mine = T // shards[1]
    width = max(chunk // -(-B // shards[0]), 1)
    if width >= mine:
        return piece(hidden, targets, weights)
    pieces = -(-mine // width)
    pad = pieces * width - mine

    def cut(array: Array) -> Array:
        parts = array.reshape(B, shards[1], mine, *array.shape[2:])
        padded = jnp.pad(parts, [(0, 0), (0, 0), (0, pad)] + [(0, 0)] * (array.ndim - 2))
        split = padded.reshape(B, shards[1], pieces, width, *array.shape[2:])
        return jnp.moveaxis(split, 2, 0)

    def add(
        total: tuple[Array, Array], inputs: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array], None]:
        new = jax.checkpoint(piece, prevent_cse=False)(*inputs)
        return (total[0] + new[0], total[1] + new[1]), None

    zero = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
    return jax.lax.scan(add, (zero, zero), (cut(hidden), cut(targets), cut(weights)))[0]


def trained(config: RunConfig, params: Tree) -> Tree:
    """The part of ``params`` that the run trains, by its objective and ``frozen``: a smaller tree.

    Raises:
      ValueError: if there is nothing to train, or a frozen name is no parameter's.
    """
    if config.objective == "language_model":
        return without_frozen(params, config.frozen)

    layers = {}
    for run in config.model.runs:
        mechanism = params["layers"][run.name]["attention"].get("mechanism", {})
        names = run.attention.selector_parameters
        learning = {
            name: tree for name, tree in mechanism.items() if names is None or name in names
        }
        if learning:
            layers[run.name] = {"attention": {"mechanism": learning}}
    part = {"layers": layers} if layers else {}
    if not part:
        raise ValueError(
            f"objective='selector' has nothing to train: {type(config.model.attention).__name__} "
            "has no parameters of its own; choose a mechanism that learns what to select (hash, "
            "seer, dsa, nsa)"
        )
    return part


def without_frozen(params: Tree, frozen: tuple[str, ...]) -> Tree:
    """``params`` without the leaves whose name is one of ``frozen`` or lies below one."""
    known = [parameter_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for name in frozen:
        if not any(f"{leaf}/".startswith(f"{name}/") for leaf in known):
            raise ValueError(
                f"frozen={name!r} names no parameter; there are {', '.join(known)}, and the "
                "groups that they are in"
            )

    def keep(tree: Tree, above: str) -> Tree:
        kept = {}
        for key, value in tree.items():
            name = f"{above}{key}"
            if name in frozen:
                continue
            value = keep(value, f"{name}/") if isinstance(value, dict) else value
            if not isinstance(value, dict) or value:
                kept[key] = value
        return kept

    part = keep(params, "")
    if not part:
        raise ValueError(f"frozen={frozen} leaves nothing to train")
    return part


def with_trained(params: Tree, part: Tree) -> Tree:
    """``params`` with the leaves of ``part`` (from :func:`trained`) in place of its own."""
    return {
        name: value
        if name not in part
        else with_trained(value, part[name])
        if isinstance(value, dict)
        else part[name]
        for name, value in params.items()
    }


def initial_state(config: RunConfig, seed: Int[Array, ""]) -> TrainState:
    """A fresh state: parameters drawn from ``seed``, moments at zero.

    Parameters come from the device's own generator ("rbg"), whose code compiles several times
    faster than the default one's; the same seed gives other numbers on another kind of device.
    """
    params_key, run_key = jax.random.key(seed, impl="rbg"), jax.random.key(seed)
    _, params, state = split(Decoder(config.model, rngs=nnx.Rngs(params_key)))
    opt_state = make_optimizer(config.optimizer, config.steps).init(trained(config, params))
    return TrainState(jnp.zeros((), jnp.int32), params, state, opt_state, run_key)


def place_state(config: RunConfig, mesh: jax.sharding.Mesh) -> tuple[TrainState, Placement]:
    """The state's shapes (``ShapeDtypeStruct`` with shardings) and where everything lives.

    Raises:
      ValueError: if parameters or sequences cannot be split over the mesh.
      NotImplementedError: if a mechanism cannot work on split sequences as asked for.
    """
    shapes = jax.eval_shape(lambda seed: initial_state(config, seed), jnp.uint32(0))
    shardings = tree_shardings(shapes, mesh)
    parallel = sequence_parallel(mesh, config.mesh)
    if parallel is not None:
        for run in config.model.alike_runs:
            parallel.check(run.attention, config.sequence_length)
    placement = Placement(mesh, shardings, batch_sharding(mesh), config.batch_size, parallel)
    return abstract_with(shardings, shapes), placement


def make_state(config: RunConfig, placement: Placement) -> TrainState:
    """A fresh state, every array born on the devices it belongs to."""
    make = jax.jit(lambda seed: initial_state(config, seed), out_shardings=placement.state)
    return make(jnp.uint32(config.seed))


def abstract_batch(config: RunConfig, placement: Placement) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch, for compiling without data."""
    shape = (config.batch_size, config.sequence_length)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=placement.batch)
        for name, dtype in BATCH_DTYPES.items()
    }


def make_train_step(config: RunConfig, placement: Placement) -> jax.stages.Wrapped:
    """The compiled ``step(state, batch) -> state, metrics``; the old state's memory is reused.

    loss = sum_bt w_bt (nll_bt + z_loss * logsumexp_bt^2) / sum_bt w_bt + mean over microbatches of
    the mechanisms' auxiliary loss; all but the nll is reported as the auxiliary one. Metrics
    (float32 scalars): ``loss`` (without the auxiliary one), ``grad_norm`` (before clipping),
    ``learning_rate``, ``tokens``, and what the mechanisms report. With the objective "selector" the
    loss is the auxiliary one alone, of ``attend="fit"``, and nothing but the mechanisms'
    parameters is differentiated or changed.
    """
    graphdef, _, _ = abstract(config.model)
    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = learning_rate_schedule(config.optimizer, config.steps)

    def fit_loss(
        part: Any, params: Any, state: Any, batch: Batch, tokens: Array
    ) -> tuple[Array, tuple[Array, Array, Metrics, dict[str, Array]]]:
        del tokens
        decoder = merge(graphdef, with_trained(params, part), state)
        aux = decoder.hidden(
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            attend="fit",
            parallel=placement.parallel,
        ).aux
        loss = aux.loss / config.microbatches
        metrics = {name: value / config.microbatches for name, value in aux.metrics.items()}
        return loss, (loss, loss, metrics, aux.statistics)

    def language_model_loss(
        part: Any, params: Any, state: Any, batch: Batch, tokens: Array
    ) -> tuple[Array, tuple[Array, Array, Metrics, dict[str, Array]]]:
        decoder = merge(graphdef, with_trained(params, part), state)
        output = decoder.hidden(
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            parallel=placement.parallel,
        )
        summed, drift = next_token_loss(
            decoder.logits,
            output.hidden,
            batch["targets"],
            batch["weights"],
            chunk=config.loss_chunk,
            z_loss=config.optimizer.z_loss,
            shards=(placement.batch_parts, placement.mesh.shape["sequence"]),
        )
        aux = output.aux
        loss = summed / tokens
        aux_loss = aux.loss / config.microbatches + drift / tokens
        metrics = {name: value / config.microbatches for name, value in aux.metrics.items()}
        return loss + aux_loss, (loss, aux_loss, metrics, aux.statistics)

    def gradients(state: TrainState, batch: Batch) -> tuple[Any, Any]:
        """Sums over microbatches of the gradients and of what the loss reports."""
        tokens = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
        grad = jax.grad(
            fit_loss if config.objective == "selector" else language_model_loss, has_aux=True
        )
        part = trained(config, state.params)
        if config.microbatches == 1:
            return grad(part, state.params, state.state, batch, tokens)
        # Rows are dealt out in turn, so that every device keeps its own.
        batches = jax.tree.map(
            lambda a: jnp.moveaxis(a.reshape(-1, config.microbatches, *a.shape[1:]), 1, 0), batch
        )

        def one(batch: Batch) -> tuple[Any, Any]:
            return grad(part, state.params, state.state, batch, tokens)

        shapes = jax.eval_shape(one, jax.tree.map(lambda a: a[0], batches))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def add(total: Any, batch: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, one(batch)), None

        return jax.lax.scan(add, zeros, batches)[0]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, (loss, aux_loss, reported, statistics) = gradients(state, batch)
        part = trained(config, state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, part)
        params = with_trained(state.params, optax.apply_updates(part, updates))
        rest = state.state
        if statistics:
            decoder = merge(graphdef, params, rest)
            decoder.update_state(statistics)
            _, _, rest = split(decoder)
        metrics = {
            **reported,
            "loss": loss,
            "aux_loss": aux_loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state.step),
            "tokens": jnp.sum(batch["weights"]),
        }
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        return TrainState(state.step + 1, params, rest, opt_state, state.rng), metrics

    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(placement.state, placement.batch),
        out_shardings=(placement.state, None),
    )


def make_inspection(config: RunConfig, placement: Placement) -> jax.stages.Wrapped:
    """The compiled ``inspect(state, batch) -> metrics``: selections against dense attention.

    One row of the batch, drawn by the run's key and the step, goes through the decoder with
    ``inspect=True``; its metrics are recall and captured mass on a few sampled positions, averaged
    over layers, and ``recall_beyond.<layer>`` of every layer that selects. Nothing is trained by
    it.
    """
    graphdef, _, _ = abstract(config.model)

    def inspect(state: TrainState, batch: Batch) -> Metrics:
        key = jax.random.fold_in(state.rng, state.step)
        row = jax.random.randint(key, (), 0, batch["tokens"].shape[0])
        one = {name: jax.lax.dynamic_slice_in_dim(array, row, 1) for name, array in batch.items()}
        decoder = merge(graphdef, state.params, state.state)
        output = decoder.hidden(
            one["tokens"],
            positions=one["positions"],
            segment_ids=one["segment_ids"],
            inspect=True,
            parallel=placement.parallel,
        )
        layers = {k: v for k, v in output.layer_metrics.items() if k.startswith(LAYER_RECALL)}
        metrics = output.aux.metrics | layers
        return {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    return jax.jit(inspect, in_shardings=(placement.state, placement.batch))
