"""InfLLM-V2 (arXiv 2509.24663): dense attention that turns block-sparse, without new parameters.

With rotated keys k, stride s = 16, fine entries C1 of 32 and coarse ones C2 of 128 tokens (stride
64), selection block L = 64:

1. C1_i = mean k[16 i : 16 i + 32], C2_i = mean k[64 i : 64 i + 128]; incomplete tails make none.
2. lse[h, t] = logsumexp_i q . C2_i / sqrt(H) over visible entries (``lse="exact"``: over C1), and
   s[h, t, i] = q . C1_i / sqrt(H) - lse[h, t].
3. Scores of a group are summed: logsumexp of s over its G heads, the logarithm of the paper's sum.
4. score[j] = max over the entries that overlap block j (4 j - 1 .. 4 j + 3).
5. Initial and local blocks are forced, the best others fill the budget.
6. Token-causal attention over those blocks.

Rows t with t + 1 < ``dense_len`` attend everything. Where no coarse entry is visible yet (t < 127)
the fine entries normalise; at those lengths every block is local, and a normaliser only weighs the
heads of a group against each other. The paper switches a whole sequence by its length
(``switch="sequence"``); here every row switches by itself, so that a prefill and the same tokens
decoded one by one agree.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels_pallas.block_scores import Pooling, entry_lse, select_blocks
from sparse_attn.block_lists import attend_blocks, inspect_blocks
from sparse_attn.cache import check_capacity, checked_truncation, empty_blocks, write_blocks
from sparse_attn.documents import Rows, place_rows, place_shard
from sparse_attn.pooled_keys import append_means, as_keys, empty_entries, mean_entries
from sparse_attn.registry import MechanismConfig, register
from sparse_attn.selecting import eligible_blocks, visible_entries
from sparse_attn.shards import Shards, Strategy
from sparse_attn.types import Attend, Aux, Heads, HeadShape, Implementation


@dataclasses.dataclass(frozen=True)
class InfLLMV2(MechanismConfig):
    """Configuration of InfLLM-V2. Lengths are in tokens, counts in blocks.

    Attributes:
      compression_block: tokens of a fine entry (C1); at most ``selection_block``.
      compression_stride: tokens between the beginnings of fine entries.
      coarse_block: tokens of a coarse entry (C2), a multiple of ``coarse_stride``.
      coarse_stride: tokens between the beginnings of coarse entries.
      selection_block: tokens of a block that is selected as a whole (L).
      selected_blocks: blocks of a row, the initial and local ones included; several numbers give
        one budget per kv head.
      initial_blocks: first blocks of the document that are always selected.
      window: local are the last ceil(window / L) blocks, the row's own included.
      cover_window: adds a local block, so that they hold the last ``window`` tokens whatever the
        row's place in its block (what the public kernel does).
      dense_len: rows are dense below it; 0 for never.
      lse: which entries normalise a head's scores, "coarse" (C2) or "exact" (C1).
      switch: "row": row t is dense iff t + 1 < dense_len. "sequence", for parity with published
        weights: all rows of a document are dense iff it has fewer than dense_len tokens, those of
        this call included; then rows of a prefill beyond dense_len differ from the same rows
        decoded while the document was shorter.
      implementation: which backend runs it; "auto" takes the first that can.

    Raises:
      ValueError: on sizes that do not divide or counts that cannot hold.
    """

    compression_block: int = 32
    compression_stride: int = 16
    coarse_block: int = 128
    coarse_stride: int = 64
    selection_block: int = 64
    selected_blocks: int | tuple[int, ...] = 96
    initial_blocks: int = 1
    window: int = 2048
    cover_window: bool = False
    dense_len: int = 8192
    lse: Literal["coarse", "exact"] = "coarse"
    switch: Literal["row", "sequence"] = "row"
    implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        for name in ("compression_stride", "coarse_stride", "selection_block", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("initial_blocks", "dense_len"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative; 0 is none")
        _ = self.pooling
        pairs = (
            ("compression_stride", "coarse_stride"),
            ("coarse_stride", "coarse_block"),
            ("coarse_stride", "selection_block"),
        )
        for divisor, multiple in pairs:
            if getattr(self, multiple) < 1 or getattr(self, multiple) % getattr(self, divisor):
                raise ValueError(
                    f"{divisor}={getattr(self, divisor)} must divide "
                    f"{multiple}={getattr(self, multiple)}"
                )
        if self.compression_block > self.selection_block:
            raise ValueError(
                f"compression_block={self.compression_block} is longer than "
                f"selection_block={self.selection_block}; an entry would not fit a block"
            )
        if self.lse not in ("coarse", "exact"):
            raise ValueError(f'lse={self.lse!r} is unknown; use "coarse" or "exact"')
        if self.switch not in ("row", "sequence"):
            raise ValueError(f'switch={self.switch!r} is unknown; use "row" or "sequence"')
        if isinstance(self.selected_blocks, tuple) and not self.selected_blocks:
            raise ValueError("selected_blocks=() is empty; give one budget per kv head, or an int")
        if min(self.budgets) < self.initial_blocks + self.local_blocks:
            raise ValueError(
                f"selected_blocks={self.selected_blocks} cannot hold the forced "
                f"initial_blocks={self.initial_blocks} + {self.local_blocks} local blocks of "
                f"window={self.window}; select more or shorten the window"
            )

    @property
    def alignment(self) -> int:
        """Documents start at multiples of the selection block."""
        return self.selection_block

    @property
    def local_blocks(self) -> int:
        """The most recent blocks that are forced, the row's own included."""
        return -(-self.window // self.selection_block) + int(self.cover_window)

    @property
    def budgets(self) -> tuple[int, ...]:
        """The distinct budgets: one, or one per kv head."""
        budgets = self.selected_blocks
        return budgets if isinstance(budgets, tuple) else (budgets,)

    @property
    def slots(self) -> int:
        """P: room for the largest budget, and for all blocks of a dense row."""
        return max(*self.budgets, -(-self.dense_len // self.selection_block))

    @property
    def pooling(self) -> Pooling:
        """The largest score of the entries that overlap a block."""
        overlaps = Pooling.geometric(
            self.compression_block, self.compression_stride, self.selection_block
        )
        return dataclasses.replace(overlaps, weights=(1.0,) * len(overlaps.weights), reducer="max")

    @property
    def sequence_strategies(self) -> tuple[Strategy, ...]:
        """Keys and values are gathered."""
        return ("gather",)

    def covering(self, length: int) -> InfLLMV2:
        """The variant that equals dense attention up to ``length``: all blocks."""
        blocks = max(-(-length // self.selection_block), self.initial_blocks + self.local_blocks)
        return dataclasses.replace(self, selected_blocks=blocks)

    def density(self, length: int) -> float:
        """Upper bound of attended over causal pairs for one document, mean over the kv heads."""
        t = np.arange(1.0, length + 1)
        dense = (t if self.switch == "row" else length) < self.dense_len
        attended = [
            np.where(dense, t, np.minimum(t, budget * self.selection_block)).sum()
            for budget in self.budgets
        ]
        return float(np.mean(attended) / t.sum())

    def auxiliary_bits(self, shape: HeadShape, element_bits: int = 16) -> float:
        """Fine entries, and the coarse ones where they are used."""
        entries = 1 / self.compression_stride
        if self.lse == "coarse":
            entries += 1 / self.coarse_stride
        return shape.kv_heads * shape.head_width * element_bits * entries

    @staticmethod
    def tiny() -> tuple[InfLLMV2, ...]:
        """Variants for the property suite: L=8, l=4, s=2, coarse entries of 16 every 8."""
        small = InfLLMV2(
            compression_block=4,
            compression_stride=2,
            coarse_block=16,
            coarse_stride=8,
            selection_block=8,
            selected_blocks=3,
            window=8,
            dense_len=26,
        )
        exact = dataclasses.replace(
            small, selected_blocks=4, cover_window=True, dense_len=0, lse="exact"
        )
        return (small, exact)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InfLLMV2Cache:
    """Rotated keys and values of every token, and the means of the keys.

    ``k`` [B, K, M, H, L], ``v`` [B, K, M, L, Hv], block by block; ``fine`` and ``coarse``
    [B, K, H, C], laid out for the products of a decode step. Means are taken of the cached keys
    themselves, so nothing waits in a ring. ``coarse`` stays empty where the config does not use it.
    """

    length: Int[Array, " B"]
    k: Float[Array, "B K M H L"]
    v: Float[Array, "B K M L Hv"]
    fine: Float[Array, "B K H C"]
    coarse: Float[Array, "B K H C2"]
    capacity: int = dataclasses.field(metadata={"static": True})
    token_axes: ClassVar = {"k": 2, "v": 2}

    def truncate(self, lengths: Int[Array, " B"]) -> InfLLMV2Cache:
        """Forget the tokens after ``lengths``; any number can be undone.

        Entries that covered forgotten tokens are in nobody's range, and are written again when the
        sequence has regrown to their end.
        """
        cut = checked_truncation(self.length, lengths, rollback=self.capacity)
        return dataclasses.replace(self, length=cut)


@register(InfLLMV2, "infllm_v2")
class InfLLMV2Attention(nnx.Module):
    """No parameters; see :class:`InfLLMV2`.

    Raises:
      ValueError: if there are budgets per kv head, but not one for each.
    """

    def __init__(
        self, config: InfLLMV2, shape: HeadShape, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32
    ):
        del rngs, param_dtype
        _check_budgets(config, shape.kv_heads)
        self.config = config
        self.shape = shape

    def init_cache(self, batch: int, capacity: int, dtype: Any, rollback: int = 0) -> InfLLMV2Cache:
        """An empty cache for ``capacity`` tokens a sequence; ``rollback`` costs nothing here.

        Raises:
          ValueError: if ``capacity`` is below 1 or ``rollback`` negative.
        """
        if capacity < 1 or rollback < 0:
            raise ValueError(f"{capacity=} must be at least 1 and {rollback=} must not be negative")
        shape, config = self.shape, self.config

        def entries(block: int, stride: int, capacity: int) -> Array:
            return empty_entries(
                batch,
                shape.kv_heads,
                shape.head_width,
                capacity=capacity,
                block=block,
                stride=stride,
                dtype=dtype,
            )

        coarse = capacity if config.lse == "coarse" else 0
        widths = (shape.head_width, shape.value_width)
        k, v = empty_blocks(batch, capacity, shape.kv_heads, config.selection_block, widths, dtype)
        return InfLLMV2Cache(
            length=jnp.zeros((batch,), jnp.int32),
            k=k,
            v=v,
            fine=entries(config.compression_block, config.compression_stride, capacity),
            coarse=entries(config.coarse_block, config.coarse_stride, coarse),
            capacity=capacity,
        )

    def __call__(
        self,
        heads: Heads,
        cache: InfLLMV2Cache | None = None,
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        attend: Attend = "sparse",
        inspect: bool = False,
    ) -> tuple[Float[Array, "B T N Hv"], InfLLMV2Cache | None, Aux]:
        """The mechanism contract. ``attend="fit"`` is ``"dense"``: nothing here can be fitted.

        Raises:
          ValueError: for ``attend="fit"`` together with a cache.
        """
        config = self.config
        if cache is not None and attend == "fit":
            raise ValueError('attend="fit" trains a selector and works without a cache only')
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
        if cache is None:
            k, v = shards.gather(k), shards.gather(v)
            fine, coarse = _entries(config, k, keys)
        else:
            if not shards.cache_split:
                check_capacity(cache.length, rows.appended, cache.capacity)
            cache = _append(config, cache, k, v, rows, shards)
            fine, coarse = (as_keys(e).astype(q.dtype) for e in (cache.fine, cache.coarse))
        # A row holds at most as many tokens as there are keys.
        room = k.shape[1] if cache is None else cache.capacity
        dense = attend != "sparse" or room < config.dense_len
        indices = None
        if inspect or not dense:
            lengths = shards.mine(_switching_lengths(config, keys, cached=cache is not None))
            indices = choose_blocks(config, q, fine, coarse, rows, lengths)
            indices = checkpoint_name(indices, "selection")
        out = attend_blocks(config, q, k, v, None if dense else indices, rows, cache, shards)
        if indices is None or not inspect:
            return out, cache, Aux.empty()
        measured, selection = inspect_blocks(
            config, self.shape, q, k, v, indices, keys, cache, shards
        )
        return out, cache, dataclasses.replace(Aux.empty(), metrics=measured, selection=selection)

    def update_state(self, statistics: dict[str, Array]) -> None:
        """Nothing to update."""
        del statistics


def infllm_v2_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    *,
    config: InfLLMV2 | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N Hv"]:
    """InfLLM-V2 on ready-made heads; see :mod:`sparse_attn.infllm_v2`.

    Args:
      q: queries, rotated.
      k: keys, rotated.
      v: values.
      config: block sizes, budget, window, dense_len, implementation.
      segment_ids: 0 is padding (output 0); documents are contiguous and start at multiples of
        ``config.selection_block``.

    Differentiable in everything but the block lists. Memory is linear in T.

    Raises:
      ValueError: on shapes that do not fit.
    """
    config = InfLLMV2() if config is None else config
    _check_budgets(config, k.shape[2])
    rows = place_rows(
        *q.shape[:2],
        length=None,
        positions=None,
        segment_ids=segment_ids,
        alignment=config.alignment,
    )
    indices = None
    if q.shape[1] >= config.dense_len:
        lengths = _switching_lengths(config, rows, cached=False)
        indices = choose_blocks(config, q, *_entries(config, k, rows), rows, lengths)
        indices = checkpoint_name(indices, "selection")
    return attend_blocks(config, q, k, v, indices, rows)


def choose_blocks(
    config: InfLLMV2,
    q: Float[Array, "B T N H"],
    fine: Float[Array, "B C K H"],
    coarse: Float[Array, "B C2 K H"],
    rows: Rows,
    lengths: Int[Array, "B T"],
) -> Int[Array, "B T K P"]:
    """The block lists of all rows (stages 2 to 5); nothing is differentiable.

    ``lengths`` are compared with ``dense_len``.
    """
    q, fine, coarse = jax.lax.stop_gradient((q, fine, coarse))
    first, last = eligible_blocks(rows, config.selection_block)
    lse = None
    if config.lse == "coarse":
        start, stop = visible_entries(rows, config.coarse_block, config.coarse_stride)
        lse = entry_lse(q, coarse, start, stop, implementation=config.implementation)
    return select_blocks(
        q,
        fine,
        *visible_entries(rows, config.compression_block, config.compression_stride),
        first,
        last,
        pooling=config.pooling,
        selected=config.slots,
        initial=config.initial_blocks,
        recent=config.local_blocks,
        lse=lse,
        budget=_row_budgets(config, lengths, fine.shape[2]),
        implementation=config.implementation,
    )


def _check_budgets(config: InfLLMV2, kv_heads: int) -> None:
    if isinstance(config.selected_blocks, tuple) and len(config.selected_blocks) != kv_heads:
        raise ValueError(
            f"selected_blocks={config.selected_blocks} gives {len(config.selected_blocks)} "
            f"budgets for kv_heads={kv_heads}; give one per kv head, or an int for all"
        )


def _entries(
    config: InfLLMV2, k: Float[Array, "B T K H"], rows: Rows
) -> tuple[Float[Array, "B C K H"], Float[Array, "B C2 K H"]]:
    """Fine and coarse entries of whole sequences, not differentiable."""
    # An entry may reach into padding; nobody sees it, but padding may hold NaN.
    k = jnp.where(rows.valid[:, :, None, None], jax.lax.stop_gradient(k), 0)
    fine = mean_entries(k, config.compression_block, config.compression_stride)
    return fine, mean_entries(k, config.coarse_block, config.coarse_stride)


def _append(
    config: InfLLMV2,
    cache: InfLLMV2Cache,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    rows: Rows,
    shards: Shards,
) -> InfLLMV2Cache:
    """The cache with the new tokens, and with every entry that became due."""
    keys, values = write_blocks(cache.k, cache.v, k, v, rows, shards)

    def grown(entries: Array, block: int, stride: int) -> Array:
        return append_means(
            entries,
            keys,
            cache.length,
            rows.appended,
            k.shape[1],
            block=block,
            stride=stride,
            shards=shards,
        )

    coarse = cache.coarse
    if config.lse == "coarse":
        coarse = grown(coarse, config.coarse_block, config.coarse_stride)
    return dataclasses.replace(
        cache,
        length=cache.length + rows.appended,
        k=keys,
        v=values,
        fine=grown(cache.fine, config.compression_block, config.compression_stride),
        coarse=coarse,
    )


def _row_budgets(
    config: InfLLMV2, lengths: Int[Array, "B T"], kv_heads: int
) -> Int[Array, "B T K"] | None:
    """Blocks that each row may list: its head's budget, or all of them where it is dense."""
    if config.budgets == (config.slots,):
        return None
    budgets = jnp.asarray(config.budgets, jnp.int32)
    budgets = jnp.broadcast_to(budgets[None, None, :], (*lengths.shape, kv_heads))
    return jnp.where((lengths < config.dense_len)[:, :, None], config.slots, budgets)


def _switching_lengths(config: InfLLMV2, rows: Rows, cached: bool) -> Int[Array, "B T"]:
    """The length by which each row of whole sequences is dense or sparse."""
    if config.switch == "row":
        return rows.index - rows.start + 1
    return _document_lengths(rows, cached)


def _document_lengths(rows: Rows, cached: bool) -> Int[Array, "B T"]:
    """Tokens of each row's document, up to the end of this call."""
    if cached:
        last = jnp.max(rows.index, axis=1, keepdims=True)
        return jnp.broadcast_to(last + 1, rows.index.shape)
    tokens = rows.index.shape[1]
    following = jnp.concatenate(
        [rows.start[:, 1:], jnp.full_like(rows.start[:, :1], tokens)], axis=1
    )
    padded_next = jnp.concatenate([~rows.valid[:, 1:], jnp.ones_like(rows.valid[:, :1])], axis=1)
    ends = (following != rows.start) | padded_next
    stop = jnp.where(ends & rows.valid, rows.index + 1, tokens)
    stop = jnp.flip(jax.lax.cummin(jnp.flip(stop, axis=1), axis=1), axis=1)
    return stop - rows.start
