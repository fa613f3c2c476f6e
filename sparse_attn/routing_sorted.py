"""Causal routing over whole sequences: sorted by cluster, every query attends one range of keys.

Keys are sorted by (cluster, index). As documents are contiguous, a document's members of a cluster
are neighbours, in order; so what a query attends is the range [max(first, e - w), e) with ``first``
the document's first member past the sinks and ``e`` the end of those outside the local window.
Queries are sorted likewise, so that neighbouring rows share most of their keys.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.ranged import ranged_attention
from sparse_attn.documents import Rows
from sparse_attn.routing_by_head import Ranges, attend_by_head
from sparse_attn.types import AttentionOutput, merge

if TYPE_CHECKING:
    from sparse_attn.routing import Routing


def sort_keys(
    clusters: Int[Array, "B S K"], eligible: Bool[Array, "B S"], count: int
) -> Int[Array, "E S"]:
    """``cluster * S + index`` of all keys, ascending, a line for each of the E = B * K kv heads.

    Keys that are not eligible (sinks, padding) count as cluster C and so come last.
    """
    B, S, K = clusters.shape
    clusters = jnp.where(eligible[:, :, None], clusters, count)
    values = clusters * S + jnp.arange(S, dtype=jnp.int32)[None, :, None]
    return jnp.sort(jnp.swapaxes(values, 1, 2).reshape(B * K, S), axis=1)


def check_sort_keys(clusters: int, keys: int, queries: int) -> None:
    """Raise ``ValueError`` if numbers (cluster, token) do not fit into 32 bits."""
    largest = (clusters + 1) * max(keys, queries)
    if largest >= 2**31:
        raise ValueError(
            f"clusters={clusters} times {max(keys, queries)} rows a kv head gives sort keys up to "
            f"{largest}, beyond 32 bits; use fewer clusters or shorter sequences"
        )


def member_ranges(
    config: Routing,
    sorted_keys: Int[Array, "E S"],
    clusters: Int[Array, "E L"],
    index: Int[Array, "E L"],
    start: Int[Array, "E L"],
) -> tuple[Int[Array, "E L"], Int[Array, "E L"]]:
    """Where in ``sorted_keys`` the members stand that each query attends: [begin, end).

    ``clusters`` C marks queries that attend nothing.
    """
    S = sorted_keys.shape[1]
    base = clusters * S
    below = jax.vmap(lambda line, value: jnp.searchsorted(line, value, method="scan"))
    first = below(sorted_keys, base + start + config.sinks).astype(jnp.int32)
    end = below(sorted_keys, base + index - config.local_window + 1).astype(jnp.int32)
    begin = jnp.maximum(first, end - config.cluster_window)
    nothing = clusters >= config.clusters
    return jnp.where(nothing, 0, begin), jnp.where(nothing, 0, end)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sorting:
    """Permutations of rows that bring clusters together, and what the sorted queries attend.

    A line is a kv head of a sequence, E = B * K of them; its queries are numbered t * G + g, Q =
    T * G of them. ``q_order`` lists the queries of a line in sorted order, ``q_back`` is its
    inverse, so ``k_order`` and ``k_back`` for keys. Queries in sorted order attend [begin, end) of
    the sorted keys.
    """

    q_order: Int[Array, "E Q"]
    q_back: Int[Array, "E Q"]
    k_order: Int[Array, "E S"]
    k_back: Int[Array, "E S"]
    begin: Int[Array, "E Q"]
    end: Int[Array, "E Q"]

    @staticmethod
    def of(
        config: Routing, clusters: Int[Array, "B T N"], sorted_keys: Int[Array, "E S"], rows: Rows
    ) -> Sorting:
        """For queries of these clusters (C: padding, which attends nothing)."""
        B, T, N = clusters.shape
        E, S = sorted_keys.shape
        K, G = E // B, N // (E // B)
        numbers = clusters.reshape(B, T, K, G) * (T * G)
        numbers = numbers + jnp.arange(T * G, dtype=jnp.int32).reshape(1, T, 1, G)
        numbers = jnp.sort(jnp.transpose(numbers, (0, 2, 1, 3)).reshape(E, T * G), axis=1)
        order, key_order = numbers % (T * G), sorted_keys % S
        token = (order // G).reshape(B, K * T * G)
        index, start = (
            jnp.take_along_axis(a, token, axis=1).reshape(E, T * G)
            for a in (rows.index, rows.start)
        )
        begin, end = member_ranges(config, sorted_keys, numbers // (T * G), index, start)
        sorting = Sorting(order, _inverse(order), key_order, _inverse(key_order), begin, end)
        return jax.tree.map(lambda a: checkpoint_name(a, "selection"), sorting)

    def sorted_q(self, x: Float[Array, "B T N X"]) -> Float[Array, "E Q 1 X"]:
        """The rows of a query-shaped array, in order."""
        return _sorted(x, self.q_order, self.q_back)

    def sorted_k(self, x: Float[Array, "B S K X"]) -> Float[Array, "E S 1 X"]:
        """The rows of a key-shaped array, in order."""
        return _sorted(x, self.k_order, self.k_back)

    def unsorted_q(
        self, x: Float[Array, "E Q 1 X"], shape: tuple[int, int, int]
    ) -> Float[Array, "B T N X"]:
        """The inverse of :meth:`sorted_q`."""
        source = _flat_positions(self.q_back, *shape)
        target = _flat_rows(self.q_order, *shape)
        return _take(x.reshape(-1, x.shape[3]), source, target).reshape(*shape, x.shape[3])


def three_sets(
    config: Routing,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    clusters: Int[Array, "B T N2"],
    sorted_keys: Int[Array, "E S"],
    rows: Rows,
    *,
    packed: bool,
    whole: bool,
) -> Float[Array, "B T N Hv"]:
    """One softmax over sinks, the last w members of the cluster, and the local window.

    ``clusters`` are those of the routed query heads; the other heads see no cluster. ``packed``:
    documents may start anywhere. ``whole``: keys and rows are the same tokens. Differentiable in
    q, k and v.
    """
    sorting = Sorting.of(config, clusters, sorted_keys, rows)
    if config.implementation == "xla" or (
        config.implementation == "auto" and jax.default_backend() == "cpu"
    ):
        ranges = Ranges(*local_range(config, rows), *sink_range(config, rows))
        sinks = k.shape[1] if packed else config.sinks
        alone = whole and config.local_window == 1
        return attend_by_head(sinks if config.sinks else 0, alone, q, k, v, sorting, ranges)
    routed = clusters.shape[2]
    return merge(*_parts(config, q, k, v, sorting, rows, routed=routed, packed=packed)).out


def local_range(config: Routing, rows: Rows) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The last ``local_window`` tokens of the document, the row's own included."""
    return jnp.maximum(rows.start, rows.index - config.local_window + 1), rows.index + 1


