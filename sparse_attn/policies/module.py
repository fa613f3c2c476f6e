"""Training-free selectors on a dense model's heads: what they share, and their one module.

A policy is a config with three pure functions: :meth:`Policy.init_state` (what it keeps beside K
and V), :meth:`Policy.observe` (new tokens came; what do rows need to select?) and
:meth:`Policy.member` (which keys does each row of a chunk attend?). The module holds the cache and
attends. It has no parameters: any model with one K/V branch runs with any policy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.common import accumulation_dtype
from kernels_pallas.gather_decode import gather_decode
from kernels_pallas.ranged import ranged_attention
from sparse_attn import metrics
from sparse_attn.cache import FEW_ROWS, check_capacity, checked_truncation, write_rows
from sparse_attn.documents import Rows, place_rows
from sparse_attn.masked import map_rows, masked_attention, rows_per_chunk
from sparse_attn.policies.rules import Budget, Queries, check_budget
from sparse_attn.registry import MechanismConfig, register
from sparse_attn.selecting import allowed_keys
from sparse_attn.top_keys import listed
from sparse_attn.types import (
    Attend,
    AttentionOutput,
    Aux,
    Heads,
    HeadShape,
    Implementation,
    Selection,
    no_rope,
)

State = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Policy(MechanismConfig):
    """Base of all policies: first and latest keys of the document are always attended.

    Attributes:
      sinks: first keys of the document that every row attends.
      recent: latest keys, the row's own included, that every row attends.
      implementation: which backend runs it; "auto" takes the first that can.

    Raises:
      ValueError: on negative counts.
    """

    sinks: int = 16
    recent: int = 64
    implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        for name in ("sinks", "recent"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")

    @property
    def forgets(self) -> bool:
        """Whether the state of earlier tokens changes, so that undoing tokens needs room for it."""
        return False

    def check(self, shape: HeadShape) -> None:
        """Raise ``ValueError`` if the policy does not fit the heads."""
        del shape

    def lists(self, shape: HeadShape) -> int:
        """J, the lists a row selects: 1, K or N."""
        raise NotImplementedError

    def capacity(self, keys: int) -> int:
        """P, the most keys that a list over ``keys`` keys holds."""
        raise NotImplementedError

    def init_state(
        self, shape: HeadShape, batch: int, capacity: int, dtype: Any, rollback: int
    ) -> State:
        """What is kept beside K and V, for no tokens yet."""
        del shape, batch, capacity, dtype, rollback
        return {}

    def observe(
        self,
        state: State,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        rows: Rows,
        length: Int[Array, " B"],
        shape: HeadShape,
    ) -> tuple[State, Any]:
        """Take in the new tokens, of which ``k`` already holds the keys, ``length`` old ones first.

        Returns the state to keep, and what :meth:`member` reads while it selects for ``rows``.
        """
        del q, rows, length, shape
        return state, {"keys": transposed(k)}

    def member(self, queries: Queries, view: Any, keys: int) -> Bool[Array, "B c J S"]:
        """Which of the ``keys`` keys each row attends."""
        raise NotImplementedError

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K Hv"],
        rows: Rows,
        view: Any,
        *,
        decoding: bool,
    ) -> AttentionOutput:
        """Attention over what :meth:`member` names; a few decoded rows gather their keys."""
        keys = k.shape[1]
        queries = Queries(jax.lax.stop_gradient(q), rows.index, rows.start)
        slots = self.capacity(keys)
        few = decoding and q.shape[1] <= FEW_ROWS and 2 * slots < keys
        if few and self.implementation != "reference":
            indices = listed(self.member(queries, view, keys), slots)
            return gather_decode(
                q,
                k,
                v,
                checkpoint_name(indices, "selection"),
                block_size=1,
                positions=rows.index,
                implementation=self.implementation,
            )
        return masked_attention(
            q,
            k,
            v,
            lambda chunk: self.member(chunk, view, keys),
            queries,
            implementation=self.implementation,
        )

    def covering(self, length: int) -> Any:
        """The variant that equals dense attention for documents up to ``length`` tokens."""
        return dataclasses.replace(self, recent=length)

    def density(self, length: int) -> float:
        """Attended over causal token pairs of one document of ``length`` tokens, at most."""
        attended = sum(min(t, self.attended(t)) for t in range(1, length + 1))
        return attended / (length * (length + 1) / 2)

    def attended(self, seen: int) -> float:
        """The most keys that a row with ``seen`` = t + 1 causal keys attends, mean over lists."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class BudgetedPolicy(Policy):
    """A policy that attends up to ``budget`` keys beyond the sinks and the recent keys.

    Attributes:
      budget: a count of keys (an int), a share f of the keys seen so far (a float), which is
        ceil(f * (t + 1)), or one of either for every list.

    Raises:
      ValueError: on negative counts, or shares outside (0, 1].
    """

    budget: Budget = 1 / 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.budget)

    def check(self, shape: HeadShape) -> None:
        """Raise ``ValueError`` if a budget per list does not fit the number of lists."""
        lists = self.lists(shape)
        if isinstance(self.budget, tuple) and len(self.budget) != lists:
            raise ValueError(
                f"budget={self.budget!r} has {len(self.budget)} entries, {type(self).__name__} "
                f"selects {lists} lists a token here; give one number, or {lists}"
            )

    def capacity(self, keys: int) -> int:
        """P, the most keys that a list over ``keys`` keys holds."""
        return min(keys, self.sinks + self.recent + max(self.allowed(keys)))

    def allowed(self, seen: int) -> list[int]:
        """k_t of every entry of the budget, for a row with ``seen`` causal keys."""
        entries = self.budget if isinstance(self.budget, tuple) else (self.budget,)
        return [allowed_keys(entry, seen) for entry in entries]

    def attended(self, seen: int) -> float:
        """The most keys that a row with ``seen`` = t + 1 causal keys attends, mean over lists."""
        each = [min(seen, self.sinks + self.recent + allowed) for allowed in self.allowed(seen)]
        return sum(each) / len(each)

    def covering(self, length: int) -> Any:
        """The variant that equals dense attention for documents up to ``length`` tokens."""
        return dataclasses.replace(self, budget=length)


