"""Mosaic GPU kernel of gathered decoding in tokens: one small copy a listed token (Hopper).

Rows land as they come, untiled, for TMA writes swizzled tiles only eight rows at a time. From
there the computing warpgroup moves 64 of them at once into the tiles that ``wgmma`` reads, without
conflicts between banks, and hides those that nobody sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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

__all__ = ["attend_tokens"]

_WIDEST_COPY = 256


def attend_tokens(
    q: Float[Array, "B T N H"],
    cache: Sequence[Float[Array, "BSK width"]],
    rows: Int[Array, "items P"],
    *,
    lists: int,
    scale: float,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "items G Hv"], Float[Array, "items G"]]:
    """Attention of every list over rows of a flat cache, float32.

    Args:
      q: queries; item (b, t, l) reads the heads of list l.
      cache: keys and values [BSK, H] and [BSK, Hv], or one array of keys with values behind them.
      rows: listed rows, -1 for tokens that nobody sees; those at the end cost nothing.
      lists: lists of a query.
      scale: factor on the logits.
      tiles: default :func:`choose_tiles`.

    Raises:
      NotImplementedError: for sizes the kernel cannot take.
    """
    op = "gather_tokens"
    width = q.shape[3]
    value_width = cache[0].shape[1] - width if len(cache) == 1 else cache[1].shape[1]
    sizes = sizes_for(op, rows.shape[0], q.shape[2] // lists, width, value_width, q.dtype)
    # Where each array's row begins in shared memory; TMA writes to multiples of 128 bytes.
    starts = [0] if len(cache) == 1 else [0, -(-width // ROWS) * ROWS]
    across = -(-(starts[-1] + cache[-1].shape[1]) // ROWS) * ROWS
    pieces = [
        (number, low, min(_WIDEST_COPY, array.shape[1] - low), starts[number] + low)
        for number, array in enumerate(cache)
        for low in range(0, array.shape[1], _WIDEST_COPY)
    ]
    if any(columns % ROWS for _, _, columns, _ in pieces):
        raise NotImplementedError(
            f"{op}: rows of {[array.shape[1] for array in cache]} numbers are fetched one by one, "
            f"for which they must be multiples of {ROWS}; pad the heads, or use "
            "implementation='xla'"
        )
    extra = 2 * ROWS * (width + sizes.value_rows)
    slot_bytes = 2 * ROWS * across + 4 * ROWS
    tiles = tiles or choose_tiles(op, sizes, slot_bytes, extra, length=rows.shape[1])
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % ROWS)), constant_values=-1)
    longest = rows.shape[1] // ROWS
    number = jnp.arange(1, rows.shape[1] + 1, dtype=jnp.int32)[None, :]
    used = jnp.max(jnp.where(rows >= 0, number, 0), axis=1)
    bounds, splits = split_steps(-(-used // ROWS), longest, sizes, tiles)

    def body(refs):
        refs.cache = [refs.keys_in, refs.values_in] if len(cache) == 2 else [refs.keys_in]
        listed = item(refs, sizes, splits)

        @pl.when(refs.warpgroup == 0)
        def _():
            _compute(refs, sizes, splits, scale, starts[1] if len(cache) == 2 else width)

        @pl.when(refs.warpgroup == 1)
        def _():
            _copy(refs, sizes, splits, listed, pieces)

    caches = dict(zip(("keys_in", "values_in"), cache, strict=False))
    out, lse = run(
        body,
        name=op,
        sizes=sizes,
        splits=splits,
        operands={"q": pad_queries(q, sizes), **caches, "rows": rows, "bounds": bounds},
        scratch={
            "listed": plgpu.SMEM((tiles.slots, ROWS), jnp.int32),
            "raw": plgpu.SMEM((tiles.slots, ROWS, across), q.dtype),
            "keys": swizzled((ROWS, width), q.dtype, sizes.key_swizzle),
            "values": swizzled((ROWS, sizes.value_rows), q.dtype, sizes.value_swizzle),
            "known": plgpu.Barrier(num_barriers=tiles.slots),
            "arrived": plgpu.Barrier(num_arrivals=ROWS * len(pieces), num_barriers=tiles.slots),
            "consumed": plgpu.Barrier(num_barriers=tiles.slots),
        },
    )
    return merge_splits(out, lse, sizes)


def _copy(
    refs: Any, sizes: Sizes, splits: int, listed: Any, pieces: Sequence[tuple[int, ...]]
) -> None:
    """The copying warpgroup: the numbers of 64 rows, then the rows."""
    begin, end = share(refs, sizes, splits)

    def load(c, slot):
        numbers = refs.rows.at[listed, pl.ds((begin + c) * ROWS, ROWS)]
        plgpu.copy_gmem_to_smem(numbers, refs.listed.at[slot], refs.known.at[slot])
        plgpu.barrier_wait(refs.known.at[slot])

        def fetch(r, _):
            row = lax.max(refs.listed[slot, r], integer(0))
            for number, low, width, place in pieces:
                plgpu.copy_gmem_to_smem(
                    refs.cache[number].at[pl.ds(row, 1), pl.ds(low, width)],
                    refs.raw.at[slot, pl.ds(r, 1), pl.ds(place, width)],
                    refs.arrived.at[slot],
                )

        lax.fori_loop(integer(0), integer(ROWS), fetch, None)

    stream(refs, end - begin, load)


def _compute(refs: Any, sizes: Sizes, splits: int, scale: float, behind: int) -> None:
    """The computing warpgroup: rows into tiles, then softmax; values lie ``behind`` the keys."""

    def move(slot, first, width, swizzle, target):
        layout = plgpu.Layout.SMEM_GMEM_COPY((ROWS, width), sizes.dtype, swizzle)
        # Without conflicts between banks, which rows of other widths cannot avoid.
        smooth = width % ROWS == 0 and first % ROWS == 0
        raw = refs.raw.at[slot, :, pl.ds(first, width)]
        rows = plgpu.load(raw, layout=layout, optimized=smooth)
        listed = plgpu.load(refs.listed.at[slot], layout=layout.reduce(1), optimized=False)
        seen = plgpu.layout_cast(lax.broadcast_in_dim(listed, rows.shape, [0]), layout) >= 0
        # What nobody sees may hold anything, and 0 * NaN is not 0.
        target[...] = jnp.where(seen, rows, jnp.zeros_like(rows))

    def step(_, slot, state):
        plgpu.barrier_wait(refs.known.at[slot])
        plgpu.barrier_wait(refs.arrived.at[slot])
        move(slot, 0, sizes.width, sizes.key_swizzle, refs.keys)
        part = refs.values.at[:, pl.ds(0, sizes.value_width)]
        move(slot, behind, sizes.value_width, sizes.value_swizzle, part)
        listed = plgpu.load(refs.listed.at[slot], layout=MATRIX.reduce(1), optimized=False)
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs.consumed.at[slot])
        listed = lax.broadcast_in_dim(listed, (ROWS, sizes.columns), [0])
        values = refs.values.transpose((1, 0))
        return attend(state, refs, refs.keys, values, listed >= 0, scale)

    compute(refs, sizes, splits, step)
