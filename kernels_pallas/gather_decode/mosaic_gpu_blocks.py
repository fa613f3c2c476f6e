"""Mosaic GPU kernel of gathered decoding in blocks: whole blocks arrive by TMA (Hopper).

A unit is what one copy fetches: a block, or 64 rows of a longer one. A step of 64 keys holds one
or several units. XLA turns the lists into a table of units; the kernel only follows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels_pallas.gather_decode.mosaic_gpu_attend import (
    ROWS,
    Sizes,
    Tiles,
    attend,
    choose_tiles,
    compute,
    item,
    merge_splits,
    pad_queries,
    run,
    share,
    sizes_for,
    split_steps,
    stream,
    swizzled,
)
from kernels_pallas.gpu import MATRIX, integer

__all__ = ["Units", "attend_units", "units_of"]


@dataclass(frozen=True)
class Units:
    """How blocks become units: ``rows`` of a unit, ``parts`` of a block, units ``a_step``."""

    rows: int
    parts: int
    a_step: int

    @property
    def filled(self) -> int:
        """Rows of a step that anything is copied to."""
        return self.rows * self.a_step


def units_of(length: int) -> Units:
    """Units of blocks of ``length`` keys."""
    rows = min(length, ROWS)
    return Units(rows=rows, parts=-(-length // ROWS), a_step=ROWS // rows)


def attend_units(
    q: Float[Array, "B T N H"],
    k: Float[Array, "*cache"],
    v: Float[Array, "*cache"],
    table: Int[Array, "items U 4"],
    *,
    units: Units,
    lists: int,
    scale: float,
    blocked: bool,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "items G Hv"], Float[Array, "items G"]]:
    """Attention of every list over its units, float32.

    Args:
      q: queries; item (b, t, l) reads the heads of list l.
      k: [B, S, K, H], or [BKM, H, L] if ``blocked``.
      v: [B, S, K, Hv], or [BKM, L, Hv].
      table: (sequence or block, first key, first visible row, one past the last visible row) of
        every unit. Units that show nothing are (0, 0, 0, 0); those at the end cost nothing.
      units: how blocks become units.
      lists: lists of a query.
      scale: factor on the logits.
      blocked: which of the two cache layouts.
      tiles: default :func:`choose_tiles`.

    Raises:
      NotImplementedError: for sizes the kernel cannot take.
    """
    op = "gather_blocks" if blocked else "gather_decode"
    width, value_width = q.shape[3], v.shape[-1]
    sizes = sizes_for(
        op,
        table.shape[0],
        q.shape[2] // lists,
        width,
        value_width,
        q.dtype,
        lanes=units.rows if blocked else 0,
    )
    slot_bytes = 2 * ROWS * (width + sizes.value_rows)
    tiles = tiles or choose_tiles(op, sizes, slot_bytes, length=table.shape[1] * units.rows)
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % units.a_step), (0, 0)))
    longest = table.shape[1] // units.a_step
    live = jnp.any((table[:, :, 3] > 0).reshape(sizes.items, longest, -1), axis=2)
    number = jnp.arange(1, longest + 1, dtype=jnp.int32)[None, :]
    bounds, splits = split_steps(jnp.max(jnp.where(live, number, 0), axis=1), longest, sizes, tiles)
    kv_heads = 1 if blocked else k.shape[2]

    def body(refs):
        listed = item(refs, sizes, splits)
        head = lax.div(lax.rem(listed, integer(lists)), integer(lists // kv_heads))

        @pl.when(refs.warpgroup == 0)
        def _():
            _compute(refs, sizes, units, splits, listed, scale, blocked)

        @pl.when(refs.warpgroup == 1)
        def _():
            _copy(refs, sizes, units, splits, listed, head, blocked)

    keys = (tiles.slots, width, ROWS) if blocked else (tiles.slots, ROWS, width)
    out, lse = run(
        body,
        name=op,
        sizes=sizes,
        splits=splits,
        operands={"q": pad_queries(q, sizes), "k": k, "v": v, "table": table, "bounds": bounds},
        scratch={
            "keys": swizzled(keys, q.dtype, sizes.key_swizzle),
            "values": swizzled((tiles.slots, ROWS, sizes.value_rows), q.dtype, sizes.value_swizzle),
            "arrived": plgpu.Barrier(
                num_arrivals=_copies(sizes, units, blocked), num_barriers=tiles.slots
            ),
            "consumed": plgpu.Barrier(num_barriers=tiles.slots),
        },
    )
    return merge_splits(out, lse, sizes)


def _copies(sizes: Sizes, units: Units, blocked: bool) -> int:
    """Copies of a step."""
    return units.a_step * sum(len(part) for part in _pieces(sizes, units, blocked))


def _pieces(
    sizes: Sizes, units: Units, blocked: bool
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(first row, rows) of the copies of a unit's keys and of its values.

    Of a part of a buffer's columns only 8 rows at a time are contiguous in shared memory.
    """
    keys = sizes.width if blocked else units.rows
    key_rows = 8 if blocked and units.rows < ROWS else keys
    value_rows = units.rows if sizes.value_rows == sizes.value_width else 8
    return (
        [(low, key_rows) for low in range(0, keys, key_rows)],
        [(low, value_rows) for low in range(0, units.rows, value_rows)],
    )


