"""What NSA remembers while decoding, and how T new tokens enter it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.gather_decode import as_tokens
from sparse_attn.cache import (
    checked_truncation,
    empty_blocks,
    read_ring,
    write_blocks,
    write_ring,
)
from sparse_attn.compression import entry_count
from sparse_attn.documents import Rows
from sparse_attn.shards import WHOLE, Shards
from sparse_attn.types import HeadShape, Rope

ENTRY_MULTIPLE = 64
"""Compressed capacity is rounded up to it: odd row lengths cost vector code its alignment."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NSACache:
    """All keys are rotated, except the raw tail that waits for compression.

    ``k_slc`` [B, K, M, H, L], ``v_slc`` [B, K, M, L, Hv]: every token, block by block, as
    ``gather_blocks`` reads them. ``k_cmp`` [B, K, H, C], ``v_cmp`` [B, K, C, Hv]:
    compressed entries, laid out for the products of a decode step, which reads all of them.
    ``k_win``/``v_win``: rings of w + rollback tokens. ``k_tail``/``v_tail``: rings of the last
    l - 1 + rollback tokens of the compressed branch, with their rotary positions.
    """

    length: Int[Array, " B"]
    k_slc: Float[Array, "B K M H L"]
    v_slc: Float[Array, "B K M L Hv"]
    k_cmp: Float[Array, "B K H C"]
    v_cmp: Float[Array, "B K C Hv"]
    k_win: Float[Array, "B Rw K H"]
    v_win: Float[Array, "B Rw K Hv"]
    k_tail: Float[Array, "B Rt K H"]
    v_tail: Float[Array, "B Rt K Hv"]
    tail_positions: Int[Array, "B Rt"]
    capacity: int = dataclasses.field(metadata={"static": True})
    rollback: int = dataclasses.field(metadata={"static": True})
    token_axes: ClassVar = {"k_slc": 2, "v_slc": 2}

    @property
    def selected(self) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
        """Keys and values of the selected branch token by token; a copy."""
        return as_tokens(self.k_slc, self.v_slc)

    @property
    def compressed(self) -> tuple[Float[Array, "B C K H"], Float[Array, "B C K Hv"]]:
        """Compressed keys and values, entry by entry."""
        return jnp.transpose(self.k_cmp, (0, 3, 1, 2)), jnp.swapaxes(self.v_cmp, 1, 2)

    def truncate(self, lengths: Int[Array, " B"]) -> NSACache:
        """Forget the tokens after ``lengths``, at most ``rollback`` of them per sequence.

        Entries that covered forgotten tokens are outside every row's range, and are written again
        when the sequence has regrown to their end.
        """
        cut = checked_truncation(self.length, lengths, self.rollback)
        return dataclasses.replace(self, length=cut)


