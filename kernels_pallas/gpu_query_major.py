"""Attention of tiles of rows on Hopper: forward and the gradient of the queries (Mosaic GPU).

A tile is 64 or 128 rows (consecutive tokens times the query heads that share keys) and visits runs
of ``keys`` key rows one after the other: which ones, and which rows see which keys, is said by
``visits`` (:class:`Visits`). Ranged and block-sparse attention are two kinds of visits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels_pallas import gpu
from kernels_pallas.gpu_tiles import Layout

__all__ = ["Visits", "forward", "query_gradient", "visible"]


class Visits(Protocol):
    """Which runs of keys a tile visits. ``at`` is head * tiles + tile, ``c`` counts the visits."""

    def operands(self) -> Mapping[str, jax.Array]:
        """Flat integer arrays in global memory, which the methods find in ``refs`` by name."""
        ...

    def count(self, refs: Any, at: jax.Array) -> jax.Array:
        """Number of visits."""
        ...

    def first_key(self, refs: Any, at: jax.Array, c: jax.Array) -> jax.Array:
        """First key row of visit c."""
        ...

    def selected(self, refs: Any, at: jax.Array, c: jax.Array, token: jax.Array) -> Any:
        """Whether the rows of the tile's tokens ``token`` take part in visit c; None if all do."""
        ...

    def phases(
        self, refs: Any, at: jax.Array, count: jax.Array
    ) -> Sequence[tuple[jax.Array, jax.Array, bool]]:
        """Intervals of visits that together are [0, count), and whether rows need a mask there."""
        ...


def visible(
    shape: tuple[int, int],
    key_axis: int,
    key: jax.Array,
    start: jax.Array | None,
    stop: jax.Array,
    selected: jax.Array | None,
) -> jax.Array:
    """True where row r sees key row ``key + i``: start[r] <= key + i < stop[r] if selected[r].

    Rows lie on the other axis of ``shape``. The arithmetic is done once a row, not once an element.
    """
    spread = gpu.across_columns if key_axis == 1 else gpu.across_rows
    i = plgpu.broadcasted_iota(jnp.int32, shape, key_axis, layout=gpu.MATRIX)
    stop = stop - key
    if selected is not None:
        stop = jnp.where(selected, stop, 0)
    mask = i < spread(stop, shape)
    if start is not None:
        mask &= i >= spread(start - key, shape)
    return mask


def _rows_of(refs: Any, layout: Layout, at: jax.Array) -> tuple[Any, Any, jax.Array]:
    """start (or None), stop and token number of the 64 rows of the calling warpgroup."""
    offset = refs.warpgroup * gpu.ROWS
    batch = lax.div(at, gpu.integer(layout.lists * layout.tiles))
    tile = lax.rem(at, gpu.integer(layout.tiles))
    where = (batch, tile, pl.ds(offset, gpu.ROWS))
    start = None
    if hasattr(refs, "start"):
        start = plgpu.load(refs.start.at[where], layout=gpu.ROW, optimized=False)
    stop = plgpu.load(refs.stop.at[where], layout=gpu.ROW, optimized=False)
    token = lax.div(gpu.row_numbers(gpu.ROW) + offset, gpu.integer(layout.group))
    return start, stop, token


def _copy_keys(refs: Any, layout: Layout, visits: Visits, at: jax.Array, steps: int) -> None:
    """What the copying warpgroup does: the keys and values of every visit, into the ring."""
    batch = lax.div(at, gpu.integer(layout.lists * layout.tiles))
    head = lax.rem(lax.div(at, gpu.integer(layout.tiles)), gpu.integer(layout.lists))
    kv_head = lax.div(head, gpu.integer(layout.sharing))
    keys = refs.k_shared.shape[1]

    def load(c, slot):
        rows = (batch, pl.ds(visits.first_key(refs, at, c), keys), kv_head)
        return [
            partial(plgpu.copy_gmem_to_smem, source.at[rows], ring.at[slot], ready.at[slot])
            for source, ring, ready in (
                (refs.k, refs.k_shared, refs.k_ready),
                (refs.v, refs.v_shared, refs.v_ready),
            )
        ]

    count = visits.count(refs, at)
    gpu.stream(count, steps, load, (refs.k_consumed, refs.v_consumed))


def _ring(layout: Layout, k: jax.Array, v: jax.Array, keys: int, steps: int) -> dict[str, Any]:
    warpgroups = layout.warpgroups
    return {
        "k_shared": gpu.shared_matrix((steps, keys, k.shape[3]), k.dtype),
        "v_shared": gpu.shared_matrix((steps, keys, v.shape[3]), v.dtype),
        "k_ready": plgpu.Barrier(num_barriers=steps),
        "v_ready": plgpu.Barrier(num_barriers=steps),
        "k_consumed": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=steps),
        "v_consumed": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=steps),
        "stage": gpu.staging(warpgroups, keys, k.dtype),
    }


