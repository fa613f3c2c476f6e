"""Tile sizes of the TPU kernels of ranged attention, and the walk over a span they share."""

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


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Static sizes: ``tokens`` of a query tile (multiple of 16), ``keys`` of a step (of 128)."""

    tokens: int
    keys: int

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.tokens % tpu.TOKEN_STEP:
            raise ValueError(f"tokens={self.tokens} must be a multiple of {tpu.TOKEN_STEP}")
        if self.keys < 1 or self.keys % tpu.LANES:
            raise ValueError(f"keys={self.keys} must be a multiple of {tpu.LANES}")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every static size of a call; widths are padded to lanes."""

    layout: tpu.RowLayout
    keys: int
    kv_heads: int
    width: int
    value_width: int
    out_width: int
    block: int
    scale: float

    @property
    def blocks(self) -> int:
        """Key blocks of a sequence."""
        return -(-self.keys // self.block)

    @property
    def padded_keys(self) -> int:
        """Keys of whole blocks."""
        return self.blocks * self.block


def tiles_for(
    chip: str, tokens: int, keys: int, group: int, width: int, value_width: int, itemsize: int
) -> Tiles:
    """Sizes by rule; ``chip`` is :func:`kernels_pallas.tpu.chip_kind`.

    About 512 rows by 512 keys: each product is then some four tensor-unit passes deep on every
    generation and a step's copies (256 KiB at H = 128, bfloat16) take less than its products.
    v6e computes four times faster per byte, hence twice the keys. Halved until the kernels fit
    into vector memory. Reasoned, not measured: no TPU was at hand.
    """
    query_tokens = max(tpu.TOKEN_STEP, 512 // group // tpu.TOKEN_STEP * tpu.TOKEN_STEP)
    query_tokens = min(query_tokens, tpu.round_up(tokens, tpu.TOKEN_STEP))
    step = min(1024 if "v6" in chip else 512, tpu.round_up(keys, tpu.LANES))
    while step > tpu.LANES and (
        vmem_bytes(query_tokens, step, group, width, value_width, itemsize) > tpu.VMEM_LIMIT // 2
    ):
        step = tpu.round_up(step // 2, tpu.LANES)
    return Tiles(query_tokens, step)


def vmem_bytes(
    tokens: int, keys: int, group: int, width: int, value_width: int, itemsize: int
) -> int:
    """Vector memory of the largest of the three kernels: blocks twice, scratch, temporaries."""
    both = width + value_width
    rows = tpu.round_up(tokens * group, tpu.LANES)
    tile = tokens * group * both * itemsize
    logits = 4 * keys * rows * 4
    query_major = 2 * tile + rows * both * itemsize + 2 * keys * both * itemsize
    query_major += 2 * tokens * group * max(width, value_width) * itemsize
    query_major += 2 * rows * max(width, value_width) * 4
    key_major = 2 * tile + 2 * rows * both * itemsize + 4 * keys * both * itemsize
    key_major += 2 * keys * both * 4
    return max(query_major, key_major) + logits


def plan_for(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    tiles: Tiles | None,
    direction: tuned.Direction = "forward",
) -> Plan:
    """The plan of a pass: ``tiles``, measured ones or sizes by rule. Raises what does not fit."""
    batch, queries, heads, width = q.shape
    keys, kv_heads, value_width = v.shape[1:]
    group = heads // kv_heads
    widths = tpu.round_up(width, tpu.LANES), tpu.round_up(value_width, tpu.LANES)
    chip = tpu.chip_kind()

    def check(tiles: Tiles) -> None:
        needed = vmem_bytes(tiles.tokens, tiles.keys, group, *widths, q.dtype.itemsize)
        tpu.check_vmem(
            "ranged_attention", needed, f"G={group} heads of {width} and {value_width}, {tiles}"
        )

    if tiles is None:
        tiles = tuned.choose(
            "ranged_attention",
            chip,
            tiles_for(chip, queries, keys, group, *widths, q.dtype.itemsize),
            check,
            direction=direction,
            length=queries,
            group=group,
            width=widths[0],
            value_width=widths[1],
            dtype=str(q.dtype),
        )
    check(tiles)
    layout = tpu.RowLayout(batch, queries, kv_heads, group, tiles.tokens)
    return Plan(layout, keys, kv_heads, *widths, value_width, tiles.keys, scale)


def tile_spans(
    plan: Plan, start: Int[Array, "B T"], stop: Int[Array, "B T"]
) -> Int[Array, "B tiles 1 128"]:
    """Scalars of every tile: first and end of the blocks it visits, first and end of those that
    all its rows see whole, first and end of the next tile's (0, 0 after the last).
    """
    layout, block = plan.layout, plan.block
    added = ((0, 0), (0, layout.padded - layout.queries))
    start, stop = (
        jnp.pad(x, added).reshape(layout.batch, layout.tiles, layout.tokens) for x in (start, stop)
    )
    alive = stop > start
    first = jnp.min(jnp.where(alive, start, plan.keys), axis=2) // block
    end = -(-jnp.max(jnp.where(alive, stop, 0), axis=2) // block)
    first = jnp.minimum(first, end)
    whole_first, whole_end = -(-jnp.max(start, axis=2) // block), jnp.min(stop, axis=2) // block
    return _scalars(first, end, whole_first, whole_end)


def key_visits(plan: Plan, spans: Int[Array, "B tiles 1 128"]) -> Int[Array, "B blocks 1 128"]:
    """Scalars of every key block: first and end of the tiles to visit, twice unused, then the next
    block's first and end.
    """
    first, end = spans[:, None, :, 0, 0], spans[:, None, :, 0, 1]
    block = jnp.arange(plan.blocks, dtype=jnp.int32)[None, :, None]
    tile = jnp.arange(plan.layout.tiles, dtype=jnp.int32)[None, None, :]
    meets = (first <= block) & (block < end)
    first_tile = jnp.min(jnp.where(meets, tile, plan.layout.tiles), axis=2)
    end_tile = jnp.max(jnp.where(meets, tile + 1, 0), axis=2)
    first_tile = jnp.minimum(first_tile, end_tile)
    zero = jnp.zeros_like(first_tile)
    return _scalars(first_tile, end_tile, zero, zero)


def _scalars(first, end, *others):
    following = (jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (first, end))
    stacked = jnp.stack([first, end, *others, *following], axis=2).astype(jnp.int32)
    stacked = jnp.pad(stacked, ((0, 0), (0, 0), (0, tpu.LANES - stacked.shape[2])))
    return stacked[:, :, None, :]


def walk(
    scalars: Any,
    slot: Any,
    copies: Callable[[Any, Any], list[Any]],
    compute: Callable[[Any, Any], None],
) -> None:
    """``compute(item, slot)`` for every item of [first, end) of this grid cell (axis 1), with the
    copies of the next item, of the next cell after the last, under way. ``slot`` remembers across
    cells where the first item went.
    """
    first, end = scalars[0, 0, 0, 0], scalars[0, 0, 0, 1]
    next_first, next_end = scalars[0, 0, 0, 4], scalars[0, 0, 0, 5]

    @pl.when(pl.program_id(1) == 0)
    def _():
        slot[0] = jnp.int32(0)

        @pl.when(end > first)
        def _():
            tpu.start(copies(first, 0))

    def hand_over(free):
        @pl.when(next_end > next_first)
        def _():
            tpu.start(copies(next_first, free))

    base = slot[0]
    tpu.stream(
        end - first,
        copies=lambda i, at: copies(first + i, at),
        compute=lambda i, at: compute(first + i, at),
        base=base,
        hand_over=hand_over,
    )
    slot[0] = (base + end - first) % 2


def walk_keys(
    spans: Any,
    slot: Any,
    sources: tuple[Any, Any],
    buffers: tuple[Any, Any],
    semaphores: Any,
    compute: Callable[..., None],
    plan: Plan,
) -> None:
    """``compute(block, slot, whole=...)`` for every key block of the tile's span; ``whole`` where
    all rows see all of it. Keys and values lie in ``buffers`` at ``slot``.
    """
    batch = pl.program_id(0) // plan.kv_heads
    head = pl.program_id(0) % plan.kv_heads

    def copies(block, at):
        row = pl.ds(pl.multiple_of(block * plan.block, plan.block), plan.block)
        found = []
        for number, (source, buffer) in enumerate(zip(sources, buffers, strict=True)):
            width = buffer.shape[2]
            lane = pl.ds(pl.multiple_of(head * width, tpu.LANES), width)
            part = source.at[batch, row, lane]
            copy = pltpu.make_async_copy(part, buffer.at[at], semaphores.at[at, number])
            found.append(copy)
        return found

    def step(block, at):
        whole = (block >= spans[0, 0, 0, 2]) & (block < spans[0, 0, 0, 3])
        pl.when(whole)(functools.partial(compute, block, at, whole=True))
        pl.when(~whole)(functools.partial(compute, block, at, whole=False))

    walk(spans, slot, copies, step)


def visible_keys(
    rows: Int[Array, "8 Mp"], at: int, position: Int[Array, ""], keys: int
) -> Bool[Array, "S Mp"]:
    """Which keys of position, position + 1, .. each row sees: [start, stop) are rows at, at + 1."""
    key = position + jax.lax.broadcasted_iota(jnp.int32, (keys, rows.shape[1]), 0)
    return (key >= tpu.row_of(rows, at)) & (key < tpu.row_of(rows, at + 1))
