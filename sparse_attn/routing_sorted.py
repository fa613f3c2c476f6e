"""Causal routing over whole sequences: sorted by cluster, every query attends one range of keys.

Keys are sorted by (cluster, index). As documents are contiguous, a document's members of a cluster
are neighbours, in order; so what a query attends is the range [max(first, e - w), e) with ``first``
the document's first member past the sinks and ``e`` the end of those outside the local window.
Queries are sorted likewise, so that neighbouring rows share most of their keys.
"""

from __future__ import annotations

import dataclasses
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.ranged import ranged_attention
from kernels_pallas.ranged.tiling import Tiles
from kernels_pallas.ranged.xla import ranged_backward
from sparse_attn.documents import Rows
from sparse_attn.types import AttentionOutput, Implementation, merge

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

    ``q_rows`` [B * K * T * G] are flat rows of q in sorted order, ``q_back`` is its inverse, so
    ``k_rows`` and ``k_back`` [B * K * S]; queries attend [begin, end) of the sorted keys, each a
    line for one of the B * K kv heads.
    """

    q_rows: Int[Array, " M"]
    q_back: Int[Array, " M"]
    k_rows: Int[Array, " L"]
    k_back: Int[Array, " L"]
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
        q_rows = _flat(order // G, order % G, K, T, G)
        k_rows = _flat(key_order, jnp.zeros_like(key_order), K, S, 1)
        sorting = Sorting(q_rows, _inverse(q_rows), k_rows, _inverse(k_rows), begin, end)
        return jax.tree.map(lambda a: checkpoint_name(a, "selection"), sorting)

    def sorted_q(self, x: Float[Array, "B T N X"]) -> Float[Array, "E Q 1 X"]:
        """The rows of a query-shaped array, in order."""
        lines, length = self.begin.shape
        return _permuted(x, self.q_rows, self.q_back, (lines, length, 1))

    def sorted_k(self, x: Float[Array, "B S K X"]) -> Float[Array, "E S 1 X"]:
        """The rows of a key-shaped array, in order."""
        shape = (self.begin.shape[0], self.k_rows.shape[0] // self.begin.shape[0], 1)
        return _permuted(x, self.k_rows, self.k_back, shape)

    def unsorted_q(
        self, x: Float[Array, "E Q 1 X"], shape: tuple[int, int, int]
    ) -> Float[Array, "B T N X"]:
        """The inverse of :meth:`sorted_q`."""
        return _permuted(x, self.q_back, self.q_rows, shape)

    def unsorted_k(
        self, x: Float[Array, "E S 1 X"], shape: tuple[int, int, int]
    ) -> Float[Array, "B S K X"]:
        """The inverse of :meth:`sorted_k`."""
        return _permuted(x, self.k_back, self.k_rows, shape)


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
) -> Float[Array, "B T N Hv"]:
    """One softmax over sinks, the last w members of the cluster, and the local window.

    ``clusters`` are those of the routed query heads; the other heads see no cluster. ``packed``:
    documents may start anywhere. Differentiable in q, k and v.
    """
    sorting = Sorting.of(config, clusters, sorted_keys, rows)
    windows = local_range(config, rows), sink_range(config, rows)
    sets = _Sets(config.implementation, config.sinks, packed, clusters.shape[2])
    if config.implementation == "xla" or (
        config.implementation == "auto" and jax.default_backend() == "cpu"
    ):
        return _joint(sets, q, k, v, sorting, windows)
    return merge(*sets.parts(q, k, v, sorting, windows)).out


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


Windows = tuple[tuple[Array, Array], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class _Sets:
    """What is static about the three sets; ``heads`` of the query heads route."""

    implementation: Implementation
    sinks: int
    packed: bool
    heads: int

    def with_sinks(self, x: Array) -> Array:
        """Keys or values among which the sinks lie; documents of a packed row start anywhere."""
        return x if self.packed else x[:, : self.sinks]

    def first(self, x: Array, kv_heads: int, query_heads: int) -> Array:
        """Keys or values of the kv heads that route."""
        return x[:, :, : self.heads * kv_heads // query_heads]

    def parts(
        self, q: Array, k: Array, v: Array, sorting: Sorting, windows: Windows
    ) -> list[AttentionOutput]:
        """Attention over each set, for all heads: local, sinks (if any), routed."""
        (B, T, N, _), K = q.shape, k.shape[2]
        local, sinks = windows
        attend = partial(ranged_attention, implementation=self.implementation)
        found = [attend(q, k, v, local[0], local[1])]
        if self.sinks:
            found.append(attend(q, self.with_sinks(k), self.with_sinks(v), sinks[0], sinks[1]))
        out, lse = attend(
            sorting.sorted_q(q[:, :, : self.heads]),
            sorting.sorted_k(self.first(k, K, N)),
            sorting.sorted_k(self.first(v, K, N)),
            sorting.begin,
            sorting.end,
        )
        shape, rest = (B, T, self.heads), ((0, 0), (0, 0), (0, N - self.heads))
        out = jnp.pad(sorting.unsorted_q(out, shape), (*rest, (0, 0)))
        lse = sorting.unsorted_q(lse[..., None], shape)[..., 0]
        found.append(AttentionOutput(out, jnp.pad(lse, rest, constant_values=-jnp.inf)))
        return found


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _joint(
    sets: _Sets, q: Array, k: Array, v: Array, sorting: Sorting, windows: Windows
) -> Float[Array, "B T N Hv"]:
    """``merge`` of the three parts. Its gradient needs no merging: with the lse of all sets, the
    weight of a key is exp(logit - lse) in whichever set it is, so each set goes back by itself.
    """
    return _joint_fwd(sets, q, k, v, sorting, windows)[0]


def _joint_fwd(
    sets: _Sets, q: Array, k: Array, v: Array, sorting: Sorting, windows: Windows
) -> tuple[Array, tuple[Any, ...]]:
    parts = sets.parts(q, k, v, sorting, windows)
    top = reduce(jnp.maximum, [part.lse for part in parts])
    top = jnp.where(jnp.isneginf(top), 0, top)
    weights = [jnp.exp(part.lse - top) for part in parts]
    total = reduce(jnp.add, weights)
    safe = jnp.where(total > 0, total, 1)
    terms = [
        (weight / safe)[..., None] * part.out.astype(weight.dtype)
        for weight, part in zip(weights, parts, strict=True)
    ]
    out = reduce(jnp.add, terms).astype(q.dtype)
    lse = jnp.where(total > 0, jnp.log(safe) + top, -jnp.inf)
    return out, (q, k, v, sorting, windows, out, lse)


def _joint_bwd(
    sets: _Sets, residuals: tuple[Any, ...], d_out: Array
) -> tuple[Array, Array, Array, None, None]:
    q, k, v, sorting, (local, sinks), out, lse = residuals
    (B, _, N, _), (S, K) = q.shape, k.shape[1:3]
    delta = jnp.sum(d_out.astype(lse.dtype) * out.astype(lse.dtype), axis=-1)

    def back(q: Array, k: Array, v: Array, begin: Array, end: Array, *grad: Array) -> Any:
        d_out, lse, delta = grad
        return ranged_backward(
            q,
            k,
            v,
            begin,
            end,
            jnp.zeros_like(d_out),
            lse,
            d_out=d_out,
            d_lse=-delta,
            scale=q.shape[-1] ** -0.5,
            tiles=Tiles.choose(q.shape[1], k.shape[1], q.shape[2] // k.shape[2]),
        )

    clip = partial(jnp.clip, min=0, max=S)
    dq, dk, dv = back(q, k, v, *map(clip, local), d_out, lse, delta)
    if sets.sinks:
        few = sets.with_sinks(k), sets.with_sinks(v)
        ends = (jnp.clip(a, 0, few[0].shape[1]) for a in sinks)
        of_q, *of_few = back(q, *few, *ends, d_out, lse, delta)
        dq = dq + of_q
        dk, dv = (_add_first(a, b, axis=1) for a, b in zip((dk, dv), of_few, strict=True))
    heads = sets.heads
    kv_heads = heads * K // N
    statistics = jnp.stack([lse[:, :, :heads], delta[:, :, :heads]], axis=-1)
    statistics = sorting.sorted_q(statistics)
    of_q, *of_kv = back(
        sorting.sorted_q(q[:, :, :heads]),
        *(sorting.sorted_k(sets.first(x, K, N)) for x in (k, v)),
        sorting.begin,
        sorting.end,
        sorting.sorted_q(d_out[:, :, :heads]),
        statistics[..., 0],
        statistics[..., 1],
    )
    dq = _add_first(dq, sorting.unsorted_q(of_q, (B, q.shape[1], heads)), axis=2)
    dk, dv = (
        _add_first(a, sorting.unsorted_k(b, (B, S, kv_heads)), axis=2)
        for a, b in zip((dk, dv), of_kv, strict=True)
    )
    return dq, dk, dv, None, None


_joint.defvjp(_joint_fwd, _joint_bwd)


def _add_first(total: Array, part: Array, axis: int) -> Array:
    """``part`` added to the first slices of ``total``."""
    if total.shape == part.shape:
        return total + part
    begin = jax.lax.slice_in_dim(total, 0, part.shape[axis], axis=axis)
    return jax.lax.dynamic_update_slice_in_dim(total, begin + part, 0, axis=axis)


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


def _flat(token: Array, head: Array, kv_heads: int, tokens: int, group: int) -> Int[Array, " M"]:
    """Rows of an array [B, T, K * G] for lines [B * K, L] of tokens and heads of the group."""
    line = jnp.arange(token.shape[0], dtype=jnp.int32)[:, None]
    sequence, kv_head = line // kv_heads, line % kv_heads
    return (((sequence * tokens + token) * kv_heads + kv_head) * group + head).reshape(-1)


def _inverse(permutation: Int[Array, " M"]) -> Int[Array, " M"]:
    numbers = jnp.arange(permutation.shape[0], dtype=permutation.dtype)
    return jnp.zeros_like(permutation).at[permutation].set(numbers, unique_indices=True)


def _permuted(
    x: Float[Array, "A1 A2 A3 H"],
    source: Int[Array, " M"],
    target: Int[Array, " M"],
    shape: tuple[int, int, int],
) -> Float[Array, "A4 A5 A6 H"]:
    """Rows ``source`` of x; ``target`` is the inverse permutation, along which gradients go back.

    Autodiff would scatter, which costs a CPU several times a gather.
    """
    rows = _take(x.reshape(-1, x.shape[-1]), source, target)
    return rows.reshape(*shape, x.shape[-1])


@jax.custom_vjp
def _take(x: Array, source: Array, target: Array) -> Array:
    return x.at[source].get(mode="promise_in_bounds", unique_indices=True)


def _take_fwd(x: Array, source: Array, target: Array) -> tuple[Array, tuple[Array, Array]]:
    return _take(x, source, target), (source, target)


def _take_bwd(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, None, None]:
    source, target = residuals
    return _take(cotangent, target, source), None, None


_take.defvjp(_take_fwd, _take_bwd)
