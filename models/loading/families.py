"""``config.json`` of Hugging Face to a :class:`ModelConfig` and back.

One architecture, five families: ``llama`` (Llama 2 and 3, SmolLM2), ``mistral`` (a sliding window),
``qwen2`` (biases on q, k and v; Qwen 2 and 2.5), ``qwen3`` (q/k-norm) and ``minicpm`` (three scale
factors, and InfLLM-V2 where ``sparse_config`` asks for it; MiniCPM4 and 4.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.loading.rope_settings import read_rope, write_rope
from sparse_attn.dense import Dense
from sparse_attn.infllm_v2 import InfLLMV2
from sparse_attn.registry import MechanismConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "minicpm": "MiniCPMForCausalLM",
}


def read_settings(settings: Mapping[str, Any], *, context: int | None = None) -> ModelConfig:
    """The model that ``config.json`` describes; layers are not stacked, dtypes are float32.

    Args:
      settings: the parsed file.
      context: the number of tokens the model will be used with; LongRoPE has other factors above
        the context it was trained on. None means no more than that.

    Raises:
      ValueError: for a family, or a feature of one, that the decoder does not have, and for
        settings that are missing.
    """
    family = settings.get("model_type")
    if family not in ARCHITECTURES:
        raise ValueError(
            f"model_type={family!r} is not supported; the decoder reads {sorted(ARCHITECTURES)}"
        )
    _refuse_unsupported(settings)
    width, heads = _need(settings, "hidden_size"), _need(settings, "num_attention_heads")
    layers = _need(settings, "num_hidden_layers")
    head_width = settings.get("head_dim") or width // heads
    attention, overrides = _attention(settings, layers)
    scales: dict[str, Any] = {}
    if family == "minicpm":
        scales = _minicpm_scales(settings, width, layers)
    return ModelConfig(
        vocab_size=_need(settings, "vocab_size"),
        layers=layers,
        model_width=width,
        query_heads=heads,
        kv_heads=settings.get("num_key_value_heads") or heads,
        head_width=head_width,
        mlp_width=_need(settings, "intermediate_size"),
        attention=attention,
        attention_overrides=overrides,
        rope=read_rope(settings, context),
        norm_epsilon=settings.get("rms_norm_eps", 1e-6),
        query_key_norm=family == "qwen3",
        qkv_bias=family == "qwen2",
        tie_embeddings=settings.get("tie_word_embeddings", False),
        scan_layers=False,
        **scales,
    )


def write_settings(config: ModelConfig, *, context_length: int) -> dict[str, Any]:
    """``config.json`` for ``config``, in the form that transformers 4 and 5 read.

    Windows and InfLLM-V2 (MiniCPM only) are described; every other mechanism becomes dense
    attention, which is what transformers knows.

    Raises:
      ValueError: for a combination of features that no family has.
    """
    family = _family(config)
    rope_theta, rope_scaling = write_rope(config.rope, context_length)
    settings: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.query_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": context_length,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "torch_dtype": config.param_dtype,
    }
    if family in ("mistral", "qwen2", "qwen3"):
        settings |= _write_windows(family, _windows(config))
    if family == "minicpm":
        settings |= _write_minicpm(config)
    return settings


def _need(settings: Mapping[str, Any], name: str) -> int:
    if settings.get(name) is None:
        raise ValueError(f"config.json has no {name!r}; it has {sorted(settings)}")
    return settings[name]


def _refuse_unsupported(settings: Mapping[str, Any]) -> None:
    """Features that would silently change what the model computes."""
    if settings.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act={settings['hidden_act']!r}; the decoder's MLP is SwiGLU")
    for name in ("attention_bias", "mlp_bias"):
        if settings.get(name):
            raise ValueError(
                f"{name}=true puts biases on projections that have none in this decoder (only "
                "q, k and v of qwen2 do)"
            )
    if settings.get("quantization_config"):
        raise ValueError(
            f"quantization_config={settings['quantization_config']} is not read; load the "
            "unquantized checkpoint, or a GGUF file"
        )


def _attention(
    settings: Mapping[str, Any], layers: int
) -> tuple[MechanismConfig, tuple[tuple[int, MechanismConfig], ...]]:
    """What all layers use, and the layers that differ."""
    if settings["model_type"] == "minicpm" and settings.get("sparse_config"):
        return read_sparse_config(settings["sparse_config"]), ()
    windows = _read_windows(settings, layers)
    if len(set(windows)) == 1:
        return Dense(window=windows[0]), ()
    return Dense(), tuple(
        (layer, Dense(window=window)) for layer, window in enumerate(windows) if window is not None
    )


def _read_windows(settings: Mapping[str, Any], layers: int) -> list[int | None]:
    """The sliding window of every layer, None for all tokens."""
    window = settings.get("sliding_window")
    if settings["model_type"] == "mistral":
        return [window] * layers
    if settings["model_type"] not in ("qwen2", "qwen3") or not settings.get("use_sliding_window"):
        return [None] * layers
    kinds = settings.get("layer_types")
    if kinds is None:
        first = settings.get("max_window_layers", layers)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown or len(kinds) != layers:
        raise ValueError(
            f"layer_types={kinds} must name 'full_attention' or 'sliding_attention' for each of "
            f"{layers} layers"
        )
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _windows(config: ModelConfig) -> list[int | None]:
    attention = [config.layer_attention(layer) for layer in range(config.layers)]
    return [one.window if isinstance(one, Dense) else None for one in attention]


def _family(config: ModelConfig) -> str:
    """The family that has the features of ``config``."""
    scaled = (
        config.embedding_multiplier != 1
        or config.residual_multiplier != 1
        or config.logit_multiplier != 1
    )
    windows = set(_windows(config))
    features = {
        "qwen2": config.qkv_bias,
        "qwen3": config.query_key_norm,
        "minicpm": scaled or isinstance(config.attention, InfLLMV2),
    }
    wanted = [family for family, has in features.items() if has]
    if len(wanted) > 1 or (windows != {None} and "minicpm" in wanted):
        raise ValueError(
            f"qkv_bias={config.qkv_bias}, query_key_norm={config.query_key_norm}, multipliers or "
            f"InfLLM-V2={features['minicpm']} and windows {sorted(windows, key=str)}: no family "
            "that transformers knows has these together"
        )
    if (config.value_width or config.head_width) != config.head_width:
        raise ValueError(
            f"value_width={config.value_width} differs from head_width={config.head_width}, which "
            "no family of transformers has"
        )
    if wanted:
        return wanted[0]
    if len(windows) > 1:
        raise ValueError(
            f"the layers have different windows {sorted(windows, key=str)}; only the qwen "
            "families, which have biases or q/k-norm, describe that"
        )
    return "llama" if windows == {None} else "mistral"


def _write_windows(family: str, windows: list[int | None]) -> dict[str, Any]:
    if family == "mistral":
        return {"sliding_window": windows[0]}
    present = {window for window in windows if window is not None}
    if len(present) > 1:
        raise ValueError(f"windows {sorted(present)}: config.json describes one window only")
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return {
        "use_sliding_window": bool(present),
        "sliding_window": next(iter(present), None),
        "max_window_layers": len(windows) if not present else 0,
        "layer_types": kinds,
    }


def _minicpm_scales(settings: Mapping[str, Any], width: int, layers: int) -> dict[str, float]:
    """scale_emb on embeddings, scale_depth / sqrt(layers) on branches, 1 / (D / base) on logits."""
    return {
        "embedding_multiplier": float(settings.get("scale_emb", 1)),
        "residual_multiplier": settings.get("scale_depth", math.sqrt(layers)) / math.sqrt(layers),
        "logit_multiplier": settings.get("dim_model_base", width) / width,
    }


def _write_minicpm(config: ModelConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "scale_emb": _tidy(config.embedding_multiplier),
        "scale_depth": _tidy(config.residual_multiplier * math.sqrt(config.layers)),
        "dim_model_base": _tidy(config.logit_multiplier * config.model_width),
    }
    if isinstance(config.attention, InfLLMV2):
        settings["sparse_config"] = write_sparse_config(config.attention)
    return settings


def _tidy(value: float) -> float | int:
    """``value`` without the noise of a multiplication and its inverse."""
    short = float(f"{value:.12g}")
    return int(short) if short.is_integer() else short


def read_sparse_config(sparse: Mapping[str, Any]) -> InfLLMV2:
    """InfLLM-V2 as MiniCPM4's public code runs it.

    ``topk`` there is without the local blocks; the local ones cover the window, the current block
    counted beside them; coarse entries are four times the fine ones; ``dense_len`` compares the
    length of the whole sequence, and -1 means always sparse.

    Raises:
      ValueError: for ``use_nope``, which compresses keys that are not rotated.
    """
    if sparse.get("use_nope"):
        raise ValueError("sparse_config.use_nope=true compresses unrotated keys; InfLLMV2 does not")
    size, stride = sparse.get("kernel_size", 32), sparse.get("kernel_stride", 16)
    block, window = sparse.get("block_size", 64), sparse.get("window_size", 2048)
    return InfLLMV2(
        compression_block=size,
        compression_stride=stride,
        coarse_block=4 * size,
        coarse_stride=4 * stride,
        selection_block=block,
        selected_blocks=sparse.get("topk", 64) + window // block,
        initial_blocks=sparse.get("init_blocks", 1),
        window=window,
        cover_window=True,
        dense_len=max(sparse.get("dense_len", 8192), 0),
        switch="sequence",
    )


def write_sparse_config(config: InfLLMV2) -> dict[str, Any]:
    """The inverse of :func:`read_sparse_config`.

    Raises:
      ValueError: for a variant that ``sparse_config`` cannot describe.
    """
    local = config.window // config.selection_block
    settings = {
        "kernel_size": config.compression_block,
        "kernel_stride": config.compression_stride,
        "init_blocks": config.initial_blocks,
        "block_size": config.selection_block,
        "window_size": config.window,
        "topk": max(config.budgets) - local,
        "use_nope": False,
        "dense_len": config.dense_len or -1,
    }
    again = read_sparse_config(settings)
    lossy = [
        f"{name}={getattr(config, name)!r}"
        for name in ("coarse_block", "coarse_stride", "selected_blocks", "cover_window", "lse")
        if getattr(config, name) != getattr(again, name)
    ]
    if lossy:
        raise ValueError(f"sparse_config cannot describe {', '.join(lossy)} of {config}")
    return settings
