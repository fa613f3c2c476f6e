"""H2O (arXiv 2306.14048): evict the key with the least attention so far, a heavy-hitter cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from sparse_attn.documents import Rows
from sparse_attn.policies.module import BudgetedPolicy, State, register_policy, transposed
from sparse_attn.policies.rules import (
    Queries,
    allowed_per_list,
    forced_keys,
    log_probabilities,
    logits,
    visible_keys,
)
from sparse_attn.types import HeadShape

NEVER = 2**31 - 1
TINY = 2.0**-100
"""Probabilities below this count as 0: float32 could not hold much smaller ones."""


@register_policy("h2o")
@dataclasses.dataclass(frozen=True)
class H2O(BudgetedPolicy):
    """Heavy hitters: keys that leave the recent window compete by the attention they received.

    Row by row, one list per kv head:

    1. If more than k_t keys are alive beside sinks and recent ones, the one with the least
       accumulated attention is evicted for good (of equal ones the oldest).
    2. The row attends what is alive: p[h, s] = softmax over alive keys.
    3. score[s] += sum of p[h, s] over the G heads of the group, in float32.

    The paper fills a prompt with dense attention and evicts at its end; here every row follows the
    same rule, so that prefill equals decode, and with ``attend="dense"`` the scores are still those
    of rows that see what is alive. A budget f is a share of the tokens so far, not of the prompt.
    Whole sequences take O(T * S) time one row after the other, and O(S) memory: a key is visible to
    the rows before the one that evicted it. Undoing ``rollback`` tokens keeps that many copies of
    the scores. The module's cache keeps evicted keys (nobody attends them).

    Raises:
      ValueError: if ``recent`` is 0: a new key would be the first to go.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recent < 1:
            raise ValueError(
                f"recent={self.recent} must be at least 1: a new key has received no attention yet"
            )

    @property
    def forgets(self) -> bool:
        """Scores of old keys change with every row."""
        return True

    def lists(self, shape: HeadShape) -> int:
        """One list per kv head."""
        return shape.kv_heads

    def init_state(
        self, shape: HeadShape, batch: int, capacity: int, dtype: Any, rollback: int
    ) -> State:
        """Scores after each of the last ``rollback`` + 1 rows; the row that evicted each key."""
        del dtype
        sizes = (shape.kv_heads, capacity)
        return {
            "scores": jnp.zeros((batch, rollback + 1, *sizes), jnp.float32),
            "evicted": jnp.full((batch, *sizes), NEVER, jnp.int32),
        }

    def observe(
        self,
        state: State,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        rows: Rows,
        length: Int[Array, " B"],
        shape: HeadShape,
    ) -> tuple[State, Any]:
        """Play the rows one after the other."""
        B, _, N, H = q.shape
        S, K = k.shape[1], shape.kv_heads
        keys = transposed(k)
        slots = state["scores"].shape[1]
        # What undone rows evicted is alive again.
        undone = state["evicted"] >= length[:, None, None]
        evicted = jnp.where(undone, NEVER, state["evicted"])
        scores = _take(state["scores"], (length - 1) % slots)
        scores = jnp.where((length > 0)[:, None, None], scores, 0.0)

        def play(
            carry: tuple[Array, Array, Array], row: tuple[Queries, Array]
        ) -> tuple[tuple[Array, Array, Array], None]:
            ring, scores, evicted = carry
            query, valid = row
            alive = evicted[:, None] == NEVER  # [B, 1, K, S]
            visible = visible_keys(query, S)
            forced = forced_keys(query, S, self.sinks, self.recent)
            free = alive & visible & ~forced
            allowed = allowed_per_list(self.budget, query)[:, 0]
            full = jnp.sum(free, axis=-1, dtype=jnp.int32)[:, 0] > allowed
            least = jnp.argmin(jnp.where(free[:, 0], scores, jnp.inf), axis=-1)
            goes = full & valid[:, None]
            hit = jnp.arange(S, dtype=jnp.int32)[None, None, :] == least[..., None]
            evicted = jnp.where(hit & goes[..., None], query.index[:, :, None], evicted)
            alive = (evicted[:, None] == NEVER) & visible
            each = jnp.repeat(alive, N // K, axis=2)
            p = jnp.exp(log_probabilities(logits(query.q, keys, H**-0.5), each))
            p = jnp.where(p < TINY, 0.0, p).astype(jnp.float32)
            received = jnp.sum(p.reshape(B, K, N // K, S), axis=2)
            scores = jnp.where(valid[:, None, None], scores + received, scores)
            slot = jnp.where(valid, query.index[:, 0] % slots, slots)
            ring = ring.at[jnp.arange(B), slot].set(scores, mode="drop")
            return (ring, scores, evicted), None

        def split(x: Array) -> Array:
            return jnp.moveaxis(x, 1, 0)[:, :, None]

        queries = Queries(split(q), split(rows.index), split(rows.start))
        start = (state["scores"], scores, evicted)
        (ring, _, evicted), _ = jax.lax.scan(play, start, (queries, split(rows.valid)[:, :, 0]))
        evicted = checkpoint_name(evicted, "selection")
        return {"scores": ring, "evicted": evicted}, {"evicted": evicted}

    def member(self, queries: Queries, view: Any, keys: int) -> Bool[Array, "B c K S"]:
        """The causal keys that no row up to this one evicted."""
        alive = view["evicted"][:, None] > queries.index[..., None, None]
        return alive & visible_keys(queries, keys)

    def auxiliary_bits(self, shape: HeadShape, element_bits: int = 16) -> float:
        """One score in float32 a kv head."""
        del element_bits
        return 32 * shape.kv_heads

    def selector_bytes(self, shape: HeadShape, length: Any, element_bits: int = 16) -> Any:
        """The scores of the keys that are alive, at most the attended ones: read and written."""
        del element_bits
        return 2 * 4 * shape.kv_heads * self._alive(length)

    def selector_flops(self, shape: HeadShape, length: Any) -> Any:
        """One addition a query head and key that is alive."""
        return shape.query_heads * self._alive(length)

    def _alive(self, length: Any) -> Any:
        allowed = self.allowed(length)
        return self.sinks + self.recent + sum(allowed) / len(allowed)

    @staticmethod
    def tiny() -> tuple[H2O, ...]:
        """A variant for the property suite."""
        return (H2O(budget=5, sinks=2, recent=4),)


def _take(ring: Float[Array, "B R K S"], slot: Int[Array, " B"]) -> Float[Array, "B K S"]:
    return jnp.take_along_axis(ring, slot[:, None, None, None], axis=1)[:, 0]
