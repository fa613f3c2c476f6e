"""Ranged attention on Hopper: tiles of rows visit the span of keys between them (Mosaic GPU).

A tile visits the runs of keys from its first start to its last stop. Runs that every row sees in
full need no mask; they are walked in a loop of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas import gpu, gpu_key_major, gpu_query_major, tuned
from kernels_pallas.common import AttentionOutput
from kernels_pallas.gpu_tiles import (
    GradientOperands,
    Layout,
    Tiles,
    pad_to,
    pad_width,
    tiles_for,
)
from kernels_pallas.ranged.tiling import covered

__all__ = ["ranged_attention"]

_OP = "ranged_attention"


def ranged_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    *,
    scale: float,
    tiles: Tiles | None = None,
) -> AttentionOutput:
    """See :func:`kernels_pallas.ranged.ranged_attention`; ``tiles`` overrides the tile sizes.

    Raises:
      NotImplementedError: for chips, dtypes (16-bit floats alone) and head widths (up to 256) that
        the kernels do not serve.
      ValueError: for tiles that do not fit in shared memory.
    """
    gpu.check_device()
    gpu.check_dtypes(_OP, q=q, k=k, v=v)
    passes = tuple(choose_tiles(q, k, v, tiles, direction) for direction in tuned.DIRECTIONS)
    if scale < 0:
        q, scale = -q, -scale
    elif scale == 0:
        q, scale = q * 0, 1.0
    out, lse = _attend(scale, passes, q, k, v, start, stop)
    return AttentionOutput(out, lse)


def choose_tiles(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    tiles: Tiles | None,
    direction: tuned.Direction,
) -> Tiles:
    """``tiles``, measured ones or sizes by rule for a pass; raises what does not fit."""
    width, value_width = gpu.padded_width(_OP, q.shape[3]), gpu.padded_width(_OP, v.shape[3])
    group = q.shape[2] // k.shape[2]

    def check(tiles: Tiles) -> None:
        tiles.check(width, value_width)

    if tiles is None:
        tiles = tuned.choose(
            _OP,
            gpu.chip_kind(),
            tiles_for(width, value_width, q.shape[1] * group),
            check,
            direction=direction,
            length=q.shape[1],
            group=group,
            width=width,
            value_width=value_width,
            dtype=str(q.dtype),
        )
    check(tiles)
    return tiles


@dataclasses.dataclass(frozen=True)
class _Spans:
    """The runs of ``keys`` keys between the first start and the last stop of every tile.

    ``bounds`` [B * tiles, 4]: first run, number of runs, and the visits [from, to) of runs that
    every row sees in full.
    """

    bounds: Int[Array, "tiles 4"]
    keys: int
    lists: int
    tiles: int

    @staticmethod
    def of(rows: Mapping[str, Int[Array, "B tiles M"]], keys: int, lists: int) -> _Spans:
        start, stop = rows["start"], rows["stop"]
        some = stop > start
        low = jnp.min(jnp.where(some, start, jnp.iinfo(jnp.int32).max), axis=2) // keys
        high = -(-jnp.max(jnp.where(some, stop, 0), axis=2) // keys)
        low = jnp.minimum(low, high)
        full = jnp.clip(-(-jnp.max(start, axis=2) // keys), low, high)
        full_stop = jnp.clip(jnp.min(stop, axis=2) // keys, full, high)
        bounds = jnp.stack([low, high - low, full - low, full_stop - low], axis=2)
        return _Spans(bounds.reshape(-1, 4), keys, lists, start.shape[1])

    def operands(self) -> Mapping[str, jax.Array]:
        return {"bounds": self.bounds}

    def _bound(self, refs: Any, at: jax.Array, which: int) -> jax.Array:
        batch = lax.div(at, gpu.integer(self.lists * self.tiles))
        tile = lax.rem(at, gpu.integer(self.tiles))
        return refs.bounds[batch * self.tiles + tile, which]

    def count(self, refs: Any, at: jax.Array) -> jax.Array:
        return self._bound(refs, at, 1)

    def first_key(self, refs: Any, at: jax.Array, c: jax.Array) -> jax.Array:
        return (self._bound(refs, at, 0) + c) * self.keys

    def selected(self, refs: Any, at: jax.Array, c: jax.Array, token: jax.Array) -> None:
        return None

    def phases(
        self, refs: Any, at: jax.Array, count: jax.Array
    ) -> Sequence[tuple[jax.Array, jax.Array, bool]]:
        full, full_stop = self._bound(refs, at, 2), self._bound(refs, at, 3)
        return (gpu.integer(0), full, True), (full, full_stop, False), (full_stop, count, True)


@dataclasses.dataclass(frozen=True)
class _Meetings:
    """The tiles whose spans meet each of the ``works`` runs of 64 keys, as an interval.

    Where spans move one way along the sequence (causal, windows, packed documents, rows sorted by
    cluster) every tile of the interval meets the run; otherwise some are walked in vain.
    ``tiles`` [B * works, 2]: first tile, number of tiles.
    """

    tiles: Int[Array, "works 2"]
    works: int
    lists: int

    @staticmethod
    def of(rows: Mapping[str, Int[Array, "B tiles M"]], keys: int, lists: int) -> _Meetings:
        start, stop = rows["start"], rows["stop"]
        some = stop > start
        low = jnp.min(jnp.where(some, start, keys), axis=2) // gpu.ROWS
        high = -(-jnp.max(jnp.where(some, stop, 0), axis=2) // gpu.ROWS)
        works, tile = keys // gpu.ROWS, jnp.arange(start.shape[1], dtype=jnp.int32)
        run = jnp.arange(works, dtype=jnp.int32)[None, :, None]
        # [B, works, tiles] inside a fused reduction: never in memory.
        meets = (low[:, None, :] <= run) & (run < high[:, None, :])
        first = jnp.min(jnp.where(meets, tile[None, None, :], tile.size), axis=2)
        last = jnp.max(jnp.where(meets, tile[None, None, :], -1), axis=2)
        interval = jnp.stack([first, jnp.maximum(last - first + 1, 0)], axis=2)
        return _Meetings(interval.reshape(-1, 2), works, lists)

    def operands(self) -> Mapping[str, jax.Array]:
        return {"meetings": self.tiles}

    def _of(self, refs: Any, at: jax.Array, which: int) -> jax.Array:
        batch = lax.div(at, gpu.integer(self.lists * self.works))
        run = lax.rem(at, gpu.integer(self.works))
        return refs.meetings[batch * self.works + run, which]

    def first_key(self, refs: Any, at: jax.Array) -> jax.Array:
        return lax.rem(at, gpu.integer(self.works)) * gpu.ROWS

    def count(self, refs: Any, at: jax.Array) -> jax.Array:
        return self._of(refs, at, 1)

    def tile(self, refs: Any, at: jax.Array, c: jax.Array) -> jax.Array:
        return self._of(refs, at, 0) + c

    def selected(self, refs: Any, at: jax.Array, c: jax.Array, token: jax.Array) -> None:
        return None


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale, passes, q, k, v, start, stop):
    return _attend_forward(scale, passes, q, k, v, start, stop)[0]


def _attend_forward(scale, passes, q, k, v, start, stop):
    tiles, _ = passes
    layout = Layout.of(q, k.shape[2], k.shape[2], tiles.warpgroups)
    rows = {"start": layout.rows_of(start), "stop": layout.rows_of(stop)}
    some = jnp.broadcast_to((stop > start)[..., None], q.shape[:3])
    k_clean, v_clean = _keys(k, v, start, stop)
    out, lse = gpu_query_major.forward(
        layout.to_tiles(pad_width(q), some),
        k_clean,
        v_clean,
        rows,
        _Spans.of(rows, tiles.keys, layout.lists),
        layout,
        scale=scale,
        keys=tiles.keys,
        steps=tiles.steps,
    )
    out = layout.from_tiles(out)[..., : v.shape[3]]
    lse = layout.from_tiles(lse[..., None])[..., 0]
    return (out, lse), (q, k, v, start, stop, out, lse)


def _attend_backward(scale, passes, residuals, cotangents):
    return gradients(scale, passes[1], residuals, cotangents)


def gradients(scale, tiles, residuals, cotangents):
    """Cotangents of (q, k, v, start, stop), the last two None, from those of (out, lse).

    ``residuals`` are (q, k, v, start, stop, out, lse).
    """
    q, k, v, start, stop, out, lse = residuals
    d_out, d_lse = cotangents
    layout = Layout.of(q, k.shape[2], k.shape[2], tiles.warpgroups)
    rows = {"start": layout.rows_of(start), "stop": layout.rows_of(stop)}
    k_clean, v_clean = _keys(k, v, start, stop)
    of_rows = GradientOperands.of(layout, q, d_out, out, lse, d_lse)
    arguments = (of_rows.q, k_clean, v_clean, of_rows.d_out, of_rows.lse, of_rows.delta)
    dq = gpu_query_major.query_gradient(
        *arguments,
        rows,
        _Spans.of(rows, gpu.ROWS, layout.lists),
        layout,
        scale=scale,
        keys=gpu.ROWS,
        steps=tiles.query_steps,
    )
    dk, dv = gpu_key_major.key_gradients(
        *arguments,
        rows,
        _Meetings.of(rows, k_clean.shape[1], layout.lists),
        layout,
        scale=scale,
        steps=tiles.key_steps,
    )
    dq = layout.from_tiles(dq)[..., : q.shape[3]]
    return dq, _sum_lists(dk, layout, k), _sum_lists(dv, layout, v), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _keys(k, v, start, stop):
    """Keys and values in whole runs and padded widths, 0 where no row looks."""
    live = covered(start, stop, k.shape[1])[:, :, None, None]
    length = -(-k.shape[1] // 128) * 128
    return (pad_to(pad_width(jnp.where(live, x, 0)), 1, length) for x in (k, v))


def _sum_lists(x, layout, like):
    """Float32 parts [E, runs, 64, X] as the gradient of ``like`` [B, S, K, H]."""
    x = x.reshape(layout.batch, layout.kv_heads, layout.sharing, -1, x.shape[3])
    x = jnp.transpose(jnp.sum(x, axis=2), (0, 2, 1, 3))
    return x[:, : like.shape[1], :, : like.shape[3]].astype(like.dtype)
