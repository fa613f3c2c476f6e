"""The rules all policies share: budgets, forced keys, votes of heads.

Everything works on a chunk of query rows, takes O(rows * S) memory and carries no gradient.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparse_attn.selecting import allowed_keys

Budget = int | float | tuple[int | float, ...]
"""Keys beyond sinks and recent ones: a count, a share of the keys seen so far, or one per list."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queries:
    """A chunk of query rows: rotated ``q`` and, as in ``Rows``, ``index`` and ``start``."""

    q: Float[Array, "B c N H"]
    index: Int[Array, "B c"]
    start: Int[Array, "B c"]


def check_budget(budget: Budget) -> None:
    """Raise ``ValueError`` unless every entry is a count >= 0 or a share in (0, 1]."""
    entries = budget if isinstance(budget, tuple) else (budget,)
    if not entries:
        raise ValueError("budget=() names no list; give a number, or one number per list")
    for entry in entries:
        wrong = entry < 0 if isinstance(entry, int) else not 0 < entry <= 1
        if wrong:
            raise ValueError(
                f"budget={budget!r}: {entry!r} must be a count of keys (an int >= 0) or a share of "
                "the keys seen so far (a float in (0, 1])"
            )


def allowed_per_list(budget: Budget, queries: Queries) -> Int[Array, "B c J"]:
    """k_t of every row and list (J = 1 if one number serves all lists)."""
    seen = jnp.maximum(queries.index - queries.start + 1, 0)
    entries = budget if isinstance(budget, tuple) else (budget,)
    return jnp.stack([allowed_keys(entry, seen) for entry in entries], axis=-1)


def visible_keys(queries: Queries, keys: int) -> Bool[Array, "B c 1 S"]:
    """The causal keys of each row's document; none for padding."""
    s = jnp.arange(keys, dtype=jnp.int32)[None, None, None, :]
    return (s >= queries.start[..., None, None]) & (s <= queries.index[..., None, None])


def forced_keys(queries: Queries, keys: int, sinks: int, recent: int) -> Bool[Array, "B c 1 S"]:
    """The document's first ``sinks`` keys and the last ``recent`` ones, the row's own included."""
    s = jnp.arange(keys, dtype=jnp.int32)[None, None, None, :]
    first = s < queries.start[..., None, None] + sinks
    last = s > queries.index[..., None, None] - recent
    return (first | last) & visible_keys(queries, keys)


def logits(
    q: Float[Array, "B c N H"], keys: Float[Array, "B K H S"], scale: float
) -> Float[Array, "B c N S"]:
    """scale * q . k in at least float32, as one batched product."""
    B, c, N, H = q.shape
    K, S = keys.shape[1], keys.shape[3]
    grouped = jnp.transpose(q.reshape(B, c, K, N // K, H), (0, 2, 3, 1, 4)).astype(keys.dtype)
    product = jnp.matmul(grouped.reshape(B, K, N // K * c, H) * scale, keys)
    return jnp.transpose(product.reshape(B, N, c, S), (0, 2, 1, 3))


def log_probabilities(
    scores: Float[Array, "B c N S"], visible: Bool[Array, "B c 1 S"]
) -> Float[Array, "B c N S"]:
    """log softmax over the visible keys, -inf elsewhere (and for rows that see nothing).

    In logarithms the ranking survives where probabilities would underflow, in every dtype.
    """
    scores = jnp.where(visible, scores, -jnp.inf)
    total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    return scores - jnp.where(jnp.isneginf(total), 0.0, total)


def vote(
    scores: Float[Array, "B c N S"], visible: Bool[Array, "B c 1 S"], lists: int
) -> Float[Array, "B c J S"]:
    """Scores of J shared lists: log of the softmax probabilities summed over N/J query heads.

    One list per query head ranks by its scores as they are.
    """
    B, c, N, S = scores.shape
    if lists == N:
        return scores
    log_p = log_probabilities(scores, visible).reshape(B, c, lists, N // lists, S)
    return jax.nn.logsumexp(log_p, axis=3)
