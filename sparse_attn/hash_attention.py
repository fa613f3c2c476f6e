"""HashAttention (arXiv 2412.14468): learned binary codes find the keys a query attends.

With rotated q and k, mappings phi_q, phi_k (learned, per list) and codes of b bits:

1. code(x) = [phi(x) > 0], packed into words; the code of a key is computed once.
2. score[t, j, s] = sum, or maximum, over the query heads of list j of b - 2 popcount(code_q ^
   code_k). With ``query_levels`` > 2 a query head has several codes, which differ by their
   thresholds, and they add up: bits that it cares about count more. Keys are coded as ever.
3. Row t attends the document's first ``sinks`` keys, the last ``recent`` ones (its own included)
   and the k_t best-scored of the rest; of equal scores the most recent win.
4. Softmax attention over these keys. Nothing differentiates through the choice: the mappings learn
   from a loss of their own (:mod:`sparse_attn.hash_training`), everything else through step 4.

Where we differ from the published code, and why: one list a kv head by default (``share="kv"``), so
that a group reads its keys once; b bits a list of cache, not b a query head; codes are cached; ties
have an order; relaxed codes can be annealed to hard ones while they train; the maps of queries and
keys begin as the same projection; prefill is as sparse as decode.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, UInt32

from kernels_pallas.hamming import pack_codes
from kernels_pallas.hamming.codes import word_count
from sparse_attn import hash_selection as selection
from sparse_attn import metrics
from sparse_attn.cache import check_capacity
from sparse_attn.documents import Rows, place_rows, place_shard
from sparse_attn.hash_cache import HashCache, append, empty_cache
from sparse_attn.hash_mapping import Mapping, MappingKind, level_bits
from sparse_attn.hash_selection import FINEST_FRACTION, Amount, by_lists, key_lists
from sparse_attn.hash_training import fit_loss
from sparse_attn.parallel.ranges import cached_range_attention
from sparse_attn.registry import MechanismConfig, register
from sparse_attn.shards import Strategy
from sparse_attn.types import Attend, Aux, Heads, HeadShape, Implementation, Selection


@dataclasses.dataclass(frozen=True)
class HashAttention(MechanismConfig):
    """Configuration of HashAttention. Lengths and budgets are in tokens.

    Training is described in :mod:`sparse_attn.hash_training`.

    Attributes:
      bits: of a code (b), a multiple of 8.
      query_levels: values that each bit of a query takes. 2: it is set or not, as in the paper. L:
        L - 1 codes a query head, which costs no memory and little time.
      mapping: makes codes by an MLP with two hidden layers, or a linear map.
      hidden: width of the MLP's hidden layers.
      share: "kv": one list a kv head, for all query heads of its group. The paper's is "query": one
        list a query head.
      group_score: the "sum" of the scores of a group's query heads, or their "max": one head that
        looks for a key is enough. The loss is the same.
      budget: keys beyond sinks and recent ones: a number, or a fraction f of what the row sees,
        which is ceil(f * (t + 1)) (a ratio with a denominator up to 16384 stands for f), or one of
        these for each list.
      sinks: first keys of the document that every row attends.
      recent: latest keys, the row's own included, that every row attends.
      loss: "bce", or "ranking", where a target counts with a power of the attention it gets, see
        target_power.
      fit_rows: rows a call on which the loss is taken.
      fit_top: targets a row: its most attended keys.
      positive_weight: of targets in "bce" (alpha).
      positive_weight_per_token: times T, is added to ``positive_weight`` (beta).
      target_power: power of attention that weighs targets in "ranking"; 0: all alike.
      hard_keys: the loss sees the bits that keys will have, with the gradient of soft ones.
      value_aware_target: ranks targets by attention times |v|.
      anneal_steps: the temperature falls from 1 to ``final_temperature`` within so many training
        steps, which the module counts itself; 0: it stays at 1.
      final_temperature: of the soft bits, after annealing.
      balance: weight of a penalty on bits that are mostly set or mostly clear.
      joint_loss: adds that many times the loss, on detached q, k and v, to ``attend="sparse"``
        without a cache, so that codes train along with the model.
      implementation: which backend runs it; "auto" takes the first that can.

    Raises:
      ValueError: on numbers that cannot hold.
    """

    bits: int = 32
    query_levels: int = 2
    mapping: MappingKind = "mlp"
    hidden: int = 128
    share: Literal["kv", "query"] = "kv"
    group_score: Literal["sum", "max"] = "sum"
    budget: int | float | tuple[int | float, ...] = 1 / 32
    sinks: int = 16
    recent: int = 64
    loss: Literal["bce", "ranking"] = "bce"
    fit_rows: int = 256
    fit_top: int = 32
    positive_weight: float = 20.0
    positive_weight_per_token: float = 0.0
    target_power: float = 0.0
    hard_keys: bool = False
    value_aware_target: bool = False
    anneal_steps: int = 0
    final_temperature: float = 0.1
    balance: float = 0.0
    joint_loss: float = 0.0
    implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        if self.bits < 8 or self.bits % 8:
            raise ValueError(f"bits={self.bits} must be a positive multiple of 8")
        if not 2 <= self.query_levels <= 16:
            raise ValueError(
                f"query_levels={self.query_levels} must be between 2 (the paper's bits) and 16"
            )
        for name, known in (
            ("mapping", ("mlp", "linear")),
            ("share", ("kv", "query")),
            ("group_score", ("sum", "max")),
            ("loss", ("bce", "ranking")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {known}")
        for name in ("hidden", "recent", "fit_rows", "fit_top"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in (
            "sinks",
            "positive_weight",
            "positive_weight_per_token",
            "target_power",
            "anneal_steps",
            "balance",
            "joint_loss",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.target_power and self.loss != "ranking":
            raise ValueError(
                f"target_power={self.target_power} weighs the targets of loss='ranking', not of "
                f"{self.loss!r}; use positive_weight there"
            )
        if not 0 < self.final_temperature <= 1:
            raise ValueError(
                f"final_temperature={self.final_temperature} must be in (0, 1]; use "
                "anneal_steps=0 to keep the temperature at 1"
            )
        if isinstance(self.budget, tuple) and not self.budget:
            raise ValueError("budget=() names no list; give one number, or one for each list")
        for amount in self.budget if isinstance(self.budget, tuple) else (self.budget,):
            if isinstance(amount, int) and amount < 0:
                raise ValueError(f"budget={self.budget} must not be negative")
            if isinstance(amount, float) and not 1 / FINEST_FRACTION <= amount <= 1:
                raise ValueError(
                    f"budget={self.budget}: a fraction of the context must be between "
                    f"1/{FINEST_FRACTION} and 1; use an int for a number of tokens"
                )

    def lists(self, shape: HeadShape) -> int:
        """J, the lists of a token."""
        return shape.kv_heads if self.share == "kv" else shape.query_heads

    def amounts(self, lists: int) -> tuple[Amount, ...]:
        """The budget of each list.

        Raises:
          ValueError: if ``budget`` is a tuple of another length.
        """
        if not isinstance(self.budget, tuple):
            return (self.budget,) * lists
        if len(self.budget) != lists:
            raise ValueError(
                f"budget={self.budget} has {len(self.budget)} entries, share={self.share!r} makes "
                f"{lists} lists; give one number, or one for each list"
            )
        return self.budget

    @property
    def sequence_strategies(self) -> tuple[Strategy, ...]:
        """Codes, keys and values are gathered."""
        return ("gather",)

    def covering(self, length: int) -> HashAttention:
        """The variant that equals dense attention for documents up to ``length`` tokens."""
        return dataclasses.replace(self, budget=length)

    def density(self, length: int) -> float:
        """Attended over causal token pairs of one document of ``length`` tokens."""
        seen = np.arange(1, length + 1, dtype=np.int64)
        per_list = self.budget if isinstance(self.budget, tuple) else (self.budget,)
        attended = 0.0
        for amount in per_list:
            chosen = selection.budget_at(amount, seen)
            attended += float(np.minimum(seen, self.sinks + self.recent + chosen).sum())
        return attended / len(per_list) / float(seen.sum())

    def auxiliary_bits(self, shape: HeadShape, element_bits: int = 16) -> float:
        """Bits a token of the code cache: whole words of 32 for each list."""
        del element_bits
        return 32.0 * word_count(self.bits) * self.lists(shape)

    def best_of(self, codes: int) -> int:
        """Parts of a list's ``codes`` query codes, within which scores are summed: one, or with
        group_score="max" one a query head, of which the best counts.
        """
        return codes // (self.query_levels - 1) if self.group_score == "max" else 1

    @property
    def code_temperature(self) -> float:
        """Of the soft bits whose values ``query_levels`` rounds: that at the end of training."""
        return self.final_temperature if self.anneal_steps else 1.0

    def selector_flops(self, shape: HeadShape, length: Any) -> Any:
        """Exclusive or, count and sum: three operations a word of every query code and key."""
        return 3 * word_count(self.bits) * shape.query_heads * (self.query_levels - 1) * length

    @staticmethod
    def tiny() -> tuple[HashAttention, ...]:
        """Variants for the property suite: a list a kv head, and the paper's a query head."""
        small = HashAttention(bits=16, hidden=8, budget=5, sinks=2, recent=3, fit_rows=8)
        paper = dataclasses.replace(small, share="query", mapping="linear", bits=40, budget=0.2)
        return (dataclasses.replace(small, query_levels=4, group_score="max"), paper)


