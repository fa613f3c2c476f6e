"""Gathered decoding on TPUs: what each op fetches, told to one pipelined kernel.

Rows of caches are read in place where they fill whole vector lanes: widths that are multiples of
128 (of H + Hv together in ``gather_tokens``) and 1, 2, 4 or a multiple of 8 kv heads (not 1 in
bfloat16). ``gather_blocks`` reads in place if H or L, and Hv, are such multiples. XLA lays other
caches out with padding, in a copy, for every call. Otherwise only lists are made outside the
kernel: O(B T J P block_size) small integers.

Gradients are those of the XLA implementation of each op.

Token lists cost one copy of a row per token: a TPU starts them one by one, whatever their size.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import tuned
from kernels_pallas.common import AttentionOutput, merge
from kernels_pallas.gather_decode import blocked, tokens, xla
from kernels_pallas.gather_decode.gradient import with_gradient_of
from kernels_pallas.gather_decode.mosaic_tpu_pipeline import META, Plan, attend_items
from kernels_pallas.tpu import LANES, check_arrays, check_vmem, chip_kind, round_up

__all__ = ["Tiles", "gather_blocks", "gather_decode", "gather_tokens", "tiles_for"]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of the kernel.

    Attributes:
      keys: keys fetched in a step; the copies of a step are in flight together.
      pieces: most copies of an item; longer lists are split, and the parts merged by lse.
      cores: TensorCores that share the items.
    """

    keys: int = 256
    pieces: int = 2**14
    cores: int = 1

    def __post_init__(self) -> None:
        if self.keys < LANES or self.keys % LANES:
            raise ValueError(f"keys={self.keys} of a step must be a multiple of {LANES}")
        if self.pieces < 1:
            raise ValueError(f"pieces={self.pieces} must be at least 1")
        if self.cores not in (1, 2):
            raise ValueError(f"cores={self.cores} must be 1 or 2")


def tiles_for(chip: str, width: int, value_width: int, dtype: Any) -> Tiles:
    """Sizes by rule.

    Copies in flight must cover the latency of HBM (about a microsecond, most of a megabyte on the
    fastest chips); a step of 256 keys of 128 + 128 numbers is 256 KiB. Wide rows take fewer, so
    that buffers stay below a megabyte or two. Chips with two TensorCores divide the items.
    """
    wide = round_up(width, LANES) + round_up(value_width, LANES)
    keys = 512 if wide <= 256 and jnp.dtype(dtype).itemsize == 2 else 256 if wide <= 768 else 128
    two_cores = chip in ("TPU v4", "TPU v5", "TPU v5p")
    return Tiles(keys=keys, cores=2 if two_cores else 1)


