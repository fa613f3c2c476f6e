"""Attention over listed blocks of a blocked cache, block after block: the execution for CPUs.

Gathers write what they read, element by element; here listed blocks are contiguous copies that
go into a product at once, and the walk ends with the list: unused slots cost nothing. It is
sequential, hence unfit for GPUs, and not differentiable.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.common import AttentionOutput, accumulation_dtype

__all__ = ["walk_blocks"]

KEYS_PER_STEP = 512
"""Keys that go into one product: enough to hide its cost, few enough to stay in cache."""


def walk_blocks(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K M H L"],
    v: Float[Array, "B K M L Hv"],
    indices: Int[Array, "B T J P"],
    *,
    positions: Int[Array, "B T"],
    scale: float,
) -> AttentionOutput:
    """Causal ``gather_blocks`` in time that follows the number of listed blocks."""
    batch, queries, query_heads, width = q.shape
    kv_heads, blocks, _, length = k.shape[1:]
    dtype = accumulation_dtype(q.dtype)
    lists = max(indices.shape[2], kv_heads)
    group = query_heads // lists
    indices = jnp.broadcast_to(indices.astype(jnp.int32), (batch, queries, lists, indices.shape[3]))
    at_once = min(max(1, KEYS_PER_STEP // length), indices.shape[3])  # blocks of a step
    surplus = -indices.shape[3] % at_once
    indices = jnp.pad(indices, ((0, 0), (0, 0), (0, 0), (0, surplus)), constant_values=-1)
    slots = indices.shape[3]
    lane = jnp.arange(length, dtype=jnp.int32)[None, :]

    def load(array: Array, numbers: Array) -> Array:
        """The blocks of a step, as runs of a flat array: slices with axes go line by line."""
        shape = array.shape[3:]
        size = shape[0] * shape[1]
        flat = array.reshape(-1) if array.size < 2**31 else array.reshape(-1, size)
        runs = [
            jax.lax.dynamic_slice(flat, (number * size,), (size,))
            if flat.ndim == 1
            else jax.lax.dynamic_index_in_dim(flat, number, keepdims=False)
            for number in numbers
        ]
        return jnp.concatenate(runs).reshape(at_once, *shape).astype(dtype)

    def attend(item: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        number, heads, listed, position = item
        sequence, head = number // (queries * lists), number % lists // (lists // kv_heads)
        source = (sequence * kv_heads + head) * blocks + jnp.maximum(listed, 0)
        source = source.reshape(-1, at_once)
        steps = (jnp.sum(listed >= 0, dtype=jnp.int32) + at_once - 1) // at_once
        heads = jnp.broadcast_to((heads.astype(dtype) * scale)[None], (at_once, group, width))

        def score(step, logits):
            product = jnp.matmul(heads, load(k, source[step]))
            at = (step * at_once, jnp.zeros_like(step), jnp.zeros_like(step))
            return jax.lax.dynamic_update_slice(logits, product, at)

        logits = jnp.zeros((slots, group, length), dtype)
        logits = jax.lax.fori_loop(0, steps, score, logits)
        room = jnp.where(listed >= 0, position - listed * length, -1)
        logits = jnp.where((lane <= room[:, None])[:, None, :], logits, -jnp.inf)
        top = jnp.max(logits, axis=(0, 2), keepdims=True)
        top = jnp.where(jnp.isneginf(top), 0.0, top)
        weights = jnp.exp(logits - top)
        total = jnp.sum(weights, axis=(0, 2))[:, None]
        by_step = weights.reshape(-1, at_once, group, length)
        by_step = jnp.swapaxes(by_step, 1, 2).reshape(-1, group, at_once * length)

        def add(step, out):
            values = load(v, source[step]).reshape(at_once * length, -1)
            return out + jnp.matmul(by_step[step], values)

        out = jax.lax.fori_loop(0, steps, add, jnp.zeros((group, v.shape[4]), dtype))
        seen = total > 0
        safe = jnp.where(seen, total, 1.0)
        lse = jnp.where(seen, top[0] + jnp.log(safe), -jnp.inf)
        return (out / safe).astype(q.dtype), lse[:, 0]

    items = batch * queries * lists
    out, lse = jax.lax.map(
        attend,
        (
            jnp.arange(items, dtype=jnp.int32),
            q.reshape(items, group, width),
            indices.reshape(items, slots),
            jnp.repeat(positions.astype(jnp.int32).reshape(-1), lists),
        ),
    )
    out = out.reshape(batch, queries, query_heads, v.shape[4])
    return AttentionOutput(out, lse.reshape(batch, queries, query_heads))
