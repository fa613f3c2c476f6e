"""Keys pooled over blocks, without parameters: all at once, and one by one as a cache fills up.

Entry i stands for tokens [i*d, i*d + l). Caches hold entries as [B, K, H, C]: a decode step scores
all of them in one product, which streams memory in that layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.common import accumulation_dtype
from sparse_attn.block_lists import pick_tokens
from sparse_attn.compression import entry_count, split_pieces
from sparse_attn.shards import WHOLE, Shards

ENTRY_MULTIPLE = 64
"""Capacities are rounded up to it: odd row lengths cost vector code its alignment."""


def mean_entries(x: Float[Array, "B T K H"], block: int, stride: int) -> Float[Array, "B C K H"]:
    """Means of x[i*d : i*d + l], C = floor((T - l)/d) + 1 (at least one, zero-padded).

    Summed in at least float32, returned in the dtype of x. Differentiable.
    """
    return _mean_of_pieces(split_pieces(x, block, stride), block)


def _mean_of_pieces(pieces: Float[Array, "B M d K H"], block: int) -> Float[Array, "B C K H"]:
    per_entry = block // pieces.shape[2]
    entries = pieces.shape[1] - per_entry + 1
    sums = jnp.sum(pieces.astype(accumulation_dtype(pieces.dtype)), axis=2)
    total = sums[:, :entries]
    for c in range(1, per_entry):
        total = total + sums[:, c : c + entries]
    return (total / block).astype(pieces.dtype)


def empty_entries(
    batch: int, kv_heads: int, width: int, *, capacity: int, block: int, stride: int, dtype: Any
) -> Float[Array, "B K H C"]:
    """Room for the entries of ``capacity`` tokens."""
    entries = max(1, -(-entry_count(capacity, block, stride) // ENTRY_MULTIPLE)) * ENTRY_MULTIPLE
    return jnp.zeros((batch, kv_heads, width, entries), dtype)


def as_keys(entries: Float[Array, "B K H C"]) -> Float[Array, "B C K H"]:
    """The cached entries in the layout of keys; a view that products undo."""
    return jnp.transpose(entries, (0, 3, 1, 2))


def due_entries(
    length: Int[Array, " B"], appended: Int[Array, " B"], block: int, stride: int
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """First entry, and how many, that ``appended`` tokens after ``length`` complete."""
    first = jnp.maximum((length - block) // stride + 1, 0)
    return first, jnp.maximum((length + appended - block) // stride + 1, 0) - first


def append_entries(
    entries: Float[Array, "B K H C"],
    length: Int[Array, " B"],
    appended: Int[Array, " B"],
    tokens: int,
    pool: Callable[[Int[Array, " B"], int], Float[Array, "B E K H"]],
    *,
    block: int,
    stride: int,
) -> Float[Array, "B K H C"]:
    """Write every entry that became due by ``appended`` of ``tokens`` new tokens after ``length``.

    ``pool(first, count)`` makes entries first .. first + count - 1 of each sequence; those that are
    not due may hold anything. Skipped at run time where no sequence has an entry due.
    """
    first, due = due_entries(length, appended, block, stride)
    count = (tokens - 1) // stride + 1

    def emit() -> Array:
        return pool(first, count).astype(entries.dtype)

    def nothing() -> Array:
        return jnp.zeros((entries.shape[0], count, *entries.shape[1:3]), entries.dtype)

    # Only the new entries pass through the conditional: whole buffers would be copied there.
    new = jax.lax.cond(jnp.any(due > 0), emit, nothing)
    slot = jnp.arange(count, dtype=jnp.int32)[None, :]
    at = jnp.where(slot < due[:, None], first[:, None] + slot, entries.shape[3])
    sequence = jnp.broadcast_to(jnp.arange(at.shape[0])[:, None], at.shape)
    return jax.lax.optimization_barrier(entries.at[sequence, :, :, at].set(new, mode="drop"))


def append_means(
    entries: Float[Array, "B K H C"],
    keys: Float[Array, "B K M H L"],
    length: Int[Array, " B"],
    appended: Int[Array, " B"],
    tokens: int,
    *,
    block: int,
    stride: int,
    shards: Shards = WHOLE,
) -> Float[Array, "B K H C"]:
    """:func:`append_entries` with means of ``keys``, a cache that holds the new tokens already.

    Its blocks may be split by ``shards``; every device then makes the same entries.
    """

    def pool(first: Array, count: int) -> Array:
        got = pick_tokens(keys, first * stride, (count - 1) * stride + block, shards)
        return _mean_of_pieces(got.reshape(got.shape[0], -1, stride, *got.shape[2:]), block)

    return append_entries(entries, length, appended, tokens, pool, block=block, stride=stride)
