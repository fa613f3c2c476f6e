"""What routing remembers while decoding: tokens, their clusters, and each cluster's last members.

K and V of every token lie in order, as in a dense cache. A cluster has a ring of the *numbers* of
its last members, which a token enters when it leaves the local window: a decode step reads one ring
a head, and gathers what it names. Member number m of a cluster has slot m % size.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparse_attn.cache import checked_truncation, write_rows
from sparse_attn.documents import Rows
from sparse_attn.types import HeadShape

if TYPE_CHECKING:
    from sparse_attn.routing import Routing

FEW_ROWS = 16
"""Up to this many new tokens a call, rings are read and written token by token (decode)."""


@dataclasses.dataclass(frozen=True)
class RingRule:
    """The static numbers by which tokens enter rings: see :class:`~sparse_attn.routing.Routing`.

    A ring of ``size`` holds w members for the oldest of up to ``FEW_ROWS`` new rows, while those
    of the later rows are in it too, and still does after ``rollback`` tokens were undone.
    """

    clusters: int
    window: int
    local_window: int
    sinks: int
    size: int

    @staticmethod
    def of(config: Routing, capacity: int, rollback: int) -> RingRule:
        """The rule for a cache of ``capacity`` tokens."""
        window = min(config.cluster_window, capacity)
        size = window + FEW_ROWS - 1 + rollback
        return RingRule(config.clusters, window, config.local_window, config.sinks, size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingCache:
    """Keys are rotated. ``cluster`` [B, S, K']: every token's cluster, K' routing kv heads.

    ``members`` [B, K', C, size]: rings of token numbers. ``count`` [B, K', C]: how many tokens of
    the cluster are past the sinks and outside the local window of the next row's predecessor, so
    members with numbers count - 1, count - 2, ... are the latest.
    """

    length: Int[Array, " B"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K Hv"]
    cluster: Int[Array, "B S K2"]
    members: Int[Array, "B K2 C size"]
    count: Int[Array, "B K2 C"]
    rule: RingRule = dataclasses.field(metadata={"static": True})
    rollback: int = dataclasses.field(metadata={"static": True})

    @property
    def capacity(self) -> int:
        """S, the tokens a sequence can hold."""
        return self.k.shape[1]

    def truncate(self, lengths: Int[Array, " B"]) -> RoutingCache:
        """Forget the tokens after ``lengths``, at most ``rollback`` of them per sequence.

        Members that are back inside the local window leave their rings again, at the end where
        they came in; what they had overwritten is the slack of the ring.
        """
        cut = checked_truncation(self.length, lengths, self.rollback)
        offsets = jnp.arange(self.rollback, dtype=jnp.int32)[None, :]
        token = (cut - self.rule.local_window)[:, None] + offsets
        left = (token >= self.rule.sinks) & (
            token < (self.length - self.rule.local_window)[:, None]
        )
        count = _add_counts(self.count, _clusters_of(self.cluster, token), left, -1)
        return dataclasses.replace(self, length=cut, count=count)


def empty_cache(
    config: Routing,
    shape: HeadShape,
    routing_heads: int,
    *,
    batch: int,
    capacity: int,
    rollback: int,
    dtype: Any,
) -> RoutingCache:
    """A cache of static size without tokens.

    Raises:
      ValueError: if ``capacity`` is below 1 or ``rollback`` negative.
    """
    if capacity < 1 or rollback < 0:
        raise ValueError(f"{capacity=} must be at least 1 and {rollback=} must not be negative")
    rule = RingRule.of(config, capacity, rollback)
    keys = (batch, capacity, shape.kv_heads)
    rings = (batch, routing_heads, config.clusters)
    return RoutingCache(
        length=jnp.zeros((batch,), jnp.int32),
        k=jnp.zeros((*keys, shape.head_width), dtype),
        v=jnp.zeros((*keys, shape.value_width), dtype),
        cluster=jnp.zeros((batch, capacity, routing_heads), jnp.int32),
        members=jnp.zeros((*rings, rule.size), jnp.int32),
        count=jnp.zeros(rings, jnp.int32),
        rule=rule,
        rollback=rollback,
    )


def append(
    cache: RoutingCache,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    clusters: Int[Array, "B T K2"],
    rows: Rows,
) -> RoutingCache:
    """Add new tokens; up to ``FEW_ROWS`` of them also enter the rings, see :func:`with_rings`."""
    before = cache.length
    cache = dataclasses.replace(
        cache,
        length=before + rows.appended,
        k=write_rows(cache.k, k, rows.index, rows.valid),
        v=write_rows(cache.v, v, rows.index, rows.valid),
        cluster=write_rows(cache.cluster, clusters, rows.index, rows.valid),
    )
    tokens = k.shape[1]
    if tokens > FEW_ROWS:
        return cache
    rule = cache.rule
    offsets = jnp.arange(tokens, dtype=jnp.int32)[None, :]
    token = (before - rule.local_window)[:, None] + offsets
    enters = (token >= rule.sinks) & (offsets < rows.appended[:, None])
    entering = _clusters_of(cache.cluster, token)
    # Of several tokens that enter one cluster, each counts those before it.
    same = (entering[:, :, None, :] == entering[:, None, :, :]) & enters[:, None, :, None]
    earlier = jnp.tril(jnp.ones((tokens, tokens), bool), -1)[None, :, :, None]
    ahead = jnp.sum(same & earlier, axis=2, dtype=jnp.int32)
    B, K = cache.count.shape[:2]
    sequence = jnp.arange(B, dtype=jnp.int32)[:, None, None]
    head = jnp.arange(K, dtype=jnp.int32)[None, None, :]
    slot = (cache.count[sequence, head, entering] + ahead) % rule.size
    rings = cache.members.reshape(B, -1)
    place = (head * rule.clusters + entering) * rule.size + slot
    place = place.reshape(B, -1)
    numbers = jnp.broadcast_to(token[:, :, None], entering.shape).reshape(B, -1)
    keep = jnp.broadcast_to(enters[:, :, None], entering.shape).reshape(B, -1)
    return dataclasses.replace(
        cache,
        members=write_rows(rings, numbers, place, keep).reshape(cache.members.shape),
        count=_add_counts(cache.count, entering, enters, 1),
    )


def with_rings(cache: RoutingCache, sorted_keys: Int[Array, "E S"]) -> RoutingCache:
    """Fill all rings anew from the sorted keys, after an append of many tokens."""
    rule, S = cache.rule, cache.capacity
    B, K, C, size = cache.members.shape
    lines = sorted_keys.reshape(B * K, S)
    base = jnp.arange(C, dtype=jnp.int32)[None, :] * S
    stop = jnp.repeat(cache.length - rule.local_window, K)[:, None]

    below = jax.vmap(jnp.searchsorted)
    first = below(lines, jnp.broadcast_to(base, (B * K, C))).astype(jnp.int32)
    count = below(lines, base + jnp.maximum(stop, 0)).astype(jnp.int32) - first
    slot = jnp.arange(size, dtype=jnp.int32)[None, None, :]
    number = count[:, :, None] - 1 - (count[:, :, None] - 1 - slot) % size
    place = jnp.clip(first[:, :, None] + number, 0, S - 1).reshape(B * K, -1)
    members = jnp.take_along_axis(lines, place, axis=1) % S
    return dataclasses.replace(
        cache,
        members=members.reshape(B, K, C, size),
        count=count.reshape(B, K, C),
    )


def gathered_lists(
    cache: RoutingCache, clusters: Int[Array, "B T N2"], rows: Rows, heads: int
) -> Int[Array, "B T N P"]:
    """Tokens outside the local window that new rows attend: sinks, and members from the rings.

    ``clusters`` are those of the routed query heads; the other of ``heads`` only list sinks. -1
    marks unused slots anywhere in a list; the order is that of the ring. Needs the cache after an
    append of at most ``FEW_ROWS`` rows.
    """
    rule = cache.rule
    B, T, N = clusters.shape
    K = cache.count.shape[1]
    limit = (rows.index - rule.local_window)[:, :, None, None]
    cluster = jnp.minimum(clusters, rule.clusters - 1)
    sequence = jnp.arange(B, dtype=jnp.int32)[:, None, None]
    head = (jnp.arange(N, dtype=jnp.int32) // (N // K))[None, None, :]
    ring = cache.members[sequence, head, cluster]
    count = cache.count[sequence, head, cluster][..., None]
    slot = jnp.arange(rule.size, dtype=jnp.int32)[None, None, None, :]
    # How many members came after: 0 for the latest. The first T of them may be ahead of a row.
    age = (count - 1 - slot) % rule.size
    live = age < count
    ahead = jnp.sum(live & (age < T) & (ring > limit), axis=3, keepdims=True, dtype=jnp.int32)
    routed = jnp.where(live & (age >= ahead) & (age < ahead + rule.window), ring, -1)
    routed = jnp.pad(routed, ((0, 0), (0, 0), (0, heads - N), (0, 0)), constant_values=-1)
    sinks = jnp.arange(rule.sinks, dtype=jnp.int32)[None, None, None, :]
    sinks = jnp.where(sinks <= limit, sinks, -1)
    sinks = jnp.broadcast_to(sinks, (B, T, heads, rule.sinks))
    lists = jnp.concatenate([sinks, routed], axis=3)
    return jnp.where(rows.valid[:, :, None, None], lists, -1)


def _clusters_of(cluster: Int[Array, "B S K2"], token: Int[Array, "B L"]) -> Int[Array, "B L K2"]:
    """Clusters of these tokens; anything for a number outside the buffer."""
    safe = jnp.clip(token, 0, cluster.shape[1] - 1)
    return jnp.take_along_axis(cluster, safe[:, :, None], axis=1)


def _add_counts(
    count: Int[Array, "B K2 C"],
    clusters: Int[Array, "B L K2"],
    which: Bool[Array, "B L"],
    amount: int,
) -> Int[Array, "B K2 C"]:
    """``amount`` more for the cluster of every token that ``which`` marks."""
    sequence = jnp.arange(count.shape[0], dtype=jnp.int32)[:, None, None]
    head = jnp.arange(count.shape[1], dtype=jnp.int32)[None, None, :]
    change = jnp.broadcast_to(jnp.where(which, amount, 0)[:, :, None], clusters.shape)
    return count.at[sequence, head, clusters].add(change.astype(count.dtype), mode="drop")
