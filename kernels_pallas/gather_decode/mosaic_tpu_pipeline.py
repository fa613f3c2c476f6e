"""The Mosaic TPU kernel of gathered decoding: listed rows or blocks, streamed past a few queries.

A grid step is one list of one query row (an item). Its pieces (runs of token rows, or blocks) are
copied from HBM into one of two buffers while those before are attended; the last step of an item
starts the first copies of the next one, so that the memory pipe never runs empty between lists.
Which fetched keys count was decided outside and arrives as one number per fetched row.

Token-major 16-bit caches keep two heads in each 32-bit row of a tile. Copies cannot take such a row
apart, so both heads are fetched and the wanted one is shifted out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas.gather_decode.cost import gathered_cost
from kernels_pallas.interpreting import interpreter
from kernels_pallas.tpu import (
    LANES,
    MASKED,
    START,
    check_vmem,
    compiler_params,
    product,
    round_up,
)

__all__ = ["META", "Plan", "attend_items"]

META = 8
"""Numbers ahead of an item's pieces: steps, sequence, head row, half of it, and room."""

_STEPS, _SEQUENCE, _HEAD, _HALF = range(4)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one kernel fetches and how; all static.

    Attributes:
      op: name for error messages.
      blocked: pieces are blocks of [B, K, M, ., .] arrays, otherwise rows of [B, S, K, .] ones.
      run: keys of a piece; of rows 1 or a multiple of 8, which is what copies can write.
      pieces: pieces of a step.
      heads: kv heads an item attends (2: both heads of a 32-bit row).
      paired: rows hold two 16-bit heads.
      fused: values lie behind their keys in one array; queries are padded with zeros.
      keys_across: blocks of keys are [H, L], not [L, H].
      clean: rows nobody sees may hold anything and are blanked before the second product.
      cores: TensorCores that share the items.
    """

    op: str
    blocked: bool
    run: int
    pieces: int
    heads: int
    paired: bool
    fused: bool
    keys_across: bool
    clean: bool
    cores: int

    @property
    def fetched(self) -> int:
        """Keys a step fetches."""
        return self.run * self.pieces

    @property
    def rows(self) -> int:
        """R: rows of a buffer; those past :attr:`fetched` are never written."""
        return self.fetched if self.blocked else round_up(self.fetched, LANES)

    def buffer(self, source: Array, keys: bool) -> tuple[tuple[int, ...], Any]:
        """Shape and dtype of the two buffers for what is fetched from ``source``."""
        if self.keys_across and keys:
            return (2, self.pieces, *source.shape[3:]), source.dtype
        dtype = jnp.int32 if self.paired else source.dtype
        return (2, self.rows, source.shape[-1]), dtype


def attend_items(
    plan: Plan,
    q: Float[Array, "items E G H"],
    sources: tuple[Array, ...],
    pieces: Int[Array, "items 1 U"],
    visible: Int[Array, "items steps R"],
    *,
    scale: float,
) -> tuple[Float[Array, "items E G Hv"], Float[Array, "items E G"]]:
    """Attention of every item's queries over its visible keys, in float32, with lse.

    Args:
      plan: sizes; ``items`` is a multiple of ``plan.cores``.
      q: queries of the E = ``plan.heads`` kv heads of an item.
      sources: keys and values, or the one array that holds both.
      pieces: :data:`META` numbers (steps, sequence, head row, half), then the first row or the
        block number of every piece, all of them valid addresses.
      visible: 1 for fetched keys that count.
      scale: factor on the logits.

    Raises:
      NotImplementedError: if the buffers do not fit into vector memory.
    """
    if plan.paired and interpreter("tpu"):
        sources = tuple(_in_words(x) for x in sources)
    items, heads, group, width = q.shape
    steps = visible.shape[1]
    value_width = sources[-1].shape[-1]
    buffers = [plan.buffer(x, i == 0) for i, x in enumerate(sources)]
    held = sum(2 * plan.rows * round_up(x.shape[-1], LANES) * 4 for x in sources)
    needed = 3 * held + 2 * 4 * plan.rows * round_up(steps, 8)
    check_vmem(plan.op, needed, f"{plan.rows} keys a step of {width} and {value_width} numbers")
    per_core = items // plan.cores

    def item(core, i):
        return core * per_core + i

    def following(core, i):
        return core * per_core + jnp.minimum(i + 1, per_core - 1)

    def block(shape, memory, index):
        zeros = (0,) * len(shape)
        return pl.BlockSpec((1, *shape), lambda c, i: (index(c, i), *zeros), memory_space=memory)

    length = pieces.shape[2]
    out, lse = pl.pallas_call(
        lambda *refs: _attend(plan, scale, *refs),
        grid=(plan.cores, per_core),
        in_specs=[
            block((1, length), pltpu.SMEM, item),
            block((1, length), pltpu.SMEM, following),
            block((steps, plan.rows), pltpu.VMEM, item),
            block((heads, group, width), pltpu.VMEM, item),
            *(pl.BlockSpec(memory_space=pl.ANY) for _ in sources),
        ],
        out_specs=[
            block((heads, group, value_width), pltpu.VMEM, item),
            block((heads, group, LANES), pltpu.VMEM, item),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((items, heads, group, value_width), jnp.float32),
            jax.ShapeDtypeStruct((items, heads, group, LANES), jnp.float32),
        ],
        scratch_shapes=[
            [pltpu.VMEM(shape, dtype) for shape, dtype in buffers],
            pltpu.SemaphoreType.DMA((2, len(sources))),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.VMEM((heads, group, LANES), jnp.float32),
            pltpu.VMEM((heads, group, LANES), jnp.float32),
            pltpu.VMEM((heads, group, value_width), jnp.float32),
        ],
        compiler_params=compiler_params(("parallel", "arbitrary")),
        cost_estimate=gathered_cost(
            items=items,
            rows=heads * group,
            keys=steps * plan.fetched,
            widths=(width,) if plan.fused else (width, value_width),
            key_bytes=sources[0].dtype.itemsize * (2 if plan.paired else 1),
        ),
        interpret=interpreter("tpu"),
        name=plan.op,
    )(pieces, pieces, visible, q, *sources)
    return out, lse[..., 0]


def _in_words(cache: Float[Array, "B S K X"]) -> Int[Array, "B S K/2 X"]:
    """What a 16-bit cache's memory holds, which the interpreter cannot look at in this way."""
    pairs = cache.reshape(*cache.shape[:2], -1, 2, cache.shape[3])
    return jax.lax.bitcast_convert_type(jnp.swapaxes(pairs, 3, 4), jnp.int32)


