"""GGUF files, seen as Hugging Face checkpoints.

llama.cpp's conversion permutes the rows of q and k of the ``llama`` architecture, so that pairs of
dims that rotate together become neighbours; here they are put back. Quantised tensors are
dequantised by the ``gguf`` package.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_MODEL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Llama 3's scaling as one factor a pair of dims; it becomes part of the settings.
_ROPE_FACTORS = "rope_freqs.weight"


class GGUFCheckpoint:
    """One ``.gguf`` file.

    Raises:
      ValueError: if the file is not GGUF, or of an architecture that is not read.
    """

    def __init__(self, path: Path):
        import gguf

        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError) as error:
            raise ValueError(f"{path} is no readable GGUF file: {error}") from error
        self._tensors = {hugging_face_name(tensor.name): tensor for tensor in self._reader.tensors}
        self.settings = self._settings()
        self._tensors.pop(_ROPE_FACTORS, None)
        self.shapes = {
            name: tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        array = self._dequantized(name)
        if self.settings["model_type"] not in ("llama", "mistral"):
            return array
        if ".q_proj." in name:
            return unpermuted(array, self.settings["num_attention_heads"])
        if ".k_proj." in name:
            return unpermuted(array, self.settings["num_key_value_heads"])
        return array

    def tokenizer(self) -> Any:
        from models.loading.gguf_tokenizer import read_tokenizer

        return read_tokenizer(self.field)

    def field(self, name: str, default: Any = None) -> Any:
        """A value of the file's metadata."""
        field = self._reader.fields.get(name)
        return default if field is None else field.contents()

    def _dequantized(self, name: str) -> np.ndarray:
        import gguf

        tensor = self._tensors[name]
        try:
            return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(
                tuple(reversed([int(size) for size in tensor.shape]))
            )
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path}: tensor {tensor.name} is {tensor.tensor_type.name}, which the gguf "
                f"package does not dequantise ({error})"
            ) from error

    def _settings(self) -> dict[str, Any]:
        """The metadata in the words of ``config.json``."""
        architecture = self.field("general.architecture")
        if architecture not in _ARCHITECTURES or self._of("expert_count", 0):
            raise ValueError(
                f"{self.path}: architecture {architecture!r} with "
                f"{self._of('expert_count', 0)} experts is not read; dense models of "
                f"{_ARCHITECTURES} are"
            )
        width, heads = self._need("embedding_length"), self._need("attention.head_count")
        head_width = self._of("attention.key_length", width // heads)
        if self._of("attention.value_length", head_width) != head_width:
            raise ValueError(
                f"{self.path}: values of {self._of('attention.value_length')} dims beside keys of "
                f"{head_width} are not read"
            )
        window = self._of("attention.sliding_window")
        family = "mistral" if architecture == "llama" and window else architecture
        return {
            "model_type": family,
            "vocab_size": self._vocab_size(),
            "hidden_size": width,
            "intermediate_size": self._need("feed_forward_length"),
            "num_hidden_layers": self._need("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._of("attention.head_count_kv", heads),
            "head_dim": head_width,
            "sliding_window": window,
            "max_position_embeddings": self._of("context_length"),
            "rms_norm_eps": _tidy(self._of("attention.layer_norm_rms_epsilon", 1e-6)),
            "rope_theta": self._of("rope.freq_base", 10000.0),
            "rope_scaling": self._rope_scaling(),
            "partial_rotary_factor": self._of("rope.dimension_count", head_width) / head_width,
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
        }

    def _rope_scaling(self) -> dict[str, Any] | None:
        trained = self._of("rope.scaling.original_context_length", self._of("context_length"))
        if _ROPE_FACTORS in self._tensors:
            factors = self._dequantized(_ROPE_FACTORS).tolist()
            return {
                "rope_type": "longrope",
                "short_factor": factors,
                "long_factor": factors,
                "original_max_position_embeddings": trained,
                "attention_factor": 1.0,
            }
        kind = self._of("rope.scaling.type", "none")
        if kind == "none":
            return None
        return {
            "rope_type": kind,
            "factor": self._of("rope.scaling.factor", 1.0),
            "original_max_position_embeddings": trained,
        }

    def _vocab_size(self) -> int:
        embedding = self._tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise ValueError(f"{self.path} has no tensor token_embd.weight")
        return int(embedding.shape[1])

    def _need(self, name: str) -> Any:
        value = self._of(name)
        if value is None:
            raise ValueError(f"{self.path}: the metadata has no {name!r}")
        return value

    def _of(self, name: str, default: Any = None) -> Any:
        return self.field(f"{self.field('general.architecture')}.{name}", default)


def hugging_face_name(name: str) -> str:
    """``blk.0.attn_q.weight`` to ``model.layers.0.self_attn.q_proj.weight``; others unchanged."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer and layer[2] in _LAYER:
        return f"model.layers.{layer[1]}.{_LAYER[layer[2]]}.{layer[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{_MODEL[stem]}.{kind}" if stem in _MODEL else name


def unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows (2 i, 2 i + 1) of every head back to (i, i + H/2)."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _tidy(value: float) -> float:
    """A float32 as it was written down: 9.999999747378752e-06 is 1e-05."""
    return float(f"{value:.7g}")
