"""SeerAttention with the decode-style gate (arXiv 2410.13276, 2506.08889): blocks picked by a gate.

A small gate beside a frozen attention layer learns which key blocks dense attention looks at. With
un-rotated q and k, blocks of L = 64 tokens and one gate head per kv head:

1. q_gate[t] = rope(W_q concat_g q[t, g], t), over the G query heads of the group.
2. k_gate[j] = rope(W_k concat(max, min, mean of k[L j : L (j + 1)]), position of token L j).
3. gate[t, j] = softmax_j(q_gate . k_gate / sqrt(H)) over the whole blocks before the row's own.
4. Attended are the row's own block and the best others within a budget of tokens, or all others
   with a gate of at least ``threshold``.
5. Fit: KL(target || gate) with target[t, j] = max over the group of max_{s in j} p[t, s], p dense
   attention, divided by its sum over the same blocks.

Choices where the paper leaves them open: the own block, always attended, is in neither
distribution, so that no row depends on an unfinished block; the gate is as wide as a head, so that
it shares its rotation. The gate's inputs are detached: it alone learns from the loss, and it learns
from nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels_pallas.block_scores import Pooling, select_blocks
from kernels_pallas.common import accumulation_dtype
from sparse_attn import metrics
from sparse_attn.block_lists import attend_blocks, earlier_blocks, inspect_blocks
from sparse_attn.cache import (
    check_capacity,
    checked_truncation,
    empty_blocks,
    read_ring,
    write_blocks,
    write_ring,
)
from sparse_attn.compression import split_pieces
from sparse_attn.documents import Rows, place_shard
from sparse_attn.pooled_keys import append_entries, as_keys, empty_entries
from sparse_attn.registry import MechanismConfig, register
from sparse_attn.selecting import eligible_blocks
from sparse_attn.shards import WHOLE, Shards, Strategy
from sparse_attn.types import Attend, Aux, Heads, HeadShape, Implementation, Rope


@dataclasses.dataclass(frozen=True)
class Seer(MechanismConfig):
    """Configuration of SeerAttention. Lengths are in tokens.

    Either ``selected_tokens`` or ``threshold`` says how much is attended; the other is None.

    Attributes:
      selection_block: tokens of a block.
      selected_tokens: a budget in whole blocks that includes the row's own.
      threshold: other blocks are attended from this probability of the gate on, of which there can
        be 1 / threshold at most.
      fit_rows: query rows a sequence, evenly spread, on which the gate is fitted.
      joint: the fit loss is part of ``attend="sparse"`` training, too.
      implementation: which backend runs it; "auto" takes the first that can.

    Raises:
      ValueError: on a budget that is no whole number of blocks, a threshold outside (0, 1], both
        or neither of them, or counts below 1.
    """

    selection_block: int = 64
    selected_tokens: int | None = 4096
    threshold: float | None = None
    fit_rows: int = 64
    joint: bool = False
    implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        for name in ("selection_block", "fit_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if (self.selected_tokens is None) == (self.threshold is None):
            raise ValueError(
                f"selected_tokens={self.selected_tokens} and threshold={self.threshold}: "
                "give one of them and set the other to None"
            )
        tokens, size = self.selected_tokens, self.selection_block
        if tokens is not None and (tokens < size or tokens % size):
            raise ValueError(
                f"selected_tokens={tokens} must be a positive multiple of selection_block={size}"
            )
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} must lie in (0, 1]")

    @property
    def alignment(self) -> int:
        """Documents start at multiples of the selection block."""
        return self.selection_block

    @property
    def slots(self) -> int:
        """P: blocks that a row can attend, its own included."""
        if self.selected_tokens is not None:
            return self.selected_tokens // self.selection_block
        assert self.threshold is not None
        return 1 + math.floor(1 / self.threshold + 1e-6)

    @property
    def sequence_strategies(self) -> tuple[Strategy, ...]:
        """Keys, values and the gate's keys of blocks are gathered."""
        return ("gather",)

    def covering(self, length: int) -> Seer:
        """The variant that equals dense attention up to ``length``: all blocks."""
        blocks = max(1, -(-length // self.selection_block))
        return dataclasses.replace(
            self, selected_tokens=blocks * self.selection_block, threshold=None
        )

    def density(self, length: int) -> float:
        """Upper bound of attended over causal pairs for one document."""
        t = np.arange(length)
        earlier = np.minimum(t // self.selection_block, self.slots - 1)
        attended = earlier * self.selection_block + t % self.selection_block + 1
        return float(attended.sum() / (t + 1.0).sum())

    def auxiliary_bits(self, shape: HeadShape, element_bits: int = 16) -> float:
        """One gate key a block."""
        return shape.kv_heads * shape.head_width * element_bits / self.selection_block

    def selector_flops(self, shape: HeadShape, length: Any) -> Any:
        """A gate key meets one gate query for the whole group."""
        return super().selector_flops(shape, length) / shape.group

    @staticmethod
    def tiny() -> tuple[Seer, ...]:
        """Variants for the property suite."""
        return (
            Seer(selection_block=8, selected_tokens=16),
            Seer(selection_block=8, selected_tokens=None, threshold=0.3),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SeerCache:
    """Rotated keys and values of every token, and what the gate needs.

    ``k`` [B, K, M, H, L], ``v`` [B, K, M, L, Hv], block by block; ``gate_keys`` [B, K, H, C] of
    whole blocks; ``tail`` and ``tail_positions``: rings of the last
    L - 1 + rollback un-rotated keys and their rotary positions.
    """

    length: Int[Array, " B"]
    k: Float[Array, "B K M H L"]
    v: Float[Array, "B K M L Hv"]
    gate_keys: Float[Array, "B K H C"]
    tail: Float[Array, "B Rt K H"]
    tail_positions: Int[Array, "B Rt"]
    capacity: int = dataclasses.field(metadata={"static": True})
    rollback: int = dataclasses.field(metadata={"static": True})
    token_axes: ClassVar = {"k": 2, "v": 2}

    def truncate(self, lengths: Int[Array, " B"]) -> SeerCache:
        """Forget the tokens after ``lengths``, at most ``rollback`` of them per sequence.

        The gate key of a block that lost tokens is in nobody's range, and is written again when the
        block is whole again.
        """
        cut = checked_truncation(self.length, lengths, self.rollback)
        return dataclasses.replace(self, length=cut)


class Gate(nnx.Module):
    """The two maps of the gate, separate per kv head: ``w_q`` [K, G H, H], ``w_k`` [K, 3 H, H]."""

    def __init__(self, shape: HeadShape, *, rngs: nnx.Rngs, param_dtype: Any):
        def matrix(rows: int) -> nnx.Param:
            size = (shape.kv_heads, rows, shape.head_width)
            return nnx.Param(jax.random.normal(rngs.params(), size, param_dtype) * rows**-0.5)

        self.w_q = matrix(shape.group * shape.head_width)
        self.w_k = matrix(3 * shape.head_width)

    def queries(self, q: Float[Array, "B T N H"]) -> Float[Array, "B T K H"]:
        """Gate queries before their rotation, from un-rotated queries."""
        w = self.w_q[...].astype(q.dtype)
        return jnp.einsum("BTKF,KFH->BTKH", q.reshape(*q.shape[:2], w.shape[0], -1), w)

    def keys(self, pieces: Float[Array, "B M L K H"]) -> Float[Array, "B M K H"]:
        """Gate keys before their rotation, from the un-rotated keys of whole blocks."""
        pooled = [f(pieces, axis=2) for f in (jnp.max, jnp.min, jnp.mean)]
        w = self.w_k[...].astype(pieces.dtype)
        return jnp.einsum("BMKF,KFH->BMKH", jnp.concatenate(pooled, axis=-1), w)


@register(Seer, "seer")
class SeerAttention(nnx.Module):
    """The mechanism: a gate and block-sparse attention; see :class:`Seer`."""

    def __init__(
        self, config: Seer, shape: HeadShape, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32
    ):
        self.config = config
        self.shape = shape
        self.gate = Gate(shape, rngs=rngs, param_dtype=param_dtype)

    def init_cache(self, batch: int, capacity: int, dtype: Any, rollback: int = 0) -> SeerCache:
        """An empty cache for ``capacity`` tokens a sequence; ``rollback`` of them can be undone.

        Raises:
          ValueError: if ``capacity`` is below 1 or ``rollback`` negative.
        """
        if capacity < 1 or rollback < 0:
            raise ValueError(f"{capacity=} must be at least 1 and {rollback=} must not be negative")
        heads, width = self.shape.kv_heads, self.shape.head_width
        size = self.config.selection_block
        tail = max(1, size - 1 + rollback)
        k, v = empty_blocks(batch, capacity, heads, size, (width, self.shape.value_width), dtype)
        return SeerCache(
            length=jnp.zeros((batch,), jnp.int32),
            k=k,
            v=v,
            gate_keys=empty_entries(
                batch, heads, width, capacity=capacity, block=size, stride=size, dtype=dtype
            ),
            tail=jnp.zeros((batch, tail, heads, width), dtype),
            tail_positions=jnp.zeros((batch, tail), jnp.int32),
            capacity=capacity,
            rollback=rollback,
        )

    def __call__(
        self,
        heads: Heads,
        cache: SeerCache | None = None,
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        attend: Attend = "sparse",
        inspect: bool = False,
    ) -> tuple[Float[Array, "B T N Hv"], SeerCache | None, Aux]:
        """The mechanism contract. ``attend="fit"``: dense output, ``aux.loss`` the gate's KL loss.

        Raises:
          ValueError: for ``attend="fit"`` together with a cache.
        """
        config = self.config
        if cache is not None and attend == "fit":
            raise ValueError('attend="fit" trains the gate and works without a cache only')
        shards = heads.shards
        batch, tokens = heads.q.shape[:2]
        rows, keys = place_shard(
            shards,
            batch,
            tokens,
            length=None if cache is None else cache.length,
            positions=positions,
            segment_ids=segment_ids,
            alignment=config.alignment,
        )
        q = heads.rope(heads.q, rows.positions)
        k, v = heads.rope(heads.k[0], rows.positions), heads.v[0]
        raw_q, raw_k = jax.lax.stop_gradient((heads.q, heads.k[0]))
        # A block may reach into padding; nobody sees its gate key, but padding may hold NaN.
        raw_k = jnp.where(rows.valid[:, :, None, None], raw_k, 0)
        gate_q = heads.rope(self.gate.queries(raw_q), rows.positions)
        loss = jnp.zeros((), jnp.float32)
        if cache is None:
            k, v = shards.gather(k), shards.gather(v)
            gate_k = shards.gather(self._gate_keys(raw_k, rows, heads.rope))
            if attend == "fit" or (attend == "sparse" and config.joint):
                detached = jax.lax.stop_gradient((q, k))
                loss = gate_loss(config, *detached, gate_q, gate_k, keys, shards)
        else:
            if not shards.cache_split:
                check_capacity(cache.length, rows.appended, cache.capacity)
            cache = self._append(cache, k, v, raw_k, rows, heads.rope, shards)
            gate_k = as_keys(cache.gate_keys).astype(q.dtype)
        indices = None
        if inspect or attend == "sparse":
            room = k.shape[1] if cache is None else cache.capacity
            indices = choose_blocks(config, gate_q, gate_k, rows, keys=room)
            indices = checkpoint_name(indices, "selection")
        lists = indices if attend == "sparse" else None
        out = attend_blocks(config, q, k, v, lists, rows, cache, shards)
        if indices is None or not inspect:
            return out, cache, Aux(loss=loss)
        measured, selection = inspect_blocks(
            config, self.shape, q, k, v, indices, keys, cache, shards
        )
        return out, cache, Aux(loss=loss, metrics=measured, selection=selection)

    def update_state(self, statistics: dict[str, Array]) -> None:
        """Nothing to update: the gate learns by gradient."""
        del statistics

    def _gate_keys(
        self, raw_k: Float[Array, "B T K H"], rows: Rows, rope: Rope
    ) -> Float[Array, "B C K H"]:
        """Rotated gate keys of whole sequences (at least one, so that shapes stay legal)."""
        size = self.config.selection_block
        pieces = split_pieces(raw_k, size, size)
        return rope(self.gate.keys(pieces), rows.positions[:, ::size][:, : pieces.shape[1]])

    def _append(
        self,
        cache: SeerCache,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K Hv"],
        raw_k: Float[Array, "B T K H"],
        rows: Rows,
        rope: Rope,
        shards: Shards,
    ) -> SeerCache:
        """The cache with the new tokens, and with the gate key of every block they fill."""
        length, size, tail = cache.length, self.config.selection_block, cache.tail.shape[1]

        def pool(first: Array, count: int) -> Array:
            lane = jnp.arange(count * size, dtype=jnp.int32)[None, :]
            take = first[:, None] * size - (length - tail)[:, None] + lane

            def gather(ring: Array, chunk: Array) -> Array:
                whole = jnp.concatenate([read_ring(ring, length).astype(chunk.dtype), chunk], 1)
                at = jnp.minimum(take, whole.shape[1] - 1)
                at = at.reshape(*at.shape, *(1 for _ in whole.shape[2:]))
                got = jnp.take_along_axis(whole, at, axis=1)
                return got.reshape(got.shape[0], count, size, *got.shape[2:])

            at = gather(cache.tail_positions, rows.positions)[:, :, 0]
            return rope(self.gate.keys(gather(cache.tail, raw_k)), at)

        keys, values = write_blocks(cache.k, cache.v, k, v, rows, shards)
        return dataclasses.replace(
            cache,
            length=length + rows.appended,
            k=keys,
            v=values,
            gate_keys=append_entries(
                cache.gate_keys, length, rows.appended, k.shape[1], pool, block=size, stride=size
            ),
            tail=write_ring(cache.tail, raw_k, length, rows),
            tail_positions=write_ring(cache.tail_positions, rows.positions, length, rows),
        )


def choose_blocks(
    config: Seer,
    gate_q: Float[Array, "B T K H"],
    gate_k: Float[Array, "B C K H"],
    rows: Rows,
    *,
    keys: int,
) -> Int[Array, "B T K P"]:
    """The block lists of all rows over ``keys`` keys (stages 3 and 4), not differentiable."""
    return select_blocks(
        gate_q,
        gate_k,
        *earlier_blocks(rows, config.selection_block),
        *eligible_blocks(rows, config.selection_block),
        pooling=Pooling((1.0,), offset=0, stride=1, reducer="max"),
        selected=min(config.slots, -(-keys // config.selection_block)),
        floor=None if config.threshold is None else math.log(config.threshold),
        implementation=config.implementation,
    )


def gate_loss(
    config: Seer,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    gate_q: Float[Array, "B T K H"],
    gate_k: Float[Array, "B C K H"],
    rows: Rows,
    shards: Shards = WHOLE,
) -> Float[Array, ""]:
    """KL(target || gate), float32 mean over sampled rows with earlier blocks, and over kv heads.

    Differentiable in ``gate_q`` and ``gate_k``; the caller detaches ``q`` and ``k``. Rows of the
    document's first block have nothing to choose and are left out. O(fit_rows * T * N) memory.
    ``rows`` are those of the whole sequence, ``shards`` may hold a part of the queries.
    """
    size, blocks, width = config.selection_block, gate_k.shape[1], gate_k.shape[3]
    sampled = metrics.sample_rows(k.shape[1], config.fit_rows)
    first, stop = (edge[:, sampled] for edge in earlier_blocks(rows, size))
    p = metrics.dense_probabilities(
        shards.take(q, sampled), k, rows.start[:, sampled], rows.index[:, sampled]
    )
    p = jnp.max(p, axis=3)  # [B, r, K, S]; a maximum over both axes, whichever is first
    p = jnp.pad(p, [(0, 0)] * 3 + [(0, max(0, blocks * size - p.shape[3]))])[..., : blocks * size]
    p = jnp.max(p.reshape(*p.shape[:3], blocks, size), axis=-1)
    block = jnp.arange(blocks, dtype=jnp.int32)[None, None, :]
    earlier = ((block >= first[..., None]) & (block < stop[..., None]))[:, :, None, :]
    p = jnp.where(earlier, p, 0.0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    target = p / jnp.where(total > 0, total, 1.0)

    dtype = accumulation_dtype(gate_q.dtype)
    gate_q = shards.take(gate_q, sampled).astype(dtype)
    logits = jnp.einsum("BrKH,BCKH->BrKC", gate_q, gate_k.astype(dtype)) * width**-0.5
    lowest = jnp.finfo(dtype).min / 2
    log_gate = jax.nn.log_softmax(jnp.where(earlier, logits, lowest), axis=-1)
    asked = target > 0
    terms = target * (jnp.log(jnp.where(asked, target, 1.0)) - jnp.where(asked, log_gate, 0.0))
    usable = total[..., 0] > 0
    divergence = jnp.where(usable, jnp.sum(terms, axis=-1), 0.0)
    total, count = shards.batch_total((jnp.sum(divergence), jnp.sum(usable)))
    return (total / jnp.maximum(count, 1)).astype(jnp.float32)
