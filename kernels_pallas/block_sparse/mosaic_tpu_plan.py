"""Tile sizes of the TPU kernels of block-sparse attention, their lists, and the walk over them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Int

from kernels_pallas import tpu, tuned
from kernels_pallas.block_sparse.lists import TileLists, build_inverse_lists, build_tile_lists

SELECTED = 2**23
"""Selected slots (B * J * T * P) whose lists may exist at once; more are done in query chunks."""

_OFFSETS = tpu.LANES // 2  # key blocks whose segment bounds share a row of scalars


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Static sizes; none changes a result.

    Attributes:
      tokens: consecutive tokens that share a union, a multiple of 16.
      blocks: key blocks of a step (forward and dq).
      tiles: query tiles of a step (dk and dv).
      entries: list entries that lie in scalar memory at once, a multiple of 128 and of ``blocks``.
      selected: selected slots whose lists may exist at once.
    """

    tokens: int
    blocks: int
    tiles: int
    entries: int = 1024
    selected: int = SELECTED

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.tokens % tpu.TOKEN_STEP:
            raise ValueError(f"tokens={self.tokens} must be a multiple of {tpu.TOKEN_STEP}")
        if not 1 <= self.blocks <= tpu.LANES // 2:
            raise ValueError(f"blocks={self.blocks} must lie in 1..{tpu.LANES // 2}")
        if self.tiles < 1 or self.selected < 1:
            raise ValueError(f"tiles={self.tiles} and selected={self.selected} must be positive")
        if self.entries < 1 or self.entries % tpu.LANES or self.entries % self.blocks:
            raise ValueError(
                f"entries={self.entries} must be a multiple of {tpu.LANES} and of "
                f"blocks={self.blocks}"
            )


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every static size of a call; widths are padded to lanes.

    ``layout`` is that of one chunk of queries; ``chunks`` of them cover the sequence. Axis A of
    the layout are the groups of query heads that share a list: K of them, or N.
    """

    layout: tpu.RowLayout
    chunks: int
    tiles: Tiles
    list_heads: int
    kv_heads: int
    slots: int
    keys: int
    block_size: int
    width: int
    value_width: int
    out_width: int
    scale: float

    @property
    def blocks(self) -> int:
        """Key blocks of a sequence."""
        return -(-self.keys // self.block_size)

    @property
    def padded_keys(self) -> int:
        """Keys of whole blocks."""
        return self.blocks * self.block_size

    @property
    def sharing(self) -> int:
        """Head groups of one kv head."""
        return self.layout.lists // self.kv_heads

    @property
    def words(self) -> int:
        """Bit words of a list entry."""
        return -(-self.layout.tokens // 32)

    @property
    def entries(self) -> int:
        """List entries of a grid cell: a tile's whole list, or a part if it is long."""
        union = min(self.layout.tokens * self.slots, self.blocks)
        return min(self.tiles.entries, tpu.round_up(union, tpu.LANES))

    @property
    def parts(self) -> int:
        """Grid cells of a tile."""
        return -(-min(self.layout.tokens * self.slots, self.blocks) // self.entries)

    def list_of(self, group: Any) -> Any:
        """Row of the lists that head group ``group`` (counted over the batch) reads."""
        if self.list_heads == self.layout.lists:
            return group
        return group // self.layout.lists


def tiles_for(
    chip: str, tokens: int, group: int, block_size: int, width: int, value_width: int, itemsize: int
) -> Tiles:
    """Sizes by rule; ``chip`` is :func:`kernels_pallas.tpu.chip_kind`.

    About 128 rows a tile fill the lanes; more tokens would only widen unions. 256 keys, or for dk
    and dv 512 rows, a step; half of that if it does not fit into vector memory. The generations
    differ too little in lanes and registers to differ here. Reasoned, not measured: no TPU was at
    hand.
    """
    del chip
    query_tokens = max(tpu.TOKEN_STEP, 128 // group // tpu.TOKEN_STEP * tpu.TOKEN_STEP)
    query_tokens = min(query_tokens, tpu.round_up(tokens, tpu.TOKEN_STEP))
    rows = tpu.round_up(query_tokens * group, tpu.LANES)
    blocks, tiles = 1, max(1, 512 // rows)
    while 2 * blocks * block_size <= 256:
        blocks *= 2
    while (
        vmem_bytes(
            Tiles(query_tokens, blocks, tiles), group, block_size, width, value_width, itemsize
        )
        > tpu.VMEM_LIMIT // 2
        and blocks * tiles > 1
    ):
        blocks, tiles = max(1, blocks // 2), max(1, tiles // 2)
    return Tiles(query_tokens, blocks, tiles)


def vmem_bytes(
    tiles: Tiles, group: int, block_size: int, width: int, value_width: int, itemsize: int
) -> int:
    """Vector memory of the larger of the dq and dk/dv kernels: blocks twice, scratch, values."""
    both, wide = width + value_width, max(width, value_width)
    tile = tiles.tokens * group
    rows = tpu.round_up(tile, tpu.LANES)
    keys = tiles.blocks * block_size
    query_major = (3 * tile * both + rows * both + 2 * keys * both + keys * both) * itemsize
    query_major += 2 * rows * wide * 4 + 4 * keys * rows * 4
    step = tiles.tiles * rows
    key_major = (2 * tiles.tiles * tile * both + 2 * step * both) * itemsize
    key_major += 2 * block_size * both * (itemsize + 4) * 2 + 4 * block_size * step * 4
    return max(query_major, key_major)


def plan_for(
    q: Array,
    k: Array,
    v: Array,
    indices: Array,
    block_size: int,
    scale: float,
    tiles: Tiles | None,
    direction: tuned.Direction = "forward",
) -> Plan:
    """The plan of a pass: ``tiles``, measured ones or sizes by rule. Raises what does not fit."""
    batch, queries, heads, width = q.shape
    keys, kv_heads, value_width = v.shape[1:]
    list_heads, slots = indices.shape[2:]
    if block_size % tpu.TOKEN_STEP:
        raise NotImplementedError(
            f"block_sparse_attention on TPUs needs block_size={block_size} to be a multiple of "
            f"{tpu.TOKEN_STEP}; use implementation='xla'"
        )
    lists = max(list_heads, kv_heads)
    group = heads // lists
    widths = tpu.round_up(width, tpu.LANES), tpu.round_up(value_width, tpu.LANES)
    sizes = (block_size, *widths, q.dtype.itemsize)
    chip = tpu.chip_kind()

    def check(tiles: Tiles) -> None:
        tpu.check_vmem(
            "block_sparse_attention",
            vmem_bytes(tiles, group, *sizes),
            f"{group} heads of {width} and {value_width} a list, {block_size=}, {tiles}",
        )

    if tiles is None:
        tiles = tuned.choose(
            "block_sparse_attention",
            chip,
            tiles_for(chip, queries, group, *sizes),
            check,
            direction=direction,
            length=queries,
            group=group,
            block_size=block_size,
            width=widths[0],
            value_width=widths[1],
            dtype=str(q.dtype),
        )
    check(tiles)
    whole = -(-queries // tiles.tokens)
    chunks = min(whole, -(-batch * list_heads * queries * slots // tiles.selected))
    layout = tpu.RowLayout(batch, -(-whole // chunks) * tiles.tokens, lists, group, tiles.tokens)
    if chunks == 1:
        layout = dataclasses.replace(layout, queries=queries)
    return Plan(
        layout=layout,
        chunks=chunks,
        tiles=tiles,
        list_heads=list_heads,
        kv_heads=kv_heads,
        slots=slots,
        keys=keys,
        block_size=block_size,
        width=widths[0],
        value_width=widths[1],
        out_width=value_width,
        scale=scale,
    )


# --- Lists as the kernels read them (outside the kernels) ---


def tile_lists(plan: Plan, indices: Int[Array, "B T J P"]) -> TileLists:
    """Lists of the tiles of one chunk of queries."""
    return build_tile_lists(indices, tile=plan.layout.tokens, blocks=plan.blocks)


def whole_to(plan: Plan, lists: TileLists, last: Int[Array, "B T"]) -> Int[Array, "B J tiles"]:
    """Last key up to which every row of a tile sees whatever it selected; -1 for tiles with a row
    that sees nothing. Beyond it kernels look at single keys and clear what nobody reads.
    """
    layout, tile = plan.layout, plan.layout.tokens
    added = ((0, 0), (0, layout.padded - layout.queries))
    last = jnp.pad(last, added, constant_values=plan.keys).reshape(layout.batch, 1, -1, tile)
    token = jnp.arange(tile, dtype=jnp.int32)
    missing = jnp.arange(layout.padded, dtype=jnp.int32).reshape(1, 1, -1, tile) >= layout.queries
    words = jax.lax.reduce(lists.words, jnp.int32(0), jax.lax.bitwise_or, (3,))
    words = jnp.take(words, token // 32, axis=3)
    shift = jnp.broadcast_to((token % 32).reshape(1, 1, 1, tile), words.shape)
    alive = (jax.lax.shift_right_logical(words, shift) & 1 > 0) | missing
    return jnp.where(jnp.all(alive, axis=3), jnp.min(last, axis=3), -1)


def query_rows(
    plan: Plan, lists: TileLists, whole: Int[Array, "B J tiles"]
) -> Int[Array, "BJ cells 1 row"]:
    """A row of scalars per grid cell: ids and words of its list entries, then its count, the next
    cell's count, ``whole_to``, and the ids of the next cell's first step.

    Unused entries repeat the last block of the list with no bit set: they are read, but hidden.
    """
    entries, parts, union = plan.entries, plan.parts, lists.blocks.shape[3]
    heads, tiles = plan.layout.batch * plan.list_heads, plan.layout.tiles
    added = ((0, 0), (0, 0), (0, entries * parts - union))
    ids = lists.blocks.reshape(heads, tiles, union)
    ids = jnp.where(ids >= 0, ids, jnp.max(ids, axis=2, keepdims=True))
    ids = jnp.pad(jnp.maximum(ids, 0), added, mode="edge").reshape(heads, -1, entries)
    words = [
        jnp.pad(lists.words[..., w].reshape(heads, tiles, union), added).reshape(heads, -1, entries)
        for w in range(plan.words)
    ]
    before = jnp.arange(parts, dtype=jnp.int32).reshape(1, 1, parts) * entries
    count = jnp.clip(lists.count.reshape(heads, tiles, 1) - before, 0, entries)
    count = count.reshape(heads, -1, 1)
    whole = jnp.repeat(whole.reshape(heads, tiles), parts, axis=1)[..., None]
    following = ((0, 0), (0, 1), (0, 0))
    next_count = jnp.pad(count[:, 1:], following)
    next_ids = jnp.pad(ids[:, 1:, : plan.tiles.blocks], following)
    tail = jnp.concatenate([count, next_count, whole, next_ids], axis=2)
    tail = jnp.pad(tail, ((0, 0), (0, 0), (0, tpu.LANES - tail.shape[2])))
    return jnp.concatenate([ids, *words, tail], axis=2)[:, :, None, :]


def inverse_rows(
    plan: Plan, lists: TileLists, whole: Int[Array, "B J tiles"]
) -> tuple[Int[Array, "BJ rows 1 128"], Int[Array, "BJ parts 1 row"]]:
    """The inverse lists: segment bounds of 64 key blocks a row (starts, then stops), and rows of
    ``tiles.entries`` entries: tiles, words, and their ``whole_to``.
    """
    shape = lists.blocks.shape
    extra = jnp.broadcast_to(whole[..., None, None], (*shape, 1))
    words = jnp.concatenate([lists.words, extra], axis=4)
    inverse = build_inverse_lists(lists.blocks, words, blocks=plan.blocks)
    assert inverse.words is not None
    heads, entries = shape[0] * shape[1], plan.tiles.entries
    added = -plan.blocks % _OFFSETS
    offsets = inverse.offsets.reshape(heads, -1)
    bounds = [
        jnp.pad(x, ((0, 0), (0, added))).reshape(heads, -1, _OFFSETS)
        for x in (offsets[:, :-1], offsets[:, 1:])
    ]
    columns = [inverse.tiles, *jnp.moveaxis(inverse.words, 3, 0)]
    added = -inverse.tiles.shape[2] % entries
    columns = [
        jnp.pad(x.reshape(heads, -1), ((0, 0), (0, added))).reshape(heads, -1, entries)
        for x in columns
    ]
    first, second = (jnp.concatenate(x, axis=2)[:, :, None, :] for x in (bounds, columns))
    return first, second


# --- Inside the kernels ---


def segment(bounds: Any, block: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """First and end of the entries of key block ``block``, from a row of :func:`inverse_rows`."""
    at = block % _OFFSETS
    return bounds[0, 0, 0, at], bounds[0, 0, 0, _OFFSETS + at]


def bounds_row(block: Any) -> Any:
    """Number of the row of bounds that holds ``block``."""
    return block // _OFFSETS


def selected_rows(plan: Plan, words: list[Int[Array, ""]]) -> Bool[Array, "1 Mp"]:
    """Which rows of a tile selected a block, from the bit words of the list entry."""
    shape = (1, plan.layout.matrix_rows)
    token = jax.lax.broadcasted_iota(jnp.int32, shape, 1) % plan.layout.tokens
    word = jnp.full(shape, words[0], jnp.int32)
    for number, other in enumerate(words[1:], start=1):
        word = jnp.where(token // 32 == number, other, word)
    return (jax.lax.shift_right_logical(word, token % 32) & 1) > 0


def walk_list(
    plan: Plan,
    row: Any,
    slot: Any,
    sources: tuple[Any, Any],
    buffers: tuple[Any, Any],
    semaphores: Any,
    last: Callable[[], Int[Array, "1 Mp"]],
    compute: Callable[..., None],
) -> None:
    """``compute(slot, visible, careful=...)`` for the entries of a grid cell, step by step, while
    the next step's blocks, after the last the next cell's first, are fetched.

    ``visible`` [keys of a step, Mp]. ``careful`` (static) marks steps in which a key may be
    read by nobody. ``slot`` remembers across cells where the first step went.
    """
    size, step, entries = plan.block_size, plan.tiles.blocks, plan.entries
    tail = entries * (1 + plan.words)
    group = pl.program_id(0)
    batch = group // plan.layout.lists
    head = group % plan.layout.lists // plan.sharing

    def copies(first, at):
        found = []
        for place in range(step):
            block = row[0, 0, 0, first + place]
            source_row = pl.ds(pl.multiple_of(block * size, size), size)
            for number, (source, buffer) in enumerate(zip(sources, buffers, strict=True)):
                width = buffer.shape[2]
                lane = pl.ds(pl.multiple_of(head * width, tpu.LANES), width)
                part = source.at[batch, source_row, lane]
                target = buffer.at[at, pl.ds(place * size, size)]
                found.append(pltpu.make_async_copy(part, target, semaphores.at[at, number]))
        return found

    count, next_count = row[0, 0, 0, tail], row[0, 0, 0, tail + 1]

    @pl.when(pl.program_id(1) == 0)
    def _():
        slot[0] = jnp.int32(0)
        pl.when(count > 0)(lambda: tpu.start(copies(0, 0)))

    def hand_over(free):
        pl.when(next_count > 0)(lambda: tpu.start(copies(tail + 3, free)))

    def visible(first, careful):
        key = jax.lax.broadcasted_iota(jnp.int32, (size, plan.layout.matrix_rows), 0)
        parts = []
        for place in range(step):
            words = [row[0, 0, 0, first + place + (1 + w) * entries] for w in range(plan.words)]
            limit = jnp.where(selected_rows(plan, words), size, -1)
            if careful:
                limit = jnp.minimum(limit, last() - row[0, 0, 0, first + place] * size)
            parts.append(key <= limit)
        return parts[0] if step == 1 else jnp.concatenate(parts, axis=0)

    def visit(i, at):
        first = i * step
        top = row[0, 0, 0, first]
        for place in range(1, step):
            top = jnp.maximum(top, row[0, 0, 0, first + place])
        careful = (top + 1) * size - 1 > row[0, 0, 0, tail + 2]

        def run(careful):
            compute(at, visible(first, careful), careful=careful)

        pl.when(careful)(functools.partial(run, True))
        pl.when(~careful)(functools.partial(run, False))

    steps = (count + step - 1) // step
    base = slot[0]
    tpu.stream(
        steps,
        copies=lambda i, at: copies(i * step, at),
        compute=visit,
        base=base,
        hand_over=hand_over,
    )
    slot[0] = (base + steps) % 2
