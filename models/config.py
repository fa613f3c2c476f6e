"""The shape of a decoder-only language model, as one frozen dataclass."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from models.rope import RopeConfig
from sparse_attn.dense import Dense
from sparse_attn.nsa import NSA
from sparse_attn.registry import MechanismConfig
from sparse_attn.types import HeadShape

Remat = Literal["none", "full", "selection", "dots"]
DtypeName = Literal["float32", "bfloat16", "float64"]


@dataclasses.dataclass(frozen=True)
class Run:
    """Consecutive layers ``first .. first + count - 1`` that are alike, so can be stacked."""

    first: int
    count: int
    attention: MechanismConfig

    @property
    def name(self) -> str:
        """``"3"`` for one layer, ``"1-7"`` for several."""
        return str(self.first) if self.count == 1 else f"{self.first}-{self.first + self.count - 1}"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A pre-norm decoder: RMSNorm, grouped-query attention with a chosen mechanism, SwiGLU.

    Attributes:
      vocab_size: rows of the embedding; at least the tokenizer's tokens.
      layers: blocks of attention and MLP.
      model_width: of the residual stream.
      query_heads: of every layer.
      kv_heads: of every layer; a divisor of ``query_heads``.
      head_width: of queries and keys.
      mlp_width: of SwiGLU's inner product.
      attention: the mechanism of every layer that is not named below.
      dense_layers: numbers of layers that use plain dense attention instead.
      attention_overrides: pairs (layer number, config) for layers with a mechanism, or just
        budgets, of their own.
      rope: how queries and keys are rotated.
      value_width: of values; None for ``head_width``.
      norm_epsilon: added to the mean square in every RMSNorm.
      query_key_norm: puts an RMSNorm on every query and key head before rotation.
      qkv_bias: adds biases to queries, keys and values. Rotated biases attend by distance alone,
        which queries and keys without them, all content, have to learn.
      qkv_bias_scale: standard deviation of the biases at first; 0 starts them at 0.
      tie_embeddings: the unembedding is the embedding.
      embedding_multiplier: scales token embeddings on the way in, not as output weights (the first
        of the three scales of muP as MiniCPM uses it).
      residual_multiplier: scales what each layer's attention and MLP add.
      logit_multiplier: scales the final hidden state before the unembedding.
      scan_layers: stacks alike consecutive layers and scans over them where no cache is given.
      remat: what a backward pass keeps of a layer: "none" keeps everything, "full" only its
        input, "selection" also the selections and what scored them (nothing selects twice). The
        last, "dots", keeps the results of matrix products with weights as well.
      compute_dtype: of activations; norms, rotations, softmax and logits are at least float32.
      param_dtype: of parameters.

    Raises:
      ValueError: on sizes below 1, heads that do not divide, an odd number of rotated dims, layer
        numbers outside the model or named twice, or unknown names.
    """

    vocab_size: int
    layers: int
    model_width: int
    query_heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    attention: MechanismConfig = dataclasses.field(default_factory=NSA)
    dense_layers: tuple[int, ...] = ()
    attention_overrides: tuple[tuple[int, MechanismConfig], ...] = ()
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    value_width: int | None = None
    norm_epsilon: float = 1e-6
    query_key_norm: bool = False
    qkv_bias: bool = False
    qkv_bias_scale: float = 0.0
    tie_embeddings: bool = True
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    scan_layers: bool = True
    remat: Remat = "none"
    compute_dtype: DtypeName = "float32"
    param_dtype: DtypeName = "float32"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "layers", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        _ = self.head_shape  # validates heads and widths
        self.rope.rotary_dims(self.head_width)
        special = [*self.dense_layers, *(layer for layer, _ in self.attention_overrides)]
        outside = [layer for layer in special if not 0 <= layer < self.layers]
        if outside:
            raise ValueError(
                f"dense_layers={self.dense_layers} and attention_overrides name layers {outside}, "
                f"but the model has layers 0 to {self.layers - 1}"
            )
        twice = sorted({layer for layer in special if special.count(layer) > 1})
        if twice:
            raise ValueError(
                f"layers {twice} are named more than once in dense_layers={self.dense_layers} and "
                "attention_overrides; name each in one of them"
            )
        if self.qkv_bias_scale < 0 or (self.qkv_bias_scale and not self.qkv_bias):
            raise ValueError(
                f"qkv_bias_scale={self.qkv_bias_scale} must not be negative, and 0 unless qkv_bias "
                f"is set; qkv_bias={self.qkv_bias}"
            )
        if self.norm_epsilon <= 0:
            raise ValueError(f"norm_epsilon={self.norm_epsilon} must be positive")
        for name, choices in (
            ("remat", get_args(Remat)),
            ("compute_dtype", get_args(DtypeName)),
            ("param_dtype", get_args(DtypeName)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {choices}")

    @property
    def head_shape(self) -> HeadShape:
        """What the attention mechanisms are built for."""
        return HeadShape(
            query_heads=self.query_heads,
            kv_heads=self.kv_heads,
            head_width=self.head_width,
            value_width=self.value_width or self.head_width,
            model_width=self.model_width,
        )

    def layer_attention(self, layer: int) -> MechanismConfig:
        """The mechanism config of one layer."""
        if layer in self.dense_layers:
            return Dense(implementation=getattr(self.attention, "implementation", "auto"))
        return dict(self.attention_overrides).get(layer, self.attention)

    @property
    def alignment(self) -> int:
        """Packed documents start at multiples of it: what all layers need."""
        return math.lcm(*(run.attention.alignment for run in self.alike_runs))

    @property
    def alike_runs(self) -> tuple[Run, ...]:
        """The layers, grouped into maximal runs with the same mechanism."""
        runs: list[Run] = []
        for layer in range(self.layers):
            attention = self.layer_attention(layer)
            if runs and runs[-1].attention == attention:
                runs[-1] = dataclasses.replace(runs[-1], count=runs[-1].count + 1)
            else:
                runs.append(Run(layer, 1, attention))
        return tuple(runs)

    @property
    def runs(self) -> tuple[Run, ...]:
        """How parameters are grouped: the alike runs if layers are scanned, else single layers."""
        if self.scan_layers:
            return self.alike_runs
        return tuple(Run(i, 1, self.layer_attention(i)) for i in range(self.layers))
