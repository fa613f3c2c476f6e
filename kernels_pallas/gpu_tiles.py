"""Sizes of the attention kernels for Hopper, and the moves between public layouts and tiles.

Axes beside the project's alphabet: A lists (groups of query heads that share a tile), E = B * A,
M rows of a tile: tokens times the query heads of a list, then rows that only fill the tile.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.gpu import ROWS, SHARED_BYTES

__all__ = ["GradientOperands", "Layout", "Tiles", "pad_to", "pad_width", "tiles_for"]

_ITEM = 2  # bytes of bfloat16 and float16
_RESERVED = 6 * 1024  # barriers, scratch of reductions across warps, alignment


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of one call; none changes a result beyond rounding.

    Attributes:
      warpgroups: computing warpgroups (64 rows each) that share the keys a tile visits: 1 or 2.
      keys: keys of a visit of the forward kernel; 64 or 128. The gradients take 64.
      steps: slots of the forward kernel's ring.
      query_steps: slots in the gradient of the queries.
      key_steps: slots, of 64 rows each, in the gradient of keys and values.
    """

    warpgroups: int
    keys: int
    steps: int
    query_steps: int
    key_steps: int

    def check(self, width: int, value_width: int) -> None:
        """Raise ``ValueError`` if a kernel would not fit in shared memory, or sizes make no sense.

        Widths are those of the padded heads.
        """
        if self.warpgroups not in (1, 2) or self.keys not in (64, 128):
            raise ValueError(f"{self}: warpgroups must be 1 or 2, keys 64 or 128")
        if min(self.steps, self.query_steps, self.key_steps) < 1:
            raise ValueError(f"{self}: a ring needs at least one slot")
        for kernel, needed in self.shared_bytes(width, value_width).items():
            if needed > SHARED_BYTES:
                raise ValueError(
                    f"{self} at head widths {width} and {value_width}: the {kernel} kernel needs "
                    f"{needed} bytes of shared memory of {SHARED_BYTES}; use fewer slots"
                )

    def shared_bytes(self, width: int, value_width: int) -> dict[str, int]:
        """Shared memory of a program of each kernel."""
        both = (width + value_width) * _ITEM
        rows = self.warpgroups * ROWS
        return {
            "forward": rows * _output_width(width, value_width) * _ITEM
            + self.steps * self.keys * both
            + _RESERVED,
            "query gradient": (rows + self.query_steps * ROWS) * both + _RESERVED,
            "key gradient": ROWS * both + self.key_steps * ROWS * (both + 16) + _RESERVED,
        }


def _output_width(width: int, value_width: int) -> int:
    """Width of queries and outputs in shared memory: outputs reuse the queries' where they fit."""
    return width if width == value_width else width + value_width


