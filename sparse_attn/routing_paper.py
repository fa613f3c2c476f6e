"""Routing as published (arXiv 2003.05997): balanced clusters over the whole sequence. Not causal.

Every cluster takes the w tokens of a document that are most similar to its centroid; members attend
the members before them and themselves; a token's output is the mean over its clusters, 0 without
any. Which tokens a cluster takes depends on later tokens too, so a row's output is not a function
of its past. This mode reproduces the paper and measures that leak; nothing can be decoded with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.ranged import ranged_attention
from sparse_attn.documents import Rows
from sparse_attn.routing_state import unit

if TYPE_CHECKING:
    from sparse_attn.routing import Routing


def balanced_attention(
    config: Routing,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    routed_q: Float[Array, "B T N H"],
    routed_k: Float[Array, "B T K H"],
    centroids: Float[Array, "K C H"],
    rows: Rows,
    *,
    packed: bool,
) -> Float[Array, "B T N Hv"]:
    """Mean over a token's clusters of the causal attention among their members.

    ``routed_q`` and ``routed_k`` are what is compared with the centroids. The list of members
    carries no gradient. O(T) memory; work O(C w^2), or O(C T w) where documents are packed.
    """
    B, T, N, _ = q.shape
    K = centroids.shape[0]
    k, v, routed_k = (jnp.repeat(x, N // K, axis=2) for x in (k, v, routed_k))
    q, k, v, routed_q, routed_k = (_by_head(x) for x in (q, k, v, routed_q, routed_k))
    documents = _Documents.of(rows, N)
    slots = T if packed else min(config.cluster_window, T)

    dtype = unit(q[:1, :1]).dtype

    @jax.checkpoint
    def one(mu: Float[Array, "K H"]) -> tuple[Array, Array]:
        from_q, from_k = (
            documents.members(_similarity(x, mu, B, N), config.cluster_window, slots)
            for x in (routed_q, routed_k)
        )
        begin, end = documents.ranges(from_q, from_k)
        out, lse = ranged_attention(
            _rows(q, from_q),
            _rows(k, from_k),
            _rows(v, from_k),
            begin,
            end,
            implementation=config.implementation,
        )
        line = jnp.arange(B * N, dtype=jnp.int32)[:, None]
        seen = ~jnp.isneginf(lse[..., 0])
        outs = jnp.zeros((B * N, T, v.shape[2]), dtype)
        outs = outs.at[line, from_q].add(out[:, :, 0].astype(dtype), mode="drop")
        counts = jnp.zeros((B * N, T), dtype)
        return outs, counts.at[line, from_q].add(seen.astype(dtype), mode="drop")

    def add(total: tuple[Array, Array], mu: Array) -> tuple[tuple[Array, Array], None]:
        # The sum stays outside of what is computed again, which would keep it once a cluster.
        outs, counts = one(mu)
        return (total[0] + outs, total[1] + counts), None

    empty = jnp.zeros((B * N, T, v.shape[2]), dtype), jnp.zeros((B * N, T), dtype)
    (outs, counts), _ = jax.lax.scan(add, empty, jnp.swapaxes(centroids, 0, 1))
    mean = outs / jnp.maximum(counts, 1)[:, :, None]
    return jnp.swapaxes(mean.reshape(B, N, T, -1), 1, 2).astype(q.dtype)


def balanced_lists(
    config: Routing,
    routed_q: Float[Array, "B T N H"],
    routed_k: Float[Array, "B T K H"],
    centroids: Float[Array, "K C H"],
    rows: Rows,
    heads: int,
) -> Int[Array, "B T N P"]:
    """Every token that each query attends, in any of its clusters. O(T^2) memory: to look at.

    Heads after those of ``routed_q``, up to ``heads``, list their local window.
    """
    B, T, N, _ = routed_q.shape
    K = centroids.shape[0]
    routed_k = jnp.repeat(routed_k, N // K, axis=2)
    queries, keys = _by_head(routed_q), _by_head(routed_k)
    documents = _Documents.of(rows, N)
    s = jnp.arange(T, dtype=jnp.int32)
    index, start = rows.index[:, :, None], rows.start[:, :, None]
    visible = (s[None, None, :] <= index) & (s[None, None, :] >= start)

    def member(x: Array, mu: Array) -> Array:
        found = documents.members(_similarity(x, mu, B, N), config.cluster_window, T)
        line = jnp.arange(B * N, dtype=jnp.int32)[:, None]
        return jnp.zeros((B * N, T), bool).at[line, found].set(True, mode="drop")

    def add(total: Array, mu: Array) -> tuple[Array, None]:
        return total | (member(queries, mu)[:, :, None] & member(keys, mu)[:, None, :]), None

    empty = jnp.zeros((B * N, T, T), bool)
    attended, _ = jax.lax.scan(add, empty, jnp.swapaxes(centroids, 0, 1))
    attended = jnp.swapaxes(attended.reshape(B, N, T, T), 1, 2) & visible[:, :, None, :]
    local = visible & (s[None, None, :] > index - config.local_window)
    local = jnp.broadcast_to(local[:, :, None, :], (B, T, heads - N, T))
    attended = jnp.concatenate([attended, local], axis=2)
    lists = jnp.sort(jnp.where(attended, s[None, None, None, :], T), axis=3)
    return jnp.where(lists == T, -1, lists)


class _Documents:
    """Members of clusters within documents, for E = B * N lines of T tokens."""

    def __init__(self, start: Array, valid: Array):
        self.start = start
        self.valid = valid
        self.index = jnp.broadcast_to(
            jnp.arange(start.shape[1], dtype=jnp.int32)[None, :], start.shape
        )

    @staticmethod
    def of(rows: Rows, heads: int) -> _Documents:
        """Rows, repeated for every head; a token of padding is a document of its own."""
        own = jnp.arange(rows.index.shape[1], dtype=jnp.int32)[None, :]
        start = jnp.where(rows.valid, rows.start, own)
        return _Documents(*(jnp.repeat(x, heads, axis=0) for x in (start, rows.valid)))

    def members(self, similarity: Float[Array, "E T"], window: int, slots: int) -> Array:
        """Tokens among the ``window`` most similar of their document, ascending, T in free slots.

        Of equal similarities the later token wins.
        """
        tokens = similarity.shape[1]
        similarity = jnp.where(self.valid, jax.lax.stop_gradient(similarity), -jnp.inf)
        # Sorted within documents, slot i still belongs to the document of token i.
        ranked = jax.lax.sort(
            (self.start, -similarity, -self.index, self.valid), dimension=1, num_keys=3
        )
        start, _, negated, valid = ranked
        chosen = valid & (self.index - start < window)
        return jnp.sort(jnp.where(chosen, -negated, tokens), axis=1)[:, :slots]

    def ranges(
        self, queries: Int[Array, "E M"], keys: Int[Array, "E M"]
    ) -> tuple[Int[Array, "E M"], Int[Array, "E M"]]:
        """Which of ``keys`` each member query sees: those of its document up to itself."""
        tokens = self.start.shape[1]
        safe = jnp.minimum(queries, tokens - 1)
        start = jnp.take_along_axis(self.start, safe, axis=1)
        below = jax.vmap(jnp.searchsorted)
        begin = below(keys, start).astype(jnp.int32)
        end = below(keys, safe + 1).astype(jnp.int32)
        free = queries == tokens
        return jnp.where(free, 0, begin), jnp.where(free, 0, end)


def _by_head(x: Float[Array, "B T N H"]) -> Float[Array, "E T H"]:
    return jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], x.shape[3])


def _similarity(
    x: Float[Array, "E T H"], mu: Float[Array, "K H"], batch: int, heads: int
) -> Float[Array, "E T"]:
    """<x / |x|, mu> of every line with its head's centroid."""
    of_lines = jnp.tile(jnp.repeat(mu, heads // mu.shape[0], axis=0), (batch, 1))
    vectors = unit(jax.lax.stop_gradient(x))
    return jnp.einsum("ETH,EH->ET", vectors, of_lines.astype(vectors.dtype), precision="highest")


def _rows(x: Float[Array, "E T H"], index: Int[Array, "E M"]) -> Float[Array, "E M 1 H"]:
    """Rows of every line; a free slot holds some row that nothing reads."""
    safe = jnp.minimum(index, x.shape[1] - 1)
    return jnp.take_along_axis(x, safe[:, :, None], axis=1)[:, :, None, :]
