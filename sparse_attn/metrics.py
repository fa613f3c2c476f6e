"""How good a selection is, and how much it attends: measured on sampled rows against dense.

Everything here is O(rows * S) for a handful of rows and never differentiated.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparse_attn.documents import Rows
from sparse_attn.registry import MechanismConfig
from sparse_attn.selecting import selected_tokens
from sparse_attn.types import HeadShape, Selection

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


@dataclasses.dataclass(frozen=True)
class SampledRows:
    """Dense attention and the selection on a few evenly spread rows.

    ``p`` [B, r, K, G, S]: probabilities of dense attention. ``member`` [B, r, K, G, S]: whether the
    row's list holds the key. ``start``, ``index``, ``valid`` [B, r]: as in ``Rows``.
    """

    p: Float[Array, "B r K G S"]
    member: Bool[Array, "B r K G S"]
    start: Int[Array, "B r"]
    index: Int[Array, "B r"]
    valid: Bool[Array, "B r"]


def sampled_rows(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], selection: Selection, rows: Rows
) -> SampledRows:
    """What the figures of this module are made from: ``SAMPLED_ROWS`` rows, all heads, spread
    evenly over the valid ones of each sequence; ``valid`` is False for those that it lacks.
    """
    count = min(SAMPLED_ROWS, q.shape[1])
    # The i-th sampled row is the last of the first i / count valid ones, the last one included.
    upto = jnp.arange(1, count + 1)[None] * jnp.sum(rows.valid, axis=1)[:, None] // count
    valid = jnp.diff(upto, axis=1, prepend=0) > 0
    places = jnp.argsort(~rows.valid, axis=1, stable=True)
    sampled = jnp.take_along_axis(places, jnp.maximum(upto - 1, 0), axis=1)
    q = jnp.take_along_axis(q, sampled[:, :, None, None], axis=1)
    indices = jnp.take_along_axis(selection.indices, sampled[:, :, None, None], axis=1)
    start = jnp.take_along_axis(rows.start, sampled, axis=1)
    index = jnp.take_along_axis(rows.index, sampled, axis=1)
    p = dense_probabilities(q, k, start, index)
    B, r, K, G, S = p.shape
    member = selected_tokens(indices, selection.block_size, jnp.arange(S, dtype=jnp.int32))
    lists = member.shape[2]
    member = (
        member.reshape(B, r, K, G, S)
        if lists == K * G
        else jnp.broadcast_to(member[:, :, :, None, :], (B, r, K, G, S))
    )
    return SampledRows(p=p, member=member, start=start, index=index, valid=valid)


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
    return _quality(sampled_rows(q, k, selection, rows), v)


def _quality(sample: SampledRows, v: Float[Array, "B S K Hv"]) -> dict[str, Float[Array, ""]]:
    p, member = sample.p, sample.member
    kept = jnp.where(member, p, 0.0)
    mass = jnp.sum(kept, axis=-1)
    values = v.astype(p.dtype)
    dense = jnp.einsum("BrKGS,BSKH->BrKGH", p, values)
    sparse = jnp.einsum("BrKGS,BSKH->BrKGH", kept / jnp.maximum(mass, 1e-30)[..., None], values)
    norm = jnp.linalg.norm(dense, axis=-1)
    error = jnp.linalg.norm(sparse - dense, axis=-1) / jnp.where(norm > 0, norm, 1.0)
    weight = jnp.broadcast_to(sample.valid[:, :, None, None], mass.shape)
    return {
        "recall_top32": _mean(top_recall(p, member), weight),
        "captured_mass": _mean(mass, weight),
        "output_error": _mean(error, weight),
        "output_error_p95": jnp.nan_to_num(
            jnp.nanpercentile(jnp.where(weight, error, jnp.nan), 95)
        ).astype(jnp.float32),
    }


def top_recall(
    p: Float[Array, "*rows S"], member: Bool[Array, "*rows S"], top: int = TOP
) -> Float[Array, "*rows"]:
    """Share of the ``top`` most probable keys (of those with any probability) that are members."""
    best, where_best = jax.lax.top_k(p, min(top, p.shape[-1]))
    hit = jnp.take_along_axis(member, where_best, axis=-1) & (best > 0)
    return jnp.sum(hit, axis=-1) / jnp.maximum(jnp.sum(best > 0, axis=-1), 1)


def _mean(x: Array, weight: Bool[Array, "..."]) -> Float[Array, ""]:
    count = jnp.maximum(jnp.sum(weight), 1)
    return (jnp.sum(jnp.where(weight, x, 0.0)) / count).astype(jnp.float32)


def _beyond(sample: SampledRows, sinks: int, recent: int) -> Bool[Array, "B r 1 1 S"]:
    """The causal keys that are neither among the first ``sinks`` nor the last ``recent``."""
    s = jnp.arange(sample.p.shape[-1], dtype=jnp.int32)[None, None, :]
    first, last = sample.start[..., None] + sinks, sample.index[..., None] - recent
    return ((s >= first) & (s <= last))[:, :, None, None, :]


def head_recall(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    selection: Selection,
    rows: Rows,
    *,
    sinks: int = 0,
    recent: int = 0,
) -> Float[Array, " N"]:
    """Recall of the 32 most attended keys by query head, sinks and recent keys left out.

    A few heads decide whether a model finds a needle; a mean over heads hides them. Mean over
    sampled rows that have a key to find.
    """
    sample = sampled_rows(q, k, selection, rows)
    p = jnp.where(_beyond(sample, sinks, recent), sample.p, 0.0)
    weight = jnp.any(p > 0, axis=-1) & sample.valid[:, :, None, None]
    recall = jnp.where(weight, top_recall(p, sample.member), 0.0)
    count = jnp.maximum(jnp.sum(weight, axis=(0, 1)), 1)
    return (jnp.sum(recall, axis=(0, 1)) / count).reshape(-1).astype(jnp.float32)


def measure(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    selection: Selection,
    rows: Rows,
    *,
    config: MechanismConfig,
    shape: HeadShape,
    sinks: int = 0,
    recent: int = 0,
    window: int | None = None,
    element_bits: int = 16,
) -> dict[str, Float[Array, ""]]:
    """All figures of a selection: quality, four densities, and what the selector keeps.

    Args:
      q: rotated queries.
      k: the rotated keys that the selection is about.
      v: their values.
      selection: the lists of all rows.
      rows: where the rows stand.
      config: says what the selector keeps and reads (``auxiliary_bits``, ``selector_bytes``,
        ``selector_flops``).
      shape: sizes of the heads.
      sinks: first keys that are selected anyway, left out of ``recall_beyond``.
      recent: last keys that are, likewise.
      window: keys of a window branch beside the lists. With several K/V branches its keys are
        fetched beside those of the lists, with one they are the same keys.
      element_bits: width of a cached number.

    Returns:
      float32 scalars: those of :func:`selection_quality`; ``recall_beyond``, the recall of the 32
      most attended keys without sinks and recent ones; ``density``, attended over causal pairs;
      ``fetched_density``, keys fetched per kv head (the union over its query heads) over causal
      keys; ``bytes_density``, bytes of fetched K and V and of what the selector reads over the
      bytes of dense attention; ``flops_density``, operations with the selector over those of dense
      attention (projections left out in both); ``auxiliary_bits`` a token. Densities but the first
      are taken on sampled rows, as of a step that decodes each of them.
    """
    sample = sampled_rows(q, k, selection, rows)
    p, valid = sample.p, sample.valid
    K, G, S = p.shape[2:]
    measured = _quality(sample, v)
    beyond = jnp.where(_beyond(sample, sinks, recent), p, 0.0)
    found = top_recall(beyond, sample.member)
    weight = jnp.any(beyond > 0, axis=-1) & valid[:, :, None, None]
    measured["recall_beyond"] = _mean(found, weight)

    s = jnp.arange(S, dtype=jnp.int32)[None, None, :]
    causal = (s >= sample.start[..., None]) & (s <= sample.index[..., None])
    in_window = jnp.zeros_like(causal)
    if window is not None:
        in_window = causal & (s > sample.index[..., None] - window)
    causal, in_window = (x[:, :, None, None, :] for x in (causal, in_window))
    listed = sample.member & causal
    seen = jnp.sum(causal, axis=-1)[:, :, 0, 0].astype(jnp.float32)
    near = jnp.sum(in_window, axis=-1, dtype=jnp.float32)
    if config.kv_branches == 1:
        fetched = jnp.sum(jnp.any(listed | in_window, axis=3), axis=-1, dtype=jnp.float32)
    else:
        fetched = jnp.sum(jnp.any(listed, axis=3), axis=-1, dtype=jnp.float32) + near[..., 0]
    attended = jnp.sum(listed, axis=-1, dtype=jnp.float32) + near

    def share(x: Array, of: float) -> Float[Array, ""]:
        whole = jnp.sum(jnp.where(valid, seen, 0.0)) * of
        return jnp.sum(jnp.where(valid, x, 0.0)) / jnp.maximum(whole, 1.0)

    pair = shape.head_width + shape.value_width
    read = jnp.asarray(config.selector_bytes(shape, seen.astype(jnp.int32), element_bits))
    spent = jnp.asarray(config.selector_flops(shape, seen.astype(jnp.int32)))
    key_bytes = pair * element_bits / 8
    keys_fetched = jnp.sum(fetched, axis=2)
    pairs_attended = jnp.sum(attended, axis=(2, 3))
    densities = {
        "density": attended_density(selection, rows, window=window),
        "fetched_density": share(keys_fetched, K),
        "bytes_density": share(keys_fetched * key_bytes + read, K * key_bytes),
        "flops_density": share(pairs_attended * 2 * pair + spent, K * G * 2 * pair),
        "auxiliary_bits": jnp.asarray(config.auxiliary_bits(shape, element_bits)),
    }
    return measured | {name: x.astype(jnp.float32) for name, x in densities.items()}


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
