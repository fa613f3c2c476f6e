"""Block scores on TPUs: compressed attention as ranged attention over entries, then the choice.

Tiles and their layout: mosaic_tpu_tiles.py. The choice streams the keys once more with the lse in
hand (mosaic_tpu_select.py, mosaic_tpu_topk.py), so no score leaves the chip. The choice has no
gradient; that of ``out`` and ``lse`` is ranged attention's.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels_pallas import tpu, tuned
from kernels_pallas.block_scores.mosaic_tpu_lse import lse_on_tpu, plan_lse
from kernels_pallas.block_scores.mosaic_tpu_select import Plan, plan_selection, select_on_tpu
from kernels_pallas.block_scores.mosaic_tpu_tiles import Tiles, tiles_for
from kernels_pallas.block_scores.pooling import BlockScores, Pooling
from kernels_pallas.block_scores.ranking import Ranking
from kernels_pallas.ranged.few_rows import FEW_ROWS
from kernels_pallas.ranged.mosaic_tpu import ranged_attention as ranged_attention_tpu
from kernels_pallas.ranged.mosaic_tpu_backward import gradients
from kernels_pallas.ranged.mosaic_tpu_plan import plan_for

__all__ = ["Tiles", "block_scores", "entry_lse", "select_blocks"]


def block_scores(
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
    """See :func:`kernels_pallas.block_scores.block_scores`; ``tiles`` overrides the tile sizes.

    Raises:
      NotImplementedError: for dtypes other than float32 and bfloat16, for 16 rows or fewer
        unless ``tiles`` are given, and for tiles that do not fit vector memory.
    """
    tpu.check_arrays("block_scores", q=q, k=k, v=v)
    _refuse_few(q, tiles)
    plan = _plan(q, k, Ranking(pooling, selected, initial, recent), k.shape[2], scale, tiles)
    out, lse = _attend(q, k, v, start, stop, scale)
    fixed = jax.lax.stop_gradient((q, k, lse))
    indices = select_on_tpu(plan, *fixed[:2], (start, stop, first_block, last_block), fixed[2])
    return BlockScores(out, lse, indices)


def select_blocks(
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
    """See :func:`kernels_pallas.block_scores.select_blocks`; ``tiles`` overrides the tile sizes.

    Raises:
      NotImplementedError: as :func:`block_scores`.
    """
    tpu.check_arrays("select_blocks", q=q, k=k)
    _refuse_few(q, tiles)
    heads, kv_heads = q.shape[2], k.shape[2]
    lists = kv_heads if share else heads
    ranking = Ranking(pooling, selected, initial, recent, log=True, floor=floor)
    plan = _plan(q, k, ranking, lists, scale, tiles)
    shift = None
    # One head's order does not depend on its normaliser, a sum over heads and a threshold do.
    if (share and heads > kv_heads) or floor is not None:
        shift = _normalizer(q, k, start, stop, lse, scale, tiles)
    return select_on_tpu(plan, q, k, (start, stop, first_block, last_block), shift, budget)


def entry_lse(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C K H"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    *,
    scale: float,
    tiles: Tiles | None = None,
) -> Float[Array, "B T N"]:
    """See :func:`kernels_pallas.block_scores.entry_lse`; ``tiles`` overrides the tile sizes.

    Raises:
      NotImplementedError: as :func:`block_scores`.
    """
    tpu.check_arrays("entry_lse", q=q, k=k)
    _refuse_few(q, tiles)
    return _lse(q, k, start, stop, scale, tiles)


def _plan(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C K H"],
    ranking: Ranking,
    lists: int,
    scale: float,
    tiles: Tiles | None,
) -> Plan:
    """The plan of a choice, with ``tiles``, measured ones or sizes by rule."""
    plan_with = partial(plan_selection, q, k, ranking=ranking, lists=lists, scale=scale)
    members, pooling = q.shape[2] // lists, ranking.pooling
    chip = tpu.chip_kind()
    return plan_with(
        tiles=tiles
        or tuned.choose(
            "select_blocks",
            chip,
            tiles_for(chip, members, pooling),
            lambda tiles: plan_with(tiles=tiles),
            length=q.shape[1],
            group=members,
            width=tpu.round_up(q.shape[3], tpu.LANES),
            stride=pooling.stride,
            weights=len(pooling.weights),
            selected=ranking.selected,
            dtype=str(q.dtype),
        )
    )


def _lse(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C K H"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    scale: float,
    tiles: Tiles | None,
) -> Float[Array, "B T N"]:
    group, chip = q.shape[2] // k.shape[2], tpu.chip_kind()
    tiles = tiles or tuned.choose(
        "entry_lse",
        chip,
        tiles_for(chip, group),
        lambda tiles: plan_lse(q, k, scale, tiles),
        length=q.shape[1],
        group=group,
        width=tpu.round_up(q.shape[3], tpu.LANES),
        dtype=str(q.dtype),
    )
    return lse_on_tpu(q, k, start, stop, scale=scale, tiles=tiles)


def _normalizer(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C K H"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    lse: Float[Array, "B T N"] | None,
    scale: float,
    tiles: Tiles | None,
) -> Float[Array, "B T N"]:
    """``lse``, where it is missing or -inf the rows' own; 0 for rows that see nothing."""
    if lse is None:
        shift = _lse(q, k, start, stop, scale, tiles)
    else:
        missing = jnp.isneginf(lse)
        # Tiles in which no row lacks one visit no entry.
        stop = jnp.where(jnp.any(missing, axis=2), stop, start)
        own = _lse(q, k, start, stop, scale, tiles)
        shift = jnp.where(missing, own, lse.astype(jnp.float32))
    return jnp.where(jnp.isneginf(shift), 0.0, shift)


def _refuse_few(q: Float[Array, "B T N H"], tiles: Tiles | None) -> None:
    if tiles is None and q.shape[1] <= FEW_ROWS:
        raise NotImplementedError(
            f"{q.shape[1]} query rows would leave most of a 128-token tile empty; use "
            "implementation='xla', which reads all entries in one product, or pass tiles"
        )


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, start, stop, scale):
    return tuple(ranged_attention_tpu(q, k, v, start, stop, scale=scale))


def _attend_fwd(q, k, v, start, stop, scale):
    # Saved by remat policies that save selections: a second forward pass would also rank again.
    out, lse = (checkpoint_name(x, "selection") for x in _attend(q, k, v, start, stop, scale))
    return (out, lse), (q, k, v, start, stop, out, lse)


def _attend_bwd(scale, residuals, cotangents):
    q, k, v = residuals[:3]
    plan = plan_for(q, k, v, scale, None, "backward")
    return (*gradients(plan, *residuals, *cotangents), None, None)


_attend.defvjp(_attend_fwd, _attend_bwd)
