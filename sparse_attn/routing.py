"""Routing attention (Routing Transformer, arXiv 2003.05997): queries attend keys of their cluster.

Tokens are clustered by spherical k-means on their un-rotated keys and queries: with unit centroids
mu_c, shared by keys and queries of a kv head, and a balancing bias b_c,

    cluster(x) = argmax_c <x / |x|, mu_c> + b_c.

``mode="causal"`` (default). A cluster is a function of the token alone. Query t attends, s being
the number of sinks and W the local window, the disjoint sets

    sinks     j < min(s, t - W + 1)
    routed    the last w of {j : s <= j <= t - W, cluster(k_j) = cluster(q_t)}
    local     t - W < j <= t

in one softmax. Training and prefill sort by cluster, so that every query has one contiguous range;
a decode step reads one ring of token numbers per head. All three are the same attention.

``mode="paper"``. Each cluster takes the w most similar tokens of the whole document; see
:mod:`sparse_attn.routing_paper`. Later tokens evict earlier ones, so it is not causal.

Centroids follow their members by statistics that every call without a cache returns and the train
step applies once (:func:`sparse_attn.routing_state.moved`). The commitment loss
beta mean |x / |x| - mu|^2 pulls queries and keys towards their centroids.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels_pallas.common import accumulation_dtype
from kernels_pallas.gather_decode import gather_decode
from kernels_pallas.ranged import ranged_attention
from sparse_attn import metrics
from sparse_attn.cache import check_capacity
from sparse_attn.documents import Rows, place_rows, place_shard
from sparse_attn.registry import MechanismConfig, register
from sparse_attn.routing_cache import (
    FEW_ROWS,
    RoutingCache,
    append,
    empty_cache,
    gathered_lists,
    with_rings,
)
from sparse_attn.routing_paper import balanced_attention, balanced_lists
from sparse_attn.routing_sorted import (
    check_sort_keys,
    local_attention,
    sort_keys,
    three_sets,
    token_lists,
)
from sparse_attn.routing_state import RoutingState, assign, collect, commitment, moved, unit
from sparse_attn.shards import Strategy
from sparse_attn.types import (
    Attend,
    Aux,
    Heads,
    HeadShape,
    Implementation,
    Selection,
    merge,
)

RoutingMode = Literal["causal", "paper"]


@dataclasses.dataclass(frozen=True)
class Routing(MechanismConfig):
    """Configuration of routing attention. Lengths are in tokens.

    ``mode="paper"`` balances clusters over the whole sequence and is not causal: its routing heads
    attend neither sinks nor the local window, and have no bias.

    Attributes:
      clusters: of a routing head (C), about the square root of the context.
      cluster_window: members of its cluster that a query attends (w).
      local_window: latest tokens, the row's own included, that every head attends (W).
      sinks: first tokens of the document that every head attends.
      routing_heads: the first that many kv heads (with their query heads) route, the others are
        local only; None: all route.
      mode: "causal", or "paper", which is not causal.
      shared_qk: in paper mode, sqrt(H) q / |q| takes the place of both q and k, as in the paper's
        decoder; otherwise q and k are routed and attended as they are.
      decay: of the centroids a training step.
      balance_rate: what the bias of a cluster moves a training step.
      reseed_after: training steps without keys after which a centroid is placed anew.
      commitment: weight of the commitment loss (beta).
      implementation: which backend runs it; "auto" takes the first that can.

    Raises:
      ValueError: for values out of range.
    """

    clusters: int = 64
    cluster_window: int = 256
    local_window: int = 256
    sinks: int = 4
    routing_heads: int | None = None
    mode: RoutingMode = "causal"
    shared_qk: bool = True
    decay: float = 0.999
    balance_rate: float = 1e-3
    reseed_after: int = 100
    commitment: float = 1e-4
    implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        for name in ("clusters", "cluster_window", "local_window", "reseed_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("sinks", "balance_rate", "commitment"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.routing_heads is not None and self.routing_heads < 1:
            raise ValueError(
                f"routing_heads={self.routing_heads} must be at least 1, or None for all; "
                "use Dense(window=...) for local heads only"
            )
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay} must lie in [0, 1); 0.999 is usual")
        if self.mode not in get_args(RoutingMode):
            raise ValueError(f"mode={self.mode!r} is unknown; use one of {get_args(RoutingMode)}")

    @property
    def causal(self) -> bool:
        """False in paper mode, where later tokens change what earlier ones attend."""
        return self.mode == "causal"

    @property
    def sequence_strategies(self) -> tuple[Strategy, ...]:
        """Clusters, keys and values are gathered; the paper's mode needs all queries as well."""
        return ("gather",) if self.causal else ()

    def covering(self, length: int) -> Routing:
        """The variant that equals dense attention: one cluster that keeps all of its members."""
        return dataclasses.replace(
            self,
            clusters=1,
            cluster_window=max(length, 1),
            routing_heads=None,
            shared_qk=False,
        )

    def density(self, length: int) -> float:
        """Upper bound of attended over causal pairs of one document: all heads route."""
        causal = length * (length + 1) / 2
        if self.mode == "paper":
            members = min(self.cluster_window, length)
            return min(1.0, self.clusters * members * (members + 1) / 2 / causal)
        budget = min(self.sinks + self.cluster_window + self.local_window, length)
        return (budget * (budget + 1) / 2 + (length - budget) * budget) / causal

    def auxiliary_bits(self, shape: HeadShape, element_bits: int = 16) -> float:
        """The cluster number, 32 bits a routing kv head; rings do not follow the context."""
        del element_bits
        return 32.0 * routing_kv_heads(self, shape)

    def selector_bytes(self, shape: HeadShape, length: Any, element_bits: int = 16) -> Any:
        """The centroids, and one ring of token numbers for each routing query head."""
        heads = routing_kv_heads(self, shape)
        centroids = heads * self.clusters * shape.head_width * element_bits / 8
        rings = 4 * heads * shape.group * jnp.minimum(length, self.cluster_window)
        return centroids + rings

    def selector_flops(self, shape: HeadShape, length: Any) -> Any:
        """Every routing query head and key head meets every centroid."""
        heads = routing_kv_heads(self, shape) * (shape.group + 1)
        return 2.0 * heads * self.clusters * shape.head_width + 0 * length

    @staticmethod
    def tiny() -> tuple[Routing, ...]:
        """Variants for the property suite."""
        return (
            Routing(clusters=3, cluster_window=5, local_window=4, sinks=2, routing_heads=1),
            Routing(clusters=3, cluster_window=7, local_window=5, mode="paper"),
        )


