"""Which published tensor is which parameter, and how the axes are turned.

Hugging Face stores a projection as [out, in] with its heads joined; ours keep heads apart and put
the contracted axis first (:mod:`models.layers`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from models.config import ModelConfig
from models.transformer import Tree, abstract

Turn = Callable[[Any, Sequence[int]], Any]
"""Both take an array and the shape of one layer's parameter, without the axis of branches."""


def _same(array: Any, shape: Sequence[int]) -> Any:
    return array.reshape(shape)


def _joined(array: Any, shape: Sequence[int]) -> Any:
    return array.reshape(-1)


def _transposed(array: Any, shape: Sequence[int]) -> Any:
    return array.transpose(1, 0)


def _read_heads_out(array: Any, shape: Sequence[int]) -> Any:
    width, heads, head_width = shape
    return array.reshape(heads, head_width, width).transpose(2, 0, 1)


def _write_heads_out(array: Any, shape: Sequence[int]) -> Any:
    return array.transpose(1, 2, 0).reshape(-1, shape[0])


def _read_heads_in(array: Any, shape: Sequence[int]) -> Any:
    return array.transpose(1, 0).reshape(shape)


def _write_heads_in(array: Any, shape: Sequence[int]) -> Any:
    return array.reshape(-1, shape[-1]).transpose(1, 0)


_SAME = (_same, _same)
_LINEAR = (_transposed, _transposed)
_HEADS_OUT = (_read_heads_out, _write_heads_out)
_HEADS_IN = (_read_heads_in, _write_heads_in)
_BIAS = (_same, _joined)

_MODEL: dict[str, tuple[str, tuple[Turn, Turn]]] = {
    "embedding": ("model.embed_tokens.weight", _SAME),
    "unembedding": ("lm_head.weight", _LINEAR),
    "final_norm.scale": ("model.norm.weight", _SAME),
}
_LAYER: dict[str, tuple[str, tuple[Turn, Turn]]] = {
    "attention_norm.scale": ("input_layernorm.weight", _SAME),
    "attention.q": ("self_attn.q_proj.weight", _HEADS_OUT),
    "attention.k": ("self_attn.k_proj.weight", _HEADS_OUT),
    "attention.v": ("self_attn.v_proj.weight", _HEADS_OUT),
    "attention.o": ("self_attn.o_proj.weight", _HEADS_IN),
    "attention.q_bias": ("self_attn.q_proj.bias", _BIAS),
    "attention.k_bias": ("self_attn.k_proj.bias", _BIAS),
    "attention.v_bias": ("self_attn.v_proj.bias", _BIAS),
    "attention.q_norm.scale": ("self_attn.q_norm.weight", _SAME),
    "attention.k_norm.scale": ("self_attn.k_norm.weight", _SAME),
    "mlp_norm.scale": ("post_attention_layernorm.weight", _SAME),
    "mlp.gate": ("mlp.gate_proj.weight", _LINEAR),
    "mlp.up": ("mlp.up_proj.weight", _LINEAR),
    "mlp.down": ("mlp.down_proj.weight", _LINEAR),
}
# Parameters with a leading axis of key-value branches, which a published model has one of.
_BRANCHED = (
    "attention.k",
    "attention.v",
    "attention.k_bias",
    "attention.v_bias",
    "attention.k_norm.scale",
)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One leaf of the decoder's parameters and the tensors it is made of, one a stacked layer.

    ``path`` are the keys of the leaf, ``shape`` is that of one layer without branches, ``tensors``
    the published names.
    """

    path: tuple[str, ...]
    leaf: jax.ShapeDtypeStruct
    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    turns: tuple[Turn, Turn]
    stacked: bool

    def assemble(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """The whole leaf in host memory; each tensor is read once."""
        host = np.empty(self.leaf.shape, self.leaf.dtype)
        for place, name in enumerate(self.tensors):
            # Branches are copies of the one that was published.
            (host[place] if self.stacked else host)[...] = self.turns[0](read(name), self.shape)
        return host

    def published(self, leaf: Any, place: int) -> np.ndarray:
        """The inverse: tensor number ``place`` of the leaf, from its first branch."""
        one = np.asarray(leaf[place] if self.stacked else leaf)
        one = one if one.ndim == len(self.shape) else one[0]
        return np.ascontiguousarray(self.turns[1](one, self.shape))

    @property
    def published_shape(self) -> tuple[int, ...]:
        """The shape that each of ``tensors`` must have."""
        one = jax.ShapeDtypeStruct(self.shape, self.leaf.dtype)
        return jax.eval_shape(lambda array: self.turns[1](array, self.shape), one).shape


def parameters(config: ModelConfig, params: Tree | None = None) -> list[Parameter]:
    """All published parameters of a decoder; those of mechanisms are not among them.

    ``params`` are shapes and dtypes (:func:`models.transformer.abstract`), made here if None.
    """
    params = abstract(config)[1] if params is None else params
    found = []
    for key, (name, turns) in _MODEL.items():
        leaf = _get(params, key.split("."))
        if leaf is not None:
            found.append(
                Parameter(tuple(key.split(".")), leaf, leaf.shape, (name,), turns, stacked=False)
            )
    for run in config.runs:
        numbers = range(run.first, run.first + run.count)
        stacked = run.count > 1
        for key, (suffix, turns) in _LAYER.items():
            path = ("layers", run.name, *key.split("."))
            leaf = _get(params, path)
            if leaf is None:
                continue
            shape = leaf.shape[1:] if stacked else leaf.shape
            branched = key in _BRANCHED
            names = tuple(f"model.layers.{number}.{suffix}" for number in numbers)
            shape = shape[1:] if branched else shape
            found.append(Parameter(path, leaf, shape, names, turns, stacked))
    return found


def check(
    wanted: Sequence[Parameter],
    have: Mapping[str, tuple[int, ...]],
    config: ModelConfig,
    where: str,
) -> None:
    """Compare names and shapes before anything is read.

    Raises:
      ValueError: with the names and shapes that are missing, unexpected or different.
    """
    shapes = {name: one.published_shape for one in wanted for name in one.tensors}
    lines = [f"missing {name} {shapes[name]}" for name in sorted(shapes.keys() - have.keys())]
    lines += [
        f"unexpected {name} {tuple(have[name])}"
        for name in sorted(have.keys() - shapes.keys())
        if not _ignored(name, config)
    ]
    lines += [
        f"{name} is {tuple(have[name])}, expected {shape}"
        for name, shape in sorted(shapes.items())
        if name in have and tuple(have[name]) != shape
    ]
    if not lines:
        return
    shown = lines[:40]
    if len(lines) > len(shown):
        shown.append(f"... and {len(lines) - len(shown)} more")
    raise ValueError(
        f"{where} does not hold the tensors of its configuration ({len(lines)} differences):\n  "
        + "\n  ".join(shown)
    )


def _ignored(name: str, config: ModelConfig) -> bool:
    """What older files store although it follows from the configuration."""
    tied = config.tie_embeddings and name == "lm_head.weight"
    return tied or name.endswith("rotary_emb.inv_freq")


def _get(tree: Tree, path: Sequence[str]) -> Any:
    for key in path:
        if key not in tree:
            return None
        tree = tree[key]
    return tree