def empty_cache(
    shape: HeadShape,
    *,
    batch: int,
    capacity: int,
    rollback: int,
    block: int,
    stride: int,
    selection_block: int,
    window: int,
    dtype: Any,
) -> NSACache:
    """A cache of static size without tokens.

    Raises:
      ValueError: if ``capacity`` is below 1 or ``rollback`` negative.
    """
    if capacity < 1 or rollback < 0:
        raise ValueError(f"{capacity=} must be at least 1 and {rollback=} must not be negative")

    def pair(tokens: int) -> tuple[Array, Array]:
        keys = (batch, tokens, shape.kv_heads)
        return (
            jnp.zeros((*keys, shape.head_width), dtype),
            jnp.zeros((*keys, shape.value_width), dtype),
        )

    k_slc, v_slc = empty_blocks(
        batch,
        capacity,
        shape.kv_heads,
        selection_block,
        (shape.head_width, shape.value_width),
        dtype,
    )
    entries = entry_count(capacity, block, stride)
    k_cmp, v_cmp = pair(max(1, -(-entries // ENTRY_MULTIPLE)) * ENTRY_MULTIPLE)
    k_win, v_win = pair(window + rollback)
    tail = max(1, block - 1 + rollback)
    k_tail, v_tail = pair(tail)
    return NSACache(
        length=jnp.zeros((batch,), jnp.int32),
        k_slc=k_slc,
        v_slc=v_slc,
        k_cmp=jnp.transpose(k_cmp, (0, 2, 3, 1)),
        v_cmp=jnp.swapaxes(v_cmp, 1, 2),
        k_win=k_win,
        v_win=v_win,
        k_tail=k_tail,
        v_tail=v_tail,
        tail_positions=jnp.zeros((batch, tail), jnp.int32),
        capacity=capacity,
        rollback=rollback,
    )


def append_selected(
    cache: NSACache, k: Array, v: Array, rows: Rows, shards: Shards = WHOLE
) -> NSACache:
    """Write the new tokens' keys and values for the selected branch."""
    k_slc, v_slc = write_blocks(cache.k_slc, cache.v_slc, k, v, rows, shards)
    return dataclasses.replace(cache, k_slc=k_slc, v_slc=v_slc)


def append_window(cache: NSACache, k: Array, v: Array, rows: Rows) -> NSACache:
    """Put the new tokens into the window rings."""
    return dataclasses.replace(
        cache,
        k_win=write_ring(cache.k_win, k, cache.length, rows),
        v_win=write_ring(cache.v_win, v, cache.length, rows),
    )


def append_compressed(
    cache: NSACache,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    rows: Rows,
    *,
    block: int,
    stride: int,
    compress: Callable[[Array, Array], tuple[Array, Array]],
    rope: Rope | None,
) -> NSACache:
    """Emit every compressed entry that became due, then put the raw tokens into the tail.

    ``compress`` maps pieces [B, M, d, K, .] of keys and values to entries. ``rope`` rotates the new
    keys at the position of their first token (``None``: they are rotated already). Skipped at run
    time where no sequence has an entry due, as in most single-token steps.
    """
    length, tokens = cache.length, k.shape[1]
    tail = cache.k_tail.shape[1]
    first_due = jnp.maximum((length - block) // stride + 1, 0)
    due = jnp.maximum((length + rows.appended - block) // stride + 1, 0) - first_due
    entries = (tokens - 1) // stride + 1
    pieces = entries + block // stride - 1
    begin = first_due * stride - (length - tail)
    take = begin[:, None] + jnp.arange(pieces * stride, dtype=jnp.int32)[None, :]

    def emit() -> tuple[Array, Array]:
        def gather(ring: Array, chunk: Array) -> Array:
            whole = jnp.concatenate([read_ring(ring, length), chunk.astype(ring.dtype)], axis=1)
            index = jnp.minimum(take, whole.shape[1] - 1)
            index = index.reshape(*index.shape, *(1 for _ in whole.shape[2:]))
            got = jnp.take_along_axis(whole, index, axis=1)
            return got.reshape(got.shape[0], pieces, stride, *got.shape[2:])

        k_new, v_new = compress(
            gather(cache.k_tail, k).astype(k.dtype), gather(cache.v_tail, v).astype(v.dtype)
        )
        if rope is not None:
            at = gather(cache.tail_positions, rows.positions)[:, :entries, 0]
            k_new = rope(k_new, at)
        return k_new.astype(cache.k_cmp.dtype), v_new.astype(cache.v_cmp.dtype)

    def nothing() -> tuple[Array, Array]:
        k_new, v_new = jax.eval_shape(emit)
        return jnp.zeros(k_new.shape, k_new.dtype), jnp.zeros(v_new.shape, v_new.dtype)

    # Only the new entries pass through the conditional: whole buffers would be copied there.
    k_new, v_new = jax.lax.cond(jnp.any(due > 0), emit, nothing)
    slot = jnp.arange(entries, dtype=jnp.int32)[None, :]
    capacity = cache.v_cmp.shape[2]
    at = jnp.where(slot < due[:, None], first_due[:, None] + slot, capacity)
    sequence = jnp.broadcast_to(jnp.arange(at.shape[0])[:, None], at.shape)
    k_cmp = cache.k_cmp.at[sequence, :, :, at].set(k_new, mode="drop")
    v_cmp = cache.v_cmp.at[sequence, :, at].set(v_new, mode="drop")
    return dataclasses.replace(
        cache,
        k_cmp=jax.lax.optimization_barrier(k_cmp),
        v_cmp=jax.lax.optimization_barrier(v_cmp),
        k_tail=write_ring(cache.k_tail, k, length, rows),
        v_tail=write_ring(cache.v_tail, v, length, rows),
        tail_positions=write_ring(cache.tail_positions, rows.positions, length, rows),
    )
