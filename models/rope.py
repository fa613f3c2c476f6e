"""Rotary position embedding and its context-extension variants.

Pair i of the rotated dims turns by ``angle_i(t) = t * f_i`` with base frequencies
``f_i = theta**(-2 i / d)``, d the number of rotated dims (RoFormer, arXiv 2104.09864). The variants
change ``f_i`` (and, for YaRN, the length of the rotated vectors), for models run at
``factor`` times the context they were trained on:

    linear   f_i / factor                                   (position interpolation, 2306.15595)
    ntk      theta <- theta * factor**(d / (d - 2))         (NTK-aware, fixed factor)
    yarn     a ramp over i between f_i and f_i / factor     (NTK-by-parts, 2309.00071)
    llama3   the same idea with a ramp over the wavelength  (Llama 3.1)
    longrope f_i / factor_i, one found for every pair       (LongRoPE, 2402.13753)
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparse_attn.types import Rope

Scaling = Literal["none", "linear", "ntk", "yarn", "llama3", "longrope"]
Layout = Literal["half", "interleaved"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """How queries and keys are rotated.

    Attributes:
      theta: base of the frequencies.
      scaling: how frequencies change for a context longer than the trained one; "none" leaves them.
      factor: target over original context.
      original_context: tokens the model was trained with; needed by yarn, llama3 and longrope.
      rotary_fraction: share of the leading dims that turn; 0 switches rotation off.
      layout: "half" pairs dim i with i + d/2 (Hugging Face), "interleaved" pairs 2i with 2i + 1
        as the paper and GGUF do.
      beta_fast: turns within the original context above which YaRN keeps a frequency.
      beta_slow: turns within the original context below which YaRN interpolates a frequency.
      attention_factor: scales the rotated q and k under yarn and longrope (so logits by its
        square); None means ``0.1 ln(factor) + 1`` and ``sqrt(1 + ln(factor) /
        ln(original_context))``.
      low_frequency_factor: as ``beta_slow``, of llama3.
      high_frequency_factor: as ``beta_fast``, of llama3.
      pair_factors: of longrope, one a rotated pair.

    Raises:
      ValueError: for values out of range or a missing ``original_context``.
    """

    theta: float = 10000.0
    scaling: Scaling = "none"
    factor: float = 1.0
    original_context: int | None = None
    rotary_fraction: float = 1.0
    layout: Layout = "half"
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    pair_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.scaling not in get_args(Scaling):
            raise ValueError(f"scaling={self.scaling!r} is unknown; use one of {get_args(Scaling)}")
        if self.layout not in get_args(Layout):
            raise ValueError(f"layout={self.layout!r} is unknown; use one of {get_args(Layout)}")
        if self.theta <= 1:
            raise ValueError(f"theta={self.theta} must be above 1; 10000 is usual")
        if self.factor < 1:
            raise ValueError(
                f"factor={self.factor} must be at least 1: it is target over original context"
            )
        if not 0 <= self.rotary_fraction <= 1:
            raise ValueError(f"rotary_fraction={self.rotary_fraction} must lie in [0, 1]")
        if self.scaling == "none" and self.factor != 1:
            raise ValueError(
                f"factor={self.factor} has no effect with scaling='none'; "
                "choose a scaling or set factor=1"
            )
        if self.scaling in ("yarn", "llama3", "longrope") and not self.original_context:
            raise ValueError(
                f"scaling={self.scaling!r} needs original_context, the trained context length; "
                f"it is {self.original_context}"
            )
        if (self.scaling == "longrope") != bool(self.pair_factors):
            raise ValueError(
                f"pair_factors={self.pair_factors} belong to scaling='longrope', which needs one a "
                f"rotated pair; scaling={self.scaling!r}"
            )
        if any(factor <= 0 for factor in self.pair_factors):
            raise ValueError(f"pair_factors={self.pair_factors} must be positive")
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast={self.beta_fast} must be above beta_slow={self.beta_slow}")
        if self.high_frequency_factor <= self.low_frequency_factor:
            raise ValueError(
                f"high_frequency_factor={self.high_frequency_factor} must be above "
                f"low_frequency_factor={self.low_frequency_factor}"
            )

    def rotary_dims(self, head_width: int) -> int:
        """How many leading dims of a head turn.

        Raises:
          ValueError: if that number is odd.
        """
        dims = round(self.rotary_fraction * head_width)
        if dims % 2:
            raise ValueError(
                f"rope turns pairs of dims, but head_width={head_width} with "
                f"rotary_fraction={self.rotary_fraction} leaves {dims} dims, an odd number; "
                "change one of them (rotary_fraction=0 switches rope off)"
            )
        return dims


def frequencies(config: RopeConfig, dims: int) -> np.ndarray:
    """f_i of the module docstring, float64 [dims / 2], in radians a position.

    Raises:
      ValueError: if there are not as many ``pair_factors`` as pairs.
    """
    pair = np.arange(dims // 2, dtype=np.float64)
    theta = config.theta
    if config.scaling == "ntk":
        theta *= config.factor ** (dims / max(dims - 2, 1))
    base = theta ** (-2.0 * pair / dims)
    if config.scaling == "linear":
        return base / config.factor
    if config.scaling == "yarn":
        return _yarn(config, base, dims)
    if config.scaling == "llama3":
        return _llama3(config, base)
    if config.scaling == "longrope":
        if len(config.pair_factors) != dims // 2:
            raise ValueError(
                f"{len(config.pair_factors)} pair_factors do not fit {dims} rotated dims; "
                f"longrope needs {dims // 2}, one a pair"
            )
        return base / np.asarray(config.pair_factors)
    return base


def _yarn(config: RopeConfig, base: np.ndarray, dims: int) -> np.ndarray:
    """keep_i f_i + (1 - keep_i) f_i / factor; keep falls from 1 to 0 between two pair numbers."""
    context = config.original_context
    assert context is not None

    def pair_with(turns: float) -> float:
        # The pair that completes `turns` turns within the original context.
        wavelength = context / turns
        return dims * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.theta))

    first = max(math.floor(pair_with(config.beta_fast)), 0)
    last = min(math.ceil(pair_with(config.beta_slow)), dims - 1)
    ramp = (np.arange(dims // 2) - first) / max(last - first, 1e-3)
    keep = 1 - np.clip(ramp, 0, 1)
    return keep * base + (1 - keep) * base / config.factor


def _llama3(config: RopeConfig, base: np.ndarray) -> np.ndarray:
    """As YaRN, with keep linear in the number of turns within the original context."""
    assert config.original_context is not None
    turns = config.original_context * base / (2 * math.pi)
    low, high = config.low_frequency_factor, config.high_frequency_factor
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return keep * base + (1 - keep) * base / config.factor


def magnitude(config: RopeConfig) -> float:
    """The length of a rotated unit vector: 1, except under YaRN's and LongRoPE's temperature."""
    if config.scaling not in ("yarn", "longrope"):
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    if config.scaling == "longrope":
        assert config.original_context is not None
        return math.sqrt(1 + math.log(config.factor) / math.log(config.original_context))
    return 0.1 * math.log(config.factor) + 1.0


def make_rope(config: RopeConfig, head_width: int) -> Rope:
    """The rotation for heads of ``head_width`` dims.

    Returns ``rope(array, positions, dims=None)``: array [B, T, A, H] of any number of heads A,
    positions [B, T] integer; rotates the leading ``rotary_fraction`` of H, or the leading ``dims``
    with frequencies of their own; the other dims pass through. Computes in float32 (float64 for
    float64 arrays), returns ``array.dtype``. Differentiable in ``array``.

    Raises:
      ValueError: at once, if the number of rotated dims is odd; on the call, for ``dims`` odd or
        above H, an array that is not of ``head_width`` without ``dims``, or ``positions`` that are
        not [B, T] integers.
    """
    rotary = config.rotary_dims(head_width)

    def rope(
        array: Float[Array, "B T A H"], positions: Int[Array, "B T"], dims: int | None = None
    ) -> Float[Array, "B T A H"]:
        _check(array, positions, dims, head_width)
        turning = rotary if dims is None else dims
        if turning == 0:
            return array
        dtype = jnp.promote_types(array.dtype, jnp.float32)
        frequency = jnp.asarray(frequencies(config, turning), dtype)
        angle = positions.astype(dtype)[:, :, None, None] * frequency[None, None, None, :]
        cos = jnp.cos(angle) * magnitude(config)
        sin = jnp.sin(angle) * magnitude(config)
        # Without a barrier XLA computes both anew for every head.
        cos, sin = jax.lax.optimization_barrier((cos, sin))
        moving = array[..., :turning].astype(dtype)
        if config.layout == "half":
            a, b = jnp.split(moving, 2, axis=-1)
            turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        else:
            a, b = moving[..., 0::2], moving[..., 1::2]
            turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
            turned = turned.reshape(moving.shape)
        turned = turned.astype(array.dtype)
        if turning == array.shape[-1]:
            return turned
        return jnp.concatenate([turned, array[..., turning:]], axis=-1)

    return rope


def _check(array: Array, positions: Array, dims: int | None, head_width: int) -> None:
    if array.ndim != 4 or positions.shape != array.shape[:2]:
        raise ValueError(
            f"rope takes array [B, T, A, H] and positions [B, T]; got {array.shape} and "
            f"{positions.shape}"
        )
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"positions are {positions.dtype}; rope takes integers")
    if dims is None and array.shape[-1] != head_width:
        raise ValueError(
            f"this rope was made for head_width={head_width}, the array has "
            f"{array.shape[-1]} dims; pass dims= to rotate its leading dims"
        )
    if dims is not None and (dims % 2 or not 0 <= dims <= array.shape[-1]):
        raise ValueError(
            f"dims={dims} must be even and between 0 and the array's {array.shape[-1]} dims"
        )
