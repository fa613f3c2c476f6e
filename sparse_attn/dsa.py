"""DeepSeek sparse attention (DeepSeek-V3.2-Exp): a lightning indexer chooses tokens.

With index queries qI_j, weights w_j (j < Hi) and one index key kI a token, all projected from the
layer input x by parameters of their own,

    I[t, s] = sum_j w[t, j] ReLU(qI[t, j] . kI[s]),      w = (W_w x) (Hi d)^(-1/2),

every row attends the k tokens of its past with the largest I, one list for all heads. A row's own
token is not forced; of equal scores the later token wins (ReLU makes exact zeros common).

kI = LayerNorm(W_k x). The first ``index_rotary`` dims of qI and kI are rotated by the model's rope
with frequencies of their own, in the model's layout ("half", non-interleaved, by default: an
interleaved indexer on half-layout weights is a known bug). Without low-rank queries qI is
projected from x. The publication's Hadamard transform and 8-bit numbers change no product of full
precision and are left out.

The indexer only learns from its own loss, with x detached. ``attend="fit"`` (dense warm-up):
KL(p || softmax_s I) with p the dense attention summed over heads and normalised. ``"sparse"``:
the same over the selected set, weighted by ``indexer_loss``. The language model's loss does not
reach it. Both are means over ``fit_rows`` evenly spaced rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.common import accumulation_dtype
from kernels_pallas.gather_decode import gather_decode
from sparse_attn import metrics
from sparse_attn.cache import FEW_ROWS, check_capacity, checked_truncation, write_rows
from sparse_attn.documents import Rows, place_rows, place_shard
from sparse_attn.masked import map_rows, masked_attention, rows_per_chunk
from sparse_attn.parallel.ranges import cached_range_attention
from sparse_attn.registry import MechanismConfig, register
from sparse_attn.shards import WHOLE, Shards, Strategy
from sparse_attn.top_keys import heaviest, listed
from sparse_attn.types import (
    Attend,
    AttentionOutput,
    Aux,
    Heads,
    HeadShape,
    Implementation,
    Rope,
    Selection,
)


@dataclasses.dataclass(frozen=True)
class DSA(MechanismConfig):
    """Configuration of DeepSeek sparse attention.

    Attributes:
      selected_tokens: tokens of a row, for all heads (k).
      index_heads: heads of the indexer (Hi).
      index_width: of an indexer's head (d).
      index_rotary: how many leading index dims turn; None for half of them.
      indexer_loss: weight of the KL loss over the selected set in sparse training; with 0 it is not
        computed, and the indexer only learns by ``attend="fit"``.
      fit_rows: rows a sequence on which a KL loss is taken.
      implementation: which backend runs it; "auto" takes the first that can.

    Raises:
      ValueError: for values out of range.
    """

    selected_tokens: int = 2048
    index_heads: int = 16
    index_width: int = 64
    index_rotary: int | None = None
    indexer_loss: float = 1.0
    fit_rows: int = 256
    implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        for name in ("selected_tokens", "index_heads", "index_width", "fit_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.indexer_loss < 0:
            raise ValueError(f"indexer_loss={self.indexer_loss} must not be negative")
        if self.rotary % 2 or not 0 <= self.rotary <= self.index_width:
            raise ValueError(
                f"index_rotary={self.index_rotary} must be even and between 0 and "
                f"index_width={self.index_width}, or None for half of it"
            )

    @property
    def rotary(self) -> int:
        """How many leading index dims turn."""
        return self.index_width // 4 * 2 if self.index_rotary is None else self.index_rotary

    @property
    def sequence_strategies(self) -> tuple[Strategy, ...]:
        """Keys, values and index keys are gathered."""
        return ("gather",)

    def covering(self, length: int) -> DSA:
        """The variant that equals dense attention: every token of the past is selected."""
        return dataclasses.replace(self, selected_tokens=max(length, 1))

    def density(self, length: int) -> float:
        """Attended over causal token pairs of one document."""
        k = min(self.selected_tokens, length)
        return (k * (k + 1) / 2 + (length - k) * k) / (length * (length + 1) / 2)

    def auxiliary_bits(self, shape: HeadShape, element_bits: int = 16) -> float:
        """One index key a token."""
        del shape
        return float(self.index_width * element_bits)

    def selector_flops(self, shape: HeadShape, length: Any) -> Any:
        """Every index head meets every index key."""
        del shape
        return 2 * self.index_heads * (self.index_width + 1) * length

    @staticmethod
    def tiny() -> tuple[DSA, ...]:
        """Variants for the property suite."""
        return (DSA(selected_tokens=9, index_heads=3, index_width=8, fit_rows=16),)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IndexRows:
    """What rows of the indexer are scored by: ``q`` [B, T, I, d], ``weight`` [B, T, I], and the
    keys [start, stop) that each row may select, [B, T].
    """

    q: Float[Array, "B T I d"]
    weight: Float[Array, "B T I"]
    start: Int[Array, "B T"]
    stop: Int[Array, "B T"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DSACache:
    """Rotated ``k`` [B, S, K, H], ``v`` and index keys ``index_k`` [B, S, d] of every token."""

    length: Int[Array, " B"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K Hv"]
    index_k: Float[Array, "B S d"]
    token_axes: ClassVar = {"k": 1, "v": 1}

    @property
    def capacity(self) -> int:
        """S, the tokens a sequence can hold."""
        return self.k.shape[1]

    def truncate(self, lengths: Int[Array, " B"]) -> DSACache:
        """Forget the tokens after ``lengths``; any number can be undone."""
        cut = checked_truncation(self.length, lengths, rollback=self.capacity)
        return dataclasses.replace(self, length=cut)


class Indexer(nnx.Module):
    """Parameters ``query`` [D, Hi, d], ``key`` [D, d], ``weight`` [D, Hi], ``key_scale`` and
    ``key_bias`` [d] of the key's LayerNorm.
    """

    def __init__(self, config: DSA, shape: HeadShape, *, rngs: nnx.Rngs, param_dtype: Any):
        D, heads, width = shape.model_width, config.index_heads, config.index_width
        key, scale = rngs.params, shape.model_width**-0.5
        self.config = config
        self.query = nnx.Param(scale * jax.random.normal(key(), (D, heads, width), param_dtype))
        self.key = nnx.Param(scale * jax.random.normal(key(), (D, width), param_dtype))
        self.weight = nnx.Param(scale * jax.random.normal(key(), (D, heads), param_dtype))
        self.key_scale = nnx.Param(jnp.ones((width,), param_dtype))
        self.key_bias = nnx.Param(jnp.zeros((width,), param_dtype))

    def __call__(
        self, x: Float[Array, "B T D"], rope: Rope, positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T I d"], Float[Array, "B T I"], Float[Array, "B T d"]]:
        """Rotated index queries, their weights, and rotated index keys, in the dtype of x."""
        config, dtype = self.config, x.dtype
        x = jax.lax.stop_gradient(x)
        q = jnp.einsum("BTD,DId->BTId", x, self.query[...].astype(dtype))
        weight = jnp.einsum("BTD,DI->BTI", x, self.weight[...].astype(dtype))
        k = jnp.einsum("BTD,Dd->BTd", x, self.key[...].astype(dtype))
        wide = k.astype(accumulation_dtype(dtype))
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        power = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = (wide * jax.lax.rsqrt(power + 1e-6)).astype(dtype)
        k = normed * self.key_scale[...].astype(dtype)[None, None]
        k = k + self.key_bias[...].astype(dtype)[None, None]
        q = rope(q, positions, dims=config.rotary)
        k = rope(k[:, :, None], positions, dims=config.rotary)[:, :, 0]
        return q, weight * (config.index_heads * config.index_width) ** -0.5, k


def index_scores(
    rows: IndexRows, index_k: Float[Array, "B S d"]
) -> tuple[Float[Array, "B T S"], Bool[Array, "B T S"]]:
    """I[t, s] = sum_j w[t, j] ReLU(qI[t, j] . kI[s]), and which keys the row may select.

    At least float32. O(T S Hi) memory: for chunks of rows.
    """
    B, T, heads, width = rows.q.shape
    dtype = accumulation_dtype(rows.q.dtype)
    keys = jnp.swapaxes(index_k, 1, 2).astype(dtype)
    products = jnp.matmul(rows.q.reshape(B, T * heads, width).astype(dtype), keys)
    products = jax.nn.relu(products).reshape(B, T, heads, -1)
    weight = rows.weight.astype(dtype)[..., None]
    # Added in one order whatever the number of rows, so that prefill and decode rank alike.
    scores = weight[:, :, 0] * products[:, :, 0]
    for j in range(1, heads):
        scores = scores + weight[:, :, j] * products[:, :, j]
    s = jnp.arange(index_k.shape[1], dtype=jnp.int32)[None, None, :]
    return scores, (s >= rows.start[..., None]) & (s < rows.stop[..., None])


def top_tokens(
    scores: Float[Array, "B T S"], visible: Bool[Array, "B T S"], count: int
) -> Bool[Array, "B T S"]:
    """The ``count`` visible keys with the largest scores of each row; the later of equal ones."""
    needed = jnp.full(scores.shape[:2], count, jnp.int32)
    return heaviest(scores, visible.astype(jnp.int32), needed)


def _nearest_first(
    scores: Float[Array, "B T S"], visible: Bool[Array, "B T S"], count: int
) -> Int[Array, "B T 1 P"]:
    """As :func:`top_tokens`, as lists in no particular order, for a handful of rows."""
    keys = scores.shape[2]
    # top_k prefers the first of equal values, so the latest key comes first.
    ranked = jnp.flip(jnp.where(visible, scores, -jnp.inf), axis=2)
    value, place = jax.lax.top_k(ranked, min(count, keys))
    return jnp.where(jnp.isneginf(value), -1, keys - 1 - place.astype(jnp.int32))[:, :, None]


def selected_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    rows: IndexRows,
    index_k: Float[Array, "B S d"],
    config: DSA,
    *,
    live: Bool[Array, "B S"] | None = None,
    scale: float | None = None,
) -> AttentionOutput:
    """Attention of many rows over the tokens that the indexer selects. O((T + S) chunk) memory."""

    def member(rows: IndexRows) -> Bool[Array, "B c 1 S"]:
        return top_tokens(*index_scores(rows, index_k), config.selected_tokens)[:, :, None]

    index_k = jax.lax.stop_gradient(index_k)
    per_row = q.shape[0] * max(q.shape[2], config.index_heads) * k.shape[1]
    reference = config.implementation == "reference"
    return masked_attention(
        q,
        k,
        v,
        member,
        jax.lax.stop_gradient(rows),
        live=live,
        scale=scale,
        chunk=q.shape[1] if reference else rows_per_chunk(q.shape[1], per_row),
        implementation=config.implementation,
    )


def indexer_kl(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    rows: IndexRows,
    index_k: Float[Array, "B S d"],
    valid: Bool[Array, "B S"],
    config: DSA,
    *,
    selected: bool,
    shards: Shards = WHOLE,
) -> Float[Array, ""]:
    """Mean over ``fit_rows`` rows of KL(p || softmax_s I), p the attention summed over heads.

    Over all visible keys, or over the ``selected`` ones with both sides normalised there.
    Differentiable in the indexer's arrays only. ``valid`` is of the whole sequence, of which
    ``shards`` may hold a part of ``q`` and ``rows``.
    """
    q, k = jax.lax.stop_gradient((q, k))
    sampled = metrics.sample_rows(k.shape[1], config.fit_rows)
    q, valid = shards.take(q, sampled), valid[:, sampled]
    rows = jax.tree.map(lambda a: shards.take(a, sampled), rows)

    def divergence(inputs: tuple[Array, IndexRows]) -> Float[Array, "B c"]:
        q, rows = inputs
        p = metrics.dense_probabilities(q, k, rows.start, rows.stop - 1)
        target = jnp.sum(p, axis=(2, 3))
        scores, chosen = index_scores(rows, index_k)
        if selected:
            best = top_tokens(jax.lax.stop_gradient(scores), chosen, config.selected_tokens)
            chosen = jax.lax.stop_gradient(best)
        target = jnp.where(chosen, target, 0)
        mass = jnp.sum(target, axis=2, keepdims=True)
        target = target / jnp.where(mass > 0, mass, 1)
        some = jnp.any(chosen, axis=2, keepdims=True)
        top = jax.lax.stop_gradient(jnp.max(jnp.where(chosen, scores, -jnp.inf), 2, keepdims=True))
        shifted = jnp.where(chosen, scores - jnp.where(some, top, 0), 0)
        total = jnp.sum(jnp.where(chosen, jnp.exp(shifted), 0), axis=2, keepdims=True)
        log_share = shifted - jnp.log(jnp.where(some, total, 1))
        entropy = jnp.where(target > 0, target * jnp.log(jnp.where(target > 0, target, 1)), 0)
        return jnp.sum(entropy - target * log_share, axis=2)

    per_row = q.shape[0] * max(q.shape[2], config.index_heads) * k.shape[1]
    found = map_rows(divergence, (q, rows), chunk=rows_per_chunk(q.shape[1], per_row))
    total, count = shards.batch_total((jnp.sum(jnp.where(valid, found, 0)), jnp.sum(valid)))
    return (total / jnp.maximum(count, 1)).astype(jnp.float32)


@register(DSA, "dsa")
class DSAAttention(nnx.Module):
    """The mechanism: an indexer beside ordinary heads; see :class:`DSA`."""

    def __init__(
        self, config: DSA, shape: HeadShape, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32
    ):
        self.config = config
        self.shape = shape
        self.indexer = Indexer(config, shape, rngs=rngs, param_dtype=param_dtype)

    def init_cache(self, batch: int, capacity: int, dtype: Any, rollback: int = 0) -> DSACache:
        """An empty cache for ``capacity`` tokens a sequence; ``rollback`` costs nothing here.

        Raises:
          ValueError: if ``capacity`` is below 1 or ``rollback`` negative.
        """
        if capacity < 1 or rollback < 0:
            raise ValueError(f"{capacity=} must be at least 1 and {rollback=} must not be negative")
        keys = (batch, capacity, self.shape.kv_heads)
        return DSACache(
            length=jnp.zeros((batch,), jnp.int32),
            k=jnp.zeros((*keys, self.shape.head_width), dtype),
            v=jnp.zeros((*keys, self.shape.value_width), dtype),
            index_k=jnp.zeros((batch, capacity, self.config.index_width), dtype),
        )

    def __call__(
        self,
        heads: Heads,
        cache: DSACache | None = None,
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        attend: Attend = "sparse",
        inspect: bool = False,
    ) -> tuple[Float[Array, "B T N Hv"], DSACache | None, Aux]:
        """The mechanism contract.

        ``aux.loss`` is the KL loss over all visible keys with ``attend="fit"`` (needs
        ``cache=None``), over the selected ones with "sparse" training, else 0.
        """
        config = self.config
        if cache is not None and attend == "fit":
            raise ValueError('attend="fit" trains the indexer and works without a cache only')
        shards = heads.shards
        batch, tokens = heads.q.shape[:2]
        rows, keys = place_shard(
            shards,
            batch,
            tokens,
            length=None if cache is None else cache.length,
            positions=positions,
            segment_ids=segment_ids,
        )
        q = heads.rope(heads.q, rows.positions)
        k, v = heads.rope(heads.k[0], rows.positions), heads.v[0]
        live = None
        if segment_ids is not None and cache is None:
            live = keys.valid
            k, v = (jnp.where(rows.valid[:, :, None, None], x, 0) for x in (k, v))
        index_q, weight, index_k = self.indexer(heads.x, heads.rope, rows.positions)
        if cache is None:
            k, v, index_k = shards.gather(k), shards.gather(v), shards.gather(index_k)
        else:
            if not shards.cache_split:
                check_capacity(cache.length, rows.appended, cache.capacity)
            cache = DSACache(
                length=cache.length + rows.appended,
                k=write_rows(cache.k, k, rows.index, rows.valid, shards),
                v=write_rows(cache.v, v, rows.index, rows.valid, shards),
                index_k=write_rows(cache.index_k, index_k, rows.index, rows.valid),
            )
            k, v, index_k = (x.astype(q.dtype) for x in (cache.k, cache.v, cache.index_k))
            token = jnp.arange(index_k.shape[1], dtype=jnp.int32)[None, :]
            live = token < cache.length[:, None]
        index_rows = IndexRows(index_q, weight, *visible_keys(rows))

        decoding = cache is not None and (tokens <= FEW_ROWS or shards.cache_split)
        if attend != "sparse":
            out = cached_range_attention(
                q,
                k,
                v,
                rows.start,
                rows.index + 1,
                shards=shards,
                implementation=config.implementation,
            ).out
        elif decoding:
            scores, visible = index_scores(index_rows, index_k)
            lists = _nearest_first(scores, visible, config.selected_tokens)
            part = gather_decode(
                q,
                k,
                v,
                shards.own_list(lists, k.shape[1]),
                block_size=1,
                positions=rows.index - shards.cache_first(k.shape[1]),
                implementation=config.implementation,
            )
            out = shards.merged(part).out
        else:
            out = selected_attention(q, k, v, index_rows, index_k, config, live=live).out

        loss = jnp.zeros((), jnp.float32)
        if cache is None and (attend == "fit" or (attend == "sparse" and config.indexer_loss > 0)):
            fit = attend == "fit"
            loss = indexer_kl(
                q, k, index_rows, index_k, keys.valid, config, selected=not fit, shards=shards
            )
            loss = loss if fit else config.indexer_loss * loss
        measured: dict[str, Array] = {}
        selection = None
        if inspect:
            member = top_tokens(*index_scores(index_rows, index_k), config.selected_tokens)
            lists = listed(member[:, :, None], min(config.selected_tokens, k.shape[1]))
            selection = Selection(lists, block_size=1)
            measured = metrics.measure(
                shards.gather(q),
                k,
                v,
                Selection(shards.gather(lists), block_size=1),
                keys,
                config=config,
                shape=self.shape,
            )
        return out, cache, Aux(loss=loss, metrics=measured, selection=selection)

    def update_state(self, statistics: dict[str, Array]) -> None:
        """Nothing to update: the indexer learns by gradient."""
        del statistics


def visible_keys(rows: Rows) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """[start, stop) of the keys a row may select: its document's tokens up to its own."""
    return rows.start, jnp.where(rows.valid, rows.index + 1, rows.start)


