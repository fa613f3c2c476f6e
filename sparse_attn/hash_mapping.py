"""phi of HashAttention: from a rotated query or key to the numbers whose signs are its code."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas.common import accumulation_dtype

MappingKind = Literal["mlp", "linear"]


class Mapping(nnx.Module):
    """phi [.., H] -> [.., b], one for each of J lists, in at least float32.

        mlp:     phi(x) = W_out silu(W_middle silu(W_in x + b_in) + b_middle) + b_out
        linear:  phi(x) = W_out x + b_out

    Parameters ``w_in`` [J, H, F], ``w_middle`` [J, F, F], ``w_out`` [J, F or H, b] and
    ``in_bias`` [J, F], ``middle_bias`` [J, F], ``out_bias`` [J, b]; F is the hidden width.
    """

    def __init__(
        self,
        kind: MappingKind,
        *,
        lists: int,
        width: int,
        hidden: int,
        bits: int,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
    ):
        def matrix(into: int, out: int) -> nnx.Param:
            draw = jax.random.normal(rngs.params(), (lists, into, out), param_dtype)
            return nnx.Param(into**-0.5 * draw)

        def bias(out: int) -> nnx.Param:
            return nnx.Param(jnp.zeros((lists, out), param_dtype))

        self.kind = kind
        if kind == "mlp":
            self.w_in, self.in_bias = matrix(width, hidden), bias(hidden)
            self.w_middle, self.middle_bias = matrix(hidden, hidden), bias(hidden)
        self.w_out, self.out_bias = matrix(hidden if kind == "mlp" else width, bits), bias(bits)

    def __call__(self, x: Float[Array, "B T J E H"]) -> Float[Array, "B T J E b"]:
        """phi of E vectors a list (the query heads that share it, or one key)."""
        B, T, J, E, H = x.shape
        dtype = accumulation_dtype(x.dtype)
        y = jnp.moveaxis(x, 2, 0).reshape(J, B * T * E, H).astype(dtype)

        def affine(y: Array, weight: nnx.Param, bias: nnx.Param) -> Array:
            return jnp.matmul(y, weight[...].astype(dtype)) + bias[...].astype(dtype)[:, None]

        if self.kind == "mlp":
            y = jax.nn.silu(affine(y, self.w_in, self.in_bias))
            y = jax.nn.silu(affine(y, self.w_middle, self.middle_bias))
        y = affine(y, self.w_out, self.out_bias)
        return jnp.moveaxis(y.reshape(J, B, T, E, -1), 0, 2)
