"""Native Sparse Attention (arXiv 2502.11089): compressed, selected and window branches, gated.

With compression block l, stride d, selection block L, n selected blocks and window w:

1. K~_i = phi_K(k[i*d : i*d + l]), V~_i likewise; K~_i is rotated at the position of token i*d.
2. p_cmp = softmax_i(q . K~_i / sqrt(H)) over entries with i*d + l - 1 <= t; o_cmp = sum p_cmp V~.
3. p_slc[j] = Eq. 9 (overlap-weighted sum of p_cmp), summed over the G heads of a group (Eq. 10).
4. The n best blocks, the document's first and the most recent ones forced inside n (Eq. 11).
5. o_slc: token-causal attention over those blocks; o_win: over exactly the last w tokens.
6. o = sum_c g_c o_c with g = sigmoid(MLP(x)) per head (Eq. 5).

Where the paper is silent: phi has one hidden layer of width 2H with SiLU and an intra-block
position embedding on keys and values; keys are compressed before rotation; gates start at
sigmoid(-2, -2, +2), so that a fresh model is close to window attention.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels_pallas.block_scores import Pooling
from sparse_attn import metrics, selector_gradient
from sparse_attn.block_lists import attend_cached
from sparse_attn.cache import check_capacity
from sparse_attn.compression import Compression, CompressionKind, entry_count, split_pieces
from sparse_attn.documents import Rows, place_shard
from sparse_attn.nsa_branches import (
    compressed_branch,
    everything_branch,
    selected_branch,
    window_branch,
    window_branch_cached,
)
from sparse_attn.nsa_cache import (
    NSACache,
    append_compressed,
    append_selected,
    append_window,
    empty_cache,
)
from sparse_attn.registry import MechanismConfig, register
from sparse_attn.shards import Shards, Strategy
from sparse_attn.types import Attend, Aux, Heads, HeadShape, Implementation, Selection

SelectorGradient = Literal["through_output", "none", "kl", "straight_through"]


@dataclasses.dataclass(frozen=True)
class NSA(MechanismConfig):
    """Configuration of Native Sparse Attention. Lengths are in tokens, counts in blocks.

    Attributes:
      compression_block: tokens of a compressed entry (l); at most ``selection_block``.
      compression_stride: tokens between the beginnings of entries (d).
      selection_block: tokens of a block that is selected as a whole (L).
      selected_blocks: blocks of a row (n), the initial and recent ones included.
      initial_blocks: first blocks of the document that are always selected.
      recent_blocks: latest blocks, the row's own included, that are always selected.
      window: keys that the window branch of a row sees (w), its own included, in training and in
        decode.
      compression: how an entry is made of its tokens.
      shared_kv: the three branches share one K/V set instead of having one each.
      gates: learned, or three constants for compressed, selected and window branch.
      selector_gradient: what teaches the block ranking (index sets never carry gradient). With
        the paper's "through_output", q and K~ learn because p_cmp also makes o_cmp. "none": neither
        does, only V~ learns from o_cmp. "kl": phi_K learns from KL(pooled dense attention || block
        importance) on sampled rows, its inputs detached; q is not trained by the selector. Last,
        with "straight_through", as through_output, every selected block is weighted by 1 + p -
        stop_gradient(p), where p is its importance within the group.
      mode: "paper", or "mean_pool", the simplified selector of a common Triton library: entries are
        means of whole selection blocks, pooled after rotation (needs compression="mean" and l = d =
        L).
      implementation: which backend runs it; "auto" takes the first that can.

    Raises:
      ValueError: on sizes that do not divide or counts that cannot hold.
    """

    compression_block: int = 32
    compression_stride: int = 16
    selection_block: int = 64
    selected_blocks: int = 16
    initial_blocks: int = 1
    recent_blocks: int = 2
    window: int = 512
    compression: CompressionKind = "mlp"
    shared_kv: bool = False
    gates: Literal["learned"] | tuple[float, float, float] = "learned"
    selector_gradient: SelectorGradient = "through_output"
    mode: Literal["paper", "mean_pool"] = "paper"
    implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        for name in (
            "compression_block",
            "compression_stride",
            "selection_block",
            "selected_blocks",
            "window",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("initial_blocks", "recent_blocks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.compression_block > self.selection_block:
            raise ValueError(
                f"compression_block={self.compression_block} is longer than "
                f"selection_block={self.selection_block}; Eq. 9 needs l <= L"
            )
        _ = self.pooling
        if self.recent_blocks < 1:
            raise ValueError("recent_blocks=0: a row must be able to see its own block; use >= 1")
        if self.initial_blocks + self.recent_blocks > self.selected_blocks:
            raise ValueError(
                f"selected_blocks={self.selected_blocks} cannot hold the forced "
                f"initial_blocks={self.initial_blocks} + recent_blocks={self.recent_blocks}"
            )
        if self.mode == "mean_pool" and not (
            self.compression == "mean"
            and self.compression_block == self.compression_stride == self.selection_block
        ):
            raise ValueError(
                'mode="mean_pool" needs compression="mean" and compression_block == '
                f"compression_stride == selection_block, got {self.compression!r}, "
                f"{self.compression_block}, {self.compression_stride}, {self.selection_block}"
            )

    @property
    def alignment(self) -> int:
        """Documents start at multiples of the selection block."""
        return self.selection_block

    @property
    def kv_branches(self) -> int:
        """R: one K/V set for each branch, or one for all."""
        return 1 if self.shared_kv else 3

    @property
    def selector_parameters(self) -> tuple[str, ...]:
        """The KL loss teaches the compression of keys and nothing else."""
        return ("compress_k",)

    @property
    def pooling(self) -> Pooling:
        """The weights of Eq. 9."""
        return Pooling.geometric(
            self.compression_block, self.compression_stride, self.selection_block
        )

    @property
    def sequence_strategies(self) -> tuple[Strategy, ...]:
        """Entries are made where their tokens are; windows take their neighbours' keys."""
        return ("halo", "gather")

    def covering(self, length: int) -> NSA:
        """The variant that equals dense attention up to ``length``: all blocks, no other branch."""
        blocks = max(-(-length // self.selection_block), self.initial_blocks + self.recent_blocks)
        return dataclasses.replace(self, selected_blocks=blocks, gates=(0.0, 1.0, 0.0))

    def density(self, length: int) -> float:
        """Upper bound of attended over causal pairs of one document, as if branches met in no key.

        A compressed entry counts as one key.
        """
        # On the host: the number of pairs is beyond 32 bits from 64k tokens on.
        t = np.arange(1, length + 1)
        budget = self.selected_blocks * self.selection_block
        entries = np.maximum((t - self.compression_block) // self.compression_stride + 1, 0)
        attended = np.minimum(t, budget) + np.minimum(t, self.window) + entries
        return float(np.minimum(attended, t).sum() / t.sum())

    def auxiliary_bits(self, shape: HeadShape, element_bits: int = 16) -> float:
        """One compressed key and value an entry."""
        pair = shape.head_width + shape.value_width
        return shape.kv_heads * pair * element_bits / self.compression_stride

    @staticmethod
    def tiny() -> tuple[NSA, ...]:
        """Variants for the property suite: L=8, l=4, d=2."""
        small = NSA(
            compression_block=4,
            compression_stride=2,
            selection_block=8,
            selected_blocks=4,
            window=11,
        )
        pool = dataclasses.replace(
            small,
            compression_block=8,
            compression_stride=8,
            compression="mean",
            mode="mean_pool",
            shared_kv=True,
        )
        return (small, pool)


class Gates(nnx.Module):
    """g = sigmoid(W_out silu(W_in x) + b): three gates a head, [B, T, D] -> [B, T, N, 3]."""

    def __init__(self, shape: HeadShape, *, rngs: nnx.Rngs, param_dtype: Any):
        hidden = max(16, shape.model_width // 8)
        scale = shape.model_width**-0.5
        key = rngs.params
        self.w_in = nnx.Param(
            scale * jax.random.normal(key(), (shape.model_width, hidden), param_dtype)
        )
        self.w_out = nnx.Param(
            0.02 * jax.random.normal(key(), (hidden, shape.query_heads, 3), param_dtype)
        )
        start = jnp.asarray([-2.0, -2.0, 2.0], param_dtype)
        self.bias = nnx.Param(jnp.broadcast_to(start[None], (shape.query_heads, 3)))

    def open(self, biases: tuple[float, float, float]) -> None:
        """Set the biases of (compressed, selected, window) for every head."""
        self.bias[...] = jnp.broadcast_to(
            jnp.asarray(biases, self.bias.dtype)[None], self.bias.shape
        )

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N 3"]:
        dtype = x.dtype
        hidden = jax.nn.silu(jnp.einsum("BTD,DF->BTF", x, self.w_in[...].astype(dtype)))
        logits = jnp.einsum("BTF,FNc->BTNc", hidden, self.w_out[...].astype(dtype))
        return jax.nn.sigmoid(logits + self.bias[...].astype(dtype)[None, None])


@register(NSA, "nsa")
class NSAAttention(nnx.Module):
    """The mechanism: compression, gates and the three branches; see :class:`NSA`."""

    def __init__(
        self, config: NSA, shape: HeadShape, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32
    ):
        self.config = config
        self.shape = shape
        sizes: dict[str, Any] = {
            "block": config.compression_block,
            "stride": config.compression_stride,
            "kv_heads": shape.kv_heads,
            "rngs": rngs,
            "param_dtype": param_dtype,
        }
        self.compress_k = Compression(config.compression, width=shape.head_width, **sizes)
        self.compress_v = Compression(config.compression, width=shape.value_width, **sizes)
        if config.gates == "learned":
            self.gates = Gates(shape, rngs=rngs, param_dtype=param_dtype)

    def initialize_from_dense(self) -> None:
        """Parameters for upcycling a dense model: phi is the mean, window and selection open."""
        self.compress_k.initialize_mean()
        self.compress_v.initialize_mean()
        if self.config.gates == "learned":
            self.gates.open((-4.0, 0.0, 0.0))

    def init_cache(self, batch: int, capacity: int, dtype: Any, rollback: int = 0) -> NSACache:
        """An empty cache for ``capacity`` tokens a sequence; ``rollback`` of them can be undone."""
        return empty_cache(
            self.shape,
            batch=batch,
            capacity=capacity,
            rollback=rollback,
            block=self.config.compression_block,
            stride=self.config.compression_stride,
            selection_block=self.config.selection_block,
            window=self.config.window,
            dtype=dtype,
        )

    def __call__(
        self,
        heads: Heads,
        cache: NSACache | None = None,
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        attend: Attend = "sparse",
        inspect: bool = False,
    ) -> tuple[Float[Array, "B T N Hv"], NSACache | None, Aux]:
        """The mechanism contract.

        ``attend="dense"``: the selected branch sees every earlier token (n without limit), the
        other branches and all caches work as ever. ``"fit"``: the same, and ``aux.loss`` is the
        selector's KL loss (needs ``cache=None``).
        """
        config = self.config
        if len(heads.k) != config.kv_branches or len(heads.v) != config.kv_branches:
            raise ValueError(
                f"heads carry {len(heads.k)} K and {len(heads.v)} V branches, the config needs "
                f"kv_branches={config.kv_branches} (shared_kv={config.shared_kv})"
            )
        if cache is not None and attend == "fit":
            raise ValueError('attend="fit" trains the selector and works without a cache only')
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
        raw = (heads.k[0], heads.v[0])
        if segment_ids is not None:
            # An entry may reach into padding; nobody sees it, but 0 * NaN in its gradient is NaN.
            padding = ~rows.valid[:, :, None, None]
            raw = (jnp.where(padding, 0, raw[0]), jnp.where(padding, 0, raw[1]))
        slc, win = (0, 0) if config.shared_kv else (1, 2)
        q = heads.rope(heads.q, rows.positions)
        k_slc, v_slc = heads.rope(heads.k[slc], rows.positions), heads.v[slc]
        k_win, v_win = (
            (k_slc, v_slc)
            if slc == win
            else (heads.rope(heads.k[win], rows.positions), heads.v[win])
        )
        if cache is None:
            k_cmp, v_cmp = self._compress_all(*raw, rows, heads.rope, shards)
            window = window_branch(config, q, k_win, v_win, rows, shards)
            k_slc, v_slc = shards.gather(k_slc), shards.gather(v_slc)
        else:
            if not shards.cache_split:
                check_capacity(cache.length, rows.appended, cache.capacity)
            before = cache
            cache = append_window(cache, k_win, v_win, rows)
            window = window_branch_cached(config, q, k_win, v_win, rows, before, cache)
            cache = append_selected(cache, k_slc, v_slc, rows, shards)
            cache = self._append_compressed(cache, *raw, rows, heads.rope)
            cache = dataclasses.replace(cache, length=cache.length + rows.appended)
            k_cmp, v_cmp = (entries.astype(q.dtype) for entries in cache.compressed)
            if inspect:
                k_slc, v_slc = (x.astype(q.dtype) for x in cache.selected)

        scores = compressed_branch(config, q, k_cmp, v_cmp, rows)
        indices = checkpoint_name(scores.indices, "selection")
        if cache is not None:
            selected = attend_cached(
                q,
                cache.k_slc,
                cache.v_slc,
                indices if attend == "sparse" else None,
                rows,
                shards=shards,
                implementation=config.implementation,
            )
        elif attend != "sparse":
            selected = everything_branch(config, q, k_slc, v_slc, rows).out
        else:
            branch = selected_branch(config, q, k_slc, v_slc, indices, rows)
            if config.selector_gradient == "straight_through":
                branch = selector_gradient.straight_through(
                    branch, q, k_slc, v_slc, k_cmp, scores.lse, indices, rows, config
                )
            selected = branch.out
        out = self._mix(heads.x, scores.out, selected, window.out)

        loss = jnp.zeros((), jnp.float32)
        if cache is None and (attend == "fit" or config.selector_gradient == "kl"):
            detached = self._compress_all(*jax.lax.stop_gradient(raw), rows, heads.rope, shards)[0]
            loss = selector_gradient.pooled_kl(
                *jax.lax.stop_gradient((q, k_slc)), detached, keys, config, shards
            )
        measured: dict[str, Array] = {}
        selection = None
        if inspect:
            selection = Selection(indices, config.selection_block)
            measured = metrics.measure(
                shards.gather(q),
                k_slc,
                v_slc,
                Selection(shards.gather(indices), config.selection_block),
                keys,
                config=config,
                shape=self.shape,
                window=config.window,
            )
        return out, cache, Aux(loss=loss, metrics=measured, selection=selection)

    def update_state(self, statistics: dict[str, Array]) -> None:
        """Nothing to update: everything NSA learns, it learns by gradient."""
        del statistics

    def _compress_all(
        self, raw_k: Array, raw_v: Array, rows: Rows, rope: Any, shards: Shards
    ) -> tuple[Float[Array, "B C K H"], Float[Array, "B C K Hv"]]:
        """Every entry of a whole sequence (at least one, so that shapes stay legal).

        With "halo" every device makes the entries that begin with its tokens, and only entries are
        gathered; the last ones of the sequence, which are not whole, are in nobody's range.
        """
        config = self.config
        stride, block = config.compression_stride, config.compression_block
        halo = shards.strategy == "halo"
        if halo:
            raw_k, raw_v = (
                jnp.concatenate([x, shards.after(x, block - stride)], axis=1)
                for x in (raw_k, raw_v)
            )
        else:
            raw_k, raw_v = shards.gather(raw_k), shards.gather(raw_v)
        at = rows.positions if halo else shards.gather(rows.positions)
        entries = max(1, entry_count(raw_k.shape[1], block, stride))

        def split(x: Array) -> Array:
            return split_pieces(x, block, stride)

        if config.mode == "mean_pool":
            k_cmp = self.compress_k(split(rope(raw_k, at)))
        else:
            k_cmp = rope(self.compress_k(split(raw_k)), split(at)[:, :, 0][:, :entries])
        v_cmp = self.compress_v(split(raw_v))
        return (shards.gather(k_cmp), shards.gather(v_cmp)) if halo else (k_cmp, v_cmp)

    def _append_compressed(
        self, cache: NSACache, raw_k: Array, raw_v: Array, rows: Rows, rope: Any
    ) -> NSACache:
        """Hand the new raw tokens to the compressed branch's cache."""
        rotated = self.config.mode == "mean_pool"
        return append_compressed(
            cache,
            rope(raw_k, rows.positions) if rotated else raw_k,
            raw_v,
            rows,
            block=self.config.compression_block,
            stride=self.config.compression_stride,
            compress=lambda k, v: (self.compress_k(k), self.compress_v(v)),
            rope=None if rotated else rope,
        )

    def _mix(
        self,
        x: Float[Array, "B T D"],
        compressed: Float[Array, "B T N Hv"],
        selected: Float[Array, "B T N Hv"],
        window: Float[Array, "B T N Hv"],
    ) -> Float[Array, "B T N Hv"]:
        """o = sum_c g_c o_c."""
        if self.config.gates == "learned":
            g = self.gates(x)
            return g[..., 0:1] * compressed + g[..., 1:2] * selected + g[..., 2:3] * window
        g_cmp, g_slc, g_win = self.config.gates
        return g_cmp * compressed + g_slc * selected + g_win * window