def transposed(k: Float[Array, "B S K H"]) -> Float[Array, "B K H S"]:
    """Keys as :func:`sparse_attn.policies.rules.logits` wants them, without gradient."""
    k = jax.lax.stop_gradient(k)
    return jnp.transpose(k, (0, 2, 3, 1)).astype(accumulation_dtype(k.dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyCache:
    """Rotated keys and values of every token, and what the policy keeps beside them.

    ``k`` [B, S, K, H], ``v`` [B, S, K, Hv]; ``rollback`` tokens can be undone.
    """

    length: Int[Array, " B"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K Hv"]
    state: State
    rollback: int = dataclasses.field(metadata={"static": True})

    def truncate(self, lengths: Int[Array, " B"]) -> PolicyCache:
        """Forget the tokens after ``lengths``, up to ``rollback`` of them."""
        cut = checked_truncation(self.length, lengths, rollback=self.rollback)
        return dataclasses.replace(self, length=cut)


class PolicyAttention(nnx.Module):
    """The module of every policy. It has no parameters; see the policy's config.

    Raises:
      ValueError: if the config does not fit the heads.
    """

    def __init__(
        self, config: Policy, shape: HeadShape, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32
    ):
        del rngs, param_dtype
        config.check(shape)
        self.config = config
        self.shape = shape

    def init_cache(self, batch: int, capacity: int, dtype: Any, rollback: int = 0) -> PolicyCache:
        """An empty cache for ``capacity`` tokens a sequence; ``rollback`` of them can be undone.

        Policies whose state of earlier tokens never changes can undo any number.
        """
        keys = (batch, capacity, self.shape.kv_heads)
        return PolicyCache(
            length=jnp.zeros((batch,), jnp.int32),
            k=jnp.zeros((*keys, self.shape.head_width), dtype),
            v=jnp.zeros((*keys, self.shape.value_width), dtype),
            state=self.config.init_state(self.shape, batch, capacity, dtype, rollback),
            rollback=rollback if self.config.forgets else capacity,
        )

    def __call__(
        self,
        heads: Heads,
        cache: PolicyCache | None = None,
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        attend: Attend = "sparse",
        inspect: bool = False,
    ) -> tuple[Float[Array, "B T N Hv"], PolicyCache | None, Aux]:
        """The mechanism contract.

        ``attend="dense"``: dense output, while the policy's state follows the tokens as ever.
        ``"fit"``: the same with a loss of 0, since a policy has nothing to learn (needs
        ``cache=None``). Gradients pass through the attended keys and values, not the selection.

        Raises:
          ValueError: on several K/V branches, on ``attend="fit"`` with a cache, and as
            :func:`sparse_attn.documents.place_rows` does.
        """
        config = self.config
        if len(heads.k) != 1 or len(heads.v) != 1:
            raise ValueError(
                f"heads carry {len(heads.k)} K and {len(heads.v)} V branches; a policy selects "
                "from the one K/V set of a dense model"
            )
        if cache is not None and attend == "fit":
            raise ValueError('attend="fit" works without a cache only; a policy learns nothing')
        batch, tokens = heads.q.shape[:2]
        rows = place_rows(
            batch,
            tokens,
            length=None if cache is None else cache.length,
            positions=positions,
            segment_ids=segment_ids,
            alignment=config.alignment,
        )
        k, v = heads.k[0], heads.v[0]
        if segment_ids is not None:
            # Scores of padding are never looked at, but a NaN among them would reach a maximum.
            padding = ~rows.valid[:, :, None, None]
            k, v = jnp.where(padding, 0, k), jnp.where(padding, 0, v)
        q, k = heads.rope(heads.q, rows.positions), heads.rope(k, rows.positions)
        if cache is None:
            length = jnp.zeros((batch,), jnp.int32)
            state = config.init_state(self.shape, batch, tokens, q.dtype, 0)
        else:
            check_capacity(cache.length, rows.appended, cache.k.shape[1])
            length, state = cache.length, cache.state
            cache = dataclasses.replace(
                cache,
                k=write_rows(cache.k, k, rows.index, rows.valid),
                v=write_rows(cache.v, v, rows.index, rows.valid),
                length=cache.length + rows.appended,
            )
            k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
        detached = (jax.lax.stop_gradient(q), jax.lax.stop_gradient(k))
        state, view = config.observe(state, *detached, rows, length, self.shape)
        if attend == "sparse":
            out = config.attend(q, k, v, rows, view, decoding=cache is not None).out
        else:
            out, _ = ranged_attention(
                q, k, v, rows.start, rows.index + 1, implementation=config.implementation
            )
        if cache is not None:
            cache = dataclasses.replace(cache, state=state)
        aux = Aux.empty()
        if inspect:
            selection = select(config, q, k, rows, view)
            measured = metrics.measure(
                q,
                k,
                v,
                selection,
                rows,
                config=config,
                shape=self.shape,
                sinks=config.sinks,
                recent=config.recent,
            )
            aux = Aux(loss=aux.loss, metrics=measured, selection=selection)
        return out, cache, aux

    def update_state(self, statistics: dict[str, Array]) -> None:
        """Nothing to update."""
        del statistics


def select(
    policy: Policy,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    rows: Rows,
    view: Any,
) -> Selection:
    """The token lists of all rows (block size 1), for inspection: O(T * P) memory."""
    keys = k.shape[1]
    slots = policy.capacity(keys)
    queries = Queries(jax.lax.stop_gradient(q), rows.index, rows.start)
    chunk = rows_per_chunk(q.shape[1], q.shape[0] * q.shape[2] * keys)
    indices = map_rows(
        lambda chunk: listed(policy.member(chunk, view, keys), slots), queries, chunk=chunk
    )
    return Selection(jax.lax.stop_gradient(indices), 1)


def policy_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    *,
    policy: Policy,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N Hv"]:
    """Causal attention over the keys that a training-free ``policy`` selects.

    Args:
      q: queries, rotated.
      k: keys, rotated; query head n reads kv head n // (N/K).
      v: values.
      policy: its config, for example ``Quest(budget=1024)``.
      segment_ids: 0 is padding (output 0); documents are contiguous and start at multiples of
        ``policy.alignment``.

    Differentiable in q, k and v through the attended keys, not through the selection.

    Raises:
      ValueError: on a policy that does not fit the heads, or segments that do not fit the policy.
    """
    shape = HeadShape(q.shape[2], k.shape[2], q.shape[3], v.shape[3], 1)
    module = PolicyAttention(policy, shape, rngs=nnx.Rngs(0))
    x = jnp.zeros((*q.shape[:2], 1), q.dtype)
    heads = Heads(q=q, k=k[None], v=v[None], x=x, rope=no_rope)
    return module(heads, segment_ids=segment_ids)[0]


def register_policy[C: type[Policy]](name: str) -> Callable[[C], C]:
    """Class decorator of a policy's config: known as ``name`` in ``POLICIES``."""

    def add(config: C) -> C:
        register(config, name, policy=True)(PolicyAttention)
        return config

    return add
