"""Learned compression of key blocks: phi(keys[i*d : i*d + l]) -> one compressed key (NSA, Eq. 7).

The l tokens of an entry are read as l/d consecutive *pieces* of d tokens. Every piece is projected
once for each place it can take inside an entry, and entries add up their pieces, so overlapping
entries never copy tokens.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

CompressionKind = Literal["mlp", "linear", "mean"]

FEW_ENTRIES = 4


class Compression(nnx.Module):
    """phi for one tensor (keys or values), separate per kv head.

    ``mlp``:    W_out silu(W_in flatten(x + position) + b_in) + b_out, hidden width 2 * width
    ``linear``: W_in flatten(x + position) + b_in
    ``mean``:   mean over the l tokens, no parameters

    ``position`` is the intra-block position embedding [l, K, H]. Differentiable in everything.
    """

    def __init__(
        self,
        kind: CompressionKind,
        *,
        block: int,
        stride: int,
        kv_heads: int,
        width: int,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
    ):
        self.kind = kind
        self.block = block
        self.stride = stride
        self.width = width
        if kind == "mean":
            return
        hidden = 2 * width if kind == "mlp" else width
        fan_in = block * width
        key = rngs.params
        self.position = nnx.Param(
            0.02 * jax.random.normal(key(), (block, kv_heads, width), param_dtype)
        )
        self.w_in = nnx.Param(
            jax.random.normal(key(), (kv_heads, block, width, hidden), param_dtype) * fan_in**-0.5
        )
        self.b_in = nnx.Param(jnp.zeros((kv_heads, hidden), param_dtype))
        if kind == "mlp":
            self.w_out = nnx.Param(
                jax.random.normal(key(), (kv_heads, hidden, width), param_dtype) * hidden**-0.5
            )
            self.b_out = nnx.Param(jnp.zeros((kv_heads, width), param_dtype))

    def initialize_mean(self) -> None:
        """Set the parameters so that phi is exactly the mean over the block.

        For the MLP this uses silu(z) - silu(-z) = z: the hidden layer holds +mean and -mean.
        """
        if self.kind == "mean":
            return
        eye = jnp.eye(self.width, dtype=self.w_in.dtype)
        mean = eye if self.kind == "linear" else jnp.concatenate([eye, -eye], axis=1)
        kv_heads = self.w_in.shape[0]
        self.position[...] = jnp.zeros_like(self.position[...])
        self.w_in[...] = jnp.broadcast_to(mean[None, None] / self.block, self.w_in.shape)
        self.b_in[...] = jnp.zeros_like(self.b_in[...])
        if self.kind == "mlp":
            back = jnp.concatenate([eye, -eye], axis=0)
            self.w_out[...] = jnp.broadcast_to(back[None], (kv_heads, *back.shape))
            self.b_out[...] = jnp.zeros_like(self.b_out[...])

    def __call__(self, pieces: Float[Array, "B M d K H"]) -> Float[Array, "B C K H"]:
        """All entries of ``M`` consecutive pieces: C = M - l/d + 1, entry i starts at piece i."""
        per_entry = self.block // self.stride
        entries = pieces.shape[1] - per_entry + 1
        if entries < 1:
            raise ValueError(
                f"{pieces.shape[1]} pieces of {self.stride} tokens hold no block of {self.block}"
            )
        if self.kind == "mean":
            means = jnp.mean(pieces, axis=2)
            parts = [means[:, c : c + entries] for c in range(per_entry)]
            return sum(parts[1:], start=parts[0]) / per_entry
        dtype = pieces.dtype
        w_in = self.w_in[...].astype(dtype)
        hidden = self.w_in.shape[-1]
        if entries <= FEW_ENTRIES:
            return self._few(pieces, entries)
        split = w_in.reshape(w_in.shape[0], per_entry, self.stride, self.width, hidden)
        position = self.position[...].astype(dtype)
        bias = self.b_in[...].astype(dtype) + jnp.einsum("lKH,KlHF->KF", position, w_in)
        total = bias[None, None]
        for c in range(per_entry):
            total = total + _project(pieces[:, c : c + entries], split[:, c])
        return self._output(total)

    def _few(self, pieces: Float[Array, "B M d K H"], entries: int) -> Float[Array, "B C K H"]:
        """The same for a few entries (decode): their tokens are copied, the weights stay put."""
        dtype = pieces.dtype
        B, _, d, K, H = pieces.shape
        per_entry = self.block // d
        parts = [pieces[:, c : c + entries] for c in range(per_entry)]
        blocks = jnp.stack(parts, axis=2).reshape(B, entries, self.block, K, H)
        blocks = blocks + self.position[...].astype(dtype)[None, None]
        total = _project(blocks, self.w_in[...].astype(dtype))
        return self._output(total + self.b_in[...].astype(dtype)[None, None])

    def _output(self, total: Float[Array, "B C K F"]) -> Float[Array, "B C K H"]:
        """The second layer, where there is one."""
        if self.kind == "linear":
            return total
        dtype = total.dtype
        out = jnp.einsum("BMKF,KFH->BMKH", jax.nn.silu(total), self.w_out[...].astype(dtype))
        return out + self.b_out[...].astype(dtype)[None, None]


def _project(
    blocks: Float[Array, "B M l K H"], weights: Float[Array, "K l H F"]
) -> Float[Array, "B M K F"]:
    """Flatten every block and apply its head's matrix, as one batched product over heads."""
    B, M, length, K, H = blocks.shape
    flat = jnp.moveaxis(blocks, 3, 0).reshape(K, B * M, length * H)
    product = jnp.matmul(flat, weights.reshape(K, length * H, -1))
    return jnp.moveaxis(product.reshape(K, B, M, -1), 0, 2)


def split_pieces(x: Shaped[Array, "B T *rest"], block: int, stride: int) -> Array:
    """Whole pieces of d tokens [B, M, d, ...], padded with zeros to at least one block."""
    tokens = x.shape[1]
    pieces = max(tokens // stride, block // stride)
    needed = pieces * stride
    x = jnp.pad(x, ((0, 0), (0, max(0, needed - tokens)), *((0, 0) for _ in x.shape[2:])))
    return x[:, :needed].reshape(x.shape[0], pieces, stride, *x.shape[2:])


def entry_count(tokens: int, block: int, stride: int) -> int:
    """C, the entries that ``tokens`` keys give: floor((T - l) / d) + 1, or 0."""
    return max(0, (tokens - block) // stride + 1)
