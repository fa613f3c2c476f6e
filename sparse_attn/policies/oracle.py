"""What a perfect selector could do: the keys that dense attention weighs most."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool

from sparse_attn.policies.module import Policy, register_policy
from sparse_attn.policies.rules import Queries, forced_keys, log_probabilities, visible_keys, vote
from sparse_attn.policies.scored import (
    ExactScores,
    ScoredPolicy,
    Share,
    check_share,
    shared_lists,
)
from sparse_attn.top_keys import heaviest
from sparse_attn.types import HeadShape


@register_policy("oracle_topk")
@dataclasses.dataclass(frozen=True)
class OracleTopK(ExactScores, ScoredPolicy):
    """The ``budget`` keys with the largest true logits, beside sinks and recent keys.

    The ceiling of every selector with the same budget. With ``share="group"`` it ranks by the
    softmax probabilities summed over a group's query heads.
    """

    @staticmethod
    def tiny() -> tuple[OracleTopK, ...]:
        """A variant for the property suite."""
        return (OracleTopK(budget=5, sinks=2, recent=4),)


@register_policy("oracle_topp")
@dataclasses.dataclass(frozen=True)
class OracleTopP(ExactScores, Policy):
    """The fewest keys that, with sinks and recent keys, hold ``mass`` of the softmax.

    How many keys that needs is up to the row. Of equal keys the more recent one wins.

    Attributes:
      mass: share of the softmax in (0, 1], one number or one per list; 1 takes every key.
      share: a list for every query head ("query"), for every group of query heads that share a kv
        head ("group"), or one for all ("layer"); a shared list holds ``mass`` of the mean of the
        heads' probabilities.

    Raises:
      ValueError: on a mass outside (0, 1] or an unknown ``share``.
    """

    mass: float | tuple[float, ...] = 0.95
    share: Share = "query"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.share)
        masses = self.mass if isinstance(self.mass, tuple) else (self.mass,)
        if not masses or not all(0 < mass <= 1 for mass in masses):
            raise ValueError(f"mass={self.mass!r} must be in (0, 1], one number or one per list")

    def check(self, shape: HeadShape) -> None:
        """Raise ``ValueError`` if a mass per list does not fit the number of lists."""
        lists = self.lists(shape)
        if isinstance(self.mass, tuple) and len(self.mass) != lists:
            raise ValueError(
                f"mass={self.mass!r} has {len(self.mass)} entries for {lists} lists a token; "
                f"give one number, or {lists}"
            )

    def lists(self, shape: HeadShape) -> int:
        """J, the lists a row selects: 1, K or N."""
        return shared_lists(self.share, shape.query_heads, shape.kv_heads)

    def capacity(self, keys: int) -> int:
        """A row may need every key."""
        return keys

    def attended(self, seen: int) -> float:
        """All of them, in the worst case."""
        return seen

    def member(self, queries: Queries, view: Any, keys: int) -> Bool[Array, "B c J S"]:
        """Sinks, recent keys, and the most probable others until the mass is reached."""
        visible = visible_keys(queries, keys)
        forced = forced_keys(queries, keys, self.sinks, self.recent)
        query_heads, kv_heads = queries.q.shape[2], view["keys"].shape[1]
        lists = shared_lists(self.share, query_heads, kv_heads)
        log_p = log_probabilities(self.scores(queries, view), visible)
        log_p = vote(log_p, visible, lists)
        p = jnp.exp(log_p) / (query_heads // lists)
        masses = self.mass if isinstance(self.mass, tuple) else (self.mass,) * lists
        wanted = jnp.asarray(masses, p.dtype)[None, None, :]
        needed = wanted - jnp.sum(jnp.where(forced, p, 0.0), axis=-1)
        chosen = heaviest(log_p, jnp.where(forced, 0.0, p), needed) | forced
        # Rounded probabilities need not add up to 1.
        return chosen | (visible & (wanted >= 1)[..., None])

    def covering(self, length: int) -> OracleTopP:
        """The variant that equals dense attention: the whole mass."""
        del length
        return dataclasses.replace(self, mass=1.0)

    @staticmethod
    def tiny() -> tuple[OracleTopP, ...]:
        """A variant for the property suite."""
        return (OracleTopP(mass=0.8, sinks=2, recent=4),)
