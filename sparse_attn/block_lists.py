"""What mechanisms that list key blocks share: who may be listed, and attention over the lists.

Their caches keep keys [B, K, M, H, L] and values [B, K, M, L, Hv] block by block. A few new tokens
walk the listed blocks where they lie; for many, keys and values are laid out token by token first.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.block_sparse import block_sparse_attention
from kernels_pallas.gather_decode import as_tokens, gather_blocks
from kernels_pallas.ranged import ranged_attention
from sparse_attn import metrics
from sparse_attn.cache import FEW_ROWS
from sparse_attn.documents import Rows
from sparse_attn.shards import WHOLE, Shards
from sparse_attn.types import HeadShape, Implementation, Selection


class BlockConfig(Protocol):
    """What the configs of these mechanisms have in common."""

    @property
    def selection_block(self) -> int: ...

    @property
    def implementation(self) -> Implementation: ...


class BlockCache(Protocol):
    """What their caches have in common."""

    @property
    def k(self) -> Float[Array, "B K M H L"]: ...

    @property
    def v(self) -> Float[Array, "B K M L Hv"]: ...


def earlier_blocks(rows: Rows, block: int) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The range of blocks of each row's document before the row's own: whole ones."""
    start = jnp.where(rows.valid, rows.start // block, 0)
    return start, jnp.where(rows.valid, rows.index // block, 0)


def all_blocks(rows: Rows, block: int, blocks: int) -> Int[Array, "B T 1 P"]:
    """Lists of every block up to each row's own, for rows with a cache (one document a row)."""
    number = jnp.arange(blocks, dtype=jnp.int32)[None, None, None, :]
    last = jnp.where(rows.valid, rows.index // block, -1)[:, :, None, None]
    return jnp.where(number <= last, number, -1)


def attend_blocks(
    config: BlockConfig,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    indices: Int[Array, "B T J P"] | None,
    rows: Rows,
    cache: BlockCache | None = None,
    shards: Shards = WHOLE,
) -> Float[Array, "B T N Hv"]:
    """Attention to the listed blocks of all keys, or of a cache; everything without lists."""
    if cache is not None:
        return attend_cached(
            q,
            cache.k,
            cache.v,
            indices,
            rows,
            shards=shards,
            implementation=config.implementation,
        )
    return attend_sequences(
        q,
        k,
        v,
        indices,
        rows,
        block=config.selection_block,
        implementation=config.implementation,
    )


def inspect_blocks(
    config: Any,
    shape: HeadShape,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    indices: Int[Array, "B T J P"],
    rows: Rows,
    cache: BlockCache | None = None,
    shards: Shards = WHOLE,
) -> tuple[dict[str, Float[Array, ""]], Selection]:
    """What ``inspect=True`` reports of the lists, over all keys or those of a cache.

    ``rows`` are those of the whole sequence; ``q`` and ``indices`` those of ``shards``.
    """
    if cache is not None:
        k, v = (x.astype(q.dtype) for x in as_tokens(cache.k, cache.v))
    whole = Selection(shards.gather(indices), config.selection_block)
    measured = metrics.measure(shards.gather(q), k, v, whole, rows, config=config, shape=shape)
    return measured, Selection(indices, config.selection_block)


def attend_sequences(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    indices: Int[Array, "B T J P"] | None,
    rows: Rows,
    *,
    block: int,
    implementation: Implementation,
) -> Float[Array, "B T N Hv"]:
    """Token-causal attention of whole sequences over the listed blocks, or over everything."""
    if indices is None:
        return ranged_attention(
            q, k, v, rows.start, rows.index + 1, implementation=implementation
        ).out
    return block_sparse_attention(
        q,
        k,
        v,
        indices,
        block_size=block,
        positions=rows.index,
        implementation=implementation,
    ).out


def attend_cached(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K M H L"],
    v: Float[Array, "B K M L Hv"],
    indices: Int[Array, "B T J P"] | None,
    rows: Rows,
    *,
    shards: Shards = WHOLE,
    implementation: Implementation,
) -> Float[Array, "B T N Hv"]:
    """:func:`attend_sequences` from a blocked cache that holds the rows' own tokens already.

    ``shards`` may split the blocks: each device attends the listed ones that it holds.
    """
    blocks, block = k.shape[2], k.shape[4]
    if shards.cache_split:
        return _attend_split(q, k, v, indices, rows, shards=shards, implementation=implementation)
    if q.shape[1] > FEW_ROWS:
        k, v = (x.astype(q.dtype) for x in as_tokens(k, v))
        return attend_sequences(q, k, v, indices, rows, block=block, implementation=implementation)
    if indices is None:
        indices = all_blocks(rows, block, blocks)
    return gather_blocks(q, k, v, indices, positions=rows.index, implementation=implementation).out


def _attend_split(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K M H L"],
    v: Float[Array, "B K M L Hv"],
    indices: Int[Array, "B T J P"] | None,
    rows: Rows,
    *,
    shards: Shards,
    implementation: Implementation,
) -> Float[Array, "B T N Hv"]:
    """The blocks that are here are attended here; what moves is a row's output, not its blocks."""
    blocks, block = k.shape[2], k.shape[4]
    positions = rows.index - shards.cache_first(blocks * block)
    if indices is not None and q.shape[1] <= FEW_ROWS:
        mine = shards.own_list(indices, blocks)
        part = gather_blocks(q, k, v, mine, positions=positions, implementation=implementation)
        return shards.merged(part).out
    k, v = (x.astype(q.dtype) for x in as_tokens(k, v))
    if indices is None:
        stop = jnp.where(rows.valid, positions + 1, 0)
        start = jnp.zeros_like(stop)
        part = ranged_attention(q, k, v, start, stop, implementation=implementation)
    else:
        part = block_sparse_attention(
            q,
            k,
            v,
            shards.own_list(indices, blocks),
            block_size=block,
            positions=positions,
            implementation=implementation,
        )
    return shards.merged(part).out


def pick_tokens(
    k: Float[Array, "B K M H L"], first: Int[Array, " B"], count: int, shards: Shards = WHOLE
) -> Float[Array, "B c K H"]:
    """Keys first .. first + count - 1 of every sequence, clipped to the cache."""
    blocks, block = k.shape[2], k.shape[4]
    token = first[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :]
    sequence = jnp.broadcast_to(jnp.arange(k.shape[0])[:, None], token.shape)
    if not shards.cache_split:
        token = jnp.minimum(token, blocks * block - 1)
        return k[sequence, :, token // block, :, token % block]
    at, here = shards.own_slots(token // block, blocks)
    found = k[sequence, :, jnp.clip(at, 0, blocks - 1), :, token % block]
    return shards.cache_sum(jnp.where(jnp.asarray(here)[:, :, None, None], found, 0))
