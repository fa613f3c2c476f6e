"""One decoder layer: RMSNorm, grouped-query attention around a mechanism, SwiGLU."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.config import ModelConfig
from sparse_attn.parallel import SequenceParallel
from sparse_attn.parallel import call as parallel_call
from sparse_attn.registry import MechanismConfig, build_mechanism
from sparse_attn.types import Attend, Aux, Heads, Rope


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float, dtype: Any) -> nnx.Param:
    """A parameter drawn from N(0, scale^2)."""
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape, dtype))


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + epsilon) * scale`` over the last axis; statistics in float32.

    ``scale`` has ``shape``: its last axis is normalised, axes before it are the leading ones of x.
    """

    def __init__(self, shape: tuple[int, ...], epsilon: float, dtype: Any):
        self.scale = nnx.Param(jnp.ones(shape, dtype))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        power = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        scale = self.scale[...].astype(wide.dtype)
        between = (1,) * (wide.ndim - scale.ndim)
        scale = scale.reshape(*scale.shape[:-1], *between, scale.shape[-1])
        return (wide * jax.lax.rsqrt(power + self.epsilon) * scale).astype(x.dtype)


class Attention(nnx.Module):
    """Projections around a mechanism; R key-value branches as the mechanism asks.

    Parameters ``q`` [D, N, H], ``k`` [R, D, K, H], ``v`` [R, D, K, Hv], ``o`` [N, Hv, D], with
    ``qkv_bias`` ``q_bias`` [N, H], ``k_bias`` [R, K, H], ``v_bias`` [R, K, Hv], with
    ``query_key_norm`` ``q_norm`` [H] and ``k_norm`` [R, H].
    """

    def __init__(self, config: ModelConfig, attention: MechanismConfig, *, rngs: nnx.Rngs):
        shape = config.head_shape
        N, K, D = shape.query_heads, shape.kv_heads, shape.model_width
        H, Hv = shape.head_width, shape.value_width
        dtype = jnp.dtype(config.param_dtype)
        self.config = config
        self.mechanism = build_mechanism(attention, shape, rngs=rngs, param_dtype=dtype)
        R = attention.kv_branches
        self.q = normal(rngs, (D, N, H), D**-0.5, dtype)
        self.k = normal(rngs, (R, D, K, H), D**-0.5, dtype)
        self.v = normal(rngs, (R, D, K, Hv), D**-0.5, dtype)
        self.o = normal(rngs, (N, Hv, D), (N * Hv * 2 * config.layers) ** -0.5, dtype)
        if config.qkv_bias:
            self.q_bias = normal(rngs, (N, H), config.qkv_bias_scale, dtype)
            self.k_bias = normal(rngs, (R, K, H), config.qkv_bias_scale, dtype)
            self.v_bias = normal(rngs, (R, K, Hv), config.qkv_bias_scale, dtype)
        if config.query_key_norm:
            self.q_norm = RMSNorm((H,), config.norm_epsilon, dtype)
            self.k_norm = RMSNorm((R, H), config.norm_epsilon, dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        cache: Any = None,
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        attend: Attend = "sparse",
        inspect: bool = False,
        parallel: SequenceParallel | None = None,
    ) -> tuple[Float[Array, "B T D"], Any, Aux]:
        q, k, v = self.heads(x)
        mechanism: Any = self.mechanism
        if parallel is not None:
            mechanism = partial(parallel_call, mechanism, parallel=parallel)
        out, cache, aux = mechanism(
            Heads(q=q, k=k, v=v, x=x, rope=rope),
            cache,
            positions=positions,
            segment_ids=segment_ids,
            attend=attend,
            inspect=inspect,
        )
        o = self.o[...].astype(x.dtype)
        # Heads and width as one dimension: contracted as two, XLA's CPU backend takes ten times as
        # long for a single token.
        out = out.reshape(*out.shape[:2], -1)
        return jnp.einsum("BTE,ED->BTD", out, o.reshape(-1, o.shape[2])), cache, aux

    def heads(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "R B T K H"], Float[Array, "R B T K Hv"]]:
        """Queries, keys and values, not rotated yet."""
        dtype = x.dtype
        q = jnp.einsum("BTD,DNH->BTNH", x, self.q[...].astype(dtype))
        k = _branches(x, self.k[...].astype(dtype))
        v = _branches(x, self.v[...].astype(dtype))
        if self.config.qkv_bias:
            q = q + self.q_bias[...].astype(dtype)[None, None]
            k = k + self.k_bias[...].astype(dtype)[:, None, None]
            v = v + self.v_bias[...].astype(dtype)[:, None, None]
        if self.config.query_key_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


def _branches(
    x: Float[Array, "B T D"], weight: Float[Array, "R D K H"]
) -> Float[Array, "R B T K H"]:
    """Keys or values of every branch; a single one by a plain product, fast for a single token."""
    R, D, K, H = weight.shape
    if R > 1:
        return jnp.einsum("BTD,RDKH->RBTKH", x, weight)
    flat = jnp.einsum("BTD,DE->BTE", x, weight[0].reshape(D, K * H))
    return flat.reshape(1, *x.shape[:2], K, H)


class SwiGLU(nnx.Module):
    """``(silu(x gate) * (x up)) down`` with weights [D, F], [D, F], [F, D] (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, F = config.model_width, config.mlp_width
        dtype = jnp.dtype(config.param_dtype)
        self.gate = normal(rngs, (D, F), D**-0.5, dtype)
        self.up = normal(rngs, (D, F), D**-0.5, dtype)
        self.down = normal(rngs, (F, D), (F * 2 * config.layers) ** -0.5, dtype)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        dtype = x.dtype
        gate = jnp.einsum("BTD,DF->BTF", x, self.gate[...].astype(dtype))
        up = jnp.einsum("BTD,DF->BTF", x, self.up[...].astype(dtype))
        return jnp.einsum("BTF,FD->BTD", jax.nn.silu(gate) * up, self.down[...].astype(dtype))


class Layer(nnx.Module):
    """``x += m attention(norm(x)); x += m mlp(norm(x))`` with m the residual multiplier."""

    def __init__(self, config: ModelConfig, attention: MechanismConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.param_dtype)
        self.attention_norm = RMSNorm((config.model_width,), config.norm_epsilon, dtype)
        self.attention = Attention(config, attention, rngs=rngs)
        self.mlp_norm = RMSNorm((config.model_width,), config.norm_epsilon, dtype)
        self.mlp = SwiGLU(config, rngs=rngs)
        self.multiplier = config.residual_multiplier

    def __call__(
        self, x: Float[Array, "B T D"], rope: Rope, cache: Any = None, **call: Any
    ) -> tuple[Float[Array, "B T D"], Any, Aux]:
        """One layer; ``call`` holds the keyword arguments of :class:`Attention`."""
        parallel, training = call.get("parallel"), cache is None
        out, cache, aux = self.attention(self.attention_norm(x), rope, cache, **call)
        x = x + self._scaled(out)
        x = x + self._scaled(self.mlp(self.mlp_norm(x)))
        if parallel is not None and training:
            x = parallel.constrain(x)
        return x, cache, aux

    def _scaled(self, branch: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if self.multiplier == 1.0:
            return branch
        return branch * jnp.asarray(self.multiplier, branch.dtype)
