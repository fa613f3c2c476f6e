"""Block scores in one pass per query tile, for any XLA backend; measured on CPUs.

A tile attends its visible entries with an online softmax and keeps the exponentials
[steps, M, keys]; once lse is known they become probabilities, are summed over the group, pooled
and ranked. The backward pass is that of ranged attention: the selection has no gradient.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels_pallas.block_scores.few_rows import WHOLE_ENTRIES, score_few_rows
from kernels_pallas.block_scores.pooling import BlockScores, Pooling
from kernels_pallas.block_scores.ranking import Ranking
from kernels_pallas.common import accumulation_dtype
from kernels_pallas.ranged.few_rows import FEW_ROWS, FewRows
from kernels_pallas.ranged.tiling import (
    MASKED,
    Softmax,
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
from kernels_pallas.ranged.xla import ranged_backward


def block_scores_xla(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C K H"],
    v: Float[Array, "B C K Hv"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    first_block: Int[Array, "B T"],
    last_block: Int[Array, "B T"],
    *,
    pooling: Pooling,
    selected: int,
    initial: int,
    recent: int,
    scale: float,
    tiles: Tiles | None = None,
) -> BlockScores:
    """See :func:`kernels_pallas.block_scores.block_scores`; ``tiles`` overrides the tile sizes."""
    if tiles is None:
        tiles = choose_tiles(q.shape[1], k.shape[1], q.shape[2] // k.shape[2])
    tiles = Tiles(tiles.rows, min(tiles.keys, k.shape[1]))
    ranking = Ranking(pooling, selected, initial, recent)
    rows = (start, stop, first_block, last_block)
    return BlockScores(*_score(q, k, v, *rows, ranking, scale, tiles))


def choose_tiles(rows: int, entries: int, group: int) -> Tiles:
    """Tiles whose exponentials (4 bytes for each matrix row and entry) stay near 1 MiB."""
    dense = Tiles.choose(rows, entries, group)
    query_rows = dense.rows
    while query_rows > 8 and query_rows * group * entries > 2**18:
        query_rows //= 2
    return Tiles(query_rows, dense.keys)


@partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def _score(q, k, v, start, stop, first_block, last_block, ranking, scale, tiles):
    rows = (start, stop, first_block, last_block)
    if q.shape[1] > FEW_ROWS:
        return _forward(q, k, v, *rows, ranking, scale, tiles)
    few = score_few_rows if k.shape[1] <= WHOLE_ENTRIES else _few_rows
    return few(q, k, v, *rows, ranking, scale)


def _score_fwd(q, k, v, start, stop, first_block, last_block, ranking, scale, tiles):
    result = _score(q, k, v, start, stop, first_block, last_block, ranking, scale, tiles)
    # Saved by remat policies that save selections: a second forward pass would also rank again.
    out, lse = (checkpoint_name(x, "selection") for x in result[:2])
    return (out, lse, result[2]), (q, k, v, start, stop, out, lse)


def _score_bwd(ranking, scale, tiles, residuals, cotangents):
    q, k = residuals[:2]
    d_out, d_lse, _ = cotangents
    # The backward pass keeps no exponentials, so it takes the larger tiles of dense attention.
    tiles = Tiles.choose(q.shape[1], k.shape[1], q.shape[2] // k.shape[2])
    gradients = ranged_backward(*residuals, d_out=d_out, d_lse=d_lse, scale=scale, tiles=tiles)
    return (*gradients, None, None, None, None)


_score.defvjp(_score_fwd, _score_bwd)


def _forward(q, k, v, start, stop, first_block, last_block, ranking, scale, tiles):
    batch, rows, heads, _ = q.shape
    entries, kv_heads, width = v.shape[1:]
    group = heads // kv_heads
    dtype, precision = accumulation_dtype(q.dtype), precision_of(q.dtype)
    ranges = tile_ranges(start, stop, tiles, group, entries)
    live = covered(start, stop, entries)
    queries = pad_rows(q, tiles)
    padded = queries.shape[1]
    k, v = head_major(k, live), head_major(v, live)
    fill = ((0, 0), (0, padded - rows))
    first_block, last_block = (
        jnp.pad(a, fill, constant_values=-1).reshape(-1, tiles.rows)
        for a in (first_block, last_block)
    )

    def tile(i, carry):
        outs, lses, selection, *scratch = carry
        at = TileIndex.of(i, padded, kv_heads, group, tiles)
        first, length, low, high = jax.tree.map(lambda a: a[at.ranges], ranges)
        query = live_rows(at.take(queries, tiles.rows, group), length, dtype) * scale

        def attend(j, state):
            softmax, kept, tops = state
            floor = low + j * tiles.keys
            position = jnp.minimum(floor, entries - tiles.keys)
            key, value = (slab(a, at.head, position, tiles.keys) for a in (k, v))
            logits = jnp.matmul(query, key.T, precision=precision)
            mask = visible(position, floor, tiles.keys, first, length)
            softmax, weights = softmax.absorb(jnp.where(mask, logits, MASKED), value, precision)
            kept = jax.lax.dynamic_update_index_in_dim(kept, weights, j, 0)
            tops = jax.lax.dynamic_update_index_in_dim(tops, softmax.top, j, 0)
            return softmax, kept, tops

        steps = (jnp.maximum(high - low, 0) + tiles.keys - 1) // tiles.keys
        empty = Softmax.empty(tiles.rows * group, width, dtype)
        softmax, kept, tops = jax.lax.fori_loop(0, steps, attend, (empty, *scratch))
        out, lse = softmax.finish()

        def share(j, probabilities):
            position = jnp.minimum(low + j * tiles.keys, entries - tiles.keys)
            part = _sum_group(kept[j], _rescale(tops[j], lse), group)
            return _add_columns(probabilities, position, part)

        probabilities = jnp.zeros((tiles.rows, entries), dtype)
        probabilities = jax.lax.fori_loop(0, steps, share, probabilities)
        indices = ranking.top_blocks_below(
            probabilities, high, first_block[at.ranges], last_block[at.ranges]
        )
        by_kv_head = at._replace(first_query_head=at.first_query_head // group)
        return (
            at.put(outs, out, tiles.rows),
            at.put(lses, lse[:, None], tiles.rows),
            by_kv_head.put(selection, indices, tiles.rows),
            kept,
            tops,
        )

    steps = -(-entries // tiles.keys)
    carry = (
        jnp.zeros((batch, padded, heads, width), q.dtype),
        jnp.zeros((batch, padded, heads, 1), dtype),
        jnp.zeros((batch, padded, kv_heads, ranking.selected), jnp.int32),
        # Steps write the scratch before reading it, so one buffer serves all tiles uncleared.
        jnp.zeros((steps, tiles.rows * group, tiles.keys), dtype),
        jnp.zeros((steps, tiles.rows * group), dtype),
    )
    count = batch * kv_heads * padded // tiles.rows
    out, lse, indices, *_ = jax.lax.fori_loop(0, count, tile, carry)
    return out[:, :rows], lse[:, :rows, :, 0], indices[:, :rows]


def _few_rows(q, k, v, start, stop, first_block, last_block, ranking, scale):
    batch, rows = start.shape
    entries = k.shape[1]
    problem = FewRows(q, k, v, start, stop, scale)
    matrix_rows = problem.queries.shape[1]
    steps = -(-entries // problem.keys)

    def attend_and_select(i):
        def attend(j, state):
            softmax, kept, tops = state
            logits, value = problem.step(i, j)
            softmax, weights = softmax.absorb(logits, value, problem.precision)
            kept = jax.lax.dynamic_update_index_in_dim(kept, weights, j, 0)
            tops = jax.lax.dynamic_update_index_in_dim(tops, softmax.top, j, 0)
            return softmax, kept, tops

        empty = problem.empty()
        scratch = (
            jnp.zeros((steps, matrix_rows, problem.keys), problem.dtype),
            jnp.zeros((steps, matrix_rows), problem.dtype),
        )
        state = jax.lax.fori_loop(0, problem.steps(i), attend, (empty, *scratch))
        softmax, kept, tops = state
        out, lse = problem.finish(softmax)

        def share(j, probabilities):
            part = _sum_group(kept[j], _rescale(tops[j], lse), problem.group)
            return _add_columns(probabilities, problem.position(i, j), part)

        probabilities = jnp.zeros((rows * problem.shared, entries), problem.dtype)
        probabilities = jax.lax.fori_loop(0, problem.steps(i), share, probabilities)
        first, last = (
            jnp.repeat(a[i // problem.bundles], problem.shared) for a in (first_block, last_block)
        )
        return out, lse, ranking.top_blocks(probabilities, first, last)

    out, lse, indices = jax.lax.map(attend_and_select, jnp.arange(problem.count, dtype=jnp.int32))
    indices = indices.reshape(batch, problem.bundles, rows, problem.shared, -1)
    indices = jnp.moveaxis(indices, 1, 2).reshape(batch, rows, k.shape[2], -1)
    return problem.unpack(out, q.dtype), problem.unpack(lse[..., None], lse.dtype)[..., 0], indices


def _rescale(top: Float[Array, "M"], lse: Float[Array, "M"]) -> Float[Array, "M"]:
    """exp(top - lse), what turns weights kept under an earlier maximum into probabilities."""
    seen = ~jnp.isneginf(lse)
    return jnp.where(seen, jnp.exp(top - jnp.where(seen, lse, 0)), 0)


def _sum_group(
    weights: Float[Array, "M c"], factor: Float[Array, "M"], group: int
) -> Float[Array, "A c"]:
    """Sum of factor * weights over the G rows of each query.

    Unrolled because CPUs run it faster than a reduction over the middle axis.
    """
    weights = weights.reshape(-1, group, weights.shape[1])
    factor = factor.reshape(-1, group)
    total = weights[:, 0] * factor[:, 0, None]
    for g in range(1, group):
        total = total + weights[:, g] * factor[:, g, None]
    return total


def _add_columns(
    total: Float[Array, "A C"], position: Int[Array, ""], part: Float[Array, "A c"]
) -> Float[Array, "A C"]:
    at = (jnp.zeros((), jnp.int32), position)
    old = jax.lax.dynamic_slice(total, at, part.shape)
    return jax.lax.dynamic_update_slice(total, old + part, at)