def dsa_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    index_q: Float[Array, "B T I d"],
    index_weight: Float[Array, "B T I"],
    index_k: Float[Array, "B T d"],
    *,
    config: DSA | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T N Hv"]:
    """Causal attention of every row over its ``selected_tokens`` best keys by the indexer.

    Args:
      q: queries, rotated.
      k: keys, rotated.
      v: values.
      index_q: index queries, rotated as they are to be compared.
      index_weight: w of the score sum_j w_j ReLU(index_q_j . index_k); positive factors common to
        all heads of a row do not matter.
      index_k: index keys.
      config: ``selected_tokens`` and ``implementation``; nothing else is looked at.
      segment_ids: 0 is padding (output 0), documents are contiguous.
      scale: logit scale, default H**-0.5.

    Differentiable in q, k and v; the indexer's arrays get no gradient. Memory is linear in T.

    Raises:
      ValueError: on shapes that do not fit.
    """
    config = DSA() if config is None else config
    batch, tokens, heads = q.shape[:3]
    if k.shape[:3] != v.shape[:3] or k.shape[:2] != (batch, tokens) or heads % k.shape[2]:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} do not fit together")
    if index_q.ndim != 4 or index_q.shape[:2] != (batch, tokens):
        raise ValueError(f"index_q.shape={index_q.shape} must be [B, T, I, d], B, T of {q.shape}")
    wanted = index_q.shape[:3], (batch, tokens, index_q.shape[3])
    if (index_weight.shape, index_k.shape) != wanted:
        raise ValueError(
            f"index_weight {index_weight.shape} and index_k {index_k.shape} must be "
            f"{wanted[0]} and {wanted[1]} for index_q {index_q.shape}"
        )
    config = dataclasses.replace(config, index_heads=index_q.shape[2])
    rows = place_rows(batch, tokens, length=None, positions=None, segment_ids=segment_ids)
    index_rows = IndexRows(index_q, index_weight, *visible_keys(rows))
    live = None if segment_ids is None else rows.valid
    return selected_attention(q, k, v, index_rows, index_k, config, live=live, scale=scale).out