def _stage(refs: Any) -> Any:
    return None if refs.stage is None else refs.stage.at[refs.warpgroup]


def forward(
    q: Float[Array, "E tiles M H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    rows: Mapping[str, Int[Array, "B tiles M"]],
    visits: Visits,
    layout: Layout,
    *,
    scale: float,
    keys: int,
    steps: int,
) -> tuple[Float[Array, "E tiles M Hv"], Float[Array, "E tiles M"]]:
    """Attention and lse of every row; E = batch * lists. ``scale`` must be positive.

    ``rows`` holds ``stop`` and, if rows do not all start at key 0, ``start``: the rows of the key
    buffer that a row may see in the runs it visits. ``keys`` is the length of a run, ``steps`` the
    number of slots in the ring. Rows that see nothing have out 0 and lse -inf.
    """
    entries, tiles, _, width = q.shape
    value_width = v.shape[3]
    logits_shape, out_shape = (gpu.ROWS, keys), (gpu.ROWS, value_width)

    def step(refs, at, row, c, carry, *, masked):
        total, top, values = carry
        start, stop, token = row
        slot = lax.rem(c, gpu.integer(steps))
        key = visits.first_key(refs, at, c)
        selected = visits.selected(refs, at, c, token) if masked else None
        plgpu.barrier_wait(refs.k_ready.at[slot])
        logits = gpu.product(
            refs.q_shared.at[refs.warpgroup], gpu.transposed(refs.k_shared.at[slot]), logits_shape
        )
        plgpu.barrier_arrive(refs.k_consumed.at[slot])
        if masked:
            mask = visible(logits_shape, 1, key, start, stop, selected)
            logits = jnp.where(mask, logits, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(logits, axis=1) * (scale * gpu.LOG2E))
        weights = jnp.exp2(logits * (scale * gpu.LOG2E) - gpu.across_columns(new_top, logits_shape))
        decay = jnp.exp2(top - new_top)
        total = total * decay + jnp.sum(weights, axis=1)
        values = values * gpu.across_columns(decay, out_shape)
        plgpu.barrier_wait(refs.v_ready.at[slot])
        values = gpu.add_product(
            values, weights.astype(v.dtype), refs.v_shared.at[slot], _stage(refs)
        )
        plgpu.barrier_arrive(refs.v_consumed.at[slot])
        return total, new_top, values

    def compute(refs, at):
        head, tile = lax.div(at, gpu.integer(tiles)), lax.rem(at, gpu.integer(tiles))
        mine = pl.ds(refs.warpgroup * gpu.ROWS, gpu.ROWS)
        q_ready = refs.q_ready.at[refs.warpgroup]
        plgpu.copy_gmem_to_smem(
            refs.q.at[head, tile, mine], refs.q_shared.at[refs.warpgroup], q_ready
        )
        row = _rows_of(refs, layout, at)
        carry = (
            gpu.zeros((gpu.ROWS,)),
            gpu.zeros((gpu.ROWS,), gpu.NOTHING),
            gpu.zeros(out_shape),
        )
        plgpu.barrier_wait(q_ready)
        for first, stop, masked in visits.phases(refs, at, visits.count(refs, at)):
            carry = lax.fori_loop(first, stop, partial(step, refs, at, row, masked=masked), carry)
        total, top, values = carry
        seen = total > 0.0
        total = jnp.where(seen, total, 1.0)
        lse = jnp.where(seen, top * math.log(2) + jnp.log(total), -jnp.inf)
        values = values / gpu.across_columns(total, out_shape)
        shared = refs.q_shared if refs.out_shared is None else refs.out_shared
        gpu.write(values, shared.at[refs.warpgroup], refs.out.at[head, tile, mine])
        gpu.write(lse, refs.lse_shared.at[refs.warpgroup], refs.lse.at[head, tile, mine])

    def body(refs):
        # Later tiles of a sequence visit more keys: they start first.
        at = entries * tiles - 1 - refs.program

        @pl.when(refs.warpgroup < layout.warpgroups)
        def _():
            gpu.take_registers(layout.warpgroups, computes=True)
            compute(refs, at)

        @pl.when(refs.warpgroup == layout.warpgroups)
        def _():
            gpu.take_registers(layout.warpgroups, computes=False)
            _copy_keys(refs, layout, visits, at, steps)

    out, lse = gpu.run_kernel(
        body,
        name="attention_forward",
        programs=entries * tiles,
        warpgroups=layout.warpgroups,
        operands={"q": q, "k": k, "v": v, **rows, **visits.operands()},
        outputs={
            "out": jax.ShapeDtypeStruct((*q.shape[:3], value_width), q.dtype),
            "lse": jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
        },
        scratch={
            "q_shared": gpu.shared_matrix((layout.warpgroups, gpu.ROWS, width), q.dtype),
            "out_shared": None
            if width == value_width
            else gpu.shared_matrix((layout.warpgroups, gpu.ROWS, value_width), q.dtype),
            "lse_shared": plgpu.SMEM((layout.warpgroups, gpu.ROWS), jnp.float32),
            "q_ready": plgpu.Barrier(num_barriers=layout.warpgroups),
            **_ring(layout, k, v, keys, steps),
        },
    )
    return out, lse


def query_gradient(
    q: Float[Array, "E tiles M H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    d_out: Float[Array, "E tiles M Hv"],
    lse: Float[Array, "E tiles M"],
    delta: Float[Array, "E tiles M"],
    rows: Mapping[str, Int[Array, "B tiles M"]],
    visits: Visits,
    layout: Layout,
    *,
    scale: float,
    keys: int,
    steps: int,
) -> Float[Array, "E tiles M H"]:
    """Gradient of the queries: ds = p (dp - delta), dq = scale ds k.

    ``lse`` is finite (anything where a row sees nothing), ``delta`` is sum(d_out * out) - d_lse.
    The rest as in :func:`forward`.
    """
    entries, tiles, _, width = q.shape
    shape = (gpu.ROWS, keys)

    def step(refs, at, row, statistics, c, dq, *, masked):
        start, stop, token = row
        lse, delta = statistics
        slot = lax.rem(c, gpu.integer(steps))
        key = visits.first_key(refs, at, c)
        selected = visits.selected(refs, at, c, token) if masked else None
        plgpu.barrier_wait(refs.k_ready.at[slot])
        logits = gpu.product(
            refs.q_shared.at[refs.warpgroup], gpu.transposed(refs.k_shared.at[slot]), shape
        )
        weights = jnp.exp2(logits * (scale * gpu.LOG2E) - gpu.across_columns(lse, shape))
        if masked:
            mask = visible(shape, 1, key, start, stop, selected)
            weights = jnp.where(mask, weights, 0.0)
        plgpu.barrier_wait(refs.v_ready.at[slot])
        d_weights = gpu.product(
            refs.d_out_shared.at[refs.warpgroup], gpu.transposed(refs.v_shared.at[slot]), shape
        )
        plgpu.barrier_arrive(refs.v_consumed.at[slot])
        d_logits = weights * (d_weights - gpu.across_columns(delta, shape))
        dq = gpu.add_product(dq, d_logits.astype(k.dtype), refs.k_shared.at[slot], _stage(refs))
        plgpu.barrier_arrive(refs.k_consumed.at[slot])
        return dq

    def compute(refs, at):
        head, tile = lax.div(at, gpu.integer(tiles)), lax.rem(at, gpu.integer(tiles))
        where = (head, tile, pl.ds(refs.warpgroup * gpu.ROWS, gpu.ROWS))
        ready = refs.ready.at[refs.warpgroup]
        plgpu.copy_gmem_to_smem(refs.q.at[where], refs.q_shared.at[refs.warpgroup], ready)
        plgpu.copy_gmem_to_smem(refs.d_out.at[where], refs.d_out_shared.at[refs.warpgroup], ready)
        row = _rows_of(refs, layout, at)
        lse = plgpu.load(refs.lse.at[where], layout=gpu.ROW, optimized=False) * gpu.LOG2E
        delta = plgpu.load(refs.delta.at[where], layout=gpu.ROW, optimized=False)
        dq = gpu.zeros((gpu.ROWS, width))
        plgpu.barrier_wait(ready)
        for first, stop, masked in visits.phases(refs, at, visits.count(refs, at)):
            visit = partial(step, refs, at, row, (lse, delta), masked=masked)
            dq = lax.fori_loop(first, stop, visit, dq)
        gpu.write(dq * scale, refs.q_shared.at[refs.warpgroup], refs.dq.at[where])

    def body(refs):
        at = entries * tiles - 1 - refs.program

        @pl.when(refs.warpgroup < layout.warpgroups)
        def _():
            gpu.take_registers(layout.warpgroups, computes=True)
            compute(refs, at)

        @pl.when(refs.warpgroup == layout.warpgroups)
        def _():
            gpu.take_registers(layout.warpgroups, computes=False)
            _copy_keys(refs, layout, visits, at, steps)

    operands = {"q": q, "k": k, "v": v, "d_out": d_out, "lse": lse, "delta": delta}
    (dq,) = gpu.run_kernel(
        body,
        name="attention_query_gradient",
        programs=entries * tiles,
        warpgroups=layout.warpgroups,
        operands={**operands, **rows, **visits.operands()},
        outputs={"dq": jax.ShapeDtypeStruct(q.shape, q.dtype)},
        scratch={
            "q_shared": gpu.shared_matrix((layout.warpgroups, gpu.ROWS, width), q.dtype),
            "d_out_shared": gpu.shared_matrix(
                (layout.warpgroups, gpu.ROWS, v.shape[3]), d_out.dtype
            ),
            "ready": plgpu.Barrier(num_arrivals=2, num_barriers=layout.warpgroups),
            **_ring(layout, k, v, keys, steps),
        },
    )
    return dq
