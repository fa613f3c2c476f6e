"""Gathered decoding on Hopper (Mosaic GPU): the backends of the three calls.

Every list is split into shares that run as programs of their own, so that a batch of one still
fills the chip; each streams its blocks or tokens through shared memory and writes (out, lse), which
XLA merges. What is listed, where it lies and which of its rows are in sight is worked out
beforehand, in tables of O(B T J P). Forward is the kernel; backward is that of the XLA path, which
gathers what was listed again: decoding rarely differentiates.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.common import AttentionOutput
from kernels_pallas.gather_decode import blocked, tokens, xla
from kernels_pallas.gather_decode.gradient import with_gradient_of
from kernels_pallas.gather_decode.mosaic_gpu_attend import Tiles
from kernels_pallas.gather_decode.mosaic_gpu_blocks import Units, attend_units, units_of
from kernels_pallas.gather_decode.mosaic_gpu_tokens import attend_tokens
from kernels_pallas.gpu import check_device, check_dtypes

__all__ = ["gather_blocks", "gather_decode", "gather_tokens"]


def gather_decode(
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
    """Arguments and results as in the api. Differentiable through the backward of the XLA path.

    Blocks of a multiple of 8 keys are fetched whole, others token by token.

    Raises:
      NotImplementedError: off Hopper, for dtypes other than one 16-bit float, and for head widths
        that are no multiple of 16 (of 64 where tokens are fetched) or too wide for shared memory.
    """
    check_device()
    check_dtypes("gather_decode", q=q, k=k, v=v)
    lists = max(indices.shape[2], k.shape[2])

    def forward(q, k, v, indices, positions):
        listed = _per_list(indices, lists)
        last = _last(positions, k.shape[1], causal)
        units = units_of(block_size)
        if block_size % 8 or k.shape[1] < units.rows:
            numbers = _tokens_of(listed, block_size)
            rows = _rows(numbers, last, k.shape[1], k.shape[2], lists)
            arrays = [x.reshape(-1, x.shape[3]) for x in (k, v)]
            out = attend_tokens(q, arrays, rows, lists=lists, scale=scale, tiles=tiles)
            return _finish(q, *out)
        table = _row_table(listed, last, units, block_size, k.shape[1])
        out = attend_units(
            *(q, k, v, table), units=units, lists=lists, scale=scale, blocked=False, tiles=tiles
        )
        return _finish(q, *out)

    backward = partial(xla.gather_decode, block_size=block_size, causal=causal, scale=scale)
    return with_gradient_of(backward, forward, q, (k, v), indices, positions)


def gather_blocks(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K M H L"],
    v: Float[Array, "B K M L Hv"],
    indices: Int[Array, "B T J P"],
    *,
    positions: Int[Array, "B T"],
    causal: bool,
    scale: float,
    tiles: Tiles | None = None,
) -> AttentionOutput:
    """Arguments and results as in the api. Differentiable through the backward of the XLA path.

    Raises:
      NotImplementedError: as :func:`gather_decode`, and for blocks that are no multiple of 16 keys
        or above 64 and no multiple of 64.
    """
    check_device()
    check_dtypes("gather_blocks", q=q, k=k, v=v)
    kv_heads, blocks, _, length = k.shape[1:]
    lists = max(indices.shape[2], kv_heads)
    units = units_of(length)
    if length % 16 or length > units.rows * units.parts or length % units.rows:
        raise NotImplementedError(
            f"gather_blocks: blocks of {length} keys must be a multiple of 16, and of 64 above 64; "
            "use implementation='xla'"
        )

    def forward(q, k, v, indices, positions):
        listed = _per_list(indices, lists)
        last = _last(positions, blocks * length, causal)
        table = _block_table(listed, last, units, length, blocks, kv_heads)
        k, v = (x.reshape(-1, *x.shape[3:]) for x in (k, v))
        out = attend_units(
            *(q, k, v, table), units=units, lists=lists, scale=scale, blocked=True, tiles=tiles
        )
        return _finish(q, *out)

    backward = partial(blocked.gathered, causal=causal, scale=scale)
    return with_gradient_of(backward, forward, q, (k, v), indices, positions)


def gather_tokens(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B S K HHv"],
    indices: Int[Array, "B T J P"],
    *,
    positions: Int[Array, "B T"],
    scale: float,
    tiles: Tiles | None = None,
) -> AttentionOutput:
    """Arguments and results as in the api. Differentiable through the backward of the XLA path.

    Raises:
      NotImplementedError: as :func:`gather_decode`, but it is H + Hv that must be a multiple of 64.
    """
    check_device()
    check_dtypes("gather_tokens", q=q, kv=kv)
    keys, kv_heads = kv.shape[1:3]
    lists = max(indices.shape[2], kv_heads)

    def forward(q, kv, indices, positions):
        listed, last = _per_list(indices, lists), _last(positions, keys, True)
        rows = _rows(listed, last, keys, kv_heads, lists)
        arrays = [kv.reshape(-1, kv.shape[3])]
        out = attend_tokens(q, arrays, rows, lists=lists, scale=scale, tiles=tiles)
        return _finish(q, *out)

    backward = partial(tokens.gather_tokens_xla, scale=scale)
    return with_gradient_of(backward, forward, q, (kv,), indices, positions)


def _finish(q: Array, out: Array, lse: Array) -> tuple[Array, Array]:
    """What the programs wrote, in the shapes and dtype of the result."""
    shape = q.shape[:3]
    return out.reshape(*shape, -1).astype(q.dtype), lse.reshape(shape)


def _per_list(indices: Int[Array, "B T J P"], lists: int) -> Int[Array, "B T L P"]:
    """The list of every kv head, or of every query head."""
    shape = (*indices.shape[:2], lists, indices.shape[3])
    return jnp.broadcast_to(indices.astype(jnp.int32), shape)


def _last(positions: Int[Array, "B T"], keys: int, causal: bool) -> Int[Array, "B T 1 1"]:
    """The last key in sight of each query."""
    last = jnp.full(positions.shape, keys - 1, jnp.int32)
    if causal:
        last = jnp.minimum(positions.astype(jnp.int32), last)
    return last[:, :, None, None]


def _tokens_of(blocks: Int[Array, "B T L P"], length: int) -> Int[Array, "B T L P2"]:
    """Listed blocks as listed tokens."""
    lane = jnp.arange(length, dtype=jnp.int32)[None, None, None, None, :]
    numbers = jnp.where(blocks[..., None] >= 0, blocks[..., None] * length + lane, -1)
    return numbers.reshape(*blocks.shape[:3], -1)


def _rows(
    numbers: Int[Array, "B T L P"], last: Int[Array, "B T 1 1"], keys: int, heads: int, lists: int
) -> Int[Array, "items P"]:
    """Rows of a flat cache [B S K, width] that hold the listed tokens, -1 for unseen ones."""
    sequence = jnp.arange(numbers.shape[0], dtype=jnp.int32)[:, None, None, None]
    head = (jnp.arange(lists, dtype=jnp.int32) // (lists // heads))[None, None, :, None]
    row = (sequence * keys + numbers) * heads + head
    seen = (numbers >= 0) & (numbers <= last)
    return jnp.where(seen, row, -1).reshape(-1, numbers.shape[3])


def _spans(
    listed: Int[Array, "B T L P"], last: Int[Array, "B T 1 1"], units: Units, length: int
) -> tuple[Int[Array, "B T L U"], Int[Array, "B T L U"], Int[Array, " U"]]:
    """(block, keys of it in sight from the unit's first on, the unit's first key) of every unit."""
    part = jnp.tile(jnp.arange(units.parts, dtype=jnp.int32), listed.shape[3]) * units.rows
    block = jnp.repeat(listed, units.parts, axis=3)
    shift = part[None, None, None, :]
    within = jnp.minimum(length - shift, units.rows)
    room = jnp.clip(last - block * length - shift + 1, 0, within)
    return block, jnp.where(block >= 0, room, 0), part


def _row_table(
    listed: Int[Array, "B T L P"],
    last: Int[Array, "B T 1 1"],
    units: Units,
    length: int,
    keys: int,
) -> Int[Array, "items U 4"]:
    """Units of a token-major cache. The last ones start early: copies stay inside the cache."""
    block, room, part = _spans(listed, last, units, length)
    first = block * length + part[None, None, None, :]
    start = jnp.clip(first, 0, keys - units.rows)
    low = first - start
    sequence = jnp.arange(listed.shape[0], dtype=jnp.int32)[:, None, None, None]
    return _table(room > 0, jnp.broadcast_to(sequence, block.shape), start, low, low + room)


def _block_table(
    listed: Int[Array, "B T L P"],
    last: Int[Array, "B T 1 1"],
    units: Units,
    length: int,
    blocks: int,
    heads: int,
) -> Int[Array, "items U 4"]:
    """Units of a blocked cache."""
    block, room, part = _spans(listed, last, units, length)
    sequence = jnp.arange(listed.shape[0], dtype=jnp.int32)[:, None, None, None]
    lists = listed.shape[2]
    head = (jnp.arange(lists, dtype=jnp.int32) // (lists // heads))[None, None, :, None]
    source = (sequence * heads + head) * blocks + block
    first = jnp.broadcast_to(part[None, None, None, :], block.shape)
    return _table(room > 0, source, first, jnp.zeros_like(room), room)


def _table(seen: Array, *columns: Array) -> Int[Array, "items U 4"]:
    """Columns side by side, 0 for units that show nothing."""
    table = jnp.where(seen[..., None], jnp.stack(columns, axis=-1), 0)
    return table.reshape(-1, *table.shape[3:])