def routing_kv_heads(config: Routing, shape: HeadShape) -> int:
    """How many kv heads route.

    Raises:
      ValueError: if the config asks for more than there are.
    """
    heads = shape.kv_heads if config.routing_heads is None else config.routing_heads
    if heads > shape.kv_heads:
        raise ValueError(
            f"routing_heads={heads} is more than kv_heads={shape.kv_heads}; "
            "lower it, or use None to route all of them"
        )
    return heads


@register(Routing, "routing")
class RoutingAttention(nnx.Module):
    """The mechanism; see :class:`Routing`. Nothing in it is trained by gradient.

    State (:class:`~sparse_attn.routing_state.RoutingState`, at least float32): ``centroids``
    [K', C, H] of length 1, ``bias`` [K', C], ``idle`` [K', C] steps without keys; K' kv heads
    route.
    """

    def __init__(
        self, config: Routing, shape: HeadShape, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32
    ):
        self.config = config
        self.shape = shape
        self.routing = routing_kv_heads(config, shape)
        sizes = (self.routing, config.clusters)
        dtype = accumulation_dtype(param_dtype)
        drawn = jax.random.normal(rngs.params(), (*sizes, shape.head_width), dtype)
        self.centroids = RoutingState(unit(drawn))
        self.bias = RoutingState(jnp.zeros(sizes, dtype))
        self.idle = RoutingState(jnp.zeros(sizes, dtype))

    def init_cache(self, batch: int, capacity: int, dtype: Any, rollback: int = 0) -> RoutingCache:
        """An empty cache for ``capacity`` tokens a sequence; ``rollback`` of them can be undone.

        Raises:
          ValueError: in paper mode, which cannot decode.
        """
        self._require_causal()
        return empty_cache(
            self.config,
            self.shape,
            self.routing,
            batch=batch,
            capacity=capacity,
            rollback=rollback,
            dtype=dtype,
        )

    def __call__(
        self,
        heads: Heads,
        cache: RoutingCache | None = None,
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        attend: Attend = "sparse",
        inspect: bool = False,
    ) -> tuple[Float[Array, "B T N Hv"], RoutingCache | None, Aux]:
        """The mechanism contract.

        ``aux.loss`` is the weighted commitment loss (not with ``attend="dense"``). With "fit" its
        inputs are detached, so it has no gradient: what fits the clusters are ``aux.statistics``,
        which every call without a cache returns.
        """
        config = self.config
        if cache is not None:
            self._require_causal()
            if attend == "fit":
                raise ValueError('attend="fit" moves the clusters and works without a cache only')
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
        routed = self.routing * self.shape.group
        routed_q, routed_k = heads.q[:, :, :routed], heads.k[0][:, :, : self.routing]
        shared = config.mode == "paper" and config.shared_qk
        centroids = self.centroids[...]
        bias = self.bias[...] if config.causal else jnp.zeros_like(self.bias[...])
        of_q = assign(routed_q, centroids, bias, rows.valid, shards)
        of_k = of_q if shared else assign(routed_k, centroids, bias, rows.valid, shards)
        q = heads.rope(heads.q, rows.positions)
        k, v = heads.rope(heads.k[0], rows.positions), heads.v[0]

        if cache is not None:
            check_capacity(cache.length, rows.appended, cache.capacity)
            cache = append(cache, k, v, of_k.clusters, rows)
            out, cache, selection = self._decode(
                q, cache, of_q.clusters, rows, dense=attend == "dense", inspect=inspect
            )
            k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
        else:
            k, v = shards.gather(k), shards.gather(v)
            if config.causal:
                out, selection = self._sparse(
                    *(q, k, v, of_q.clusters, shards.gather(of_k.clusters), rows, keys),
                    packed=segment_ids is not None,
                    inspect=inspect,
                )
            else:
                out, selection = self._balanced(
                    *(heads, q, k, v, rows), packed=segment_ids is not None, inspect=inspect
                )
            if attend != "sparse":
                out = self._dense(q, k, v, rows)

        loss = jnp.zeros((), jnp.float32)
        statistics: dict[str, Array] = {}
        if cache is None:
            statistics = shards.total(collect(of_q, of_k))
            if attend != "dense" and config.commitment > 0:
                sides = [(routed_q, of_q)] if shared else [(routed_q, of_q), (routed_k, of_k)]
                for x, found in sides:
                    x = jax.lax.stop_gradient(x) if attend == "fit" else x
                    part = commitment(x, centroids, found.clusters, rows.valid, shards)
                    loss = loss + config.commitment / len(sides) * part
        measured: dict[str, Array] = {}
        if inspect:
            assert selection is not None
            whole = Selection(shards.gather(selection.indices), selection.block_size)
            measured = metrics.measure(
                shards.gather(q), k, v, whole, keys, config=config, shape=self.shape
            )
        return out, cache, Aux(loss, measured, statistics, selection)

    def update_state(self, statistics: dict[str, Array]) -> None:
        """Move centroids, bias and idle steps; call it once a training step.

        ``statistics``: those of the calls of the step, added up.
        """
        config = self.config
        centroids, bias, idle = moved(
            self.centroids[...],
            self.bias[...],
            self.idle[...],
            statistics,
            decay=config.decay,
            balance_rate=config.balance_rate if config.causal else 0.0,
            reseed_after=config.reseed_after,
        )
        self.centroids[...], self.bias[...], self.idle[...] = centroids, bias, idle

    def _sparse(
        self,
        q: Array,
        k: Array,
        v: Array,
        query_clusters: Array,
        key_clusters: Array,
        rows: Rows,
        keys: Rows,
        *,
        packed: bool,
        inspect: bool,
    ) -> tuple[Array, Selection | None]:
        """Causal attention of ``rows`` over the ``keys`` of a whole sequence."""
        out, sorted_keys = _sorted_attention(
            self.config, q, k, v, query_clusters, key_clusters, rows, keys, packed=packed
        )
        if not inspect:
            return out, None
        heads = q.shape[2]
        lists = token_lists(self.config, query_clusters, sorted_keys, rows, heads)
        return out, Selection(lists, block_size=1)

    def _balanced(
        self, heads: Heads, q: Array, k: Array, v: Array, rows: Rows, *, packed: bool, inspect: bool
    ) -> tuple[Array, Selection | None]:
        """The paper's attention over a whole sequence."""
        config, centroids = self.config, self.centroids[...]
        group = self.shape.group
        routed = self.routing * group
        to_q, to_k = heads.q[:, :, :routed], heads.k[0][:, :, : self.routing]
        attended_k, values, mu = k[:, :, : self.routing], v[:, :, : self.routing], centroids
        attended_q = q[:, :, :routed]
        if config.shared_qk:
            radius = q.shape[3] ** 0.5
            attended_q = (unit(to_q) * radius).astype(q.dtype)
            attended_q = heads.rope(attended_q, rows.positions)
            attended_k, to_k = attended_q, to_q
            values, mu = jnp.repeat(values, group, axis=2), jnp.repeat(centroids, group, axis=0)
        out = balanced_attention(
            config, attended_q, attended_k, values, to_q, to_k, mu, rows, packed=packed
        )
        if self.routing < self.shape.kv_heads:
            local = local_attention(
                config, q[:, :, routed:], k[:, :, self.routing :], v[:, :, self.routing :], rows
            )
            out = jnp.concatenate([out, local.out], axis=2)
        if not inspect:
            return out, None
        lists = balanced_lists(config, to_q, to_k, mu, rows, q.shape[2])
        return out, Selection(lists, block_size=1)

    def _decode(
        self,
        q: Array,
        cache: RoutingCache,
        clusters: Array,
        rows: Rows,
        *,
        dense: bool,
        inspect: bool,
    ) -> tuple[Array, RoutingCache, Selection | None]:
        """Attention of new rows over a cache that they are already in; rings brought up to date."""
        config = self.config
        k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
        few = q.shape[1] <= FEW_ROWS
        sorted_keys = None
        if not few or inspect:
            token = jnp.arange(cache.capacity, dtype=jnp.int32)[None, :]
            eligible = (token >= config.sinks) & (token < cache.length[:, None])
            check_sort_keys(config.clusters, cache.capacity, q.shape[1] * self.shape.group)
            sorted_keys = sort_keys(cache.cluster, eligible, config.clusters)
        if not few:
            assert sorted_keys is not None
            cache = with_rings(cache, sorted_keys)
        if dense:
            out = self._dense(q, k, v, rows)
        elif few:
            lists = gathered_lists(cache, clusters, rows, q.shape[2])
            outside = gather_decode(
                q,
                k,
                v,
                lists,
                block_size=1,
                positions=rows.index,
                implementation=config.implementation,
            )
            out = merge(local_attention(config, q, k, v, rows), outside).out
        else:
            assert sorted_keys is not None
            out = three_sets(
                config, q, k, v, clusters, sorted_keys, rows, packed=False, whole=False
            )
        if not inspect:
            return out, cache, None
        assert sorted_keys is not None
        lists = token_lists(config, clusters, sorted_keys, rows, q.shape[2])
        return out, cache, Selection(lists, block_size=1)

    def _dense(self, q: Array, k: Array, v: Array, rows: Rows) -> Array:
        return ranged_attention(
            q, k, v, rows.start, rows.index + 1, implementation=self.config.implementation
        ).out

    def _require_causal(self) -> None:
        if not self.config.causal:
            raise ValueError(
                'mode="paper" is not causal: a later token can evict an earlier one from its '
                'cluster, so nothing can be decoded with a cache; use mode="causal"'
            )


