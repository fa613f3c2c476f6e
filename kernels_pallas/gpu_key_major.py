"""Gradients of keys and values on Hopper: runs of 64 keys meet the tiles that visit them.

A program owns one run of keys and walks a list of tiles; nothing is added atomically, so results
are bitwise repeatable. One warpgroup sums dv, another dk: both sums of one warpgroup would not
leave registers for the rest at wide heads, and the logits computed twice cost a fifth of the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels_pallas import gpu
from kernels_pallas.gpu_query_major import visible
from kernels_pallas.gpu_tiles import Layout

__all__ = ["KeyVisits", "key_gradients"]

_VALUES, _KEYS, _COPIES = 0, 1, 2  # the warpgroups: one sums dv, one dk, one copies


class KeyVisits(Protocol):
    """Which tiles meet which run of 64 keys, as W pieces of work for each of the E lists.

    ``at`` is entry * works + work, ``c`` counts the tiles of a piece.
    """

    @property
    def works(self) -> int:
        """W."""
        ...

    def operands(self) -> Mapping[str, jax.Array]:
        """Flat integer arrays in global memory, which the methods find in ``refs`` by name."""
        ...

    def first_key(self, refs: Any, at: jax.Array) -> jax.Array:
        """First key row of the run."""
        ...

    def count(self, refs: Any, at: jax.Array) -> jax.Array:
        """Number of tiles."""
        ...

    def tile(self, refs: Any, at: jax.Array, c: jax.Array) -> jax.Array:
        """Number of tile c."""
        ...

    def selected(self, refs: Any, at: jax.Array, c: jax.Array, token: jax.Array) -> Any:
        """Whether the rows of the tile's tokens ``token`` visit the run; None if all do."""
        ...