def _attend(plan, scale, listed, upcoming, visible, q, *refs):
    """One item; see :func:`attend_items`."""
    count = 1 if plan.fused else 2
    sources, (out, lse, buffers, arrived, first_slot, top, total, values) = (
        refs[:count],
        refs[count:],
    )
    base, steps = first_slot, listed[0, 0, _STEPS]

    @pl.when(pl.program_id(1) == 0)
    def _():
        base[0] = 0
        _fetch(plan, listed, 0, 0, sources, buffers, arrived)

    top[...] = jnp.full(top.shape, START, jnp.float32)
    total[...] = jnp.zeros(total.shape, jnp.float32)
    values[...] = jnp.zeros(values.shape, jnp.float32)
    begin = base[0]

    def step(i, carry):
        slot = (begin + i) % 2

        @pl.when(i + 1 < steps)
        def _():
            _fetch(plan, listed, i + 1, 1 - slot, sources, buffers, arrived)

        @pl.when((i + 1 == steps) & (pl.program_id(1) + 1 < pl.num_programs(1)))
        def _():
            _fetch(plan, upcoming, 0, 1 - slot, sources, buffers, arrived)

        for at, buffer in enumerate(buffers):
            # One wait for the bytes of all copies of the step.
            whole = buffer.at[slot]
            if not plan.blocked:
                whole = whole.at[pl.ds(0, plan.fetched)]
            pltpu.make_async_copy(whole, whole, arrived.at[slot, at]).wait()
        seen = visible[0, pl.ds(i, 1), :] > 0
        for head in range(plan.heads):
            half = head if plan.heads == 2 else listed[0, 0, _HALF]
            keys, content = _loaded(plan, buffers, slot, half, seen)
            _absorb(plan, scale, q[0, head], keys, content, seen, head, top, total, values)
        return carry

    jax.lax.fori_loop(0, steps, step, None)
    base[0] = (begin + steps) % 2
    sums = total[...]
    some = sums > 0
    safe = jnp.where(some, sums, 1.0)
    lse[0] = jnp.where(some, top[...] + jnp.log(safe), -jnp.inf)
    out[0] = values[...] / safe[:, :, :1]


def _fetch(plan, listed, step, slot, sources, buffers, arrived):
    """Start the copies of one step of an item."""
    sequence, head = listed[0, 0, _SEQUENCE], listed[0, 0, _HEAD]

    def piece(p, carry):
        place = listed[0, 0, META + step * plan.pieces + p]
        for at, (source, buffer) in enumerate(zip(sources, buffers, strict=True)):
            if plan.blocked:
                source = source.at[sequence, head, place]
                across = plan.keys_across and at == 0
                here = p if across else pl.ds(pl.multiple_of(p * plan.run, plan.run), plan.run)
            else:
                if plan.paired and source.dtype != jnp.int32:
                    source = source.bitcast(jnp.int32)
                source = source.at[sequence, pl.ds(place, plan.run), head]
                first = p if plan.run == 1 else pl.multiple_of(p * plan.run, 8)
                here = pl.ds(first, plan.run)
            pltpu.make_async_copy(source, buffer.at[slot, here], arrived.at[slot, at]).start()
        return carry

    jax.lax.fori_loop(0, plan.pieces, piece, None, unroll=min(plan.pieces, 8))


def _loaded(plan, buffers, slot, half, seen):
    """Keys and values of a step as the products take them."""
    arrays = [buffer[slot] for buffer in buffers]
    if plan.paired:
        # A bfloat16 is the upper half of a float32; the first of two heads is the lower half.
        high = [(x << (16 * (1 - half))) & jnp.int32(-(2**16)) for x in arrays]
        arrays = [pltpu.bitcast(x, jnp.float32).astype(jnp.bfloat16) for x in high]
    keys, content = arrays[0], arrays[-1]
    if plan.clean or plan.rows > plan.fetched:
        column = jnp.broadcast_to(seen.astype(jnp.float32), (8, plan.rows))
        column = jnp.transpose(column)[:, :1]
        content = jnp.where(column > 0, content.astype(jnp.float32), 0.0).astype(content.dtype)
    return keys, content


def _absorb(plan, scale, q, keys, content, seen, head, top, total, values):
    """Add the keys of a step to the running softmax of one kv head's queries [G, H]."""
    if plan.keys_across:
        blocks = [product(q, keys[p], "nn") for p in range(plan.pieces)]
        logits = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)
    else:
        logits = product(q, keys, "nt")
    logits = jnp.where(seen, logits * scale, MASKED)
    before = top[head]
    after = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
    weights = jnp.exp(logits - after[:, :1])
    decay = jnp.exp(before - after)
    top[head] = after
    total[head] = total[head] * decay + jnp.sum(weights, axis=1, keepdims=True)
    added = product(weights.astype(content.dtype), content, "nn")
    values[head] = values[head] * decay[:, :1] + added
