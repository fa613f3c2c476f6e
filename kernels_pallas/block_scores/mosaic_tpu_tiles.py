"""Tile sizes, layouts and the walk over keys that the TPU kernels of block scores share.

Tokens lie on lanes and entries on sublanes (see :mod:`kernels_pallas.tpu`): a product is
``[entries, H] x [H, tokens]`` for one head, heads of a group add up without crossing lanes, and any
G fills the tensor unit. A tile is ``tokens`` queries of one list: of all heads of a kv head, or of
one query head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Num

from kernels_pallas import tpu
from kernels_pallas.block_scores.pooling import Pooling
from kernels_pallas.ranged.mosaic_tpu_plan import walk


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Static tile sizes.

    Attributes:
      tokens: queries of a tile, a multiple of 128.
      blocks: key blocks whose entries are scored at a time, a multiple of 16.
      segment: scored blocks held before only the best are kept, a multiple of ``blocks``.
      entries: entries that a step of ``entry_lse`` visits, a multiple of 16.

    Raises:
      ValueError: for sizes that are not such multiples.
    """

    tokens: int = 128
    blocks: int = 64
    segment: int = 4096
    entries: int = 512

    def __post_init__(self) -> None:
        rests = (
            self.tokens % tpu.LANES, self.blocks % tpu.TOKEN_STEP, self.entries % tpu.TOKEN_STEP
        )  # fmt: skip
        if min(dataclasses.astuple(self)) < 1 or any(rests) or self.segment % self.blocks:
            raise ValueError(
                f"{self}: tokens must be a positive multiple of {tpu.LANES}, blocks and entries of "
                f"{tpu.TOKEN_STEP}, segment of blocks"
            )


def tiles_for(chip: str, members: int, pooling: Pooling | None = None) -> Tiles:
    """Sizes by rule; ``chip`` is :func:`kernels_pallas.tpu.chip_kind`.

    One tensor-unit pass wants 128 tokens; a list of one head takes 256, for twice the work on keys
    that were copied. Steps of about 256 entries keep both busy; a wide stride takes fewer blocks a
    step, so that its scores stay near 256 KiB. Every chip takes the same: reasoned, not measured,
    no TPU was at hand.
    """
    del chip
    blocks = 64
    while pooling is not None and blocks > tpu.TOKEN_STEP and blocks * pooling.stride > 512:
        blocks //= 2
    return Tiles(tokens=256 if members == 1 else 128, blocks=blocks)


def row_tiles(
    layout: tpu.RowLayout, *rows: tuple[Int[Array, "B T"], int]
) -> Int[Array, "B tiles rows tokens"]:
    """Numbers of every token, each with what the tokens added to fill the last tile get."""
    added = ((0, 0), (0, layout.padded - layout.queries))
    shape = (layout.batch, layout.tiles, layout.tokens)
    padded = [jnp.pad(x, added, constant_values=fill).reshape(shape) for x, fill in rows]
    return jnp.stack(padded, axis=2)


def list_tiles(
    layout: tpu.RowLayout, x: Num[Array, "B T lists_times_members"]
) -> Num[Array, "B_times_lists tiles members tokens"]:
    """Numbers of every token and query head (or list), 0 for the tokens added."""
    x = jnp.pad(x, ((0, 0), (0, layout.padded - layout.queries), (0, 0)))
    x = x.reshape(layout.batch, layout.tiles, layout.tokens, layout.lists, -1)
    x = jnp.transpose(x, (0, 3, 1, 4, 2))
    return x.reshape(-1, *x.shape[2:])


def from_list_tiles(
    layout: tpu.RowLayout, x: Num[Array, "B_times_lists tiles members tokens"]
) -> Num[Array, "B T lists members"]:
    """Inverse of :func:`list_tiles`."""
    x = x.reshape(layout.batch, layout.lists, *x.shape[1:])
    x = jnp.transpose(x, (0, 2, 4, 1, 3))
    return x.reshape(layout.batch, layout.padded, *x.shape[3:])[:, : layout.queries]


