"""How the XLA paths cut attention into tiles, and the online softmax they share.

A tile is Tq consecutive query rows of one kv head with all G query heads of its group, flattened
to M = Tq * G matrix rows, so that products stay wide for every group size.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.common import accumulation_dtype

# Masked logits and the initial maximum. The maximum starts above what a mask writes, so a row
# that has seen nothing yet gets exp(MASKED - START) = 0 and needs no second mask.
MASKED = -2e30
START = -1e30


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Static tile sizes: query rows per tile and keys per step."""

    rows: int
    keys: int

    @staticmethod
    def choose(rows: int, keys: int, group: int) -> Tiles:
        """About 512 matrix rows by 128 keys: the best of the sizes tried on CPUs with 2 MiB of
        second-level cache, where the logits of one step stay in that cache. Narrow key steps
        waste little at the ends of a sliding window.
        """
        query_rows = max(8, min(128, 512 // group))
        while query_rows // 2 >= rows and query_rows > 8:
            query_rows //= 2
        return Tiles(query_rows, min(128, keys))


class Softmax(NamedTuple):
    """Running softmax of M rows: largest logit, sum of exponentials, weighted sum of values."""

    top: Float[Array, "M"]
    total: Float[Array, "M"]
    values: Float[Array, "M Hv"]

    @staticmethod
    def empty(rows: int, width: int, dtype: jnp.dtype) -> Softmax:
        """The softmax of rows that have seen nothing."""
        return Softmax(
            jnp.full((rows,), START, dtype),
            jnp.zeros((rows,), dtype),
            jnp.zeros((rows, width), dtype),
        )

    def absorb(
        self, logits: Float[Array, "M S"], values: Float[Array, "S Hv"], precision: str
    ) -> tuple[Softmax, Float[Array, "M S"]]:
        """Add keys; also returns their weights ``exp(logits - top)`` under the new ``top``."""
        top = jnp.maximum(self.top, jnp.max(logits, axis=1))
        weights = jnp.exp(logits - top[:, None])
        decay = jnp.exp(self.top - top)
        total = self.total * decay + jnp.sum(weights, axis=1)
        product = jnp.matmul(weights, values, precision=precision)
        return Softmax(top, total, self.values * decay[:, None] + product), weights

    def finish(self) -> tuple[Float[Array, "M Hv"], Float[Array, "M"]]:
        """Normalised values and lse; 0 and -inf for rows that saw nothing."""
        seen = self.total > 0
        total = jnp.where(seen, self.total, 1)
        return self.values / total[:, None], jnp.where(seen, jnp.log(total) + self.top, -jnp.inf)


class RowTiles(NamedTuple):
    """Ranges of all query rows, tiled. U = B * tiles a sequence.

    ``start`` and ``length`` give the visible keys [start, start + length) of each matrix row;
    ``low`` and ``high`` the span that a whole tile visits.
    """

    start: Int[Array, "U M"]
    length: Int[Array, "U M"]
    low: Int[Array, "U"]
    high: Int[Array, "U"]


def tile_ranges(
    start: Int[Array, "B T"], stop: Int[Array, "B T"], tiles: Tiles, group: int, keys: int
) -> RowTiles:
    """Cut ranges into tiles; rows added to fill the last tile see nothing."""
    fill = ((0, 0), (0, -start.shape[1] % tiles.rows))
    start, stop = (jnp.pad(a, fill).reshape(-1, tiles.rows) for a in (start, stop))
    length = jnp.maximum(stop - start, 0)
    low = jnp.min(jnp.where(length > 0, start, keys), axis=1)
    high = jnp.max(jnp.where(length > 0, stop, 0), axis=1)
    return RowTiles(jnp.repeat(start, group, axis=1), jnp.repeat(length, group, axis=1), low, high)


class TileIndex(NamedTuple):
    """Where a tile lies: ``head`` counts B * K matrices of keys, ``ranges`` rows of RowTiles."""

    batch: Int[Array, ""]
    head: Int[Array, ""]
    first_row: Int[Array, ""]
    first_query_head: Int[Array, ""]
    ranges: Int[Array, ""]

    @staticmethod
    def of(i: Int[Array, ""], padded_rows: int, kv_heads: int, group: int, tiles: Tiles):
        """Tile number i: sequences outermost, then kv heads, then rows."""
        a_sequence = padded_rows // tiles.rows
        i = jnp.asarray(i, jnp.int32)  # loop counters are int64 under x64
        head, tile = i // a_sequence, i % a_sequence
        batch = head // kv_heads
        return TileIndex(
            batch, head, tile * tiles.rows, head % kv_heads * group, batch * a_sequence + tile
        )

    def take(self, x: Float[Array, "B T N X"], rows: int, group: int) -> Float[Array, "M X"]:
        """The tile's rows of a query-shaped array."""
        zero = jnp.zeros((), jnp.int32)
        at = (self.batch, self.first_row, self.first_query_head, zero)
        part = jax.lax.dynamic_slice(x, at, (1, rows, group, x.shape[3]))
        return part.reshape(rows * group, x.shape[3])

    def put(
        self, x: Float[Array, "B T N X"], part: Float[Array, "M X"], rows: int
    ) -> Float[Array, "B T N X"]:
        """The inverse of :meth:`take`: x with the tile's rows replaced."""
        zero = jnp.zeros((), jnp.int32)
        at = (self.batch, self.first_row, self.first_query_head, zero)
        part = part.reshape(1, rows, -1, x.shape[3]).astype(x.dtype)
        return jax.lax.dynamic_update_slice(x, part, at)


def pad_rows(x: Float[Array, "B T N X"], tiles: Tiles) -> Float[Array, "B T N X"]:
    """Rows added up to a whole number of tiles."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % tiles.rows), (0, 0), (0, 0)))


def live_rows(
    x: Float[Array, "M X"], length: Int[Array, "M"], dtype: jnp.dtype
) -> Float[Array, "M X"]:
    """Rows as ``dtype``, cleared where they see nothing: padding may hold NaN."""
    return jnp.where((length > 0)[:, None], x.astype(dtype), 0)


def covered(start: Int[Array, "B T"], stop: Int[Array, "B T"], keys: int) -> Bool[Array, "B S"]:
    """True for keys that lie in the range of at least one row."""
    batch = jnp.arange(start.shape[0])[:, None]
    step = (stop > start).astype(jnp.int32)
    edges = jnp.zeros((start.shape[0], keys + 1), jnp.int32)
    edges = edges.at[batch, start].add(step).at[batch, stop].add(-step)
    return jnp.cumsum(edges[:, :-1], axis=1) > 0


def head_major(x: Float[Array, "B S K H"], live: Bool[Array, "B S"]) -> Float[Array, "E S H"]:
    """Keys or values as E = B * K contiguous matrices, cleared where no row looks."""
    x = jnp.where(live[:, :, None, None], x.astype(accumulation_dtype(x.dtype)), 0)
    return jnp.transpose(x, (0, 2, 1, 3)).reshape(-1, x.shape[1], x.shape[3])


def visible(
    position: Int[Array, ""],
    floor: Int[Array, ""],
    keys: int,
    start: Int[Array, "M"],
    length: Int[Array, "M"],
) -> Bool[Array, "M S"]:
    """Which of the keys position, position + 1, .. each row sees; none below ``floor``.

    The last step of a span is moved left to stay inside the buffer, ``floor`` keeps the keys that
    the step before has visited from counting twice.
    """
    s = position + jnp.arange(keys, dtype=jnp.int32)
    offset = (s[None, :] - start[:, None]).astype(jnp.uint32)  # wraps to huge below start
    return (offset < length.astype(jnp.uint32)[:, None]) & (s >= floor)[None, :]


def precision_of(dtype: jnp.dtype) -> str:
    """Full products for float32 and float64 inputs, the platform's own for narrower ones."""
    return "highest" if jnp.finfo(dtype).bits >= 32 else "default"


def slab(x: Float[Array, "E S H"], head: Int[Array, ""], position: Int[Array, ""], keys: int):
    """``x[head, position : position + keys]``."""
    zero = jnp.zeros((), jnp.int32)
    return jax.lax.dynamic_slice(x, (head, position, zero), (1, keys, x.shape[2]))[0]
