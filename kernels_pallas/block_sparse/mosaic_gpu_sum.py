"""The last step of dk and dv on Hopper: partial sums of a block added in a fixed order."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels_pallas import gpu
from kernels_pallas.gpu_tiles import Layout

__all__ = ["sum_pieces"]


def sum_pieces(
    parts: Float[Array, "E W L X"],
    offset: Int[Array, "E blocks+1"],
    layout: Layout,
    *,
    runs: int,
    dtype: Any,
) -> Float[Array, "B S K X"]:
    """Sum of the parts of every run of L = 64 keys, over its pieces and the lists of a kv head.

    The pieces of block j of entry e are [offset[e, j], offset[e, j + 1]), part ``w * runs + r``
    belongs to run r of piece w. Blocks without pieces get 0. S = blocks * runs * 64.
    """
    entries, _, _, width = parts.shape
    blocks, kv_heads, sharing = offset.shape[1] - 1, layout.kv_heads, layout.sharing
    heads = entries // sharing

    def body(refs):
        head = lax.div(refs.program, gpu.integer(blocks * runs))
        run = lax.rem(refs.program, gpu.integer(blocks * runs))
        block, within = lax.div(run, gpu.integer(runs)), lax.rem(run, gpu.integer(runs))
        total = gpu.zeros((gpu.ROWS, width))
        for part in range(sharing):
            entry = head * sharing + part
            place = entry * (blocks + 1) + block

            def add(w, total, entry=entry):
                piece = refs.parts.at[entry, w * runs + within]
                return total + plgpu.load(piece, layout=gpu.MATRIX, optimized=False)

            total = lax.fori_loop(refs.offset[place], refs.offset[place + 1], add, total)
        batch, kv_head = lax.div(head, gpu.integer(kv_heads)), lax.rem(head, gpu.integer(kv_heads))
        rows = pl.ds(run * gpu.ROWS, gpu.ROWS)
        gpu.write(total, refs.shared, refs.out.at[batch, rows, kv_head])

    shape = (layout.batch, blocks * runs * gpu.ROWS, kv_heads, width)
    (out,) = gpu.run_kernel(
        body,
        name="sum_pieces",
        programs=heads * blocks * runs,
        warpgroups=0,
        operands={"parts": parts, "offset": offset.reshape(-1)},
        outputs={"out": jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))},
        scratch={"shared": gpu.shared_matrix((gpu.ROWS, width), dtype)},
    )
    return out