class HashProgress(nnx.Variable):
    """How many training steps the codes have learnt from: state, not a parameter."""


@register(HashAttention, "hash")
class HashMechanism(nnx.Module):
    """The mappings, the code cache and the selection; see :class:`HashAttention`.

    Raises:
      ValueError: if ``config.budget`` is a tuple that does not fit the heads.
    """

    def __init__(
        self,
        config: HashAttention,
        shape: HeadShape,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
    ):
        self.config = config
        self.shape = shape
        self.lists = config.lists(shape)
        config.amounts(self.lists)
        sizes: dict[str, Any] = {
            "lists": self.lists,
            "width": shape.head_width,
            "hidden": config.hidden,
            "bits": config.bits,
            "projection": rngs.params(),
            "rngs": rngs,
            "param_dtype": param_dtype,
        }
        self.phi_q = Mapping(config.mapping, **sizes)
        self.phi_k = Mapping(config.mapping, **sizes)
        self.steps = HashProgress(jnp.zeros((), jnp.float32))

    def init_cache(self, batch: int, capacity: int, dtype: Any, rollback: int = 0) -> HashCache:
        """An empty cache for ``capacity`` tokens a sequence; ``rollback`` costs nothing here."""
        del rollback
        return empty_cache(
            self.shape,
            batch=batch,
            capacity=capacity,
            lists=self.lists,
            bits=self.config.bits,
            dtype=dtype,
        )

    def __call__(
        self,
        heads: Heads,
        cache: HashCache | None = None,
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        attend: Attend = "sparse",
        inspect: bool = False,
    ) -> tuple[Float[Array, "B T N Hv"], HashCache | None, Aux]:
        """The mechanism contract.

        ``attend="dense"``: every earlier token is attended, codes are cached as ever. ``"fit"``:
        the same, and ``aux.loss`` teaches the mappings, and nothing else, what to select.
        """
        config = self.config
        if cache is not None and attend == "fit":
            raise ValueError('attend="fit" trains the selector and works without a cache only')
        shards = heads.shards
        rows, keys = place_shard(
            shards,
            *heads.q.shape[:2],
            length=None if cache is None else cache.length,
            positions=positions,
            segment_ids=segment_ids,
        )
        q = heads.rope(heads.q, rows.positions)
        k = heads.rope(heads.k[0], rows.positions)
        v = heads.v[0]
        # The numbers behind the codes: nothing of the model is trained through them.
        hashed = jax.lax.stop_gradient(k)
        if segment_ids is not None:
            hashed = jnp.where(rows.valid[:, :, None, None], hashed, 0)
        u_k = self.phi_k(key_lists(hashed, self.lists))[:, :, :, 0]
        codes = checkpoint_name(pack_codes(u_k > 0), "selection")
        live = None
        if cache is None:
            k, v, codes = shards.gather(k), shards.gather(v), shards.gather(codes)
            k_codes = selection.packed(codes)
            if segment_ids is not None:
                live = keys.valid
        else:
            if not shards.cache_split:
                check_capacity(cache.length, rows.appended, cache.capacity)
            cache = append(cache, k, v, codes, rows, shards)
            k, v = jnp.split(cache.kv.astype(q.dtype), [k.shape[3]], axis=3)
            k_codes = cache.codes

        joint = cache is None and attend == "sparse" and config.joint_loss > 0
        loss = jnp.zeros((), jnp.float32)
        measured: dict[str, Array] = {}
        statistics: dict[str, Array] = {}
        if attend == "fit" or joint:
            some = None if live is None else live[:, :, None, None]
            loss, measured = fit_loss(
                config,
                q,
                k if some is None else jnp.where(some, k, 0),
                v if some is None else jnp.where(some, v, 0),
                self.phi_q,
                shards.gather(u_k),
                keys,
                self.steps[...],
                shards,
            )
            loss = config.joint_loss * loss if joint else loss
            statistics = {"fitted": jnp.ones((), jnp.float32)}

        q_codes = self.query_codes(q) if attend == "sparse" or inspect else None
        if attend == "sparse" and q_codes is not None:
            if cache is not None and (shards.cache_split or q.shape[1] <= selection.FEW_ROWS):
                out = selection.gathered(config, q, cache, q_codes, rows, shards)
            else:
                out = selection.masked(config, q, k, v, q_codes, k_codes, rows, live)
        else:
            out, _ = cached_range_attention(
                q,
                k,
                v,
                rows.start,
                rows.index + 1,
                shards=shards,
                implementation=config.implementation,
            )
        chosen = None
        if inspect and q_codes is not None:
            indices = selection.select(config, q_codes, k_codes, rows, k.shape[1])
            chosen = Selection(indices, 1)
            if live is not None:
                k, v = (jnp.where(live[:, :, None, None], x, 0) for x in (k, v))
            measured |= metrics.measure(
                shards.gather(q),
                k,
                v,
                Selection(shards.gather(indices), 1),
                keys,
                config=config,
                shape=self.shape,
                sinks=config.sinks,
                recent=config.recent,
            )
        return out, cache, Aux(loss, measured, statistics, chosen)

    def query_codes(self, q: Float[Array, "B T N H"]) -> UInt32[Array, "B T J E W"]:
        """Packed codes of rotated queries, sorted to the lists they stand behind: E of them a list,
        ``query_levels - 1`` for each of its query heads.
        """
        u_q = self.phi_q(by_lists(jax.lax.stop_gradient(q), self.lists))
        bits = level_bits(u_q, self.config.query_levels, self.config.code_temperature)
        return checkpoint_name(pack_codes(bits), "selection")

    def update_state(self, statistics: dict[str, Array]) -> None:
        """Count a training step if the codes learnt in it, however many microbatches it had."""
        learnt = statistics.get("fitted")
        if learnt is not None:
            self.steps[...] = self.steps[...] + (learnt > 0).astype(self.steps.dtype)