def seen_entries(
    rows: Int[Array, "B tiles rows tokens"], entries: int
) -> tuple[Int[Array, "B tiles"], Int[Array, "B tiles"]]:
    """The span [low, high) that holds what a tile's tokens see, from rows 0 (start) and 1 (stop);
    high is 0 where they see nothing.
    """
    start, stop = rows[:, :, 0], rows[:, :, 1]
    seeing = stop > start
    low = jnp.min(jnp.where(seeing, start, entries), axis=2)
    return low, jnp.max(jnp.where(seeing, stop, 0), axis=2)


def spans_of(
    first: Int[Array, "B tiles"], end: Int[Array, "B tiles"]
) -> Int[Array, "B tiles 1 128"]:
    """Scalars of every tile as ``walk`` reads them: its first and end step, two unused, the next
    tile's first and end.
    """
    first = jnp.minimum(first, end)
    following = [jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (first, end)]
    unused = jnp.zeros_like(first)
    stacked = jnp.stack([first, end, unused, unused, *following], axis=2)
    stacked = jnp.pad(stacked, ((0, 0), (0, 0), (0, tpu.LANES - stacked.shape[2])))
    return stacked[:, :, None, :]


def common_specs(
    layout: tpu.RowLayout, rows: int, width: int
) -> tuple[tuple[int, int], list[pl.BlockSpec]]:
    """The grid (B * lists, tiles), and its specs of spans, :func:`row_tiles` and queries."""
    lists, members = layout.lists, layout.group
    specs = [
        pl.BlockSpec(
            (1, 1, 1, tpu.LANES), lambda h, i: (h // lists, i, 0, 0), memory_space=pltpu.SMEM
        ),
        pl.BlockSpec((1, 1, rows, layout.tokens), lambda h, i: (h // lists, i, 0, 0)),
        pl.BlockSpec((1, layout.tokens, members * width), lambda h, i: (h // lists, i, h % lists)),
    ]
    return (layout.batch * lists, layout.tiles), specs


def list_spec(layout: tpu.RowLayout, rows: int) -> pl.BlockSpec:
    """Spec of [B * lists, tiles, rows, tokens]."""
    return pl.BlockSpec((1, 1, rows, layout.tokens), lambda h, i: (h, i, 0, 0))


def walk_entries(
    spans: Any,
    slot: Any,
    memory: Any,
    buffer: Any,
    arrived: Any,
    compute: Callable[[Any, Any], None],
    *,
    layout: tpu.RowLayout,
    kv_heads: int,
    advance: int,
) -> None:
    """``compute(step, slot)`` for every step of the tile's span with its keys in ``buffer[slot]``.

    Step s holds the rows of ``memory`` [B, rows, K * width] from ``s * advance`` on, a multiple of
    16, of the kv head that the list belongs to.
    """
    grid_row = pl.program_id(0)
    batch = grid_row // layout.lists
    head = grid_row % layout.lists // (layout.lists // kv_heads)
    _, rows, width = buffer.shape

    def copies(step, at):
        row = pl.ds(pl.multiple_of(step * advance, tpu.TOKEN_STEP), rows)
        lane = pl.ds(pl.multiple_of(head * width, tpu.LANES), width)
        return [pltpu.make_async_copy(memory.at[batch, row, lane], buffer.at[at], arrived.at[at])]

    walk(spans, slot, copies, compute)


def for_members(members: int, body: Callable[[Any, Any], Any], state: Any) -> Any:
    """``state = body(g, state)`` for each head of a list; pairs of them where they are many, which
    is enough to overlap one head's products with the other's exponentials.
    """
    if members > 4:
        pairs = jnp.int32(members // 2)
        state = jax.lax.fori_loop(
            jnp.int32(0), pairs, lambda i, state: body(2 * i + 1, body(2 * i, state)), state
        )
        return body(members - 1, state) if members % 2 else state
    for g in range(members):
        state = body(g, state)
    return state


def member_logits(
    key: Float[Array, "rows width"], queries: Any, g: Any, factor: float
) -> Float[Array, "rows tokens"]:
    """factor * key . query of head g, out of the reference ``queries`` [1, tokens, G * width]."""
    width = key.shape[1]
    at = g * width if isinstance(g, int) else pl.multiple_of(g * width, tpu.LANES)
    return tpu.product(key, queries[0, :, pl.ds(at, width)], "nt") * factor
