"""Pieces of a decode cache: buffers that append per sequence, blocks, rings of the latest tokens.

All capacities are static, every sequence has its own length, an append brings T >= 1 tokens of
which each sequence may use fewer (right padding). Rings keep position p in slot p % size, so that
cutting a sequence back by up to the ring's slack needs nothing but a smaller length.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from sparse_attn.documents import Rows
from sparse_attn.shards import WHOLE, Shards

FEW_ROWS = 16
"""Up to this many new tokens a call, what they select is read from the cache as it is (decode)."""


def write_rows(
    buffer: Shaped[Array, "B S *rest"],
    chunk: Shaped[Array, "B T *rest"],
    index: Int[Array, "B T"],
    keep: Bool[Array, "B T"],
    shards: Shards = WHOLE,
) -> Shaped[Array, "B S *rest"]:
    """``buffer[b, index[b, t]] = chunk[b, t]`` where ``keep``; everything else is left alone.

    ``shards`` may split the buffer, of which each device then writes the rows it holds.
    """
    size = buffer.shape[1]
    index, here = shards.own_slots(index, size)
    target = jnp.where(keep & here, index, size)
    rows = jnp.broadcast_to(jnp.arange(buffer.shape[0])[:, None], target.shape)
    written = buffer.at[rows, target].set(chunk.astype(buffer.dtype), mode="drop")
    # Otherwise XLA fuses the write into every reader, each with a copy of the whole buffer.
    return jax.lax.optimization_barrier(written)


def empty_blocks(
    batch: int, capacity: int, kv_heads: int, block: int, widths: tuple[int, int], dtype: Any
) -> tuple[Shaped[Array, "B K M H L"], Shaped[Array, "B K M L Hv"]]:
    """Zeros for ``capacity`` tokens in whole blocks, in the layout of ``gather_blocks``."""
    blocks = -(-capacity // block)
    return (
        jnp.zeros((batch, kv_heads, blocks, widths[0], block), dtype),
        jnp.zeros((batch, kv_heads, blocks, block, widths[1]), dtype),
    )


def write_blocks(
    k: Shaped[Array, "B K M H L"],
    v: Shaped[Array, "B K M L Hv"],
    new_k: Shaped[Array, "B T K H"],
    new_v: Shaped[Array, "B T K Hv"],
    rows: Rows,
    shards: Shards = WHOLE,
) -> tuple[Shaped[Array, "B K M H L"], Shaped[Array, "B K M L Hv"]]:
    """Put the valid new tokens where they belong; everything else is left alone.

    ``shards`` may split the blocks, of which each device then writes those it holds.
    """
    blocks, block = v.shape[2:4]
    sequence = jnp.broadcast_to(jnp.arange(k.shape[0])[:, None], rows.index.shape)
    at, here = shards.own_slots(rows.index // block, blocks)
    at = jnp.where(rows.valid & here, at, blocks)
    lane = rows.index % block
    k = k.at[sequence, :, at, :, lane].set(new_k.astype(k.dtype), mode="drop")
    v = v.at[sequence, :, at, lane].set(new_v.astype(v.dtype), mode="drop")
    # As in write_rows.
    return jax.lax.optimization_barrier((k, v))


def write_ring(
    ring: Shaped[Array, "B R *rest"],
    chunk: Shaped[Array, "B T *rest"],
    length: Int[Array, " B"],
    rows: Rows,
) -> Shaped[Array, "B R *rest"]:
    """Put the valid tokens of ``chunk`` into their slots; of more than R the last R stay."""
    size = ring.shape[1]
    tokens = chunk.shape[1]
    offsets = jnp.arange(tokens, dtype=jnp.int32)[None, :]
    keep = rows.valid & (offsets >= rows.appended[:, None] - size)
    return write_rows(ring, chunk, (length[:, None] + offsets) % size, keep)


def read_ring(
    ring: Shaped[Array, "B R *rest"], length: Int[Array, " B"]
) -> Shaped[Array, "B R *rest"]:
    """The ring in order: row r holds position ``length - R + r`` (garbage where negative)."""
    size = ring.shape[1]
    slots = (length[:, None] + jnp.arange(size, dtype=jnp.int32)[None, :]) % size
    slots = slots.reshape(*slots.shape, *(1 for _ in ring.shape[2:]))
    return jnp.take_along_axis(ring, slots, axis=1)


def window_slots(
    first: Int[Array, "B T"], last: Int[Array, "B T"], size: int
) -> tuple[Int[Array, "B T"], Int[Array, "B T"], Int[Array, "B T"], Int[Array, "B T"]]:
    """Slots of positions ``first..last`` in a ring: at most two disjoint ranges.

    Returns ``(start_a, stop_a, start_b, stop_b)``; the second range is empty unless the positions
    wrap around. Nothing is visible where ``last < first``. Needs ``last - first < size``.
    """
    count = jnp.maximum(last - first + 1, 0)
    start = jnp.where(count > 0, first % size, 0)
    stop = start + count
    return start, jnp.minimum(stop, size), jnp.zeros_like(start), jnp.maximum(stop - size, 0)


def checked_truncation(
    length: Int[Array, " B"], lengths: Int[Array, " B"], rollback: int
) -> Int[Array, " B"]:
    """Validate a cut of ``length`` back to ``lengths``.

    Raises:
      ValueError: if a sequence would grow, or lose more than ``rollback`` tokens (checked where the
        values are concrete).
    """
    lengths = jnp.asarray(lengths, jnp.int32)
    if lengths.shape != length.shape:
        raise ValueError(f"{lengths.shape=} must be [B]={length.shape}")
    if not isinstance(length, jax.core.Tracer) and not isinstance(lengths, jax.core.Tracer):
        lost = np.asarray(length) - np.asarray(lengths)
        if (lost < 0).any() or (lost > rollback).any():
            raise ValueError(
                f"cannot cut lengths {np.asarray(length).tolist()} to "
                f"{np.asarray(lengths).tolist()}: at most rollback={rollback} tokens can be "
                "undone; make the cache with a larger rollback"
            )
    return lengths


def check_capacity(length: Int[Array, " B"], appended: Int[Array, " B"], capacity: int) -> None:
    """Raise ``ValueError`` if an append overflows the cache (where values are concrete)."""
    if isinstance(length, jax.core.Tracer) or isinstance(appended, jax.core.Tracer):
        return
    after = np.asarray(length) + np.asarray(appended)
    if (after > capacity).any():
        raise ValueError(
            f"cache capacity {capacity} is too small for lengths {after.tolist()}; "
            "make it with init_cache(batch, capacity) large enough for prompt and continuation"
        )