def hash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    q_codes: UInt32[Array, "B T NL W"],
    k_codes: UInt32[Array, "B T J W"],
    *,
    config: HashAttention | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N Hv"]:
    """HashAttention on ready-made heads and codes; see :mod:`sparse_attn.hash_attention`.

    Args:
      q: queries, rotated.
      k: keys, rotated.
      v: values.
      q_codes: one packed code a query head (:func:`kernels_pallas.hamming.pack_codes`), or the
        ``config.query_levels - 1`` of each, head by head.
      k_codes: one packed code a list: a kv head with ``config.share="kv"``, else a query head.
      config: bits, sharing, budget, sinks, recent, implementation; the rest is not looked at.
      segment_ids: 0 is padding (output 0), documents are contiguous.

    Differentiable in q, k and v through the attention over the selected keys. Memory is linear in
    T.

    Raises:
      ValueError: on shapes that do not fit.
    """
    config = HashAttention() if config is None else config
    batch, tokens, heads = q.shape[:3]
    lists = k.shape[2] if config.share == "kv" else heads
    words, codes = word_count(config.bits), heads * (config.query_levels - 1)
    if q_codes.shape != (batch, tokens, codes, words):
        raise ValueError(
            f"q_codes.shape={q_codes.shape} must be [B, T, N * (query_levels - 1), W]="
            f"{(batch, tokens, codes, words)} for bits={config.bits}, "
            f"query_levels={config.query_levels}"
        )
    if k_codes.shape != (batch, tokens, lists, words):
        raise ValueError(
            f"k_codes.shape={k_codes.shape} must be [B, T, J, W]={(batch, tokens, lists, words)} "
            f"for share={config.share!r} and bits={config.bits}"
        )
    rows: Rows = place_rows(batch, tokens, length=None, positions=None, segment_ids=segment_ids)
    return selection.masked(
        config,
        q,
        k,
        v,
        q_codes.reshape(batch, tokens, lists, codes // lists, words),
        selection.packed(k_codes),
        rows,
        None if segment_ids is None else rows.valid,
    )