def sink_range(config: Routing, rows: Rows) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The first tokens of the document that have left the local window."""
    left = rows.index - config.local_window + 1
    return rows.start, jnp.minimum(rows.start + config.sinks, left)


def local_attention(
    config: Routing,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    rows: Rows,
) -> AttentionOutput:
    """Attention over :func:`local_range`."""
    begin, end = local_range(config, rows)
    return ranged_attention(q, k, v, begin, end, implementation=config.implementation)


def _parts(
    config: Routing,
    q: Array,
    k: Array,
    v: Array,
    sorting: Sorting,
    rows: Rows,
    *,
    routed: int,
    packed: bool,
) -> list[AttentionOutput]:
    """Attention over each set, for all heads: local, sinks (if any), routed."""
    (B, T, N, _), K = q.shape, k.shape[2]
    found = [local_attention(config, q, k, v, rows)]
    if config.sinks:
        few = (k, v) if packed else (k[:, : config.sinks], v[:, : config.sinks])
        begin, end = sink_range(config, rows)
        found.append(ranged_attention(q, *few, begin, end, implementation=config.implementation))
    kv_routed = routed * K // N
    out, lse = ranged_attention(
        sorting.sorted_q(q[:, :, :routed]),
        sorting.sorted_k(k[:, :, :kv_routed]),
        sorting.sorted_k(v[:, :, :kv_routed]),
        sorting.begin,
        sorting.end,
        implementation=config.implementation,
    )
    shape, rest = (B, T, routed), ((0, 0), (0, 0), (0, N - routed))
    out = jnp.pad(sorting.unsorted_q(out, shape), (*rest, (0, 0)))
    lse = sorting.unsorted_q(lse[..., None], shape)[..., 0]
    return [*found, AttentionOutput(out, jnp.pad(lse, rest, constant_values=-jnp.inf))]


def token_lists(
    config: Routing,
    clusters: Int[Array, "B T N"],
    sorted_keys: Int[Array, "E S"],
    rows: Rows,
    heads: int,
) -> Int[Array, "B T N P"]:
    """Every token that each query attends, ascending, -1 trailing. O(T P) memory: to look at.

    ``clusters`` are those of the routed heads; ``heads`` counts all query heads.
    """
    B, T, N = clusters.shape
    E, S = sorted_keys.shape
    K, G = E // B, N // (E // B)
    index, start = rows.index[:, :, None], rows.start[:, :, None]

    def spread(a: Array) -> Array:
        a = jnp.broadcast_to(a[:, :, None, :], (B, T, K, G))
        return jnp.transpose(a, (0, 2, 1, 3)).reshape(E, T * G)

    of_heads = jnp.transpose(clusters.reshape(B, T, K, G), (0, 2, 1, 3)).reshape(E, T * G)
    begin, end = member_ranges(config, sorted_keys, of_heads, spread(index), spread(start))
    slots = jnp.arange(min(config.cluster_window, S), dtype=jnp.int32)[None, None, :]
    place = begin[..., None] + slots
    flat = jnp.minimum(place, S - 1).reshape(E, -1)
    routed = jnp.take_along_axis(sorted_keys, flat, axis=1).reshape(place.shape) % S
    routed = jnp.where(place < end[..., None], routed, S)
    routed = jnp.transpose(routed.reshape(B, K, T, G, -1), (0, 2, 1, 3, 4)).reshape(B, T, N, -1)
    routed = jnp.pad(routed, ((0, 0), (0, 0), (0, heads - N), (0, 0)), constant_values=S)

    sinks = start + jnp.arange(config.sinks, dtype=jnp.int32)[None, None, :]
    sinks = jnp.where(sinks <= index - config.local_window, sinks, S)
    recent = jnp.arange(min(config.local_window, S), dtype=jnp.int32)[None, None, :]
    local = index - recent
    local = jnp.where((local >= start) & (index >= 0), local, S)
    both = jnp.concatenate([sinks, local], axis=2)[:, :, None, :]
    both = jnp.broadcast_to(both, (B, T, heads, both.shape[3]))
    lists = jnp.sort(jnp.concatenate([both, routed], axis=3), axis=3)
    return jnp.where(lists == S, -1, lists)[..., : min(lists.shape[3], S)]


def _inverse(permutation: Int[Array, "E L"]) -> Int[Array, "E L"]:
    """The inverse of every line's permutation."""
    line = jnp.arange(permutation.shape[0])[:, None]
    numbers = jnp.arange(permutation.shape[1], dtype=permutation.dtype)
    numbers = jnp.broadcast_to(numbers, permutation.shape)
    return jnp.zeros_like(permutation).at[line, permutation].set(numbers, unique_indices=True)


