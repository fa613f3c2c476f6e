"""Block scores in one pass per query tile, for any XLA backend; measured on CPUs.

A tile attends its visible entries with an online softmax and keeps the exponentials
[steps, M, keys]; once lse is known they become probabilities, are summed over the group, pooled
and ranked. The backward pass is that of ranged attention: the selection has no gradient.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.block_scores.pooling import BlockScores, Pooling
from kernels_pallas.block_scores.ranking import Ranking
from kernels_pallas.common import accumulation_dtype
from kernels_pallas.ranged.few_rows import FEW_ROWS, FewRows
from kernels_pallas.ranged.tiling import (
    MASKED,
    Softmax,
    Tiles,
    covered,
    head_major,
    precision_of,
    slab,
    tile_ranges,
    tile_rows,
    untile_rows,
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
    forward = _few_rows if q.shape[1] <= FEW_ROWS else partial(_forward, tiles=tiles)
    return forward(q, k, v, start, stop, first_block, last_block, ranking, scale)


def _score_fwd(q, k, v, start, stop, first_block, last_block, ranking, scale, tiles):
    result = _score(q, k, v, start, stop, first_block, last_block, ranking, scale, tiles)
    out, lse, _ = result
    return result, (q, k, v, start, stop, out, lse)


def _score_bwd(ranking, scale, tiles, residuals, cotangents):
    q, k = residuals[:2]
    d_out, d_lse, _ = cotangents
    tiles = Tiles.choose(q.shape[1], k.shape[1], q.shape[2] // k.shape[2])
    return (*ranged_backward(*residuals, d_out, d_lse, scale, tiles), None, None, None, None)


_score.defvjp(_score_fwd, _score_bwd)


def _forward(q, k, v, start, stop, first_block, last_block, ranking, scale, tiles):
    batch, rows, heads, _ = q.shape
    entries, kv_heads, width = v.shape[1:]
    group = heads // kv_heads
    dtype, precision = accumulation_dtype(q.dtype), precision_of(q.dtype)
    ranges = tile_ranges(start, stop, tiles, group, entries)
    live = covered(start, stop, entries)
    queries = tile_rows(q, tiles, kv_heads, stop > start) * scale
    k, v = head_major(k, live), head_major(v, live)
    a_sequence = queries.shape[0] // (batch * kv_heads)
    fill = ((0, 0), (0, -rows % tiles.rows))
    first_block, last_block = (
        jnp.pad(a, fill, constant_values=-1).reshape(-1, tiles.rows)
        for a in (first_block, last_block)
    )

    def tile(scratch, i):
        head = i // a_sequence
        at = head // kv_heads * a_sequence + i % a_sequence
        first, count, low, high = jax.tree.map(lambda a: a[at], ranges)

        def attend(j, state):
            softmax, kept, tops = state
            floor = low + j * tiles.keys
            position = jnp.minimum(floor, entries - tiles.keys)
            key, value = (slab(a, head, position, tiles.keys) for a in (k, v))
            logits = jnp.matmul(queries[i], key.T, precision=precision)
            mask = visible(position, floor, tiles.keys, first, count)
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
        indices = ranking.top_blocks(probabilities, first_block[at], last_block[at])
        return (kept, tops), (out, lse, indices)

    # Steps write the scratch before reading it, so one buffer serves all tiles uncleared.
    steps = -(-entries // tiles.keys)
    scratch = (
        jnp.zeros((steps, tiles.rows * group, tiles.keys), dtype),
        jnp.zeros((steps, tiles.rows * group), dtype),
    )
    tile_numbers = jnp.arange(queries.shape[0], dtype=jnp.int32)
    _, (out, lse, indices) = jax.lax.scan(tile, scratch, tile_numbers)
    out = untile_rows(out, batch, rows, kv_heads, tiles)
    lse = untile_rows(lse[:, :, None], batch, rows, kv_heads, tiles)[..., 0]
    indices = untile_rows(indices, batch, rows, kv_heads, tiles)
    return out.astype(q.dtype), lse, indices


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
    """Sum of factor * weights over the G rows of each query; unrolled, it runs four times as
    fast on a CPU as a reduction over the middle axis."""
    weights = weights.reshape(-1, group, weights.shape[1])
    factor = factor.reshape(-1, group)
    return sum(weights[:, g] * factor[:, g, None] for g in range(group))


def _add_columns(
    total: Float[Array, "A C"], position: Int[Array, ""], part: Float[Array, "A c"]
) -> Float[Array, "A C"]:
    at = (jnp.zeros((), jnp.int32), position)
    old = jax.lax.dynamic_slice(total, at, part.shape)
    return jax.lax.dynamic_update_slice(total, old + part, at)
