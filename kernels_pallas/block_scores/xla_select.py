"""Choice of key blocks by scores in log space, for any XLA backend; measured on CPUs.

A tile keeps the logits of its rows for the entries that it visits, [steps, M, keys]. Where no
normaliser is given it sums them up, then it takes the log-sum-exp over the group, pools and ranks.
Nothing is differentiable, and nothing but the indices leaves a tile.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.block_scores.few_rows import entry_logits, select_few_rows
from kernels_pallas.block_scores.pooling import Pooling
from kernels_pallas.block_scores.ranking import Ranking
from kernels_pallas.block_scores.xla import choose_tiles
from kernels_pallas.common import accumulation_dtype
from kernels_pallas.ranged.few_rows import FEW_ROWS
from kernels_pallas.ranged.tiling import (
    MASKED,
    START,
    TileIndex,
    Tiles,
    covered,
    head_major,
    live_rows,
    pad_rows,
    precision_of,
    slab,
    tile_ranges,
    visible,
)
from kernels_pallas.ranged.xla import ranged_attention_xla


def select_blocks_xla(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C K H"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    first_block: Int[Array, "B T"],
    last_block: Int[Array, "B T"],
    *,
    lse: Float[Array, "B T N"] | None,
    budget: Int[Array, "B T J"] | None,
    pooling: Pooling,
    selected: int,
    initial: int,
    recent: int,
    floor: float | None,
    share: bool,
    scale: float,
    tiles: Tiles | None = None,
) -> Int[Array, "B T J P"]:
    """See :func:`kernels_pallas.block_scores.select_blocks`; ``tiles`` overrides the tile sizes."""
    ranking = Ranking(pooling, selected, initial, recent, log=True, floor=floor)
    rows = (start, stop, first_block, last_block)
    if q.shape[1] <= FEW_ROWS:
        return select_few_rows(q, k, *rows, lse, budget, ranking, share, scale)
    if tiles is None:
        tiles = choose_tiles(q.shape[1], k.shape[1], q.shape[2] // k.shape[2])
    tiles = Tiles(tiles.rows, min(tiles.keys, k.shape[1]))
    return _select(q, k, *rows, lse, budget, ranking, share, scale, tiles)


def entry_lse_xla(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C K H"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    *,
    scale: float,
) -> Float[Array, "B T N"]:
    """See :func:`kernels_pallas.block_scores.entry_lse`."""
    if q.shape[1] > FEW_ROWS:
        return ranged_attention_xla(q, k, k[..., :1], start, stop, scale=scale).lse
    lse = jax.nn.logsumexp(entry_logits(q, k, start, stop, scale), axis=-1)
    return jnp.swapaxes(lse, 1, 2).reshape(q.shape[:3])


def _select(
    q, k, start, stop, first_block, last_block, lse, budget, ranking, share, scale, tiles
) -> Int[Array, "B T J P"]:
    batch, rows, heads, _ = q.shape
    entries, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    lists = 1 if share else group  # of a kv head
    # One head's order does not depend on its normaliser, a sum over heads and a threshold do.
    normalized = (share and group > 1) or ranking.floor is not None
    dtype, precision = accumulation_dtype(q.dtype), precision_of(q.dtype)
    ranges = tile_ranges(start, stop, tiles, group, entries)
    queries = pad_rows(q, tiles)
    padded = queries.shape[1]
    keys = head_major(k, covered(start, stop, entries))
    fill = ((0, 0), (0, padded - rows))
    first_block, last_block = (
        jnp.pad(a, fill, constant_values=-1).reshape(-1, tiles.rows)
        for a in (first_block, last_block)
    )
    if lse is not None:
        lse = pad_rows(lse[..., None].astype(dtype), tiles)
    if budget is not None:
        budget = pad_rows(budget[..., None].astype(jnp.int32), tiles)

    def tile(i, carry):
        selection, kept = carry
        at = TileIndex.of(i, padded, kv_heads, group, tiles)
        by_list = at._replace(first_query_head=at.first_query_head // group * lists)
        first, length, low, high = jax.tree.map(lambda a: a[at.ranges], ranges)
        query = live_rows(at.take(queries, tiles.rows, group), length, dtype) * scale
        steps = (jnp.maximum(high - low, 0) + tiles.keys - 1) // tiles.keys

        def position(j):
            return jnp.minimum(low + j * tiles.keys, entries - tiles.keys)

        def product(j, kept):
            logits = jnp.matmul(
                query, slab(keys, at.head, position(j), tiles.keys).T, precision=precision
            )
            mask = visible(position(j), low + j * tiles.keys, tiles.keys, first, length)
            logits = jnp.where(mask, logits, MASKED)
            return jax.lax.dynamic_update_index_in_dim(kept, logits, j, 0)

        kept = jax.lax.fori_loop(0, steps, product, kept)
        shift = None
        if normalized:
            given = None if lse is None else at.take(lse, tiles.rows, group)[:, 0]
            shift = _normalizer(kept, steps, given, length)

        def score(j, scores):
            part = _group_scores(kept[j], shift, group // lists)
            part = jnp.where(part > START, part, -jnp.inf)
            at_columns = (jnp.zeros((), jnp.int32), position(j))
            # The last step overlaps the one before, with -inf where that one has been.
            old = jax.lax.dynamic_slice(scores, at_columns, part.shape)
            return jax.lax.dynamic_update_slice(scores, jnp.maximum(old, part), at_columns)

        scores = jnp.full((tiles.rows * lists, entries), -jnp.inf, dtype)
        scores = jax.lax.fori_loop(0, steps, score, scores)
        slots = None
        if budget is not None:
            slots = by_list.take(budget, tiles.rows, lists)[:, 0]
        firsts, lasts = (
            jnp.repeat(blocks[at.ranges], lists) for blocks in (first_block, last_block)
        )
        indices = ranking.top_blocks_below(scores, high, firsts, lasts, slots)
        return by_list.put(selection, indices, tiles.rows), kept

    carry = (
        jnp.zeros((batch, padded, kv_heads * lists, ranking.selected), jnp.int32),
        # Steps write the scratch before reading it, so one buffer serves all tiles uncleared.
        jnp.zeros((-(-entries // tiles.keys), tiles.rows * group, tiles.keys), dtype),
    )
    count = batch * kv_heads * padded // tiles.rows
    return jax.lax.fori_loop(0, count, tile, carry)[0][:, :rows]


def _normalizer(
    kept: Float[Array, "steps M c"],
    steps: Int[Array, ""],
    given: Float[Array, "M"] | None,
    length: Int[Array, "M"],
) -> Float[Array, "M"]:
    """``given``, and where it is missing or -inf the log-sum-exp of the row's own logits."""
    rows, dtype = kept.shape[1], kept.dtype
    if given is not None:
        missing = jnp.any(jnp.isneginf(given) & (length > 0))
        steps = jnp.where(missing, steps, 0)

    def absorb(j, state):
        top, total = state
        higher = jnp.maximum(top, jnp.max(kept[j], axis=1))
        weights = jnp.exp(kept[j] - higher[:, None])
        return higher, total * jnp.exp(top - higher) + jnp.sum(weights, axis=1)

    empty = (jnp.full((rows,), START, dtype), jnp.zeros((rows,), dtype))
    top, total = jax.lax.fori_loop(0, steps, absorb, empty)
    own = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1)), 0)
    return own if given is None else jnp.where(jnp.isneginf(given), own, given)


def _group_scores(
    logits: Float[Array, "M c"], shift: Float[Array, "M"] | None, group: int
) -> Float[Array, "A c"]:
    """log sum_g exp(logits - shift) over ``group`` neighbouring rows; unrolled like its sum."""
    scores = logits if shift is None else logits - shift[:, None]
    if group == 1:
        return scores
    scores = scores.reshape(-1, group, scores.shape[1])
    top = scores[:, 0]
    for g in range(1, group):
        top = jnp.maximum(top, scores[:, g])
    total = jnp.exp(scores[:, 0] - top)
    for g in range(1, group):
        total = total + jnp.exp(scores[:, g] - top)
    return top + jnp.log(total)
