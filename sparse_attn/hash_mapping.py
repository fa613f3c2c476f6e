"""phi of HashAttention: from a rotated query or key to the numbers whose signs are its code."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from kernels_pallas.common import accumulation_dtype

MappingKind = Literal["mlp", "linear"]

INITIAL_NOISE = 0.1
"""Size of what is added to the projection that an MLP begins as, relative to a random MLP."""


class Mapping(nnx.Module):
    """phi [.., H] -> [.., b], one for each of J lists, in at least float32.

        mlp:     phi(x) = W_out silu(W_middle silu(W_in x + b_in) + b_middle) + b_out
        linear:  phi(x) = W_out x + b_out

    Parameters ``w_in`` [J, H, F], ``w_middle`` [J, F, F], ``w_out`` [J, F or H, b] and
    ``in_bias`` [J, F], ``middle_bias`` [J, F], ``out_bias`` [J, b]; F is the hidden width.

    At first phi(x) is a random projection of H^(-1/4) x (so that products are logits), an MLP's but
    for some noise: silu(a) - silu(-a) = a, so that pairs of hidden units hand numbers on. Maps with
    the same ``projection`` key begin as the same projection: their codes tell the angle between a
    query and a key (SimHash, Charikar 2002) before anything is learnt.
    """

    def __init__(
        self,
        kind: MappingKind,
        *,
        lists: int,
        width: int,
        hidden: int,
        bits: int,
        projection: Array,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
    ):
        def orthogonal(
            key: Array, into: int, out: int, scale: float = 1.0
        ) -> Float[Array, "J into out"]:
            one = jax.nn.initializers.orthogonal(scale)
            keys = jax.random.split(key, lists)
            return jax.vmap(lambda key: one(key, (into, out), jnp.float32))(keys)

        def noisy(matrix: Float[Array, "J into out"]) -> nnx.Param:
            noise = jax.random.normal(rngs.params(), matrix.shape, jnp.float32)
            size = INITIAL_NOISE * matrix.shape[1] ** -0.5
            return nnx.Param((matrix + size * noise).astype(param_dtype))

        def bias(out: int) -> nnx.Param:
            return nnx.Param(jnp.zeros((lists, out), param_dtype))

        self.kind = kind
        first, last = jax.random.split(projection)
        if kind == "mlp":
            # Pairs of units hold a number and its negative; units that are left begin as noise.
            pairs = min(width, hidden // 2)
            free = (0, hidden - 2 * pairs)
            signs = jnp.array([1.0, -1.0], jnp.float32)
            inner = jnp.kron(jnp.outer(signs, signs), jnp.eye(pairs, dtype=jnp.float32))
            into = orthogonal(first, width, pairs, scale=width**-0.25)
            out = orthogonal(last, pairs, bits)
            self.w_in = noisy(jnp.pad(jnp.kron(signs, into), ((0, 0), (0, 0), free)))
            self.in_bias = bias(hidden)
            self.w_middle = noisy(jnp.tile(jnp.pad(inner, (free, free)), (lists, 1, 1)))
            self.middle_bias = bias(hidden)
            self.w_out = noisy(jnp.pad(jnp.kron(signs[:, None], out), ((0, 0), free, (0, 0))))
        else:
            self.w_out = nnx.Param(orthogonal(last, width, bits, width**-0.25).astype(param_dtype))
        self.out_bias = bias(bits)

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


def level_bits(
    u: Float[Array, "*rest E b"], levels: int, temperature: float = 1.0
) -> Bool[Array, "*rest EL b"]:
    """Codes of a query whose tanh(u / temperature) is rounded to one of L evenly spaced values.

    L - 1 codes, [u > t] with L - 1 thresholds t; the sum of their signs is (L - 1) times the
    rounded value, in {-1, ..., 1}. L = 2: the code [u > 0].
    """
    codes = levels - 1
    edges = [temperature * math.atanh((2 * i + 1 - codes) / codes) for i in range(codes)]
    bits = jnp.stack([u > edge for edge in edges], axis=-2)
    return bits.reshape(*u.shape[:-2], u.shape[-2] * codes, u.shape[-1])