def _choose_tiles(
    op: str, q: Array, indices: Array, kv_heads: int, value_width: int, block_size: int
) -> Tiles:
    """Measured tiles or those of :func:`tiles_for`."""
    chip, width = chip_kind(), q.shape[3]
    group = q.shape[2] // max(kv_heads, indices.shape[2])

    def check(tiles: Tiles) -> None:
        lanes = round_up(width, LANES) + round_up(value_width, LANES)
        check_vmem(op, 24 * tiles.keys * lanes, f"{tiles.keys} keys a step of {lanes} numbers")

    return tuned.choose(
        op,
        chip,
        tiles_for(chip, width, value_width, q.dtype),
        check,
        length=indices.shape[3] * block_size,
        group=group,
        block_size=block_size,
        width=width,
        value_width=value_width,
        dtype=str(q.dtype),
    )


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
    """Arguments and results as in the api; the gradient is that of the XLA implementation.

    Raises:
      NotImplementedError: for dtypes other than float32 and bfloat16, an odd number of bfloat16 kv
        heads, or widths that do not fit into vector memory.
    """
    check_arrays("gather_decode", q=q, k=k, v=v)
    _check_pairs("gather_decode", k)
    tiles = tiles or _choose_tiles("gather_decode", q, indices, k.shape[2], v.shape[3], block_size)

    def forward(q, k, v, indices, positions):
        keys = k.shape[1]
        run = _run_of(block_size, keys)
        start, low, high = _runs(indices, block_size, run, keys)
        high = jnp.minimum(high, _last(positions, keys, causal))
        listed = _Pieces(jnp.clip(start, 0, keys - run), low, high)
        plan = _rows_plan("gather_decode", k, indices, low.shape[3], run, tiles, fused=False)
        return _attend(plan, tiles, q, (k, v), listed, scale)

    other = partial(xla.gather_decode, block_size=block_size, causal=causal, scale=scale)
    return with_gradient_of(other, forward, q, (k, v), indices, positions)


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
    """Arguments and results as in the api; the gradient is that of the XLA implementation.

    Raises:
      NotImplementedError: for dtypes other than float32 and bfloat16, or blocks that do not fit
        into vector memory.
    """
    check_arrays("gather_blocks", q=q, k=k, v=v)
    kv_heads, value_width, block_size = k.shape[1], v.shape[4], v.shape[3]
    tiles = tiles or _choose_tiles("gather_blocks", q, indices, kv_heads, value_width, block_size)

    def forward(q, k, v, indices, positions):
        blocks, length = k.shape[2], k.shape[4]
        indices = indices.astype(jnp.int32)
        across = length % LANES == 0
        # XLA keeps blocks of fewer than 128 tokens with H innermost: this moves nothing then.
        k = k if across else jnp.swapaxes(k, 3, 4)
        whole = length % (32 // k.dtype.itemsize) == 0
        first = jnp.where(indices >= 0, indices * length, -1)
        high = jnp.minimum(first + length - 1, _last(positions, blocks * length, causal))
        high = jnp.where(first >= 0, high, -1)
        listed = _Pieces(jnp.clip(indices, 0, blocks - 1), first, high, unit=length)
        plan = Plan(
            op="gather_blocks",
            blocked=True,
            run=length,
            pieces=_pieces_a_step(tiles.keys, length, indices.shape[3]) if whole else 1,
            heads=1,
            paired=False,
            fused=False,
            keys_across=across,
            clean=False,
            cores=tiles.cores,
        )
        return _attend(plan, tiles, q, (k, v), listed, scale)

    other = partial(blocked.gathered, causal=causal, scale=scale)
    return with_gradient_of(other, forward, q, (k, v), indices, positions)


def gather_tokens(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B S K HHv"],
    indices: Int[Array, "B T J P"],
    *,
    positions: Int[Array, "B T"],
    scale: float,
    tiles: Tiles | None = None,
) -> AttentionOutput:
    """Arguments and results as in the api; the gradient is that of the XLA implementation.

    Raises:
      NotImplementedError: for dtypes other than float32 and bfloat16, an odd number of bfloat16 kv
        heads, or widths that do not fit into vector memory.
    """
    check_arrays("gather_tokens", q=q, kv=kv)
    _check_pairs("gather_tokens", kv)
    width, both = q.shape[3], kv.shape[3]
    tiles = tiles or _choose_tiles("gather_tokens", q, indices, kv.shape[2], both - width, 1)

    def forward(q, kv, indices, positions):
        keys = kv.shape[1]
        indices = indices.astype(jnp.int32)
        high = jnp.minimum(indices, _last(positions, keys, True))
        high = jnp.where(indices >= 0, high, -1)
        listed = _Pieces(jnp.clip(indices, 0, keys - 1), jnp.maximum(indices, 0), high)
        plan = _rows_plan("gather_tokens", kv, indices, indices.shape[3], 1, tiles, fused=True)
        padded = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, both - width)))
        output = _attend(plan, tiles, padded, (kv,), listed, scale)
        return AttentionOutput(output.out[..., width:], output.lse)

    other = partial(tokens.gather_tokens_xla, scale=scale)
    return with_gradient_of(other, forward, q, (kv,), indices, positions)


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """Pieces of lists [B, T, J, P']: where they lie, and which of their keys count.

    ``address`` is the first row of a piece, or the number of a block; its keys begin at
    ``address * unit``. Those from ``low`` to ``high`` count, none where ``high < low``.
    """

    address: Int[Array, "B T J P"]
    low: Int[Array, "B T J P"]
    high: Int[Array, "B T J P"]
    unit: int = 1

    def visible(self, run: int) -> Bool[Array, "B T J P run"]:
        lane = jnp.arange(run, dtype=jnp.int32)[None, None, None, None, :]
        key = (self.address * self.unit)[..., None] + lane
        return (key >= self.low[..., None]) & (key <= self.high[..., None])


def _check_pairs(op: str, cache: Array) -> None:
    if cache.dtype == jnp.bfloat16 and cache.shape[2] % 2:
        raise NotImplementedError(
            f"{op} on TPUs fetches bfloat16 kv heads in pairs and the cache {cache.shape} has "
            f"K={cache.shape[2]}; use float32 or implementation='xla'"
        )


def _last(positions: Int[Array, "B T"], keys: int, causal: bool) -> Int[Array, "B T 1 1"]:
    """The last key each row may see."""
    last = jnp.full(positions.shape, keys - 1, jnp.int32)
    if causal:
        last = jnp.minimum(last, positions.astype(jnp.int32))
    return last[:, :, None, None]


