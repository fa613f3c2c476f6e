"""Double Sparsity (arXiv 2408.07092): logits from a few label channels chosen offline."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparse_attn.cache import write_rows
from sparse_attn.documents import Rows
from sparse_attn.policies.module import State, register_policy, transposed
from sparse_attn.policies.rules import Queries, logits
from sparse_attn.policies.scored import ScoredPolicy
from sparse_attn.types import HeadShape

Channels = tuple[tuple[int, ...], ...]
Ranges = tuple[tuple[tuple[float, float], ...], ...]


@register_policy("double_sparsity")
@dataclasses.dataclass(frozen=True)
class DoubleSparsity(ScoredPolicy):
    """score[s] = sum over label channels d of q_d k_sd / sqrt(H), on rotated q and k.

    The labels of a key are kept apart. The paper chooses channels per query head; here the heads of
    a group share them, because the labels are stored once per kv head.

    Attributes:
      channels: channel numbers for every kv head, as many for each, best those that
        calibrate_channels finds. Empty: ``width`` channels spread evenly over the head, the same
        for all heads.
      width: channels of a head where none are given.
      label_bits: bits of a label, rounded between the smallest and largest label of the key and
        head as the paper's 4-bit labels are; None keeps them as they are.
      ranges: (low, high) of every one of ``channels``, best those that calibrate_ranges finds;
        labels are then rounded between them, and no key keeps a range of its own.

    Raises:
      ValueError: on channels that repeat, are negative or differ in number, on ranges that do not
        fit them, or on sizes below 1.
    """

    channels: Channels = ()
    width: int = 16
    label_bits: int | None = None
    ranges: Ranges = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1:
            raise ValueError(f"width={self.width} must be at least 1 channel")
        if self.label_bits is not None and not 1 <= self.label_bits <= 8:
            raise ValueError(
                f"label_bits={self.label_bits} must be 1 to 8, or None for labels as they are"
            )
        if len({len(head) for head in self.channels}) > 1 or () in self.channels:
            raise ValueError(f"channels={self.channels} must name as many channels for every head")
        for head in self.channels:
            if len(set(head)) != len(head) or min(head) < 0:
                raise ValueError(f"channels={self.channels}: {head} must be different and >= 0")
        if not self.ranges:
            return
        if self.label_bits is None:
            raise ValueError("ranges are what labels are rounded between; give label_bits too")
        have, want = [len(head) for head in self.ranges], [len(head) for head in self.channels]
        if have != want or not all(low < high for head in self.ranges for low, high in head):
            raise ValueError(
                f"ranges={self.ranges} must have a (low, high), low < high, for every channel of "
                f"every kv head: {want} of them"
            )

    def check(self, shape: HeadShape) -> None:
        """Raise ``ValueError`` if the channels do not fit the heads."""
        super().check(shape)
        H = shape.head_width
        if not self.channels:
            if self.width > H:
                raise ValueError(f"width={self.width} is more than the {H} channels of a head")
            return
        if len(self.channels) != shape.kv_heads:
            raise ValueError(
                f"channels are given for {len(self.channels)} heads, the model has "
                f"{shape.kv_heads} kv heads; give one tuple for each"
            )
        if max(max(head) for head in self.channels) >= H:
            raise ValueError(f"channels={self.channels} name channels outside 0..{H - 1}")

    def labels_of(self, shape: HeadShape) -> Int[Array, "K r"]:
        """The channels of every kv head."""
        if self.channels:
            return jnp.asarray(self.channels, jnp.int32)
        even = np.arange(self.width) * shape.head_width // self.width
        return jnp.asarray(np.tile(even, (shape.kv_heads, 1)), jnp.int32)

    def init_state(
        self, shape: HeadShape, batch: int, capacity: int, dtype: Any, rollback: int
    ) -> State:
        """r labels a token and kv head."""
        del rollback
        r = len(self.channels[0]) if self.channels else self.width
        return {"labels": jnp.zeros((batch, capacity, shape.kv_heads, r), dtype)}

    def observe(
        self,
        state: State,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        rows: Rows,
        length: Int[Array, " B"],
        shape: HeadShape,
    ) -> tuple[State, Any]:
        """Append the labels of the new keys."""
        del length
        at = jnp.maximum(rows.index, 0)[:, :, None, None]
        channels = self.labels_of(shape)
        new = jnp.take_along_axis(k, at, axis=1)
        labels = jnp.take_along_axis(new, channels[None, None], axis=3)
        if self.label_bits is not None:
            ends = jnp.asarray(self.ranges, labels.dtype) if self.ranges else None
            labels = rounded(labels, self.label_bits, ends)
        kept = write_rows(state["labels"], labels, rows.index, rows.valid)
        view = {"keys": transposed(kept.astype(k.dtype)), "channels": channels}
        return {"labels": kept}, view

    def scores(self, queries: Queries, view: Any) -> Float[Array, "B c N S"]:
        """q . k over the label channels."""
        channels = view["channels"]
        group = queries.q.shape[2] // channels.shape[0]
        per_query = jnp.repeat(channels, group, axis=0)[None, None]
        labels = jnp.take_along_axis(queries.q, per_query, axis=3)
        return logits(labels, view["keys"], queries.q.shape[-1] ** -0.5)

    def auxiliary_bits(self, shape: HeadShape, element_bits: int = 16) -> float:
        """The labels; quantised ones with two numbers for the range of their own, if they have."""
        r = len(self.channels[0]) if self.channels else self.width
        if self.label_bits is None:
            return shape.kv_heads * r * element_bits
        own = 0 if self.ranges else 2 * element_bits
        return shape.kv_heads * (r * self.label_bits + own)

    @staticmethod
    def tiny() -> tuple[DoubleSparsity, ...]:
        """A variant for the property suite."""
        return (DoubleSparsity(width=4, budget=5, sinks=2, recent=4),)


def rounded(
    labels: Float[Array, "*rest K r"], bits: int, ends: Float[Array, "K r 2"] | None = None
) -> Float[Array, "*rest K r"]:
    """Labels on 2^bits levels: from low to high of ``ends``, which clip them; where there are none,
    from the least to the greatest label of each head and key.
    """
    if ends is None:
        low = jnp.min(labels, axis=-1, keepdims=True)
        high = jnp.max(labels, axis=-1, keepdims=True)
    else:
        ends = ends.reshape(*(1,) * (labels.ndim - 2), *ends.shape)
        low, high = ends[..., 0], ends[..., 1]
        labels = jnp.clip(labels, low, high)
    step = (high - low) / (2**bits - 1)
    return low + step * jnp.round((labels - low) / jnp.where(step > 0, step, 1.0))


def calibrate_channels(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    width: int,
    *,
    valid: Array | None = None,
) -> Channels:
    """The ``width`` channels of every kv head with the largest E |q_d k_d| at the same token.

    Args:
      q: rotated queries of calibration text.
      k: rotated keys.
      width: r, the channels to keep.
      valid: [B, T] bool, tokens that count; all if not given.

    Returns:
      Channel numbers for ``DoubleSparsity(channels=...)``, ascending. The expectation is summed
      over the query heads of a group. Runs outside ``jit``.

    Raises:
      ValueError: if a head has fewer than ``width`` channels.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    if not 1 <= width <= H:
        raise ValueError(f"{width=} must be between 1 and the {H} channels of a head")
    grouped = jnp.abs(q.reshape(B, T, K, N // K, H)).sum(axis=3)
    product = grouped * jnp.abs(k)
    if valid is not None:
        product = jnp.where(valid[:, :, None, None], product, 0.0)
    strength = np.asarray(jax.device_get(jnp.sum(product, axis=(0, 1))))
    best = np.sort(np.argsort(-strength, axis=1, kind="stable")[:, :width], axis=1)
    return tuple(tuple(int(channel) for channel in head) for head in best)


def calibrate_ranges(
    k: Float[Array, "B T K H"],
    channels: Channels,
    bits: int,
    *,
    valid: Bool[Array, "B T"] | None = None,
) -> Ranges:
    """Where 2^bits evenly spaced levels leave labels the least squared error, if they are normal.

    Args:
      k: rotated keys of calibration text.
      channels: of :func:`calibrate_channels`.
      bits: 1 to 8, of a label.
      valid: tokens that count; all if not given.

    Returns:
      (mean - c std, mean + c std) of every channel, for ``DoubleSparsity(ranges=...)``; c is the
      outermost of the best uniform quantiser's levels (Max 1960, table II). Runs outside ``jit``.

    Raises:
      ValueError: on other numbers of bits.
    """
    if bits not in _OUTERMOST:
        raise ValueError(f"{bits=} must be one of {sorted(_OUTERMOST)}")
    flat = np.asarray(jax.device_get(k), np.float64).reshape(-1, *k.shape[2:])
    if valid is not None:
        flat = flat[np.asarray(jax.device_get(valid)).reshape(-1)]
    found = []
    for head, picked in enumerate(channels):
        labels = flat[:, head, list(picked)]
        middle, reach = labels.mean(axis=0), _OUTERMOST[bits] * labels.std(axis=0)
        found.append(tuple(zip((middle - reach).tolist(), (middle + reach).tolist(), strict=True)))
    return tuple(found)


# Half the distance between the outermost of 2^bits levels, in standard deviations: that between
# neighbours is 1.596, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308.
_OUTERMOST = {
    bits: step * (2**bits - 1) / 2
    for bits, step in enumerate(
        (1.596, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308), start=1
    )
}
