"""Attention over token-level selections of whole sequences, a chunk of query rows at a time.

Lists of tokens for all rows would take O(T * S / 32) memory and masks O(T * S). Here a selector
says which keys a *chunk* of rows attends, the chunk attends them, and the backward pass selects
again: O(chunk * S) memory, products of dense attention. Decode steps gather their few tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas.common import AttentionOutput, accumulation_dtype
from sparse_attn.types import Implementation

CHUNK_ELEMENTS = 2**21
"""Logits [B, N, chunk, S] that are alive at a time."""


def rows_per_chunk(rows: int, per_row: int) -> int:
    """Query rows of a chunk, if each takes ``per_row`` logits: at least 8, at most all."""
    return min(rows, max(8, CHUNK_ELEMENTS // max(per_row, 1)))


def map_rows(function: Callable[[Any], Any], inputs: Any, *, chunk: int, axis_out: int = 1) -> Any:
    """``function`` over chunks of the axis T of a pytree of [B, T, ...]; results are put together.

    The last chunk is padded with zeros and its results are cut off. Forward values of one chunk
    exist at a time, also in the backward pass, which calls ``function`` again.
    """
    rows = jax.tree.leaves(inputs)[0].shape[1]
    if rows <= chunk:
        return function(inputs)
    pad = -rows % chunk

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pad), *((0, 0) for _ in x.shape[2:])))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, axis_out)
        x = x.reshape(*x.shape[:axis_out], rows + pad, *x.shape[axis_out + 2 :])
        return jax.lax.slice_in_dim(x, 0, rows, axis=axis_out)

    mapped = jax.lax.map(jax.checkpoint(function), jax.tree.map(split, inputs))
    return jax.tree.map(join, mapped)


def masked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    member: Callable[[Any], Bool[Array, "B c J S"]],
    inputs: Any,
    *,
    live: Bool[Array, "B S"] | None = None,
    scale: float | None = None,
    chunk: int | None = None,
    implementation: Implementation = "auto",
) -> AttentionOutput:
    """Softmax attention of every row over the keys that ``member`` names.

    Args:
      q: queries.
      k: keys; query head n reads kv head n // (N/K).
      v: values.
      member: takes the rows [B, c, ...] of ``inputs`` and says which keys each attends, with J in
        1, K, N lists a row. A pure function, not differentiated, called again in the backward pass.
        All-zero rows, which pad the last chunk, may answer anything.
      inputs: pytree of arrays [B, T, ...] that ``member`` decides by.
      live: keys that hold numbers; the others may hold anything, NaN included, and are attended by
        nobody.
      scale: logit scale, default H**-0.5.
      chunk: rows a chunk; by default as many as keep the logits near 8 MiB.
      implementation: ``"reference"`` takes all rows at once.

    Returns:
      ``(out, lse)``, differentiable in q, k and v; a row without keys is (0, -inf).
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    G = N // K
    scale = H**-0.5 if scale is None else scale
    dtype = accumulation_dtype(q.dtype)
    if live is not None:
        k, v = (jnp.where(live[:, :, None, None], x, 0) for x in (k, v))
    keys = jnp.transpose(k, (0, 2, 3, 1)).astype(dtype)
    values = jnp.transpose(v, (0, 2, 1, 3)).astype(dtype)

    def attend(rows: tuple[Array, Any]) -> tuple[Array, Array]:
        q, inputs = rows
        c = q.shape[1]
        mask = jax.lax.stop_gradient(member(inputs))
        if live is not None:
            mask = mask & live[:, None, None, :]
        lists = mask.shape[2]
        mask = jnp.moveaxis(mask, 1, 2)  # [B, J, c, S]
        heads = (1, 1) if lists == 1 else (K, 1) if lists == K and G > 1 else (K, G)
        mask = mask.reshape(B, *heads, c, S)
        grouped = jnp.transpose(q.reshape(B, c, K, G, H), (0, 2, 3, 1, 4)).astype(dtype) * scale
        logits = jnp.matmul(grouped.reshape(B, K, G * c, H), keys).reshape(B, K, G, c, S)
        logits = jnp.where(mask, logits, -jnp.inf)
        top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        top = jnp.where(jnp.isneginf(top), 0.0, top)
        weights = jnp.where(mask, jnp.exp(jnp.where(mask, logits, 0.0) - top), 0.0)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        seen = total > 0
        safe = jnp.where(seen, total, 1.0)
        out = jnp.matmul(weights.reshape(B, K, G * c, S), values).reshape(B, K, G, c, -1) / safe
        lse = jnp.where(seen, jnp.log(safe) + top, -jnp.inf)[..., 0]
        out = jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(B, c, N, -1)
        return out.astype(q.dtype), jnp.transpose(lse, (0, 3, 1, 2)).reshape(B, c, N)

    if chunk is None:
        chunk = T if implementation == "reference" else rows_per_chunk(T, B * N * S)
    return AttentionOutput(*map_rows(attend, (q, inputs), chunk=chunk))