def _run_of(block_size: int, keys: int) -> int:
    """Rows of a copy: 1, or 8 n, of which those past the end of a block are fetched in vain."""
    whole = min(round_up(min(block_size, LANES), 8), keys // 8 * 8)
    return 1 if block_size == 1 else max(1, whole)


def _runs(
    indices: Int[Array, "B T J P"], block_size: int, run: int, keys: int
) -> tuple[Array, Array, Array]:
    """Blocks as runs of ``run`` rows: first row, first and last key (high < low where unused)."""
    count = -(-block_size // run) if block_size <= keys else -(-keys // run)
    offset = jnp.arange(count, dtype=jnp.int32)[None, None, None, None, :] * run
    begin = indices.astype(jnp.int32)[..., None] * block_size
    start = begin + offset
    end = jnp.minimum(start + run, begin + block_size) - 1
    used = (begin >= 0) & (start < keys)
    flat = (*indices.shape[:3], -1)
    low, high = jnp.where(used, start, 0), jnp.where(used, end, -1)
    return start.reshape(flat), low.reshape(flat), high.reshape(flat)


def _pieces_a_step(keys: int, run: int, pieces: int) -> int:
    """As many pieces as fill a step, but no more than there are."""
    return max(1, min(keys // run, pieces))


def _rows_plan(op, cache, indices, slots, run, tiles, *, fused) -> Plan:
    """The plan for a token-major cache; ``slots`` are those of a list, in runs."""
    paired = cache.dtype == jnp.bfloat16
    shared = indices.shape[2] == 1 and cache.shape[2] > 1
    return Plan(
        op=op,
        blocked=False,
        run=run,
        pieces=_pieces_a_step(tiles.keys, run, slots),
        heads=2 if paired and shared else 1,
        paired=paired,
        fused=fused,
        keys_across=False,
        clean=not fused,
        cores=tiles.cores,
    )


def _attend(
    plan: Plan,
    tiles: Tiles,
    q: Float[Array, "B T N H"],
    sources: tuple[Array, ...],
    listed: _Pieces,
    scale: float,
) -> AttentionOutput:
    """Lists become items: one per sequence, query row, list and split of the list."""
    batch, queries, query_heads, width = q.shape
    kv_heads = sources[0].shape[1 if plan.blocked else 2]
    lists = max(listed.address.shape[2], kv_heads) // plan.heads
    group = query_heads // (lists * plan.heads)
    slots = listed.address.shape[3]
    steps = -(-slots // plan.pieces)
    splits = -(-steps // max(1, tiles.pieces // plan.pieces))
    steps = -(-steps // splits)
    room = splits * steps * plan.pieces

    def spread(x: Array) -> Array:
        """Slots filled up, a list for every item."""
        x = jnp.pad(x, [(0, 0)] * 3 + [(0, room - slots)] + [(0, 0)] * (x.ndim - 4))
        x = jnp.broadcast_to(x, (batch, queries, lists, *x.shape[3:]))
        return x.reshape(batch * queries * lists, splits, steps, plan.pieces, *x.shape[4:])

    visible = spread(listed.visible(plan.run))
    used = jnp.any(visible, axis=(3, 4)) * jnp.arange(1, steps + 1, dtype=jnp.int32)[None, None]
    needed = jnp.maximum(jnp.max(used, axis=2), 1)
    meta = _meta(plan, batch, queries, lists, kv_heads, needed)
    address = spread(listed.address.astype(jnp.int32)).reshape(-1, steps * plan.pieces)
    pieces = jnp.concatenate([meta, address], axis=1)
    pieces = jnp.pad(pieces, ((0, 0), (0, -pieces.shape[1] % LANES)))[:, None]
    visible = visible.reshape(-1, steps, plan.fetched).astype(jnp.int32)
    visible = jnp.pad(visible, ((0, 0), (0, 0), (0, plan.rows - plan.fetched)))
    rows = q.reshape(batch * queries * lists, 1, plan.heads, group, width)
    rows = jnp.broadcast_to(rows, (rows.shape[0], splits, *rows.shape[2:]))
    rows = rows.reshape(-1, plan.heads, group, width)
    items = rows.shape[0]
    surplus = -items % plan.cores
    # A surplus item repeats the last one, which is a valid thing to fetch.
    pieces, visible, rows = (
        jnp.concatenate([x, x[-1:]]) if surplus else x for x in (pieces, visible, rows)
    )
    out, lse = attend_items(plan, rows, sources, pieces, visible, scale=scale)
    out = out[:items].reshape(-1, splits, plan.heads * group, out.shape[3])
    lse = lse[:items].reshape(-1, splits, plan.heads * group)
    parts = [
        AttentionOutput(
            out[:, s].reshape(batch, queries, query_heads, -1),
            lse[:, s].reshape(batch, queries, query_heads),
        )
        for s in range(splits)
    ]
    whole = parts[0] if splits == 1 else merge(*parts)
    return AttentionOutput(whole.out.astype(q.dtype), whole.lse)


def _meta(plan, batch, queries, lists, kv_heads, needed) -> Int[Array, "items META"]:
    """Steps, sequence, head row and half of every item."""
    item = jnp.arange(batch * queries * lists, dtype=jnp.int32)[:, None]
    item = jnp.broadcast_to(item, needed.shape)
    head = item % lists * plan.heads // (lists * plan.heads // kv_heads)
    half = head % 2 if plan.paired else jnp.zeros_like(head)
    row = head // 2 if plan.paired else head
    meta = jnp.stack([needed, item // (queries * lists), row, half], axis=-1).reshape(-1, 4)
    return jnp.pad(meta, ((0, 0), (0, META - 4)))
