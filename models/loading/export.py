"""A decoder as a Hugging Face folder that transformers loads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.config import ModelConfig
from models.loading import layout
from models.loading.families import write_settings
from models.transformer import Decoder, Tree, split

if TYPE_CHECKING:
    from train.tokenizer import Tokenizer


def export(
    decoder: Decoder,
    folder: str | os.PathLike,
    *,
    context_length: int,
    tokenizer: Tokenizer | None = None,
    shard_bytes: int = 5_000_000_000,
) -> list[Path]:
    """Write ``config.json``, the weights as safetensors and, if given, the tokenizer.

    The weights keep their dtype. Layers are described as dense attention, sliding windows or (for
    MiniCPM) InfLLM-V2; a policy or any other mechanism without parameters is left out.

    Args:
      decoder: any grouping of layers; every parameter must be addressable from this process.
      folder: made if it does not exist.
      context_length: the number of tokens the model is meant for (``max_position_embeddings``).
      tokenizer: one with a Hugging Face form is written as ``tokenizer.json``.
      shard_bytes: weights above it are split into several files with an index.

    Returns:
      The files with weights.

    Raises:
      FileExistsError: if the folder holds weights already.
      ValueError: for parameters of mechanisms, or features, that transformers does not know.
    """
    config = decoder.config
    settings = write_settings(config, context_length=context_length)
    params = split(decoder)[1]
    _refuse_mechanisms(config, params)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    present = sorted(file.name for file in folder.glob("*.safetensors*"))
    if present:
        raise FileExistsError(f"{folder} holds {present}; export into an empty folder")
    shards = _shards(config, params, shard_bytes)
    files = _write_shards(folder, shards)
    if tokenizer is not None:
        tokenizer.save(folder)
        settings |= {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
        }
    _write_json(folder / "config.json", settings)
    return files


def _refuse_mechanisms(config: ModelConfig, params: Tree) -> None:
    for run in config.runs:
        learned = params["layers"][run.name]["attention"].get("mechanism")
        if learned or run.attention.kv_branches != 1:
            raise ValueError(
                f"layers {run.name} use {type(run.attention).__name__} with "
                f"{run.attention.kv_branches} K/V branches and own parameters "
                f"{sorted(learned or ())}, which transformers does not have; only mechanisms "
                "without parameters can be exported"
            )


def _published(config: ModelConfig, params: Tree) -> Iterator[tuple[str, int, Any]]:
    """Name, bytes and place (parameter, leaf, number in it) of every tensor."""
    for parameter in layout.parameters(config, params):
        leaf: Any = params
        for key in parameter.path:
            leaf = leaf[key]
        size = leaf.size * leaf.dtype.itemsize // len(parameter.tensors)
        for place, name in enumerate(parameter.tensors):
            yield name, size, (parameter, leaf, place)


def _shards(config: ModelConfig, params: Tree, shard_bytes: int) -> list[dict[str, Any]]:
    """Names grouped so that each group stays below ``shard_bytes`` (one tensor at least)."""
    shards: list[dict[str, Any]] = []
    filled = 0
    for name, size, tensor in _published(config, params):
        if not shards or filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    return shards


def _write_shards(folder: Path, shards: list[dict[str, Any]]) -> list[Path]:
    from safetensors.numpy import save_file

    files: list[Path] = []
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = folder / (name if len(shards) > 1 else "model.safetensors")
        tensors = {
            key: parameter.published(leaf, place) for key, (parameter, leaf, place) in shard.items()
        }
        # transformers reads only files that say which framework's layout they have.
        save_file(tensors, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        files.append(file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / "model.safetensors.index.json", index)
    return files


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
