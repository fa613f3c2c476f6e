"""Block-sparse attention walked key block by key block: the execution for CPUs.

Every key block is loaded once and meets exactly the queries that selected it (the inverse lists of
tiles of one query), so the work is the selection's, whatever neighbouring queries agree on.
Queries, running outputs and query gradients are gathered and written back as contiguous rows of
[G, H], which costs little on a CPU; keys are never gathered and their gradients never scattered
with conflicts. The loop is sequential, hence bitwise repeatable, and hence unfit for GPUs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.block_sparse.lists import InverseLists, build_inverse_lists
from kernels_pallas.common import AttentionOutput, accumulation_dtype

__all__ = ["backward", "forward"]

_MASKED = -1e30  # finite: differences of two masked logits stay defined


def _dot(left: Array, right: Array, left_axis: int, right_axis: int, dtype: jnp.dtype) -> Array:
    """Matrix product contracting one axis of each."""
    return jax.lax.dot_general(
        left, right, (((left_axis,), (right_axis,)), ((), ())), preferred_element_type=dtype
    )


class _Walk:
    """The list of (key block, chunk of its queries) steps and what each of them loads.

    One instance per trace. Rows are numbered ``(b * T + t) * A + a`` and hold ``group`` = N/A
    heads; a step is a key block and up to ``chunk`` of the rows that selected it.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        inverse: InverseLists,
        last: Int[Array, "B T"],
        *,
        kv_heads: int,
        block_size: int,
        rows_per_step: int,
    ) -> None:
        self.batch, self.queries, self.query_heads, self.width = shape
        self.lists = inverse.offsets.shape[1]
        self.group = self.query_heads // self.lists
        self.block_size = block_size
        self.blocks = inverse.offsets.shape[2] - 1
        sharing = self.lists // kv_heads
        self.last_key = jnp.max(last, axis=1)
        entries = inverse.tiles.shape[2]
        # Long enough for fast matrix products, short against the queries a block has on average:
        # the last chunk of every block is padded.
        self.chunk = min(max(rows_per_step // self.group, 1), max(entries // self.blocks // 4, 8))
        heads = self.batch * self.lists
        tokens = inverse.tiles.reshape(-1)
        base = jnp.arange(heads, dtype=jnp.int32)[:, None] * entries
        offsets = inverse.offsets.reshape(heads, self.blocks + 1)
        starts = (offsets[:, :-1] + base).reshape(-1)
        stops = (offsets[:, 1:] + base).reshape(-1)
        chunks = -(-(stops - starts) // self.chunk)
        ends = jnp.cumsum(chunks)
        self.steps = ends[-1]
        segment = jnp.repeat(
            jnp.arange(heads * self.blocks, dtype=jnp.int32),
            chunks,
            total_repeat_length=heads * (entries // self.chunk + self.blocks),
        )
        number = jnp.arange(segment.shape[0], dtype=jnp.int32)
        head, block = segment // self.blocks, segment % self.blocks
        batch, listed = head // self.lists, head % self.lists
        # Made outside the loop: as data it is loaded, as an iota in the loop it slows vector code.
        self.key_lane = jnp.arange(block_size, dtype=jnp.int32)
        # Tables of all steps, not arithmetic in the loop: XLA would fuse that arithmetic into the
        # loops over [chunk, G, L] and redo it for every element.
        lane = jnp.arange(self.chunk, dtype=jnp.int32)[None, :]
        place = starts[segment] + (number - (ends - chunks)[segment]) * self.chunk
        place = place[:, None] + lane
        live = place < stops[segment][:, None]
        # Surplus lanes repeat the segment's last query: only listed queries are ever loaded.
        place = jnp.minimum(place, stops[segment][:, None] - 1)
        query = batch[:, None] * self.queries + jnp.take(tokens, place, mode="clip")
        start = block * block_size
        limit = jnp.take(last.reshape(-1), query, mode="clip") - start[:, None]
        self.limit_table = jnp.where(live, limit, -1)
        self.row_table = query * self.lists + listed[:, None]
        self.block_table = jnp.stack([batch, start, listed // sharing], axis=1)

    @property
    def rows(self) -> int:
        """How many rows there are in all."""
        return self.batch * self.queries * self.lists

    def step(self, number: Int[Array, ""]) -> dict[str, Array]:
        """Where step ``number`` reads and writes, and which keys each of its rows sees."""
        batch, start, kv_head = (
            jax.lax.dynamic_index_in_dim(self.block_table, number, keepdims=False)[i]
            for i in range(3)
        )
        row = jax.lax.dynamic_index_in_dim(self.row_table, number, keepdims=False)
        limit = jax.lax.dynamic_index_in_dim(self.limit_table, number, keepdims=False)
        surplus = self.rows + jnp.arange(self.chunk, dtype=jnp.int32)
        return {
            "batch": batch,
            "kv_head": kv_head,
            "start": start,
            "row": row,
            "write": jnp.where(limit >= 0, row, surplus),
            "limit": limit,
        }

    def load_block(self, array: Float[Array, "B S K A"], at: dict[str, Array]) -> Array:
        """One key block [L, width] of a head, zero beyond what any query of the batch may see."""
        width = array.shape[3]
        zero = jnp.zeros_like(at["start"])
        block = jax.lax.dynamic_slice(
            array, (at["batch"], at["start"], at["kv_head"], zero), (1, self.block_size, 1, width)
        ).reshape(self.block_size, width)
        key = at["start"] + self.key_lane
        seen = key <= self.last_key[at["batch"]]
        return jnp.where(seen[:, None], block, 0).astype(accumulation_dtype(array.dtype))

    def add_block(
        self, array: Float[Array, "B S K A"], block: Array, at: dict[str, Array]
    ) -> Float[Array, "B S K A"]:
        """Add [L, width] to the place of a key block."""
        size = (1, self.block_size, 1, array.shape[3])
        where = (at["batch"], at["start"], at["kv_head"], jnp.zeros_like(at["start"]))
        old = jax.lax.dynamic_slice(array, where, size)
        return jax.lax.dynamic_update_slice(array, old + block.reshape(size), where)

    def load_rows(self, array: Float[Array, "rows A"], at: dict[str, Array]) -> Array:
        """The rows of a step [chunk, A]."""
        return jnp.take(array, at["row"], axis=0, mode="clip")

    def visible(self, at: dict[str, Array]) -> Array:
        """Which keys of the block each row sees [chunk, 1, L]; a row's heads see the same."""
        return self.key_lane[None, None, :] <= at["limit"][:, None, None]

    def run(self, body, *carry):
        """``carry = body(step, *carry)`` over all steps in order."""

        def advance(state):
            return (state[0] + 1, *body(self.step(state[0]), *state[1:]))

        start = (jnp.zeros((), jnp.int32), *carry)
        return jax.lax.while_loop(lambda state: state[0] < self.steps, advance, start)[1:]


def _pad_keys(array: Float[Array, "B S K A"], block_size: int) -> Float[Array, "B S K A"]:
    """Pad with zeros to whole blocks."""
    surplus = -array.shape[1] % block_size
    return jnp.pad(array, ((0, 0), (0, surplus), (0, 0), (0, 0))) if surplus else array


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    indices: Int[Array, "B T A P"],
    last: Int[Array, "B T"],
    *,
    block_size: int,
    scale: float,
    rows_per_step: int,
) -> tuple[AttentionOutput, InverseLists]:
    """Attention of each query over its listed blocks, keys up to row ``last``.

    ``indices`` must hold no block that starts after ``last``. Returns the output and the inverse
    lists, which the backward pass walks again.
    """
    dtype = accumulation_dtype(q.dtype)
    k, v = _pad_keys(k, block_size), _pad_keys(v, block_size)
    inverse = build_inverse_lists(
        jnp.transpose(indices, (0, 2, 1, 3)), None, blocks=k.shape[1] // block_size
    )
    walk = _Walk(
        q.shape,
        inverse,
        last,
        kv_heads=k.shape[2],
        block_size=block_size,
        rows_per_step=rows_per_step,
    )
    chunk, group, value_width = walk.chunk, walk.group, v.shape[3]
    q_rows = q.reshape(walk.rows, group * walk.width)

    def body(at, sums, statistics):
        keys = walk.load_block(k, at) * scale
        values = walk.load_block(v, at)
        queries = walk.load_rows(q_rows, at).reshape(chunk * group, walk.width).astype(dtype)
        logits = _dot(queries, keys, 1, 1, dtype).reshape(chunk, group, block_size)
        logits = jnp.where(walk.visible(at), logits, _MASKED)
        before = walk.load_rows(statistics, at)
        top_before, total_before = before[:, :group], before[:, group:]
        top = jnp.maximum(top_before, jnp.max(logits, axis=2))
        weights = jnp.exp(logits - top[:, :, None])
        decay = jnp.exp(top_before - top)
        total = decay * total_before + jnp.sum(weights, axis=2)
        added = _dot(weights.reshape(chunk * group, block_size), values, 1, 0, dtype)
        sums_before = walk.load_rows(sums, at).reshape(chunk, group, value_width)
        sums_after = decay[:, :, None] * sums_before + added.reshape(chunk, group, value_width)
        write = {"mode": "drop", "unique_indices": True}
        sums = sums.at[at["write"]].set(sums_after.reshape(chunk, -1), **write)
        after = jnp.concatenate([top, total], axis=1)
        return sums, statistics.at[at["write"]].set(after, **write)

    sums, statistics = walk.run(
        body,
        jnp.zeros((walk.rows, group * value_width), dtype),
        jnp.concatenate(
            [jnp.full((walk.rows, group), _MASKED, dtype), jnp.zeros((walk.rows, group), dtype)],
            axis=1,
        ),
    )
    top, total = (x.reshape(q.shape[:3]) for x in (statistics[:, :group], statistics[:, group:]))
    seen = total > 0
    safe_total = jnp.where(seen, total, 1.0)
    out = sums.reshape(*q.shape[:3], value_width) / safe_total[..., None]
    lse = jnp.where(seen, top + jnp.log(safe_total), -jnp.inf)
    return AttentionOutput(out.astype(q.dtype), lse), inverse


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    inverse: InverseLists,
    last: Int[Array, "B T"],
    lse: Float[Array, "B T N"],
    delta: Float[Array, "B T N"],
    out_cotangent: Float[Array, "B T N Hv"],
    *,
    block_size: int,
    scale: float,
    rows_per_step: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """Gradients of q, k and v: ds = p (dp - delta) with delta = sum(do * out) - dlse."""
    dtype = accumulation_dtype(q.dtype)
    keys_given = k.shape[1]
    k, v = _pad_keys(k, block_size), _pad_keys(v, block_size)
    walk = _Walk(
        q.shape,
        inverse,
        last,
        kv_heads=k.shape[2],
        block_size=block_size,
        rows_per_step=rows_per_step,
    )
    chunk, group, value_width = walk.chunk, walk.group, v.shape[3]
    heads = chunk * group
    q_rows = q.reshape(walk.rows, group * walk.width)
    cotangent_rows = out_cotangent.reshape(walk.rows, group * value_width)
    statistics = jnp.concatenate(
        [lse.reshape(walk.rows, group), delta.reshape(walk.rows, group)], axis=1
    )

    def body(at, dq, dk, dv):
        keys = walk.load_block(k, at) * scale
        values = walk.load_block(v, at)
        queries = walk.load_rows(q_rows, at).reshape(heads, walk.width).astype(dtype)
        cotangents = walk.load_rows(cotangent_rows, at).reshape(heads, value_width).astype(dtype)
        row_statistics = walk.load_rows(statistics, at)
        row_lse, row_delta = row_statistics[:, :group], row_statistics[:, group:]
        limit = jnp.broadcast_to(at["limit"][:, None], (chunk, group))
        # Keys lead in these products: dk and dv then contract contiguous rows, the costliest two.
        # The barrier keeps the per-row vectors materialised instead of recomputed per element.
        row_lse, row_delta, limit = jax.lax.optimization_barrier(
            (row_lse.reshape(1, heads), row_delta.reshape(1, heads), limit.reshape(1, heads))
        )
        visible = walk.key_lane[:, None] <= limit
        logits = _dot(keys, queries, 1, 1, dtype)
        weights = jnp.where(visible, jnp.exp(logits - row_lse), 0.0)
        dweights = _dot(values, cotangents, 1, 1, dtype)
        dlogits = weights * (dweights - row_delta)
        dv = walk.add_block(dv, _dot(weights, cotangents, 1, 0, dtype), at)
        dk = walk.add_block(dk, _dot(dlogits, queries, 1, 0, dtype), at)
        dqueries = _dot(dlogits, keys, 0, 0, dtype).reshape(chunk, group * walk.width)
        dq = dq.at[at["write"]].add(dqueries, mode="drop", unique_indices=True)
        return dq, dk, dv

    dq, dk, dv = walk.run(
        body,
        jnp.zeros((walk.rows, group * walk.width), dtype),
        jnp.zeros(k.shape, dtype),
        jnp.zeros(v.shape, dtype),
    )
    dk, dv = dk[:, :keys_given] * scale, dv[:, :keys_given]
    return dq.reshape(q.shape).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
