"""The rotary embedding as ``config.json`` describes it, in its old and its new form.

Old: ``rope_theta`` and ``rope_scaling`` side by side. New (transformers 5): both inside
``rope_parameters``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.rope import RopeConfig


def read_rope(settings: Mapping[str, Any], context: int | None) -> RopeConfig:
    """The rotation of a checkpoint for sequences of up to ``context`` tokens (None: as trained).

    Raises:
      ValueError: for a kind of scaling that is not known, or one that lacks a setting.
    """
    scaling = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    theta = scaling.get("rope_theta") or settings.get("rope_theta") or 10000.0
    fraction = scaling.get("partial_rotary_factor") or settings.get("partial_rotary_factor") or 1.0
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    shared: dict[str, Any] = {"theta": float(theta), "rotary_fraction": float(fraction)}
    trained = scaling.get("original_max_position_embeddings")
    maximum = settings.get("max_position_embeddings")
    try:
        if kind == "default":
            return RopeConfig(**shared)
        if kind == "linear":
            return RopeConfig(scaling="linear", factor=float(scaling["factor"]), **shared)
        if kind == "llama3":
            return RopeConfig(
                scaling="llama3",
                factor=float(scaling["factor"]),
                original_context=trained,
                low_frequency_factor=float(scaling["low_freq_factor"]),
                high_frequency_factor=float(scaling["high_freq_factor"]),
                **shared,
            )
        if kind == "yarn":
            return _read_yarn(scaling, trained or maximum, shared)
        if kind == "longrope":
            return _read_longrope(scaling, trained or maximum, maximum, context, shared)
    except KeyError as error:
        raise ValueError(f"rope scaling {dict(scaling)} has no {error}") from error
    raise ValueError(
        f"rope scaling of type {kind!r} is not supported; use default, linear, llama3, yarn or "
        "longrope"
    )


def write_rope(rope: RopeConfig, context_length: int) -> tuple[float, dict[str, Any] | None]:
    """``(rope_theta, rope_scaling)`` for :func:`read_rope`.

    Raises:
      ValueError: for a rotation that transformers does not have.
    """
    if rope.layout != "half" or rope.rotary_fraction != 1 or rope.scaling == "ntk":
        raise ValueError(
            f"transformers has no layout={rope.layout!r}, scaling={rope.scaling!r}, "
            f"rotary_fraction={rope.rotary_fraction} for these families; only 'half', all dims, "
            "and none, linear, yarn, llama3 or longrope can be exported"
        )
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "none":
        return rope.theta, None
    if rope.scaling == "linear":
        return rope.theta, scaling
    scaling["original_max_position_embeddings"] = rope.original_context
    if rope.scaling == "llama3":
        scaling["low_freq_factor"] = rope.low_frequency_factor
        scaling["high_freq_factor"] = rope.high_frequency_factor
        return rope.theta, scaling
    if rope.attention_factor is not None:
        scaling["attention_factor"] = rope.attention_factor
    if rope.scaling == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
    else:
        # One list was chosen when the model was loaded; it serves short and long sequences.
        scaling |= {"short_factor": list(rope.pair_factors), "long_factor": list(rope.pair_factors)}
    return rope.theta, scaling


def _read_yarn(scaling: Mapping[str, Any], trained: int | None, shared: dict) -> RopeConfig:
    unknown = [name for name in ("mscale", "mscale_all_dim") if scaling.get(name)]
    if unknown or scaling.get("truncate") is False:
        raise ValueError(f"yarn with {unknown or 'truncate=false'} is not supported: {scaling}")
    return RopeConfig(
        scaling="yarn",
        factor=float(scaling["factor"]),
        original_context=trained,
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
        attention_factor=scaling.get("attention_factor"),
        **shared,
    )


def _read_longrope(
    scaling: Mapping[str, Any],
    trained: int | None,
    maximum: int | None,
    context: int | None,
    shared: dict,
) -> RopeConfig:
    """The short factors up to the trained context, the long ones above it."""
    if trained is None:
        raise ValueError("longrope needs original_max_position_embeddings or a maximum length")
    which = "long_factor" if context is not None and context > trained else "short_factor"
    factor = scaling.get("factor") or (maximum or trained) / trained
    return RopeConfig(
        scaling="longrope",
        factor=max(float(factor), 1.0),
        original_context=trained,
        attention_factor=scaling.get("attention_factor"),
        pair_factors=tuple(float(value) for value in scaling[which]),
        **shared,
    )
