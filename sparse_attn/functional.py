"""Sparse attention as plain functions, for people who use none of our modules."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels_pallas.ranged import ranged_attention
from sparse_attn.compression import Compression, split_pieces
from sparse_attn.documents import place_rows
from sparse_attn.nsa import NSA
from sparse_attn.nsa_branches import compressed_branch, selected_branch, window_branch
from sparse_attn.types import Implementation

__all__ = ["dense_attention", "mean_compress", "nsa_attention"]


def dense_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "B T N Hv"]:
    """Causal softmax attention, over all earlier tokens of the document or the last ``window``.

    ``segment_ids``: 0 is padding (output 0), documents are contiguous. ``scale`` defaults to
    H**-0.5. Differentiable in q, k, v. Memory is linear in T.

    Raises:
      ValueError: on shapes that do not fit.
    """
    rows = place_rows(*q.shape[:2], length=None, positions=None, segment_ids=segment_ids)
    start = rows.start
    if window is not None:
        if window < 1:
            raise ValueError(f"{window=} must be at least 1, or None")
        start = jnp.maximum(start, rows.index - window + 1)
    return ranged_attention(
        q, k, v, start, rows.index + 1, scale=scale, implementation=implementation
    ).out


def mean_compress(
    x: Float[Array, "B T K H"], *, block: int = 32, stride: int = 16
) -> Float[Array, "B C K H"]:
    """Means of x[i*d : i*d + l], C = floor((T - l)/d) + 1 (at least one entry, zero-padded)."""
    if block % stride:
        raise ValueError(f"{stride=} must divide {block=}")
    phi = Compression(
        "mean", block=block, stride=stride, kv_heads=x.shape[2], width=x.shape[3], rngs=nnx.Rngs(0)
    )
    return phi(split_pieces(x, block, stride))


def nsa_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"] | Float[Array, "3 B T K H"],
    v: Float[Array, "B T K Hv"] | Float[Array, "3 B T K Hv"],
    gates: Float[Array, "B T N 3"],
    *,
    compressed: tuple[Float[Array, "B C K H"], Float[Array, "B C K Hv"]] | None = None,
    config: NSA | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N Hv"]:
    """Native Sparse Attention (arXiv 2502.11089) on ready-made heads.

    o = g_cmp o_cmp + g_slc o_slc + g_win o_win; see :mod:`sparse_attn.nsa`.

    Args:
      q: queries, rotated.
      k: keys, rotated; one set, or three stacked for (compressed, selected, window).
      v: values, likewise.
      gates: weights of (compressed, selected, window) per token and head, usually in [0, 1].
      compressed: compressed keys and values, entry i standing for tokens [i*d, i*d + l); the
        means over the tokens if not given.
      config: block sizes, budgets, window, implementation; ``compression``, ``gates`` and
        ``shared_kv`` are not looked at.
      segment_ids: 0 is padding; documents are contiguous and start at multiples of
        ``config.selection_block``.

    Differentiable in everything but the block lists. Memory is linear in T.

    Raises:
      ValueError: on shapes that do not fit, or a number of K/V sets other than 1 or 3.
    """
    config = NSA() if config is None else config
    if config.selector_gradient not in ("through_output", "none"):
        raise ValueError(
            f"selector_gradient={config.selector_gradient!r} needs the NSA module; "
            'use "through_output" or "none" with the function'
        )
    if k.ndim != v.ndim or k.ndim not in (4, 5) or (k.ndim == 5 and len(k) != 3):
        raise ValueError(
            f"k.shape={k.shape} and v.shape={v.shape} must both be [B, T, K, .] or [3, B, T, K, .]"
        )
    batch, tokens = q.shape[:2]
    if gates.shape != (batch, tokens, q.shape[2], 3):
        raise ValueError(f"gates.shape={gates.shape} must be {(batch, tokens, q.shape[2], 3)}")
    keys, values = (k, v) if k.ndim == 5 else ((k, k, k), (v, v, v))
    rows = place_rows(
        batch,
        tokens,
        length=None,
        positions=None,
        segment_ids=segment_ids,
        alignment=config.alignment,
    )
    if compressed is None:
        sizes = {"block": config.compression_block, "stride": config.compression_stride}
        compressed = mean_compress(keys[0], **sizes), mean_compress(values[0], **sizes)
    scores = compressed_branch(config, q, *compressed, rows)
    selected = selected_branch(config, q, keys[1], values[1], scores.indices, rows)
    window = window_branch(config, q, keys[2], values[2], rows)
    g_cmp, g_slc, g_win = jnp.split(gates, 3, axis=-1)
    return g_cmp * scores.out + g_slc * selected.out + g_win * window.out