def _copy(
    refs: Any, sizes: Sizes, units: Units, splits: int, listed: Any, head: Any, blocked: bool
) -> None:
    """The copying warpgroup: the units of every step into the ring."""
    begin, end = share(refs, sizes, splits)
    key_pieces, value_pieces = _pieces(sizes, units, blocked)

    def load(c, slot):
        def fetch(source, target):
            plgpu.copy_gmem_to_smem(source, target, refs.arrived.at[slot])

        for i in range(units.a_step):
            unit = (begin + c) * units.a_step + i
            source, first = refs.table[listed, unit, 0], refs.table[listed, unit, 1]
            keys, values = refs.keys.at[slot], refs.values.at[slot]
            offset = i * units.rows
            for low, rows in key_pieces:
                if blocked:
                    k = refs.k.at[source, pl.ds(low, rows), pl.ds(first, units.rows)]
                    fetch(k, keys.at[pl.ds(low, rows), pl.ds(offset, units.rows)])
                else:
                    k = refs.k.at[source, pl.ds(first + low, rows), head]
                    fetch(k, keys.at[pl.ds(offset + low, rows)])
            for low, rows in value_pieces:
                part = pl.ds(first + low, rows)
                v = refs.v.at[source, part] if blocked else refs.v.at[source, part, head]
                fetch(v, values.at[pl.ds(offset + low, rows), pl.ds(0, sizes.value_width)])

    stream(refs, end - begin, load)


def _compute(
    refs: Any, sizes: Sizes, units: Units, splits: int, listed: Any, scale: float, blocked: bool
) -> None:
    """The computing warpgroup: softmax over the steps."""

    def visible(spans: list[tuple[jax.Array, jax.Array]], columns: int) -> jax.Array:
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS, columns), 0, layout=MATRIX)
        seen = jnp.zeros((), jnp.bool_)
        for low, high in spans:
            seen = seen | ((row >= low) & (row < high))
        return seen

    def step(number, slot, state):
        spans = []
        count = jnp.zeros((), jnp.int32)
        for i in range(units.a_step):
            unit = number * units.a_step + i
            low, high = refs.table[listed, unit, 2], refs.table[listed, unit, 3]
            spans.append((low + i * units.rows, high + i * units.rows))
            count += high - low
        plgpu.barrier_wait(refs.arrived.at[slot])
        values = refs.values.at[slot]

        # What nobody sees may hold anything, and 0 * NaN is not 0.
        @pl.when(count < ROWS)
        def _():
            rows = values[...]
            values[...] = jnp.where(visible(spans, sizes.value_rows), rows, jnp.zeros_like(rows))
            plgpu.commit_smem()

        keys = refs.keys.at[slot]
        state = attend(
            state,
            refs,
            keys.transpose((1, 0)) if blocked else keys,
            values.transpose((1, 0)),
            visible(spans, sizes.columns),
            scale,
        )
        plgpu.barrier_arrive(refs.consumed.at[slot])
        return state

    compute(refs, sizes, splits, step)