def _flat_rows(order: Int[Array, "E L"], B: int, T: int, A: int) -> Int[Array, " M"]:
    """Of the members of lines, the rows of an array [B, T, A, X]."""
    K = order.shape[0] // B
    G = A // K
    line = jnp.arange(order.shape[0], dtype=jnp.int32)[:, None]
    row = (line // K * T + order // G) * K + line % K
    return (row * G + order % G).reshape(-1)


def _flat_positions(back: Int[Array, "E L"], B: int, T: int, A: int) -> Int[Array, " M"]:
    """For every row of an array [B, T, A, X], its place in [E, L]: the inverse of _flat_rows."""
    E, L = back.shape
    place = back + jnp.arange(E, dtype=jnp.int32)[:, None] * L
    place = place.reshape(B, E // B, T, A // (E // B))
    return jnp.transpose(place, (0, 2, 1, 3)).reshape(-1)


def _sorted(
    x: Float[Array, "B T A X"], order: Int[Array, "E L"], back: Int[Array, "E L"]
) -> Float[Array, "E L 1 X"]:
    source, target = _flat_rows(order, *x.shape[:3]), _flat_positions(back, *x.shape[:3])
    return _take(x.reshape(-1, x.shape[3]), source, target).reshape(*order.shape, 1, x.shape[3])


@jax.custom_vjp
def _take(x: Array, source: Array, target: Array) -> Array:
    """Rows ``source`` of x; ``target`` is the inverse permutation, along which gradients go back.

    Autodiff would scatter, which costs several times a gather.
    """
    return x.at[source].get(mode="promise_in_bounds", unique_indices=True)


def _take_fwd(x: Array, source: Array, target: Array) -> tuple[Array, tuple[Array, Array]]:
    return _take(x, source, target), (source, target)


def _take_bwd(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, None, None]:
    source, target = residuals
    return _take(cotangent, target, source), None, None


_take.defvjp(_take_fwd, _take_bwd)
