"""How good a selection is, and how much it attends: measured on sampled rows against dense.

Everything here is O(rows * S) for a handful of rows and never differentiated.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparse_attn.documents import Rows
from sparse_attn.selecting import selected_tokens
from sparse_attn.types import Selection

SAMPLED_ROWS = 8
TOP = 32


def sample_rows(tokens: int, count: int) -> Int[Array, " r"]:
    """``count`` row numbers spread evenly over [0, T), the last row included."""
    count = min(count, tokens)
    return ((jnp.arange(1, count + 1) * tokens) // count - 1).astype(jnp.int32)


def dense_probabilities(
    q: Float[Array, "B r N H"],
    k: Float[Array, "B S K H"],
    start: Int[Array, "B r"],
    index: Int[Array, "B r"],
    scale: float | None = None,
) -> Float[Array, "B r K G S"]:
    """softmax(q . k * scale) over keys start..index for a few rows; zero for empty rows."""
    B, r, N, H = q.shape
    S, K = k.shape[1:3]
    scale = H**-0.5 if scale is None else scale
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(B, r, K, N // K, H).astype(dtype)
    logits = jnp.einsum("BrKGH,BSKH->BrKGS", grouped, k.astype(dtype)) * scale
    s = jnp.arange(S, dtype=jnp.int32)[None, None, :]
    visible = ((s >= start[..., None]) & (s <= index[..., None]))[:, :, None, None, :]
    logits = jnp.where(visible, logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True)
    p = jnp.where(visible, jnp.exp(logits - jnp.where(jnp.isneginf(top), 0.0, top)), 0.0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    return p / jnp.where(total > 0, total, 1.0)


def selection_quality(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    selection: Selection,
    rows: Rows,
) -> dict[str, Float[Array, ""]]:
    """Recall and captured mass of a selection against dense attention over the same K/V.

    Returns scalars over evenly sampled valid rows and all heads: ``recall_top32`` (share of the 32
    most attended keys that are selected), ``captured_mass`` (softmax mass on selected keys),
    ``output_error`` and ``output_error_p95`` (relative L2 error of the output, mean and 95th
    percentile).
    """
    sampled = sample_rows(q.shape[1], SAMPLED_ROWS)
    q, indices = q[:, sampled], selection.indices[:, sampled]
    start, index, valid = rows.start[:, sampled], rows.index[:, sampled], rows.valid[:, sampled]
    p = dense_probabilities(q, k, start, index)
    B, r, K, G, S = p.shape
    member = selected_tokens(indices, selection.block_size, jnp.arange(S, dtype=jnp.int32))
    lists = member.shape[2]
    member = (
        member.reshape(B, r, K, G, S)
        if lists == K * G
        else jnp.broadcast_to(member[:, :, :, None, :], (B, r, K, G, S))
    )
    kept = jnp.where(member, p, 0.0)
    mass = jnp.sum(kept, axis=-1)
    best, where_best = jax.lax.top_k(p, min(TOP, S))
    hit = jnp.take_along_axis(member, where_best, axis=-1) & (best > 0)
    recall = jnp.sum(hit, axis=-1) / jnp.maximum(jnp.sum(best > 0, axis=-1), 1)
    values = v.astype(p.dtype)
    dense = jnp.einsum("BrKGS,BSKH->BrKGH", p, values)
    sparse = jnp.einsum("BrKGS,BSKH->BrKGH", kept / jnp.maximum(mass, 1e-30)[..., None], values)
    norm = jnp.linalg.norm(dense, axis=-1)
    error = jnp.linalg.norm(sparse - dense, axis=-1) / jnp.where(norm > 0, norm, 1.0)
    weight = jnp.broadcast_to(valid[:, :, None, None], mass.shape)
    count = jnp.maximum(jnp.sum(weight), 1)

    def mean(x: Array) -> Array:
        return (jnp.sum(jnp.where(weight, x, 0.0)) / count).astype(jnp.float32)

    return {
        "recall_top32": mean(recall),
        "captured_mass": mean(mass),
        "output_error": mean(error),
        "output_error_p95": jnp.nan_to_num(
            jnp.nanpercentile(jnp.where(weight, error, jnp.nan), 95)
        ).astype(jnp.float32),
    }


def attended_density(
    selection: Selection, rows: Rows, window: int | None = None
) -> Float[Array, ""]:
    """Attended over causal token pairs: keys in the listed blocks or in the last ``window``.

    A pair that two branches attend counts once. Mean over lists (kv heads) and sequences.
    """
    size = selection.block_size
    index, start = rows.index[:, :, None, None], rows.start[:, :, None, None]
    begin = selection.indices * size
    listed = selection.indices >= 0
    low, high = jnp.maximum(begin, start), jnp.minimum(begin + size - 1, index)
    attended = jnp.sum(jnp.where(listed, jnp.maximum(high - low + 1, 0), 0), axis=-1)
    causal = jnp.where(rows.valid, rows.index - rows.start + 1, 0)
    if window is not None:
        first = jnp.maximum(start, index - window + 1)
        overlap = jnp.where(listed, jnp.maximum(high - jnp.maximum(low, first) + 1, 0), 0)
        in_window = jnp.minimum(causal, window)
        attended = attended + in_window[:, :, None] - jnp.sum(overlap, axis=-1)
    attended = jnp.where(rows.valid[:, :, None], attended, 0)
    lists = attended.shape[-1]
    # Ratios of float sums: the pair counts of a long batch do not fit into int32.
    pairs = jnp.sum(causal.astype(jnp.float32)) * lists
    return jnp.sum(attended.astype(jnp.float32)) / jnp.maximum(pairs, 1.0)
