"""Tile lists and inverse lists: what the fast executions of block-sparse attention walk over.

``tile`` consecutive queries form a tile that visits the *union* of their blocks once; a bit word
per (tile, block) says which of its queries selected the block, so that the result stays exact.
The inverse lists say, for every key block, which tiles visit it: gradients of keys and values are
sums over them, without atomics. Both are shared by all backends.

Axes beside the project's alphabet: A lists per query (K or N), U union slots, E = tiles * U.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = [
    "InverseLists",
    "TileLists",
    "build_inverse_lists",
    "build_tile_lists",
    "union_ratio",
]

_WORD_BITS = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileLists:
    """Per tile of consecutive queries, the union of their blocks and who selected each.

    ``blocks`` [B, A, tiles, U] int32, ascending, -1 in unused trailing slots; ``words``
    [B, A, tiles, U, W] int32, bit ``i % 32`` of word ``i // 32`` is set if query i of the tile
    selected the block, 0 in unused slots; ``count`` [B, A, tiles] int32, used slots.
    """

    blocks: Int[Array, "B A tiles U"]
    words: Int[Array, "B A tiles U W"]
    count: Int[Array, "B A tiles"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InverseLists:
    """Per key block, the tiles that visit it (compressed sparse rows over blocks).

    The tiles of block j are ``tiles[b, a, offsets[b, a, j] : offsets[b, a, j + 1]]``, ascending;
    ``words`` holds the bit words of the same entries, or is None if tiles are single queries.
    """

    offsets: Int[Array, "B A blocks+1"]
    tiles: Int[Array, "B A E"]
    words: Int[Array, "B A E W"] | None


def build_tile_lists(indices: Int[Array, "B T A P"], *, tile: int, blocks: int) -> TileLists:
    """Union of the lists of every ``tile`` consecutive queries.

    The number of slots is U = min(tile * P, blocks), the largest union there can be: nothing is
    ever dropped. Entries outside [0, blocks) are unused slots. T need not be a multiple of
    ``tile``: the last tile is short.

    Raises:
      ValueError: if ``tile`` is below 1, or the sort keys of a tile overflow int32.
    """
    if tile < 1:
        raise ValueError(f"tile={tile} must be at least 1")
    if (blocks + 1) * tile >= 2**31:
        raise ValueError(f"{blocks=} * {tile=} overflows int32; use a smaller tile")
    batch, queries, lists, slots = indices.shape
    tiles = -(-queries // tile)
    words = -(-tile // _WORD_BITS)
    union = min(tile * slots, blocks)
    entries = jnp.transpose(
        jnp.pad(
            indices.astype(jnp.int32),
            ((0, 0), (0, tiles * tile - queries), (0, 0), (0, 0)),
            constant_values=-1,
        ),
        (0, 2, 1, 3),
    ).reshape(batch * lists * tiles, tile, slots)
    rows = entries.shape[0]
    token = jnp.arange(tile, dtype=jnp.int32)[None, :, None]
    used = (entries >= 0) & (entries < blocks)
    keys = jnp.where(used, entries, blocks) * tile + token
    keys = jax.lax.sort(keys.reshape(rows, tile * slots), dimension=1)
    block, token = keys // tile, keys % tile
    first = jnp.concatenate([jnp.ones((rows, 1), bool), block[:, 1:] != block[:, :-1]], axis=1)
    first &= block < blocks
    rank = jnp.cumsum(first.astype(jnp.int32), axis=1) - 1
    slot = jnp.where(block < blocks, rank, union)
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    union_blocks = jnp.full((rows, union), -1, jnp.int32).at[row, slot].set(block, mode="drop")
    bit = jnp.left_shift(jnp.ones_like(token), token % _WORD_BITS)
    union_words = jnp.zeros((rows, union, words), jnp.int32)
    union_words = union_words.at[row, slot, token // _WORD_BITS].add(bit, mode="drop")
    return TileLists(
        blocks=union_blocks.reshape(batch, lists, tiles, union),
        words=union_words.reshape(batch, lists, tiles, union, words),
        count=jnp.sum(first, axis=1, dtype=jnp.int32).reshape(batch, lists, tiles),
    )


def build_inverse_lists(
    blocks_of_tiles: Int[Array, "B A tiles U"],
    words: Int[Array, "B A tiles U W"] | None,
    *,
    blocks: int,
) -> InverseLists:
    """Invert tile lists: which tiles visit each of the ``blocks`` key blocks.

    ``blocks_of_tiles`` may be the selection itself (a tile a query), for which ``words`` is None.
    Entries outside [0, blocks) are unused slots, in any place.
    """
    batch, lists, tiles, union = blocks_of_tiles.shape
    rows, entries = batch * lists, tiles * union
    block = blocks_of_tiles.reshape(rows, tiles, union)
    block = jnp.where((block >= 0) & (block < blocks), block, blocks)
    tile = jnp.arange(tiles, dtype=jnp.int32)[None, :, None]
    if words is not None or (blocks + 1) * tiles >= 2**31:
        place = jnp.arange(entries, dtype=jnp.int32)[None, :]
        block, order = jax.lax.sort(
            (block.reshape(rows, entries), jnp.broadcast_to(place, (rows, entries))),
            dimension=1,
            num_keys=1,
            is_stable=True,
        )
        tile = order // union
    else:
        # One operand sorts nearly twice as fast as two.
        keys = jax.lax.sort((block * tiles + tile).reshape(rows, entries), dimension=1)
        block, tile = keys // tiles, keys % tiles
    bounds = jnp.arange(blocks + 1, dtype=jnp.int32)
    offsets = jax.vmap(lambda row: jnp.searchsorted(row, bounds))(block)
    sorted_words = None
    if words is not None:
        width = words.shape[-1]
        flat = words.reshape(rows, entries, width)
        sorted_words = jnp.take_along_axis(flat, order[:, :, None], axis=1)
        sorted_words = sorted_words.reshape(batch, lists, entries, width)
    return InverseLists(
        offsets=offsets.astype(jnp.int32).reshape(batch, lists, blocks + 1),
        tiles=tile.reshape(batch, lists, entries),
        words=sorted_words,
    )


def union_ratio(indices: Int[Array, "B T J P"], tile: int) -> Float[Array, ""]:
    """Mean size of the union of ``tile`` consecutive lists over the mean size of a list.

    1 means that neighbours agree on everything, ``tile`` that they share nothing. float32 scalar;
    0 if nothing is selected anywhere.

    Raises:
      ValueError: if ``tile`` is below 1.
    """
    batch, queries, lists, slots = indices.shape
    # Blocks are only compared for equality, so any bound above the largest number serves.
    span = (2**31 - 1) // tile - 1 if tile >= 1 else 0
    if tile < 1:
        raise ValueError(f"tile={tile} must be at least 1")
    tiles = -(-queries // tile)
    padded = jnp.pad(
        indices, ((0, 0), (0, tiles * tile - queries), (0, 0), (0, 0)), constant_values=-1
    )
    grouped = jnp.transpose(padded, (0, 2, 1, 3)).reshape(batch, lists, tiles, tile * slots)
    ordered = jax.lax.sort(jnp.where(grouped >= 0, grouped, span), dimension=3)
    fresh = jnp.concatenate(
        [jnp.ones_like(ordered[..., :1], bool), ordered[..., 1:] != ordered[..., :-1]], axis=3
    )
    unions = jnp.sum(jnp.any(ordered < span, axis=3), dtype=jnp.float32)
    visited = jnp.sum(fresh & (ordered < span), dtype=jnp.float32)
    filled = jnp.any(indices >= 0, axis=3)
    mean_list = jnp.sum(indices >= 0, dtype=jnp.float32) / jnp.maximum(jnp.sum(filled), 1)
    mean_union = visited / jnp.maximum(unions, 1.0)
    return jnp.where(unions > 0, mean_union / jnp.maximum(mean_list, 1.0), 0.0)
