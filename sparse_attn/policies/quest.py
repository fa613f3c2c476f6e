"""Quest (arXiv 2406.10774): whole pages of keys, ranked by an upper bound of their logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.common import accumulation_dtype
from sparse_attn.cache import write_rows
from sparse_attn.documents import Rows
from sparse_attn.policies.module import State, register_policy
from sparse_attn.policies.rules import (
    Queries,
    allowed_per_list,
    forced_keys,
    logits,
    visible_keys,
    vote,
)
from sparse_attn.policies.scored import ScoredPolicy, shared_lists
from sparse_attn.top_keys import heaviest
from sparse_attn.types import HeadShape


@register_policy("quest")
@dataclasses.dataclass(frozen=True)
class Quest(ScoredPolicy):
    """Pages of ``page`` keys by score[j] = sum_d max(q_d min_jd, q_d max_jd) / sqrt(H).

    min and max run over the rotated keys of page j: no logit in it is larger. A row compares the
    pages that are complete at its position; its own page is taken first. Pages whose causal keys
    are all sinks or recent ones are no candidates. The budget k_t is a number of keys, and
    ceil(k_t / page) pages are taken: more keys than k_t by less than a page. Page grids start with
    the document. Defaults of the common fields are ours; the paper has neither sinks nor a window
    and keeps the first two layers dense.

    Attributes:
      page: keys of a page.

    Raises:
      ValueError: on a page below one key.
    """

    page: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page < 1:
            raise ValueError(f"page={self.page} must be at least 1 key")

    @property
    def alignment(self) -> int:
        """Documents start on a page."""
        return self.page

    def allowed(self, seen: int) -> list[int]:
        """Whole pages: k_t rounded up."""
        return [-(-allowed // self.page) * self.page for allowed in super().allowed(seen)]

    def init_state(
        self, shape: HeadShape, batch: int, capacity: int, dtype: Any, rollback: int
    ) -> State:
        """Two vectors a page and kv head."""
        del rollback
        sizes = (batch, -(-capacity // self.page), shape.kv_heads, shape.head_width)
        return {"low": jnp.zeros(sizes, dtype), "high": jnp.zeros(sizes, dtype)}

    def observe(
        self,
        state: State,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        rows: Rows,
        length: Int[Array, " B"],
        shape: HeadShape,
    ) -> tuple[State, Any]:
        """Renew the bounds of every page that got a key.

        An incomplete page gets bounds of what its end of the buffer holds; nobody looks at them
        before its last key renews them.
        """
        del shape
        B, S, K, H = k.shape
        total = state["low"].shape[1]
        touched = min(total, q.shape[1] // self.page + 2)
        pages = (length // self.page)[:, None] + jnp.arange(touched, dtype=jnp.int32)[None, :]
        at = pages[:, :, None] * self.page + jnp.arange(self.page, dtype=jnp.int32)[None, None, :]
        at = jnp.minimum(at, S - 1).reshape(B, touched * self.page, 1, 1)
        held = jnp.take_along_axis(k, at, axis=1).reshape(B, touched, self.page, K, H)
        last = jnp.max(rows.index, axis=1)[:, None] // self.page
        keep = (pages < total) & (pages <= last)
        state = {
            "low": write_rows(state["low"], jnp.min(held, axis=2), pages, keep),
            "high": write_rows(state["high"], jnp.max(held, axis=2), pages, keep),
        }
        dtype = accumulation_dtype(k.dtype)
        return state, {
            name: jnp.transpose(bounds, (0, 2, 3, 1)).astype(dtype)
            for name, bounds in state.items()
        }

    def member(self, queries: Queries, view: Any, keys: int) -> Bool[Array, "B c J S"]:
        """Sinks, recent keys, and the causal keys of the best pages."""
        kv_heads, pages = view["low"].shape[1], view["low"].shape[3]
        visible = visible_keys(queries, keys)
        forced = forced_keys(queries, keys, self.sinks, self.recent)
        ragged = jnp.pad(visible & ~forced, ((0, 0), (0, 0), (0, 0), (0, pages * self.page - keys)))
        candidate = jnp.any(ragged.reshape(*ragged.shape[:3], pages, self.page), axis=-1)
        page = jnp.arange(pages, dtype=jnp.int32)[None, None, None, :]
        own = page == (queries.index // self.page)[..., None, None]
        first = page >= (queries.start // self.page)[..., None, None]
        complete = (page + 1) * self.page <= queries.index[..., None, None] + 1
        scale = queries.q.shape[3] ** -0.5
        bound = logits(jax.nn.relu(queries.q), view["high"], scale)
        bound = bound - logits(jax.nn.relu(-queries.q), view["low"], scale)
        lists = shared_lists(self.share, queries.q.shape[2], kv_heads)
        bound = vote(bound, complete & first, lists)
        bound = jnp.where(own, jnp.inf, bound)
        allowed = -(-allowed_per_list(self.budget, queries) // self.page)
        candidate = jnp.broadcast_to(candidate & (complete | own), bound.shape)
        needed = jnp.broadcast_to(allowed, bound.shape[:-1])
        taken = heaviest(bound, candidate.astype(jnp.int32), needed)
        return (jnp.repeat(taken, self.page, axis=-1)[..., :keys] & visible) | forced

    def auxiliary_bits(self, shape: HeadShape, element_bits: int = 16) -> float:
        """Two vectors a page."""
        return 2 * shape.kv_heads * shape.head_width * element_bits / self.page

    @staticmethod
    def tiny() -> tuple[Quest, ...]:
        """A variant for the property suite."""
        return (Quest(page=4, budget=8, sinks=2, recent=4),)