def key_gradients(
    q: Float[Array, "E tiles M H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    d_out: Float[Array, "E tiles M Hv"],
    lse: Float[Array, "E tiles M"],
    delta: Float[Array, "E tiles M"],
    rows: Mapping[str, Int[Array, "B tiles M"]],
    visits: KeyVisits,
    layout: Layout,
    *,
    scale: float,
    steps: int,
) -> tuple[Float[Array, "E W L H"], Float[Array, "E W L Hv"]]:
    """What every piece of work adds to dk and dv of its run of L = 64 keys, float32.

    Arguments as in :func:`kernels_pallas.gpu_query_major.query_gradient`; ``steps`` counts slots of
    64 rows. A piece without tiles adds 0.
    """
    entries, _, _, width = q.shape
    value_width, works, parts = v.shape[3], visits.works, layout.warpgroups
    shape = (gpu.ROWS, gpu.ROWS)

    def weigh(refs, at, key, c):
        """Transposed weights [keys, rows] of step c, and its slot. Awaits the slot."""
        slot = lax.rem(c, gpu.integer(steps))
        token = gpu.row_numbers(gpu.COLUMN) + lax.rem(c, gpu.integer(parts)) * gpu.ROWS
        token = lax.div(token, gpu.integer(layout.group))
        selected = visits.selected(refs, at, lax.div(c, gpu.integer(parts)), token)
        plgpu.barrier_wait(refs.ready.at[slot])
        start = None
        if "start" in rows:
            start = plgpu.load(refs.start_shared.at[slot], layout=gpu.COLUMN)
        stop = plgpu.load(refs.stop_shared.at[slot], layout=gpu.COLUMN)
        lse = plgpu.load(refs.lse_shared.at[slot], layout=gpu.COLUMN) * gpu.LOG2E
        logits = gpu.product(refs.k_shared, gpu.transposed(refs.q_shared.at[slot]), shape)
        weights = jnp.exp2(logits * (scale * gpu.LOG2E) - gpu.across_rows(lse, shape))
        return jnp.where(visible(shape, 0, key, start, stop, selected), weights, 0.0), slot

    def stage(refs, which):
        return None if refs.stage is None else refs.stage.at[which]

    def sum_values(refs, at, key, c, dv):
        weights, slot = weigh(refs, at, key, c)
        dv = gpu.add_product(
            dv, weights.astype(v.dtype), refs.d_out_shared.at[slot], stage(refs, _VALUES)
        )
        plgpu.barrier_arrive(refs.consumed.at[slot])
        return dv

    def sum_keys(refs, at, key, c, dk):
        weights, slot = weigh(refs, at, key, c)
        d_weights = gpu.product(refs.v_shared, gpu.transposed(refs.d_out_shared.at[slot]), shape)
        delta = plgpu.load(refs.delta_shared.at[slot], layout=gpu.COLUMN)
        d_logits = weights * (d_weights - gpu.across_rows(delta, shape))
        dk = gpu.add_product(
            dk, d_logits.astype(k.dtype), refs.q_shared.at[slot], stage(refs, _KEYS)
        )
        plgpu.barrier_arrive(refs.consumed.at[slot])
        return dk

    def copy(refs, at, key):
        entry = lax.div(at, gpu.integer(works))
        batch = lax.div(entry, gpu.integer(layout.lists))
        kv_head = lax.div(lax.rem(entry, gpu.integer(layout.lists)), gpu.integer(layout.sharing))
        mine = (batch, pl.ds(key, gpu.ROWS), kv_head)
        plgpu.copy_gmem_to_smem(refs.k.at[mine], refs.k_shared, refs.k_ready)
        plgpu.copy_gmem_to_smem(refs.v.at[mine], refs.v_shared, refs.v_ready)

        def load(c, slot):
            tile = visits.tile(refs, at, lax.div(c, gpu.integer(parts)))
            part = pl.ds(lax.rem(c, gpu.integer(parts)) * gpu.ROWS, gpu.ROWS)

            def start_copies():
                for name in ("q", "d_out", "lse", "delta", *rows):
                    of = batch if name in rows else entry
                    plgpu.copy_gmem_to_smem(
                        getattr(refs, name).at[of, tile, part],
                        getattr(refs, name + "_shared").at[slot],
                        refs.ready.at[slot],
                    )

            return [start_copies]

        gpu.stream(visits.count(refs, at) * parts, steps, load, (refs.consumed,))

    def body(refs):
        at = refs.program
        key = visits.first_key(refs, at)
        entry, work = lax.div(at, gpu.integer(works)), lax.rem(at, gpu.integer(works))

        def walk(step, width):
            count = visits.count(refs, at) * parts
            empty = gpu.zeros((gpu.ROWS, width))
            return lax.fori_loop(gpu.integer(0), count, partial(step, refs, at, key), empty)

        @pl.when(refs.warpgroup == _VALUES)
        def _():
            gpu.take_registers(2, computes=True)
            plgpu.barrier_wait(refs.k_ready)
            refs.dv[entry, work] = walk(sum_values, value_width)

        @pl.when(refs.warpgroup == _KEYS)
        def _():
            gpu.take_registers(2, computes=True)
            plgpu.barrier_wait(refs.k_ready)
            plgpu.barrier_wait(refs.v_ready)
            refs.dk[entry, work] = walk(sum_keys, width) * scale

        @pl.when(refs.warpgroup == _COPIES)
        def _():
            gpu.take_registers(2, computes=False)
            copy(refs, at, key)

    numbers = {"lse": jnp.float32, "delta": jnp.float32, **dict.fromkeys(rows, jnp.int32)}
    operands = {"q": q, "k": k, "v": v, "d_out": d_out, "lse": lse, "delta": delta}
    dk, dv = gpu.run_kernel(
        body,
        name="attention_key_gradients",
        programs=entries * works,
        warpgroups=2,
        operands={**operands, **rows, **visits.operands()},
        outputs={
            "dk": jax.ShapeDtypeStruct((entries, works, gpu.ROWS, width), jnp.float32),
            "dv": jax.ShapeDtypeStruct((entries, works, gpu.ROWS, value_width), jnp.float32),
        },
        scratch={
            "k_shared": gpu.shared_matrix((gpu.ROWS, width), k.dtype),
            "v_shared": gpu.shared_matrix((gpu.ROWS, value_width), v.dtype),
            "q_shared": gpu.shared_matrix((steps, gpu.ROWS, width), q.dtype),
            "d_out_shared": gpu.shared_matrix((steps, gpu.ROWS, value_width), d_out.dtype),
            **{
                name + "_shared": plgpu.SMEM((steps, gpu.ROWS), dtype)
                for name, dtype in numbers.items()
            },
            "k_ready": plgpu.Barrier(),
            "v_ready": plgpu.Barrier(),
            "ready": plgpu.Barrier(num_arrivals=2 + len(numbers), num_barriers=steps),
            "consumed": plgpu.Barrier(num_arrivals=2, num_barriers=steps),
            "stage": gpu.staging(2, gpu.ROWS, k.dtype),
        },
    )
    return dk, dv
