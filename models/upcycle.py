"""From a trained dense checkpoint to a sparse model that continues it.

Everything the two models share is copied. The one K and V projection of a dense layer becomes the
R branches of the sparse one (copies), and the mechanism starts as close to dense attention as it
can (``initialize_from_dense``; for NSA: compression is the mean, the window and selected branches
are open).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from models.config import ModelConfig
from models.transformer import Decoder, Tree, abstract, merge, split

_BRANCHED = ("k", "v", "k_bias", "v_bias")


def upcycle(
    params: Tree,
    config: ModelConfig,
    attention: Any,
    *,
    dense_layers: tuple[int, ...] = (),
    rngs: nnx.Rngs,
) -> Decoder:
    """The sparse decoder that continues a dense one.

    ``params``: of a decoder with ``config`` (:func:`models.transformer.split`), whose layers all
    have one K/V branch. ``attention``: the config of the sparse mechanism, used in every layer but
    ``dense_layers``. The result has ``config`` with those two replaced. ``rngs`` draws what the
    dense model does not have.

    Raises:
      ValueError: if ``params`` are not those of ``config``, or a layer of it is not dense.
    """
    branches = {run.attention.kv_branches for run in config.alike_runs}
    if branches != {1}:
        raise ValueError(
            f"upcycling starts from layers with one K/V branch, this config has {sorted(branches)}"
        )
    graphdef, expected, state = abstract(config)
    _check_params(params, expected)
    source = split(merge(graphdef, params, _zeros(state)).unstacked())[1]
    target_config = dataclasses.replace(config, attention=attention, dense_layers=dense_layers)
    target = Decoder(dataclasses.replace(target_config, scan_layers=False), rngs=rngs)
    for layer in target.layers.values():
        initialize = getattr(layer.attention.mechanism, "initialize_from_dense", None)
        if initialize is not None:
            initialize()
    target_graphdef, target_params, target_state = split(target)
    decoder = merge(target_graphdef, _overlay(target_params, source), target_state)
    return decoder.stacked() if config.scan_layers else decoder


def _overlay(target: Tree, source: Tree) -> Tree:
    """``target`` with every leaf that ``source`` has too; K and V repeated over their branches."""
    result = {}
    for name, value in target.items():
        if name not in source or name == "mechanism":
            result[name] = value
        elif isinstance(value, dict):
            result[name] = _overlay(value, source[name])
            if name == "k_norm":
                result[name] = {"scale": _repeat(source[name]["scale"], value["scale"])}
        else:
            result[name] = _repeat(source[name], value) if name in _BRANCHED else source[name]
    return result


def _repeat(one: Array, like: Array) -> Array:
    """[1, ...] -> [R, ...], copies (each branch is trained on its own)."""
    return jnp.repeat(one, like.shape[0], axis=0)


def _zeros(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def _check_params(params: Tree, expected: Tree) -> None:
    def named(tree: Tree) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {
            jax.tree_util.keystr(p, simple=True, separator="."): leaf.shape for p, leaf in leaves
        }

    have, want = named(params), named(expected)
    wrong = sorted(n for n in have.keys() | want.keys() if have.get(n) != want.get(n))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"params do not belong to this config: {len(wrong)} entries differ, the first is "
            f"{name!r} with shape {have.get(name)} instead of {want.get(name)}; pass the "
            "ModelConfig the checkpoint was trained with"
        )
