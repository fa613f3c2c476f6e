"""Block scores on Hopper: compressed attention as ranged attention over entries, then the choice.

The choice streams the keys once more with the lse in hand (mosaic_gpu_select.py), so no score
leaves the chip. It has no gradient; that of ``out`` and ``lse`` is ranged attention's.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels_pallas import gpu, tuned
from kernels_pallas.block_scores.mosaic_gpu_select import select_on_gpu
from kernels_pallas.block_scores.mosaic_gpu_tiles import Tiles, tiles_for
from kernels_pallas.block_scores.pooling import BlockScores, Pooling
from kernels_pallas.block_scores.ranking import Ranking
from kernels_pallas.ranged import mosaic_gpu as ranged
from kernels_pallas.ranged.few_rows import FEW_ROWS

__all__ = [
    "Tiles",
    "block_scores",
    "entry_lse",
    "select_blocks",
    "tiles_for",
]


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
      NotImplementedError: for chips, dtypes (16-bit floats alone), head widths (up to 256), group
        sizes and ``selected`` that the kernels do not serve, and for 16 rows or fewer unless
        ``tiles`` are given.
      ValueError: for tiles that do not fit in shared memory.
    """
    width = _check("block_scores", tiles, q=q, k=k, v=v)
    lists = k.shape[2]
    tiles = _sizes(q, lists, pooling, selected, width, tiles)
    gpu.padded_width("block_scores", v.shape[3])
    if scale < 0:
        q, scale = -q, -scale
    elif scale == 0:
        q, scale = q * 0, 1.0
    out, lse = _attend(q, k, v, start, stop, scale)
    fixed_q, fixed_k, shift = jax.lax.stop_gradient((q, k, lse))
    indices = select_on_gpu(
        fixed_q,
        fixed_k,
        (start, stop, first_block, last_block),
        jnp.where(jnp.isneginf(shift), 0.0, shift),
        None,
        ranking=Ranking(pooling, selected, initial, recent),
        lists=lists,
        scale=scale,
        tiles=tiles,
    )
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
      ValueError: for tiles that do not fit in shared memory.
    """
    width = _check("select_blocks", tiles, q=q, k=k)
    heads, kv_heads = q.shape[2], k.shape[2]
    lists = kv_heads if share else heads
    tiles = _sizes(q, lists, pooling, selected, width, tiles)
    shift = None
    # One head's order does not depend on its normaliser, a sum over heads and a threshold do.
    if heads > lists or floor is not None:
        shift = _normalizer(q, k, start, stop, lse, scale)
    return select_on_gpu(
        q,
        k,
        (start, stop, first_block, last_block),
        shift,
        budget,
        ranking=Ranking(pooling, selected, initial, recent, log=True, floor=floor),
        lists=lists,
        scale=scale,
        tiles=tiles,
    )


def entry_lse(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C K H"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    *,
    scale: float,
) -> Float[Array, "B T N"]:
    """See :func:`kernels_pallas.block_scores.entry_lse`.

    Raises:
      NotImplementedError: for chips, dtypes and head widths that ranged attention does not serve,
        and for 16 rows or fewer.
    """
    _check("entry_lse", None, q=q, k=k)
    return _own_lse(q, k, start, stop, scale)


def _own_lse(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C K H"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T N"]:
    # The kernel's narrowest values are 64 wide; which ones does not matter.
    return ranged.ranged_attention(q, k, k[..., :64], start, stop, scale=scale).lse


def _normalizer(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C K H"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    lse: Float[Array, "B T N"] | None,
    scale: float,
) -> Float[Array, "B T N"]:
    """``lse``, where it is missing or -inf the rows' own; 0 for rows that see nothing."""
    if lse is None:
        shift = _own_lse(q, k, start, stop, scale)
    else:
        missing = jnp.isneginf(lse)
        # Tiles in which no row lacks one visit no entry.
        stop = jnp.where(jnp.any(missing, axis=2), stop, start)
        shift = jnp.where(missing, _own_lse(q, k, start, stop, scale), lse.astype(jnp.float32))
    return jnp.where(jnp.isneginf(shift), 0.0, shift)


def _check(op: str, tiles: Tiles | None, **arrays: jax.Array) -> int:
    """Refuse what the kernels do not serve; returns the padded head width."""
    gpu.check_device()
    gpu.check_dtypes(op, **arrays)
    q = arrays["q"]
    if tiles is None and q.shape[1] <= FEW_ROWS:
        raise NotImplementedError(
            f"{op}: {q.shape[1]} query rows would occupy a few of the chip's processors; use "
            "implementation='xla', which reads all entries in one product, or pass tiles"
        )
    return gpu.padded_width(op, q.shape[3])


def _sizes(
    q: jax.Array, lists: int, pooling: Pooling, selected: int, width: int, tiles: Tiles | None
) -> Tiles:
    """``tiles``, measured ones or sizes by rule; raises what does not fit."""
    group = q.shape[2] // lists

    def check(tiles: Tiles) -> None:
        tiles.check(width, group)

    if tiles is None:
        tiles = tuned.choose(
            "select_blocks",
            gpu.chip_kind(),
            tiles_for(width, group, selected, q.shape[1]),
            check,
            length=q.shape[1],
            group=group,
            width=width,
            stride=pooling.stride,
            weights=len(pooling.weights),
            selected=selected,
            dtype=str(q.dtype),
        )
    check(tiles)
    return tiles


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, start, stop, scale):
    return tuple(ranged.ranged_attention(q, k, v, start, stop, scale=scale))


def _attend_fwd(q, k, v, start, stop, scale):
    # Saved by remat policies that save selections: a second forward pass would also rank again.
    out, lse = (checkpoint_name(x, "selection") for x in _attend(q, k, v, start, stop, scale))
    return (out, lse), (q, k, v, start, stop, out, lse)


def _attend_bwd(scale, residuals, cotangents):
    q, k, v = residuals[:3]
    tiles = ranged.choose_tiles(q, k, v, None, "backward")
    return ranged.gradients(scale, tiles, residuals, cotangents)


_attend.defvjp(_attend_fwd, _attend_bwd)