def tiles_for(width: int, value_width: int, rows: int, *, longest: int = 128) -> Tiles:
    """Sizes for padded head widths and ``rows`` = T * G rows a kv head. Not yet tuned on a chip.

    Registers decide first: a warpgroup has 232 a thread beside another one, and its sums take half
    the head width. Two warpgroups share a tile up to widths of 192, where the gradient of the
    queries holds 96 + 64 + 16 registers of matrices; at 256 one has the chip's 255 for itself. A
    visit is 128 keys (64 registers of logits) up to a width of 128. Rings take what is left of the
    shared memory, four slots at most. ``longest`` bounds ``keys``.
    """
    widest = max(width, value_width)
    warpgroups = 2 if widest <= 192 and rows > ROWS else 1
    keys = min(128 if widest <= 128 else 64, longest)
    both = (width + value_width) * _ITEM
    free = SHARED_BYTES - _RESERVED

    def slots(resident: int, slot: int) -> int:
        return max(1, min(4, (free - resident) // slot))

    return Tiles(
        warpgroups=warpgroups,
        keys=keys,
        steps=slots(warpgroups * ROWS * _output_width(width, value_width) * _ITEM, keys * both),
        query_steps=slots(warpgroups * ROWS * both, ROWS * both),
        key_steps=slots(ROWS * both, ROWS * (both + 16)),
    )


@dataclasses.dataclass(frozen=True)
class Layout:
    """How queries [B, T, N, H] fall into tiles [E, tiles, M, H], and back.

    ``group`` query heads of ``tile`` consecutive tokens are the rows of a tile, head fastest.
    """

    batch: int
    tokens: int
    query_heads: int
    kv_heads: int
    group: int
    warpgroups: int

    @staticmethod
    def of(q: Float[Array, "B T N H"], kv_heads: int, lists: int, warpgroups: int) -> Layout:
        """``lists``: how many different selections a token has, K or N (or any multiple of K).

        Groups too large for a tile are split; the parts then have the same selection.
        """
        batch, tokens, query_heads, _ = q.shape
        heads = query_heads // lists
        rows = warpgroups * ROWS
        group = max(g for g in range(1, min(heads, rows) + 1) if heads % g == 0)
        return Layout(batch, tokens, query_heads, kv_heads, group, warpgroups)

    @property
    def lists(self) -> int:
        """A: tiles of one token range."""
        return self.query_heads // self.group

    @property
    def sharing(self) -> int:
        """Lists that read the same kv head."""
        return self.lists // self.kv_heads

    @property
    def rows(self) -> int:
        """M."""
        return self.warpgroups * ROWS

    @property
    def tile(self) -> int:
        """Tokens of a tile."""
        return self.rows // self.group

    @property
    def tiles(self) -> int:
        """Tiles of a sequence."""
        return -(-self.tokens // self.tile)

    def to_tiles(
        self, x: Float[Array, "B T N X"], live: Bool[Array, "B T N"] | None = None
    ) -> Float[Array, "E tiles M X"]:
        """Rows of tiles; 0 in rows that fill, and where ``live`` is False: they may hold NaN."""
        if live is not None:
            x = jnp.where(live[..., None], x, 0)
        width = x.shape[3]
        x = pad_to(x, 1, self.tiles * self.tile)
        x = x.reshape(self.batch, self.tiles, self.tile, self.lists, self.group, width)
        x = jnp.transpose(x, (0, 3, 1, 2, 4, 5))
        x = x.reshape(self.batch * self.lists, self.tiles, self.tile * self.group, width)
        return pad_to(x, 2, self.rows)

    def from_tiles(self, x: Float[Array, "E tiles M X"]) -> Float[Array, "B T N X"]:
        """Inverse of :meth:`to_tiles`."""
        width = x.shape[3]
        x = x[:, :, : self.tile * self.group]
        x = x.reshape(self.batch, self.lists, self.tiles, self.tile, self.group, width)
        x = jnp.transpose(x, (0, 2, 3, 1, 4, 5))
        x = x.reshape(self.batch, self.tiles * self.tile, self.query_heads, width)
        return x[:, : self.tokens]

    def rows_of(self, x: Int[Array, "B T"]) -> Int[Array, "B tiles M"]:
        """A number a token as a number a row; rows that fill repeat the last one."""
        x = jnp.pad(x, ((0, 0), (0, self.tiles * self.tile - self.tokens)), mode="edge")
        x = jnp.repeat(x.reshape(self.batch, self.tiles, self.tile), self.group, axis=2)
        return jnp.pad(x, ((0, 0), (0, 0), (0, self.rows - x.shape[2])), mode="edge")


class GradientOperands(NamedTuple):
    """What the gradient kernels read of the rows, in tiles."""

    q: Float[Array, "E tiles M H"]
    d_out: Float[Array, "E tiles M Hv"]
    lse: Float[Array, "E tiles M"]
    delta: Float[Array, "E tiles M"]

    @staticmethod
    def of(
        layout: Layout,
        q: Float[Array, "B T N H"],
        d_out: Float[Array, "B T N Hv"],
        out: Float[Array, "B T N Hv"],
        lse: Float[Array, "B T N"],
        d_lse: Float[Array, "B T N"],
    ) -> GradientOperands:
        """0 in rows that saw nothing (whose arguments may be NaN) and in rows that fill.

        delta = sum(d_out * out) - d_lse: the gradient by a logit is p (d_out . v - delta).
        """
        seen = ~jnp.isneginf(lse)
        delta = jnp.sum(d_out.astype(lse.dtype) * out.astype(lse.dtype), axis=-1) - d_lse
        numbers = (layout.to_tiles(x[..., None], seen)[..., 0] for x in (lse, delta))
        matrices = (layout.to_tiles(pad_width(x), seen) for x in (q, d_out))
        return GradientOperands(*matrices, *numbers)


def pad_width(x: Float[Array, "B T N H"]) -> Float[Array, "B T N X"]:
    """Heads widened with zeros to a multiple of 64."""
    return pad_to(x, 3, -(-x.shape[3] // ROWS) * ROWS)


def pad_to(x: Array, axis: int, size: int) -> Array:
    """``x`` with zeros appended along ``axis`` up to ``size``."""
    if x.shape[axis] == size:
        return x
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, padding)