def routing_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    centroids: Float[Array, "K2 C H"],
    bias: Float[Array, "K2 C"] | None = None,
    *,
    routed_by: tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]] | None = None,
    config: Routing | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N Hv"]:
    """Causal routing attention on ready-made heads; see :mod:`sparse_attn.routing`.

    Args:
      q: queries, rotated.
      k: keys, rotated.
      v: values.
      centroids: of the first K2 kv heads, which route; any length, they are normalised.
      bias: added to the similarities; 0 if not given.
      routed_by: un-rotated queries and keys, which decide the clusters; ``(q, k)`` if not given.
      config: sizes and implementation; ``clusters`` is that of ``centroids``, ``routing_heads`` and
        what concerns training are not looked at. ``mode`` must be "causal".
      segment_ids: 0 is padding, documents are contiguous.

    Differentiable in q, k and v, not in what chooses the clusters. Memory is linear in T.

    Raises:
      ValueError: on shapes that do not fit, or paper mode.
    """
    config = Routing() if config is None else config
    if not config.causal:
        raise ValueError('routing_attention is causal; use the Routing module with mode="paper"')
    by_q, by_k = (q, k) if routed_by is None else routed_by
    if by_q.shape != q.shape or by_k.shape != k.shape:
        raise ValueError(
            f"routed_by {by_q.shape}, {by_k.shape} must have the shapes of q {q.shape}, k {k.shape}"
        )
    heads, width = k.shape[2], q.shape[3]
    if centroids.ndim != 3 or centroids.shape[0] > heads or centroids.shape[2] != width:
        raise ValueError(
            f"centroids.shape={centroids.shape} must be [K', C, H] with K' <= {heads}, H={width}"
        )
    bias = jnp.zeros(centroids.shape[:2], centroids.dtype) if bias is None else bias
    if bias.shape != centroids.shape[:2]:
        raise ValueError(f"bias.shape={bias.shape} must be [K', C]={centroids.shape[:2]}")
    config = dataclasses.replace(config, clusters=centroids.shape[1])
    rows = place_rows(*q.shape[:2], length=None, positions=None, segment_ids=segment_ids)
    routing = centroids.shape[0]
    routed = routing * (q.shape[2] // heads)
    mu = unit(centroids)
    of_q = assign(by_q[:, :, :routed], mu, bias, rows.valid)
    of_k = assign(by_k[:, :, :routing], mu, bias, rows.valid)
    packed = segment_ids is not None
    clusters = of_q.clusters, of_k.clusters
    return _sorted_attention(config, q, k, v, *clusters, rows, rows, packed=packed)[0]


def _sorted_attention(
    config: Routing,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    query_clusters: Int[Array, "B T N2"],
    key_clusters: Int[Array, "B S K2"],
    rows: Rows,
    keys: Rows,
    *,
    packed: bool,
) -> tuple[Float[Array, "B T N Hv"], Int[Array, "E S"]]:
    """Causal routing without a cache, and the sorted keys it went by."""
    check_sort_keys(config.clusters, k.shape[1], q.shape[1] * (q.shape[2] // k.shape[2]))
    query_clusters = checkpoint_name(query_clusters, "selection")
    key_clusters = checkpoint_name(key_clusters, "selection")
    eligible = keys.valid & (keys.index - keys.start >= config.sinks)
    sorted_keys = sort_keys(key_clusters, eligible, config.clusters)
    out = three_sets(
        *(config, q, k, v, query_clusters, sorted_keys, rows), packed=packed, whole=rows is keys
    )
    return out, sorted_keys
