"""Attention over tiles of 64 gathered keys by one warpgroup of Hopper (Mosaic GPU).

Keys are the rows of the products and the queries of a list, 8 to 64 of them, the columns: a list
of G heads wastes no rows of the tensor cores, and the sums it writes are as small as its queries.

    logits [64, columns] = keys [64, H] queries^T        sums [Hv, columns] += values^T weights^T

Both sides of both products lie in shared memory, so that the interpreter runs the very lines the
chip does. A program's second warpgroup copies (TMA) what is listed into a ring of slots.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels_pallas import tuned
from kernels_pallas.gpu import (
    COLUMN,
    LOG2E,
    MATRIX,
    NOTHING,
    SHARED_BYTES,
    chip_kind,
    integer,
)
from kernels_pallas.interpreting import interpreter

__all__ = [
    "ROWS",
    "Sizes",
    "State",
    "Tiles",
    "attend",
    "choose_tiles",
    "compute",
    "item",
    "merge_splits",
    "pad_queries",
    "run",
    "share",
    "sizes_for",
    "split_steps",
    "stream",
    "swizzle_for",
    "swizzled",
]

ROWS = 64
"""Keys of a step: the rows of one ``wgmma``."""

_MULTIPROCESSORS = 132
"""Of an H100 or H200 (SXM)."""

_WIDEST = 512


@dataclass(frozen=True)
class Tiles:
    """How a kernel is cut: ``slots`` of the ring, and the most ``programs`` to split lists into."""

    slots: int
    programs: int = _MULTIPROCESSORS


@dataclass(frozen=True)
class Sizes:
    """Static sizes of a call; ``columns`` queries a program, ``tiles`` of them an item."""

    items: int
    group: int
    columns: int
    tiles: int
    width: int
    value_width: int
    key_swizzle: int
    value_swizzle: int
    dtype: Any

    @property
    def value_rows(self) -> int:
        """Rows of the transposed sums: whole products of 64."""
        return -(-self.value_width // ROWS) * ROWS

    def fixed_bytes(self) -> int:
        """Shared memory beside the ring: queries, weights, sums, lse, barriers and scratch."""
        halves = self.columns * (self.width + ROWS)
        return 2 * halves + 4 * self.columns * (self.value_rows + 1) + 4096


def sizes_for(
    op: str, items: int, group: int, width: int, value_width: int, dtype: Any, *, lanes: int = 0
) -> Sizes:
    """Sizes of a call whose keys come ``lanes`` tokens to a transposed row, or in rows (0).

    Raises:
      NotImplementedError: for widths that ``wgmma`` or TMA cannot take.
    """
    for name, size in (("H", width), ("Hv", value_width)):
        if size % 16 or size > _WIDEST:
            raise NotImplementedError(
                f"{op}: {name}={size} must be a multiple of 16 up to {_WIDEST}; pad the heads, or "
                "use implementation='xla'"
            )
    columns = min(ROWS, -(-group // 8) * 8)
    return Sizes(
        items=items,
        group=group,
        columns=columns,
        tiles=-(-group // columns),
        width=width,
        value_width=value_width,
        key_swizzle=swizzle_for(math.gcd(width, lanes)),
        value_swizzle=swizzle_for(value_width),
        dtype=dtype,
    )


def tiles_for(op: str, sizes: Sizes, slot_bytes: int, extra_bytes: int = 0) -> Tiles:
    """Two programs a multiprocessor with up to 4 slots each; one program if that leaves one slot.

    Lists are split into as many programs as run at a time, no more: a few programs in a second
    wave would cost as much as a whole one.

    Raises:
      NotImplementedError: if two slots do not fit into shared memory.
    """
    fixed = sizes.fixed_bytes() + extra_bytes
    for programs_at_once in (2, 1):
        slots = (SHARED_BYTES // programs_at_once - fixed) // slot_bytes
        if slots >= 2:
            return Tiles(min(slots, 4), programs_at_once * _MULTIPROCESSORS)
    raise NotImplementedError(
        f"{op}: H={sizes.width}, Hv={sizes.value_width} and {sizes.columns} heads a list leave no "
        f"room for two steps in {SHARED_BYTES} bytes of shared memory; use implementation='xla'"
    )


def choose_tiles(
    op: str, sizes: Sizes, slot_bytes: int, extra_bytes: int = 0, *, length: int
) -> Tiles:
    """Measured tiles or those of :func:`tiles_for`; ``length`` is that of the lists, in keys."""

    def check(tiles: Tiles) -> None:
        needed = sizes.fixed_bytes() + extra_bytes + tiles.slots * slot_bytes
        if min(tiles.slots, tiles.programs) < 1 or needed > SHARED_BYTES:
            raise ValueError(f"{tiles} need {needed} bytes of shared memory of {SHARED_BYTES}")

    return tuned.choose(
        op,
        chip_kind(),
        tiles_for(op, sizes, slot_bytes, extra_bytes),
        check,
        length=length,
        group=sizes.group,
        width=sizes.width,
        value_width=sizes.value_width,
        dtype=str(jnp.dtype(sizes.dtype)),
    )


def swizzle_for(lanes: int) -> int:
    """The widest swizzle (bytes) whose 16-bit lanes divide a width."""
    return next(bytes_ for bytes_ in (128, 64, 32) if lanes % (bytes_ // 2) == 0)


def swizzled(shape: tuple[int, ...], dtype: Any, swizzle: int) -> Any:
    """Shared memory for 16-bit matrices as ``wgmma`` reads them."""
    kinds: Any = plgpu  # mypy takes the transforms for abstract.
    transforms = (kinds.TilingTransform((8, swizzle // 2)), kinds.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def pad_queries(q: Float[Array, "B T N H"], sizes: Sizes) -> Float[Array, "programs columns H"]:
    """The queries of every item, in tiles of columns."""
    q = q.reshape(sizes.items, sizes.group, sizes.width)
    q = jnp.pad(q, ((0, 0), (0, sizes.tiles * sizes.columns - sizes.group), (0, 0)))
    return q.reshape(sizes.items * sizes.tiles, sizes.columns, sizes.width)


def split_steps(
    steps: Int[Array, " items"], longest: int, sizes: Sizes, tiles: Tiles
) -> tuple[Int[Array, "items_splits 2"], int]:
    """Steps [begin, end) of every split of every item, and how many splits there are."""
    splits = max(1, min(longest, tiles.programs // (sizes.items * sizes.tiles)))
    edge = jnp.arange(splits + 1, dtype=jnp.int32)[None, :] * steps[:, None] // splits
    return jnp.stack([edge[:, :-1], edge[:, 1:]], axis=-1).reshape(-1, 2), splits


class State(NamedTuple):
    """Softmax in progress: maximum [columns], weights so far [64, columns], sums [Hv, columns]."""

    top: jax.Array
    weights: jax.Array
    sums: jax.Array


def attend(state: State, refs: Any, keys: Any, values: Any, visible: Any, scale: float) -> State:
    """One step: ``keys`` [64, H] and ``values`` [Hv, 64] in shared memory, ``visible`` a mask."""
    logits = _product(keys, refs.queries.transpose((1, 0)), visible.shape)
    logits = jnp.where(visible, logits * (scale * LOG2E), -jnp.inf)
    top = jnp.maximum(state.top, jnp.max(logits, axis=0))
    weights = jnp.exp2(logits - _across(top, logits.shape))
    decay = jnp.exp2(state.top - top)
    refs.weights.transpose((1, 0))[...] = weights.astype(refs.weights.dtype)
    plgpu.commit_smem()
    added = _product(values, refs.weights.transpose((1, 0)), state.sums.shape)
    return State(
        top,
        state.weights * _across(decay, logits.shape) + weights,
        state.sums * _across(decay, state.sums.shape) + added,
    )


def compute(refs: Any, sizes: Sizes, splits: int, step: Callable[[Any, Any, State], State]) -> None:
    """What the computing warpgroup does: ``step(number, slot, state)`` over its share, then store.

    A share without visible keys stores lse -inf beside sums of 0.
    """
    row = lax.div(refs.program, integer(splits))
    plgpu.copy_gmem_to_smem(refs.q.at[row], refs.queries, refs.asked)
    plgpu.barrier_wait(refs.asked)
    columns = sizes.columns
    state = State(
        plgpu.layout_cast(jnp.full((columns,), NOTHING, jnp.float32), COLUMN),
        plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), MATRIX),
        plgpu.layout_cast(jnp.zeros((sizes.value_rows, columns), jnp.float32), MATRIX),
    )
    begin, end = share(refs, sizes, splits)
    slots = refs.arrived.shape[0]

    def visit(c, state):
        return State(*step(begin + c, lax.rem(c, integer(slots)), State(*state)))

    state = State(*lax.fori_loop(integer(0), end - begin, visit, state))
    total = jnp.sum(state.weights, axis=0)
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    refs.sums[...] = state.sums / _across(safe, state.sums.shape)
    refs.logs[...] = jnp.where(seen, (state.top + jnp.log2(safe)) / LOG2E, -jnp.inf)
    plgpu.commit_smem()
    for low in range(0, sizes.value_rows, 256):
        rows = pl.ds(low, min(256, sizes.value_rows - low))
        plgpu.copy_smem_to_gmem(refs.sums.at[rows], refs.out.at[refs.program, rows])
    plgpu.copy_smem_to_gmem(refs.logs, refs.lse.at[refs.program])
    plgpu.wait_smem_to_gmem(0)


def share(refs: Any, sizes: Sizes, splits: int) -> tuple[jax.Array, jax.Array]:
    """The steps [begin, end) of this program."""
    at = item(refs, sizes, splits) * splits + lax.rem(refs.program, integer(splits))
    return refs.bounds[at, 0], refs.bounds[at, 1]


def item(refs: Any, sizes: Sizes, splits: int) -> jax.Array:
    """Which (sequence, query, list) this program belongs to."""
    return lax.div(refs.program, integer(splits * sizes.tiles))


def stream(refs: Any, count: jax.Array, load: Callable[[jax.Array, jax.Array], None]) -> None:
    """What the copying warpgroup does: ``load(c, slot)`` for c < count, once the slot is free.

    Every arrival at ``refs.consumed`` has been awaited in the end, as the interpreter wants it.
    """
    slots = integer(refs.consumed.shape[0])

    def fill(c, carry):
        @pl.when(c >= slots)
        def _():
            plgpu.barrier_wait(refs.consumed.at[lax.rem(c, slots)])

        load(c, lax.rem(c, slots))
        return carry

    def drain(c, carry):
        plgpu.barrier_wait(refs.consumed.at[lax.rem(c, slots)])
        return carry

    lax.fori_loop(integer(0), count, fill, None)
    lax.fori_loop(lax.max(count - slots, integer(0)), count, drain, None)


def run(
    body: Callable[[Any], None],
    *,
    name: str,
    sizes: Sizes,
    splits: int,
    operands: Mapping[str, jax.Array],
    scratch: Mapping[str, Any],
) -> tuple[Float[Array, "programs Hv columns"], Float[Array, "programs columns"]]:
    """Run ``body(refs)`` in both warpgroups of every program; 0 computes, 1 copies."""
    programs = sizes.items * sizes.tiles * splits
    names = [*operands, "out", "lse"]
    columns, dtype = sizes.columns, sizes.dtype
    common = {
        "queries": swizzled((columns, sizes.width), dtype, sizes.key_swizzle),
        "weights": swizzled((columns, ROWS), dtype, sizes.value_swizzle),
        "sums": plgpu.SMEM((sizes.value_rows, columns), jnp.float32),
        "logs": plgpu.SMEM((columns,), jnp.float32),
        "asked": plgpu.Barrier(),
    }

    def kernel(*positional, **scoped):
        refs = types.SimpleNamespace(**dict(zip(names, positional, strict=True)), **scoped)
        refs.program = lax.axis_index("program")
        refs.warpgroup = lax.axis_index("warpgroup")
        body(refs)

    kernel.__name__ = name
    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((programs, sizes.value_rows, columns), jnp.float32),
            jax.ShapeDtypeStruct((programs, columns), jnp.float32),
        ),
        scratch_types={**common, **scratch},
        grid=(programs,),
        grid_names=("program",),
        num_threads=2,
        thread_name="warpgroup",
        # Lane semantics leave the layout of every buffer to us; the others swizzle unasked.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpreter("gpu"),
    )(*operands.values())


def merge_splits(
    out: Float[Array, "programs Hv columns"], lse: Float[Array, "programs columns"], sizes: Sizes
) -> tuple[Float[Array, "items G Hv"], Float[Array, "items G"]]:
    """Merge the splits of every item by their lse, float32; see kernels_pallas.common.merge."""
    shape = (sizes.items, sizes.tiles, -1, sizes.columns)
    lse = lse.reshape(shape)
    out = out[:, : sizes.value_width].reshape(*shape[:3], sizes.value_width, sizes.columns)
    top = jnp.max(lse, axis=2, keepdims=True)
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = jnp.exp(lse - top)
    total = jnp.sum(weights, axis=2)
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    merged = jnp.einsum("itsc,itsvc->itcv", weights, out, precision="highest")
    merged = merged / safe[..., None]
    logs = jnp.where(seen, jnp.log(safe) + top[:, :, 0], -jnp.inf)
    merged = merged.reshape(sizes.items, -1, sizes.value_width)[:, : sizes.group]
    return merged, logs.reshape(sizes.items, -1)[:, : sizes.group]


def _product(left: Any, right: Any, shape: Any) -> jax.Array:
    def multiply(total):
        plgpu.wgmma(total, left, right)
        return total[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _across(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One number a column as a matrix."""
    return lax.broadcast_in_dim(x, shape, [1])
