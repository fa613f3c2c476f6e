"""Policies that rank keys by a score: the best k_t keys beside the sinks and the recent ones."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from sparse_attn.policies.module import BudgetedPolicy
from sparse_attn.policies.rules import (
    Queries,
    allowed_per_list,
    forced_keys,
    logits,
    visible_keys,
    vote,
)
from sparse_attn.top_keys import heaviest
from sparse_attn.types import HeadShape

Share = Literal["query", "group", "layer"]
"""A list for every query head, for the query heads of a kv head, or for all heads."""


def check_share(share: Share) -> None:
    """Raise ``ValueError`` on an unknown way to share lists."""
    if share not in get_args(Share):
        raise ValueError(f"share={share!r} is unknown; use one of {get_args(Share)}")


def shared_lists(share: Share, query_heads: int, kv_heads: int) -> int:
    """J, the lists a row selects."""
    return {"query": query_heads, "group": kv_heads, "layer": 1}[share]


@dataclasses.dataclass(frozen=True)
class ScoredPolicy(BudgetedPolicy):
    """The ``budget`` best keys by a score, beside the sinks and the recent keys.

    Of equal scores the more recent key wins.

    Attributes:
      share: a list for every query head ("query"), for every group of query heads that share a kv
        head ("group"), or one for all ("layer"). Shared lists rank by the sum of the heads' softmax
        probabilities of their scores.

    Raises:
      ValueError: on an unknown ``share``, and as the fields of the base do.
    """

    share: Share = "query"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.share)

    def lists(self, shape: HeadShape) -> int:
        """J, the lists a row selects: 1, K or N."""
        return shared_lists(self.share, shape.query_heads, shape.kv_heads)

    def scores(self, queries: Queries, view: Any) -> Float[Array, "B c N S"]:
        """Approximate logits, in the scale of q . k / sqrt(H); only causal keys are looked at."""
        raise NotImplementedError

    def ranking(
        self, queries: Queries, view: Any, visible: Bool[Array, "B c 1 S"]
    ) -> Num[Array, "B c J S"]:
        """Floats or unsigned integers, higher is better; only causal keys are looked at."""
        query_heads, kv_heads = queries.q.shape[2], view["keys"].shape[1]
        lists = shared_lists(self.share, query_heads, kv_heads)
        return vote(self.scores(queries, view), visible, lists)

    def member(self, queries: Queries, view: Any, keys: int) -> Bool[Array, "B c J S"]:
        """Sinks, recent keys, and the best k_t of the others."""
        visible = visible_keys(queries, keys)
        forced = forced_keys(queries, keys, self.sinks, self.recent)
        ranking = self.ranking(queries, view, visible)
        eligible = jnp.broadcast_to(visible & ~forced, ranking.shape)
        needed = jnp.broadcast_to(allowed_per_list(self.budget, queries), ranking.shape[:-1])
        return heaviest(ranking, eligible.astype(jnp.int32), needed) | forced


class ExactScores:
    """Scores are the logits of dense attention: the selector reads every key."""

    def scores(self, queries: Queries, view: Any) -> Float[Array, "B c N S"]:
        """q . k / sqrt(H)."""
        return logits(queries.q, view["keys"], queries.q.shape[-1] ** -0.5)

    def selector_bytes(self, shape: HeadShape, length: Any, element_bits: int = 16) -> Any:
        """Bytes a row with ``length`` keys reads to select: every key, once."""
        return shape.kv_heads * shape.head_width * element_bits / 8 * length
