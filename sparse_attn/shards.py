"""How the tokens of a call lie on devices, and the few ways in which devices exchange them.

A mechanism that runs inside ``jax.shard_map`` sees the tokens of its own device. ``Heads.shards``
says where they stand, and brings what the mechanism needs from others. :data:`WHOLE`, the default,
is a call that has everything: its methods return what they are given, so a mechanism is written
once.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from kernels_pallas.common import AttentionOutput

Strategy = Literal["gather", "halo", "ring", "ulysses", "replicate"]
"""How a sequence that is split over devices is attended; see ``docs/parallel.md``."""

Order = Literal["natural", "zigzag"]
"""``"zigzag"``: device i of P holds chunks i and 2 P - 1 - i of 2 P, which balances causality."""


@dataclasses.dataclass(frozen=True)
class Shards:
    """What splits the tokens of a call; a static value.

    ``axis``: mesh axis that splits the sequence over ``count`` devices, None for none.
    ``of_cache``: it splits the tokens of the cache, while those of the call are whole; otherwise
    the call's own tokens are split. ``batch_axes``: mesh axes that split the batch.
    """

    axis: str | None = None
    count: int = 1
    of_cache: bool = False
    batch_axes: tuple[str, ...] = ()
    strategy: Strategy = "gather"
    order: Order = "natural"

    @property
    def split(self) -> bool:
        """Whether the call's own tokens are split."""
        return self.axis is not None and not self.of_cache

    @property
    def cache_split(self) -> bool:
        """Whether the tokens of the cache are split."""
        return self.axis is not None and self.of_cache

    def tokens(self, mine: int) -> int:
        """Tokens of the whole sequence, of which ``mine`` are here."""
        return mine * self.count if self.split else mine

    def first(self, tokens: int) -> Int[Array, ""]:
        """Number of the first of the ``tokens`` rows here, which follow each other."""
        (first, _), *more = self.stretches(tokens)
        assert not more, "only natural order has one stretch a device"
        return jnp.asarray(first)

    def gather(self, x: Shaped[Array, "*lead T *rest"], axis: int = 1) -> Array:
        """The rows of all devices in their order, where ``axis`` of ``x`` counts those here.

        Differentiable: gradients are summed onto the device that holds a row.
        """
        if not self.split:
            return x
        whole = jax.lax.all_gather(x, self._name, axis=axis, tiled=True)
        if self.order == "natural":
            return whole
        chunks = whole.reshape(*x.shape[:axis], 2 * self.count, -1, *x.shape[axis + 1 :])
        numbers = np.arange(2 * self.count)
        place = np.where(numbers < self.count, 2 * numbers, 4 * self.count - 2 * numbers - 1)
        return jnp.take(chunks, place, axis=axis).reshape(whole.shape)

    def mine(self, x: Shaped[Array, "*lead S *rest"], axis: int = 1) -> Array:
        """The rows that are here, of an array that every device has as a whole."""
        if not self.split:
            return x
        parts = [
            jax.lax.dynamic_slice_in_dim(x, first, size, axis=axis)
            for first, size in self.stretches(x.shape[axis] // self.count)
        ]
        return jnp.concatenate(parts, axis=axis)

    def take(self, x: Shaped[Array, "B T *rest"], numbers: Int[Array, " r"]) -> Array:
        """Rows ``numbers`` [r] of the sequence, on every device. Differentiable."""
        if not self.split:
            return x[:, numbers]
        tokens = x.shape[1]
        if self.order == "natural":
            owner, place = numbers // tokens, numbers % tokens
        else:
            size = tokens // 2
            chunk = numbers // size
            owner = jnp.minimum(chunk, 2 * self.count - 1 - chunk)
            place = numbers % size + jnp.where(chunk < self.count, 0, size)
        here = (owner == jax.lax.axis_index(self._name)).reshape(1, -1, *(1 for _ in x.shape[2:]))
        rows = jnp.where(here, x[:, place], jnp.zeros((), x.dtype))
        summed = rows.astype(jnp.int32) if rows.dtype == jnp.bool_ else rows
        return jax.lax.psum(summed, self._name).astype(x.dtype)

    def before(self, x: Shaped[Array, "B T *rest"], width: int) -> Array:
        """The ``width`` rows before those here, zeros before the sequence's first.

        Differentiable. Only the rows that are asked for move.
        """
        return self._halo(x, width, step=1)

    def after(self, x: Shaped[Array, "B T *rest"], width: int) -> Array:
        """The ``width`` rows after those here, zeros after the sequence's last."""
        return self._halo(x, width, step=-1)

    def total(self, x: Any) -> Any:
        """Sum of each device's share of a number that tokens add up to (a pytree)."""
        axes = (*self.batch_axes, *((self._name,) if self.split else ()))
        return jax.lax.psum(x, axes) if axes else x

    def batch_total(self, x: Any) -> Any:
        """The same for numbers that the devices of one sequence all have already."""
        return jax.lax.psum(x, self.batch_axes) if self.batch_axes else x

    def cache_first(self, size: int) -> Int[Array, ""] | int:
        """Number of the first cache slot here, where each device holds ``size`` of them."""
        return jax.lax.axis_index(self._name) * size if self.cache_split else 0

    def own_slots(
        self, index: Int[Array, "..."], size: int
    ) -> tuple[Int[Array, "..."], Bool[Array, "..."] | bool]:
        """Slots among the ``size`` ones here of cache slots ``index``, and which are here."""
        if not self.cache_split:
            return index, True
        local = index - self.cache_first(size)
        return local, (local >= 0) & (local < size)

    def own_list(self, indices: Int[Array, "B T J P"], size: int) -> Int[Array, "B T J P"]:
        """Those of the listed slots that are here, in the order that lists have."""
        if not self.cache_split:
            return indices
        local, here = self.own_slots(indices, size)
        ordered = jnp.sort(jnp.where((indices >= 0) & here, local, size), axis=3)
        return jnp.where(ordered < size, ordered, -1).astype(indices.dtype)

    def merged(self, part: AttentionOutput) -> AttentionOutput:
        """Attention over the keys of all devices from each one's over its own; not differentiable.

        out = sum_i exp(lse_i - lse) out_i; what moves are outputs, whatever the cache holds.
        """
        if not self.cache_split:
            return part
        top = jax.lax.pmax(jax.lax.stop_gradient(part.lse), self._name)
        top = jnp.where(jnp.isneginf(top), 0.0, top)
        weight = jnp.exp(part.lse - top)
        out, total = jax.lax.psum(
            (weight[..., None] * part.out.astype(weight.dtype), weight), self._name
        )
        safe = jnp.where(total > 0, total, 1.0)
        lse = jnp.where(total > 0, jnp.log(safe) + top, -jnp.inf)
        return AttentionOutput((out / safe[..., None]).astype(part.out.dtype), lse)

    def cache_sum(self, x: Array) -> Array:
        """Sum over the devices that share a cache."""
        return jax.lax.psum(x, self._name) if self.cache_split else x

    @property
    def _name(self) -> str:
        assert self.axis is not None
        return self.axis

    def stretches(self, tokens: int) -> list[tuple[Int[Array, ""] | int, int]]:
        """(first number, size) of the stretches of the sequence that make up ``tokens`` rows."""
        if not self.split:
            return [(0, tokens)]
        device = jax.lax.axis_index(self._name)
        if self.order == "natural":
            return [(device * tokens, tokens)]
        size = tokens // 2
        return [(device * size, size), ((2 * self.count - 1 - device) * size, size)]

    def _halo(self, x: Array, width: int, step: int) -> Array:
        if not self.split or width == 0:
            return jnp.zeros((x.shape[0], 0, *x.shape[2:]), x.dtype)
        if self.order != "natural":
            raise NotImplementedError(
                f"order={self.order!r} has no single neighbour to take {width} rows from; "
                'use strategy="gather" or order="natural"'
            )
        tokens = x.shape[1]
        parts = []
        for hop in range(1, -(-width // tokens) + 1):
            rows = min(tokens, width - (hop - 1) * tokens)
            edge = x[:, tokens - rows :] if step > 0 else x[:, :rows]
            pairs = [
                (device, device + hop * step)
                for device in range(self.count)
                if 0 <= device + hop * step < self.count
            ]
            parts.append(jax.lax.ppermute(edge, self._name, pairs) if pairs else edge * 0)
        return jnp.concatenate(parts[::-1] if step > 0 else parts, axis=1)


WHOLE = Shards()
"""All tokens are here."""


def zigzag_order(tokens: int, shards: int) -> np.ndarray:
    """The order [tokens] in which a sequence is laid out so that equal parts are zig-zag shards.

    ``x[:, zigzag_order(T, P)]``, split into P equal parts, gives part i the chunks i and
    2 P - 1 - i of 2 P. Tokens, targets, positions and segment ids are all to be reordered.

    Raises:
      ValueError: if ``tokens`` is not a multiple of 2 ``shards``.
    """
    if tokens % (2 * shards):
        raise ValueError(
            f"tokens={tokens} cannot be cut into 2 * shards={2 * shards} equal chunks; "
            f"use a multiple of {2 * shards}"
        )
    chunks = np.arange(tokens).reshape(2 * shards, -1)
    held = [chunk for shard in range(shards) for chunk in (shard, 2 * shards - 1 - shard)]
    return chunks[held].reshape(-1)
