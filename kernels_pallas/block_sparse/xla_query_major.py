"""Tile-union block-sparse attention, query-major: the execution for accelerators and small blocks.

``tile`` consecutive queries times the G heads of a kv head are one tile of M rows; it visits the
union of its queries' blocks ``blocks_per_step`` at a time, with a trip count that follows the
longest union of the ``tiles_at_once`` tiles advanced together. Gradients of q walk the same lists;
those of k and v walk the inverse lists, one key block at a time, so that nothing is summed by
atomics and results are bitwise repeatable.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.block_sparse.lists import TileLists, build_inverse_lists, build_tile_lists
from kernels_pallas.common import AttentionOutput, accumulation_dtype

__all__ = ["backward", "forward"]

_MASKED = -1e30  # finite: differences of two masked logits stay defined


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Sizes, and the moves between the public layout and tiles."""

    batch: int
    queries: int
    query_heads: int
    kv_heads: int
    lists: int
    tile: int
    block_size: int
    keys: int

    @property
    def group(self) -> int:
        return self.query_heads // self.lists

    @property
    def tiles(self) -> int:
        return -(-self.queries // self.tile)

    @property
    def blocks(self) -> int:
        return -(-self.keys // self.block_size)

    @property
    def count(self) -> int:
        """Tiles of all batches and lists."""
        return self.batch * self.lists * self.tiles

    def to_tiles(self, array: Float[Array, "B T N A"]) -> Float[Array, "tiles M A"]:
        """Rows ordered (query, head of the group) in a tile; padded queries are zero."""
        width = array.shape[3]
        array = jnp.pad(array, ((0, 0), (0, self.tiles * self.tile - self.queries), (0, 0), (0, 0)))
        shape = (self.batch, self.tiles, self.tile, self.lists, self.group, width)
        array = jnp.transpose(array.reshape(shape), (0, 3, 1, 2, 4, 5))
        return array.reshape(self.count, self.tile * self.group, width)

    def from_tiles(self, array: Float[Array, "tiles M A"]) -> Float[Array, "B T N A"]:
        """Inverse of :meth:`to_tiles`."""
        width = array.shape[-1]
        shape = (self.batch, self.lists, self.tiles, self.tile, self.group, width)
        array = jnp.transpose(array.reshape(shape), (0, 2, 3, 1, 4, 5))
        array = array.reshape(self.batch, self.tiles * self.tile, self.query_heads, width)
        return array[:, : self.queries]

    def last_of_tiles(self, last: Int[Array, "B T"]) -> Int[Array, "tiles tile"]:
        """Last visible key row of the queries of every tile, -1 for padding."""
        surplus = self.tiles * self.tile - self.queries
        last = jnp.pad(last, ((0, 0), (0, surplus)), constant_values=-1)
        last = last.reshape(self.batch, 1, self.tiles, self.tile)
        shape = (self.batch, self.lists, self.tiles, self.tile)
        return jnp.broadcast_to(last, shape).reshape(self.count, self.tile)

    def split_keys(
        self, array: Float[Array, "B S K A"], last: Int[Array, "B T"]
    ) -> Float[Array, "B blocks L K A"]:
        """Whole blocks, zero beyond what any query of the batch may see."""
        row = jnp.arange(self.keys, dtype=jnp.int32)[None, :]
        seen = row <= jnp.max(last, axis=1, keepdims=True)
        array = jnp.where(seen[:, :, None, None], array, 0)
        array = jnp.pad(array, ((0, 0), (0, -self.keys % self.block_size), (0, 0), (0, 0)))
        return array.reshape(
            self.batch, self.blocks, self.block_size, self.kv_heads, array.shape[3]
        )

    def heads_of(self, number: Int[Array, "Z"], per_head: int) -> tuple[Array, Array]:
        """Batch and kv head of flat item numbers with ``per_head`` items a list."""
        head = number // per_head
        return head // self.lists, head % self.lists // (self.lists // self.kv_heads)


def _bits(words: Int[Array, "*A W"], tile: int) -> Bool[Array, "*A tile"]:
    """Unpack bit words into one flag a query."""
    query = jnp.arange(tile, dtype=jnp.int32)
    selected = jnp.take(words, query // 32, axis=-1)
    shift = (query % 32).reshape((1,) * (words.ndim - 1) + (tile,))
    return (jax.lax.shift_right_logical(selected, jnp.broadcast_to(shift, selected.shape)) & 1) > 0


def _map_groups(function, count: int, at_once: int):
    """``function`` of ``at_once`` item numbers at a time; results joined along axis 0."""
    at_once = min(at_once, count)
    groups = -(-count // at_once)
    number = jnp.arange(groups * at_once, dtype=jnp.int32).reshape(groups, at_once)
    # The last group may repeat the last item; its surplus results are cut off.
    results = jax.lax.map(function, jnp.minimum(number, count - 1))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], results)


@dataclasses.dataclass(frozen=True)
class _Visit:
    """What a group of Z tiles needs to walk its lists ``step`` blocks at a time."""

    layout: _Layout
    step: int
    batch: Int[Array, "Z"]
    kv_head: Int[Array, "Z"]
    last: Int[Array, "Z tile"]
    blocks: Int[Array, "Z U"]
    words: Int[Array, "Z U W"]
    count: Int[Array, "Z"]

    @staticmethod
    def of(layout: _Layout, lists: TileLists, last: Array, number: Array, step: int) -> _Visit:
        union, width = lists.words.shape[-2:]
        batch, kv_head = layout.heads_of(number, layout.tiles)
        padding = -union % step
        blocks = lists.blocks.reshape(layout.count, union)[number]
        words = lists.words.reshape(layout.count, union, width)[number]
        return _Visit(
            layout=layout,
            step=step,
            batch=batch,
            kv_head=kv_head,
            last=layout.last_of_tiles(last)[number],
            blocks=jnp.pad(blocks, ((0, 0), (0, padding)), constant_values=-1),
            words=jnp.pad(words, ((0, 0), (0, padding), (0, 0))),
            count=lists.count.reshape(-1)[number],
        )

    def gather(
        self, array: Float[Array, "B blocks L K A"], at: Int[Array, ""]
    ) -> Float[Array, "Z S A"]:
        """Keys or values of step ``at``, zero in unused slots (S = step * L)."""
        blocks = jax.lax.dynamic_slice_in_dim(self.blocks, at * self.step, self.step, axis=1)
        picked = array[
            self.batch[:, None], jnp.maximum(blocks, 0), :, self.kv_head[:, None]
        ]  # [Z, step, L, A]
        picked = jnp.where((blocks >= 0)[:, :, None, None], picked, 0)
        return picked.reshape(picked.shape[0], -1, picked.shape[3])

    def visible(self, at: Int[Array, ""]) -> Bool[Array, "Z M S"]:
        """Which keys of step ``at`` each row sees."""
        layout = self.layout
        blocks = jax.lax.dynamic_slice_in_dim(self.blocks, at * self.step, self.step, axis=1)
        words = jax.lax.dynamic_slice_in_dim(self.words, at * self.step, self.step, axis=1)
        selected = jnp.swapaxes(_bits(words, layout.tile), 1, 2)  # [Z, tile, step]
        limit = self.last[:, :, None] - blocks[:, None, :] * layout.block_size
        limit = jnp.where(selected, limit, -1)
        lane = jnp.arange(layout.block_size, dtype=jnp.int32)
        visible = lane[None, None, None, :] <= limit[..., None]
        visible = visible.reshape(*visible.shape[:2], -1)
        return jnp.repeat(visible, layout.group, axis=1)

    def run(self, body, *carry):
        """``carry = body(step number, *carry)`` until the longest list of the group is done."""
        trips = -(-jnp.max(self.count) // self.step)
        return jax.lax.fori_loop(0, trips, lambda i, state: body(i, *state), carry)


def _layout(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    indices: Int[Array, "B T A P"],
    tile: int,
    block_size: int,
) -> _Layout:
    batch, queries, query_heads = q.shape[:3]
    return _Layout(
        batch=batch,
        queries=queries,
        query_heads=query_heads,
        kv_heads=k.shape[2],
        lists=indices.shape[2],
        tile=min(tile, queries),
        block_size=block_size,
        keys=k.shape[1],
    )


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    indices: Int[Array, "B T A P"],
    last: Int[Array, "B T"],
    *,
    block_size: int,
    scale: float,
    tile: int,
    blocks_per_step: int,
    tiles_at_once: int,
) -> tuple[AttentionOutput, TileLists]:
    """Attention of each query over its listed blocks, keys up to row ``last``.

    ``indices`` must hold no block that starts after ``last``. Returns the output and the tile
    lists, which the backward pass walks again.
    """
    dtype = accumulation_dtype(q.dtype)
    layout = _layout(q, k, indices, tile, block_size)
    lists = build_tile_lists(indices, tile=layout.tile, blocks=layout.blocks)
    step = min(blocks_per_step, lists.blocks.shape[3])
    rows = layout.tile * layout.group
    q_tiles = layout.to_tiles(q)
    k_blocks, v_blocks = layout.split_keys(k, last), layout.split_keys(v, last)

    def attend(number):
        visit = _Visit.of(layout, lists, last, number, step)
        queries = q_tiles[number]
        size = queries.shape[0]

        def body(at, top_before, total_before, sums):
            keys, values = visit.gather(k_blocks, at), visit.gather(v_blocks, at)
            logits = scale * jnp.einsum("ZMH,ZSH->ZMS", queries, keys, preferred_element_type=dtype)
            visible = visit.visible(at)
            logits = jnp.where(visible, logits, _MASKED)
            top = jnp.maximum(top_before, jnp.max(logits, axis=2))
            weights = jnp.where(visible, jnp.exp(logits - top[..., None]), 0.0)
            decay = jnp.exp(top_before - top)
            added = jnp.einsum("ZMS,ZSH->ZMH", weights, values.astype(dtype))
            total = decay * total_before + jnp.sum(weights, axis=2)
            return top, total, decay[..., None] * sums + added

        top, total, sums = visit.run(
            body,
            jnp.full((size, rows), _MASKED, dtype),
            jnp.zeros((size, rows), dtype),
            jnp.zeros((size, rows, v.shape[3]), dtype),
        )
        seen = total > 0
        safe_total = jnp.where(seen, total, 1.0)
        lse = jnp.where(seen, top + jnp.log(safe_total), -jnp.inf)
        return (sums / safe_total[..., None]).astype(q.dtype), lse

    out, lse = _map_groups(attend, layout.count, tiles_at_once)
    output = AttentionOutput(layout.from_tiles(out), layout.from_tiles(lse[..., None])[..., 0])
    return output, lists


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    lists: TileLists,
    last: Int[Array, "B T"],
    lse: Float[Array, "B T N"],
    delta: Float[Array, "B T N"],
    out_cotangent: Float[Array, "B T N Hv"],
    *,
    block_size: int,
    scale: float,
    tile: int,
    blocks_per_step: int,
    tiles_at_once: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """Gradients of q, k and v: ds = p (dp - delta) with delta = sum(do * out) - dlse."""
    dtype = accumulation_dtype(q.dtype)
    layout = _layout(q, k, jnp.swapaxes(lists.blocks, 1, 2), tile, block_size)
    # Rows that see nothing may hold anything; their weights are zero, 0 * NaN is not.
    alive = (last >= 0)[:, :, None, None]
    q_tiles = layout.to_tiles(jnp.where(alive, q, 0))
    cotangent_tiles = layout.to_tiles(jnp.where(alive, out_cotangent, 0))
    lse_tiles = layout.to_tiles(jnp.where(jnp.isneginf(lse), 0.0, lse)[..., None])
    delta_tiles = layout.to_tiles(delta[..., None])
    k_blocks, v_blocks = layout.split_keys(k, last), layout.split_keys(v, last)

    def weigh(queries, keys, values, cotangents, row_lse, row_delta, visible):
        """Weights p and logit gradients ds [Z, M, S]."""
        logits = scale * jnp.einsum("ZMH,ZSH->ZMS", queries, keys, preferred_element_type=dtype)
        weights = jnp.where(visible, jnp.exp(logits - row_lse), 0.0)
        dweights = jnp.einsum("ZMH,ZSH->ZMS", cotangents, values, preferred_element_type=dtype)
        return weights, jnp.where(visible, weights * (dweights - row_delta), 0.0)

    def query_gradient(number):
        step = min(blocks_per_step, lists.blocks.shape[3])
        visit = _Visit.of(layout, lists, last, number, step)
        rows = (q_tiles[number], cotangent_tiles[number], lse_tiles[number], delta_tiles[number])

        def body(at, dq):
            keys, values = visit.gather(k_blocks, at), visit.gather(v_blocks, at)
            queries, cotangents, row_lse, row_delta = rows
            _, dlogits = weigh(
                queries, keys, values, cotangents, row_lse, row_delta, visit.visible(at)
            )
            return (dq + scale * jnp.einsum("ZMS,ZSH->ZMH", dlogits, keys.astype(dtype)),)

        (dq,) = visit.run(body, jnp.zeros(rows[0].shape, dtype))
        return dq.astype(q.dtype)

    inverse = build_inverse_lists(lists.blocks, lists.words, blocks=layout.blocks)
    entries = inverse.tiles.shape[2]
    step = min(blocks_per_step, entries)
    heads = layout.batch * layout.lists
    offsets = inverse.offsets.reshape(heads, layout.blocks + 1)
    visiting = inverse.tiles.reshape(heads, entries)
    assert inverse.words is not None
    words = inverse.words.reshape(heads, entries, -1)
    last_tiles = layout.last_of_tiles(last)
    rows = layout.tile * layout.group

    def key_gradient(number):
        head, block = number // layout.blocks, number % layout.blocks
        batch, kv_head = layout.heads_of(number, layout.blocks)
        start, stop = offsets[head, block], offsets[head, block + 1]
        keys, values = (x[batch, block, :, kv_head] for x in (k_blocks, v_blocks))
        size = number.shape[0]

        def body(at, carry):
            dk, dv = carry
            place = start[:, None] + at * step + jnp.arange(step, dtype=jnp.int32)[None, :]
            live = place < stop[:, None]
            place = jnp.minimum(place, entries - 1)
            tile_number = head[:, None] * layout.tiles + visiting[head[:, None], place]
            selected = _bits(words[head[:, None], place], layout.tile) & live[..., None]
            limit = last_tiles[tile_number] - (block * block_size)[:, None, None]
            limit = jnp.repeat(jnp.where(selected, limit, -1), layout.group, axis=2)
            lane = jnp.arange(block_size, dtype=jnp.int32)
            visible = lane[None, None, :] <= limit.reshape(size, step * rows)[..., None]
            parts = (q_tiles, cotangent_tiles, lse_tiles, delta_tiles)
            queries, cotangents, row_lse, row_delta = (
                x[tile_number].reshape(size, step * rows, -1) for x in parts
            )
            weights, dlogits = weigh(queries, keys, values, cotangents, row_lse, row_delta, visible)
            dv = dv + jnp.einsum("ZMS,ZMH->ZSH", weights, cotangents.astype(dtype))
            dk = dk + scale * jnp.einsum("ZMS,ZMH->ZSH", dlogits, queries.astype(dtype))
            return dk, dv

        zero = (jnp.zeros(keys.shape, dtype), jnp.zeros(values.shape, dtype))
        trips = -(-jnp.max(stop - start) // step)
        return jax.lax.fori_loop(0, trips, body, zero)

    def to_keys(array, like):
        """Sum the lists of a kv head and leave the block layout."""
        sharing = layout.lists // layout.kv_heads
        array = array.reshape(
            layout.batch, layout.kv_heads, sharing, layout.blocks * block_size, like.shape[3]
        )
        array = jnp.transpose(jnp.sum(array, axis=2), (0, 2, 1, 3))
        return array[:, : layout.keys].astype(like.dtype)

    dq = layout.from_tiles(_map_groups(query_gradient, layout.count, tiles_at_once))
    dk, dv = _map_groups(key_gradient, heads * layout.blocks, tiles_at_once)
    return dq, to_keys(dk, k), to_keys(dv, v)
