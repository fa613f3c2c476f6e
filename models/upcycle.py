"""From a trained checkpoint to a model with other attention that continues it.

Everything the two models share is copied. Where a layer keeps its kind of mechanism, so are the
mechanism's parameters; where it changes, the one K and V projection of the old layer becomes the R
branches of the new one (copies), and the mechanism starts as close to dense attention as it can
(``initialize_from_dense``; for NSA: compression is the mean, the window and selected branches are
open). Mechanisms without parameters - InfLLM-V2, the policies - continue any model with one K/V
branch exactly as it is.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from models.config import ModelConfig
from models.loading.mapping import MappingFile
from models.transformer import Decoder, Tree, abstract, merge, split
from sparse_attn.dense import Dense

_BRANCHED = ("k", "v", "k_bias", "v_bias")
# What may differ between a model and its continuation: attention, and how it is computed.
_FREE = (
    "attention",
    "dense_layers",
    "attention_overrides",
    "rope",
    "scan_layers",
    "remat",
    "compute_dtype",
    "param_dtype",
)


def upcycle(
    params: Tree,
    config: ModelConfig,
    target: ModelConfig,
    *,
    rngs: nnx.Rngs,
    state: Tree | None = None,
) -> Decoder:
    """The decoder with ``target`` that continues one with ``config``.

    Args:
      params: of the trained decoder (:func:`models.transformer.split`).
      config: its configuration.
      target: the wanted one; attention, RoPE scaling, dtypes and grouping of layers may differ.
      rngs: draws what the trained decoder does not have.
      state: the trained decoder's other variables, if it has any.

    Raises:
      ValueError: if ``params`` are not those of ``config``, ``target`` has other sizes, or a layer
        would have to turn several K/V branches into fewer.
    """
    _check_same_sizes(config, target)
    _check_branches(config, target)
    graphdef, expected, expected_state = abstract(config)
    _check_params(params, expected)
    if state is None:
        state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), expected_state)
    source = merge(graphdef, params, state).unstacked()
    decoder = Decoder(dataclasses.replace(target, scan_layers=False), rngs=rngs)
    for layer in range(target.layers):
        old, new = config.layer_attention(layer), target.layer_attention(layer)
        mechanism = decoder.layers[str(layer)].attention.mechanism
        if type(old) is type(new):
            kept = nnx.state(source.layers[str(layer)].attention.mechanism)
            _check_mechanism(layer, kept, nnx.state(mechanism))
            nnx.update(mechanism, kept)
        elif hasattr(mechanism, "initialize_from_dense"):
            mechanism.initialize_from_dense()
    target_graphdef, target_params, target_state = split(decoder)
    wanted = _overlay(target_params, split(source)[1])
    dtypes = jax.tree.map(lambda new, like: new.astype(like.dtype), wanted, target_params)
    decoder = merge(target_graphdef, dtypes, target_state)
    return decoder.stacked() if target.scan_layers else decoder


def attending(decoder: Decoder, target: ModelConfig, mapping: MappingFile | None = None) -> Decoder:
    """``decoder`` with the attention of ``target``, on the same arrays: nothing is copied.

    For trying policies and mappings on one model. What the new mechanisms learnt comes from
    ``mapping``; their other variables start at 0.

    Raises:
      ValueError: if the two differ in more than attention and grouping of layers, a layer would
        have to turn several K/V branches into fewer, or a mechanism has parameters that
        ``mapping`` does not hold.
    """
    decoder = decoder.unstacked()
    target = dataclasses.replace(target, scan_layers=False)
    _check_same_sizes(decoder.config, target)
    _check_branches(decoder.config, target)
    graphdef, shapes, state_shapes = abstract(target)
    params = _overlay(shapes, split(decoder)[1])
    if mapping is not None:
        params = mapping.put_into(params, target)
    open_names = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if isinstance(leaf, jax.ShapeDtypeStruct)
    ]
    if open_names:
        raise ValueError(
            f"{target.attention} has parameters that the decoder does not have, such as "
            f"{open_names[0]}; give the mapping file that holds them"
        )
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state_shapes)
    return merge(graphdef, params, state)


def densely(decoder: Decoder) -> Decoder:
    """``decoder`` with dense attention in every layer, by :func:`attending`."""
    target = dataclasses.replace(
        decoder.config, attention=Dense(), attention_overrides=(), dense_layers=()
    )
    return attending(decoder, target)


def _check_same_sizes(config: ModelConfig, target: ModelConfig) -> None:
    different = [
        f"{field.name}: {getattr(config, field.name)!r} -> {getattr(target, field.name)!r}"
        for field in dataclasses.fields(config)
        if field.name not in _FREE and getattr(config, field.name) != getattr(target, field.name)
    ]
    if different:
        raise ValueError(
            f"a model of other sizes cannot be continued: {'; '.join(different)}; only attention, "
            "rope, dtypes and the grouping of layers may change"
        )


def _check_branches(config: ModelConfig, target: ModelConfig) -> None:
    for layer in range(target.layers):
        old, new = config.layer_attention(layer), target.layer_attention(layer)
        if old.kv_branches not in (1, new.kv_branches):
            raise ValueError(
                f"layer {layer}: {old.kv_branches} K/V branches of {type(old).__name__} cannot "
                f"become the {new.kv_branches} of {type(new).__name__}; start from a model with "
                "one K/V branch, or keep the mechanism"
            )


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
    """[1, ...] -> [R, ...], copies (each branch is trained on its own); [R, ...] stays."""
    if one.shape == like.shape:
        return one
    return jnp.repeat(one, like.shape[0] // one.shape[0], axis=0)


def _check_mechanism(layer: int, kept: nnx.State, wanted: nnx.State) -> None:
    old, new = (nnx.to_pure_dict(state) for state in (kept, wanted))
    if jax.tree.map(jnp.shape, old) != jax.tree.map(jnp.shape, new):
        raise ValueError(
            f"layer {layer}: the mechanism keeps its kind, but its parameters change shape: "
            f"{jax.tree.map(jnp.shape, old)} -> {jax.tree.map(jnp.shape, new)}; keep the sizes "
            "that its parameters depend on"
        )


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
