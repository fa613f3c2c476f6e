"""Block-sparse attention on Hopper: tiles visit the union of their tokens' blocks (Mosaic GPU).

Forward and dq walk the tile lists; dk and dv walk the inverse lists. A block that many tiles visit
(block 0 often sits in every list) is cut into pieces of a fixed number of tiles, whose float32
sums a second kernel adds in order: bitwise repeatable, and no program waits for one hot block.
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
from kernels_pallas.block_sparse.lists import (
    InverseLists,
    TileLists,
    build_inverse_lists,
    build_tile_lists,
)
from kernels_pallas.block_sparse.mosaic_gpu_sum import sum_pieces
from kernels_pallas.common import AttentionOutput
from kernels_pallas.gpu_tiles import GradientOperands, Layout, Tiles, pad_to, pad_width, tiles_for

__all__ = ["Pieces", "block_sparse_attention"]

_OP = "block_sparse_attention"
_BITS = 32


def block_sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    indices: Int[Array, "B T J P"],
    *,
    block_size: int,
    positions: Int[Array, "B T"],
    causal: bool,
    scale: float,
    tiles: Tiles | None = None,
) -> AttentionOutput:
    """Arguments and results as in the api; ``tiles`` overrides the tile sizes.

    Raises:
      NotImplementedError: for chips, dtypes (16-bit floats alone), head widths (up to 256) and
        block sizes (multiples of 64) that the kernels do not serve.
      ValueError: for tiles that do not fit in shared memory.
    """
    gpu.check_device()
    gpu.check_dtypes(_OP, q=q, k=k, v=v)
    if block_size % gpu.ROWS:
        raise NotImplementedError(
            f"{_OP}: {block_size=} is not a multiple of {gpu.ROWS}; use implementation='xla'"
        )
    if q.shape[1] == 0:
        raise NotImplementedError(f"{_OP}: q {q.shape} has no queries; use implementation='xla'")
    passes = tuple(
        _choose_tiles(q, k, v, indices.shape[2], block_size, tiles, direction)
        for direction in tuned.DIRECTIONS
    )
    if scale < 0:
        q, scale = -q, -scale
    elif scale == 0:
        q, scale = q * 0, 1.0
    last = jnp.full(q.shape[:2], k.shape[1] - 1, jnp.int32)
    if causal:
        last = jnp.minimum(positions.astype(jnp.int32), last)
    indices = indices.astype(jnp.int32)
    if indices.shape[2] == 1:
        indices = jnp.broadcast_to(indices, (*indices.shape[:2], k.shape[2], indices.shape[3]))
    # Blocks that start after the query's last key are visited by nobody.
    in_reach = indices <= (last // block_size)[:, :, None, None]
    indices = jnp.where(in_reach & (last >= 0)[:, :, None, None], indices, -1)
    return AttentionOutput(*_attend(block_size, scale, passes, q, k, v, indices, last))


def _choose_tiles(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lists: int,
    block_size: int,
    tiles: Tiles | None,
    direction: tuned.Direction,
) -> Tiles:
    """``tiles``, measured ones or sizes by rule for a pass; raises what does not fit."""
    width, value_width = gpu.padded_width(_OP, q.shape[3]), gpu.padded_width(_OP, v.shape[3])
    group = q.shape[2] // max(k.shape[2], lists)
    longest = 128 if block_size % 128 == 0 else 64

    def check(tiles: Tiles) -> None:
        tiles.check(width, value_width)
        if block_size % tiles.keys:
            raise ValueError(
                f"{_OP}: {block_size=} is not a multiple of the {tiles.keys} keys a visit"
            )

    if tiles is None:
        tiles = tuned.choose(
            _OP,
            gpu.chip_kind(),
            tiles_for(width, value_width, q.shape[1] * group, longest=longest),
            check,
            direction=direction,
            length=q.shape[1],
            group=group,
            block_size=block_size,
            width=width,
            value_width=value_width,
            dtype=str(q.dtype),
        )
    check(tiles)
    return tiles


@dataclasses.dataclass(frozen=True)
class _Unions:
    """The runs of ``keys`` keys of the blocks in the list of every tile (flat arrays)."""

    lists: TileLists
    block_size: int
    keys: int

    def operands(self) -> Mapping[str, jax.Array]:
        lists = self.lists
        return {
            "counts": lists.count.reshape(-1),
            "blocks": lists.blocks.reshape(-1),
            "words": lists.words.reshape(-1),
        }

    def _slot(self, at: jax.Array, c: jax.Array) -> jax.Array:
        runs = self.block_size // self.keys
        return at * self.lists.blocks.shape[3] + lax.div(c, gpu.integer(runs))

    def count(self, refs: Any, at: jax.Array) -> jax.Array:
        return refs.counts[at] * (self.block_size // self.keys)

    def first_key(self, refs: Any, at: jax.Array, c: jax.Array) -> jax.Array:
        run = lax.rem(c, gpu.integer(self.block_size // self.keys))
        return refs.blocks[self._slot(at, c)] * self.block_size + run * self.keys

    def selected(self, refs: Any, at: jax.Array, c: jax.Array, token: jax.Array) -> jax.Array:
        return _bit(refs.words, self._slot(at, c), self.lists.words.shape[4], token)

    def phases(
        self, refs: Any, at: jax.Array, count: jax.Array
    ) -> Sequence[tuple[jax.Array, jax.Array, bool]]:
        return ((gpu.integer(0), count, True),)


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The inverse lists cut into pieces of at most ``most`` tiles of one block.

    Piece w of an entry (one of E = B * A lists) serves block ``block[entry, w]`` and the tiles
    [``first``, ``first + size``) of the inverse list; those of block j are the pieces
    [offset[entry, j], offset[entry, j + 1]). A block of several runs of 64 keys counts as as many.
    """

    inverse: InverseLists
    block: Int[Array, "E W"]
    first: Int[Array, "E W"]
    size: Int[Array, "E W"]
    offset: Int[Array, "E blocks+1"]
    block_size: int

    @staticmethod
    def of(inverse: InverseLists, block_size: int) -> Pieces:
        blocks, entries = inverse.offsets.shape[2] - 1, inverse.tiles.shape[2]
        offsets = inverse.offsets.reshape(-1, blocks + 1)
        # The mean length there can be: sum of ceil(length / most) <= 2 * blocks pieces at most.
        most = -(-entries // blocks)
        pieces = -(-(offsets[:, 1:] - offsets[:, :-1]) // most)
        offset = jnp.concatenate(
            [jnp.zeros((pieces.shape[0], 1), jnp.int32), jnp.cumsum(pieces, axis=1)], axis=1
        ).astype(jnp.int32)
        number = jnp.arange(2 * blocks, dtype=jnp.int32)
        block = jax.vmap(lambda row: jnp.searchsorted(row, number, side="right"))(offset) - 1
        block = jnp.minimum(block, blocks - 1).astype(jnp.int32)

        def of_block(x):
            return jnp.take_along_axis(x, block, axis=1)

        first = of_block(offsets[:, :-1]) + (number[None, :] - of_block(offset[:, :-1])) * most
        size = jnp.clip(of_block(offsets[:, 1:]) - first, 0, most)
        return Pieces(inverse, block, first, size, offset, block_size)

    @property
    def runs(self) -> int:
        """Runs of 64 keys in a block."""
        return self.block_size // gpu.ROWS

    @property
    def works(self) -> int:
        return self.block.shape[1] * self.runs

    def operands(self) -> Mapping[str, jax.Array]:
        assert self.inverse.words is not None
        return {
            "piece_block": self.block.reshape(-1),
            "piece_first": self.first.reshape(-1),
            "piece_size": self.size.reshape(-1),
            "visitors": self.inverse.tiles.reshape(-1),
            "visitor_words": self.inverse.words.reshape(-1),
        }

    def _slot(self, refs: Any, at: jax.Array, c: jax.Array) -> jax.Array:
        entry = lax.div(at, gpu.integer(self.works))
        first = refs.piece_first[lax.div(at, gpu.integer(self.runs))]
        return entry * self.inverse.tiles.shape[2] + first + c

    def first_key(self, refs: Any, at: jax.Array) -> jax.Array:
        block = refs.piece_block[lax.div(at, gpu.integer(self.runs))]
        return block * self.block_size + lax.rem(at, gpu.integer(self.runs)) * gpu.ROWS

    def count(self, refs: Any, at: jax.Array) -> jax.Array:
        return refs.piece_size[lax.div(at, gpu.integer(self.runs))]

    def tile(self, refs: Any, at: jax.Array, c: jax.Array) -> jax.Array:
        return refs.visitors[self._slot(refs, at, c)]

    def selected(self, refs: Any, at: jax.Array, c: jax.Array, token: jax.Array) -> jax.Array:
        assert self.inverse.words is not None
        slot = self._slot(refs, at, c)
        return _bit(refs.visitor_words, slot, self.inverse.words.shape[3], token)


def _bit(words: Any, slot: jax.Array, count: int, token: jax.Array) -> jax.Array:
    """Bit ``token`` of the ``count`` words of ``slot``."""
    word = words[slot * count]
    chosen = jnp.full(token.shape, 0, jnp.int32) + word
    for number in range(1, count):
        chosen = jnp.where(token >= number * _BITS, words[slot * count + number], chosen)
    return (lax.shift_right_logical(chosen, token & (_BITS - 1)) & 1) > 0


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(block_size, scale, passes, q, k, v, indices, last):
    return _attend_forward(block_size, scale, passes, q, k, v, indices, last)[0]


def _attend_forward(block_size, scale, passes, q, k, v, indices, last):
    tiles, _ = passes
    layout = Layout.of(q, k.shape[2], indices.shape[2], tiles.warpgroups)
    reach = _reach(k, indices, last, block_size)
    keys, values = _keys(k, v, reach, block_size)
    lists = _tile_lists(indices, layout, keys.shape[1] // block_size)
    out, lse = gpu_query_major.forward(
        layout.to_tiles(pad_width(q)),
        keys,
        values,
        {"stop": layout.rows_of(last + 1)},
        _Unions(lists, block_size, tiles.keys),
        layout,
        scale=scale,
        keys=tiles.keys,
        steps=tiles.steps,
    )
    out = layout.from_tiles(out)[..., : v.shape[3]]
    lse = layout.from_tiles(lse[..., None])[..., 0]
    return (out, lse), (q, k, v, indices, lists, last, reach, out, lse)


def _attend_backward(block_size, scale, passes, residuals, cotangents):
    q, k, v, indices, lists, last, reach, out, lse = residuals
    d_out, d_lse = cotangents
    forward_tiles, tiles = passes
    layout = Layout.of(q, k.shape[2], indices.shape[2], tiles.warpgroups)
    keys, values = _keys(k, v, reach, block_size)
    if tiles.warpgroups != forward_tiles.warpgroups:
        lists = _tile_lists(indices, layout, keys.shape[1] // block_size)
    of_rows = GradientOperands.of(layout, q, d_out, out, lse, d_lse)
    arguments = (of_rows.q, keys, values, of_rows.d_out, of_rows.lse, of_rows.delta)
    rows = {"stop": layout.rows_of(last + 1)}
    dq = gpu_query_major.query_gradient(
        *arguments,
        rows,
        _Unions(lists, block_size, gpu.ROWS),
        layout,
        scale=scale,
        keys=gpu.ROWS,
        steps=tiles.query_steps,
    )
    inverse = build_inverse_lists(lists.blocks, lists.words, blocks=keys.shape[1] // block_size)
    pieces = Pieces.of(inverse, block_size)
    parts = gpu_key_major.key_gradients(
        *arguments, rows, pieces, layout, scale=scale, steps=tiles.key_steps
    )
    dk, dv = (
        sum_pieces(part, pieces.offset, layout, runs=pieces.runs, dtype=k.dtype) for part in parts
    )
    dk, dv = (dk[:, : k.shape[1], :, : k.shape[3]], dv[:, : k.shape[1], :, : v.shape[3]])
    return layout.from_tiles(dq)[..., : q.shape[3]], dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _tile_lists(indices, layout, blocks):
    # Groups too large for a tile were split: their parts share a list.
    spread = jnp.repeat(indices, layout.lists // indices.shape[2], axis=2)
    return build_tile_lists(spread, tile=layout.tile, blocks=blocks)


def _reach(
    k: Float[Array, "B S K H"],
    indices: Int[Array, "B T J P"],
    last: Int[Array, "B T"],
    block_size: int,
) -> Int[Array, "B blocks K"]:
    """The last key that any query sees of those that list the block, -1 if none does."""
    batch, _, lists, _ = indices.shape
    blocks, kv_heads = -(-k.shape[1] // block_size), k.shape[2]
    sequence = jnp.arange(batch, dtype=jnp.int32)[:, None, None, None]
    head = (jnp.arange(lists, dtype=jnp.int32) * kv_heads // lists)[None, None, :, None]
    block = jnp.where(indices < 0, blocks, indices)  # Unused slots are dropped.
    nothing = jnp.full((batch, blocks, kv_heads), -1, jnp.int32)
    # A maximum does not depend on the order in which it is taken.
    return nothing.at[sequence, block, head].max(last[:, :, None, None], mode="drop")


def _keys(k, v, reach, block_size):
    """Keys and values in whole blocks and padded widths, 0 where no query sees them: what is not
    seen may be NaN, and a weight of 0 does not silence that in a product.
    """
    length = k.shape[1]
    seen = jnp.repeat(reach, block_size, axis=1)[:, :length]
    seen = jnp.arange(length, dtype=jnp.int32)[None, :, None] <= seen
    whole = reach.shape[1] * block_size
    return (pad_to(pad_width(jnp.where(seen[..., None], x, 0)), 1, whole) for x in (k, v))
