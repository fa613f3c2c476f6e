"""Clusters of routing attention: which one a token belongs to, and how the centroids move.

Spherical k-means: vectors and centroids have length 1, the similarity is their inner product. What
a step learns from its tokens leaves the call as sums over tokens, so that adding the statistics of
microbatches and devices gives those of the whole batch, and is applied once by :func:`moved`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.common import accumulation_dtype
from sparse_attn.shards import WHOLE, Shards

CHUNK_SCORES = 2**20
"""Similarities of tokens to centroids that are alive at a time."""

FAR_SHARPNESS = 32.0
"""Weight of a token as a new centroid: exp(-32 similarity), so that the farthest dominate."""

_TINY = 1e-12  # added to |x|^2, so that zero has a direction and a gradient


class RoutingState(nnx.Variable):
    """State that moves by statistics, once a training step, and never by gradient."""


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Clusters of the tokens, [B, T, A] int32 (C for padding), and the sums over tokens.

    ``sums`` [K, C, H] and ``counts`` [K, C]: unit vectors of every cluster's members.
    ``far_sums`` [K, C, H] and ``far_weights`` [K, C]: the token in row t is a candidate for
    centroid t mod C with weight exp(-32 similarity to its own centroid); their ratio is a mean in
    which the candidate farthest from every centroid dominates.
    """

    clusters: Int[Array, "B T A"]
    sums: Float[Array, "K C H"]
    counts: Float[Array, "K C"]
    far_sums: Float[Array, "K C H"]
    far_weights: Float[Array, "K C"]


def unit(x: Float[Array, "*rest H"]) -> Float[Array, "*rest H"]:
    """x / |x| in at least float32; zero stays zero, with a finite gradient."""
    x = x.astype(accumulation_dtype(x.dtype))
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + _TINY)


def assign(
    x: Float[Array, "B T A H"],
    centroids: Float[Array, "K C H"],
    bias: Float[Array, "K C"],
    valid: Bool[Array, "B T"],
    shards: Shards = WHOLE,
) -> Assignment:
    """cluster = argmax_c <x / |x|, mu_c> + bias_c, head a of A reading centroids a // (A/K).

    A function of each token alone; of equal scores the first cluster wins. Padding may hold
    anything. Nothing here is differentiated. O(chunk * C) memory beside the inputs. ``shards`` may
    split the tokens: the sums are then over those here.
    """
    x, centroids, bias = jax.lax.stop_gradient((x, centroids, bias))
    C = bias.shape[1]
    clusters, totals, at = [], [], 0
    for first, size in shards.stretches(x.shape[1]):
        found = _assign(x[:, at : at + size], centroids, bias, valid[:, at : at + size])
        if shards.split:
            # Row t of the sequence is a candidate for centroid t mod C, wherever it lies.
            far = (jnp.roll(a, first % C, axis=1) for a in (found.far_sums, found.far_weights))
            found = Assignment(found.clusters, found.sums, found.counts, *far)
        clusters.append(found.clusters)
        totals.append((found.sums, found.counts, found.far_sums, found.far_weights))
        at += size
    total = jax.tree.map(lambda *parts: functools.reduce(jnp.add, parts), *totals)
    return Assignment(jnp.concatenate(clusters, axis=1), *total)


def _assign(
    x: Float[Array, "B T A H"],
    centroids: Float[Array, "K C H"],
    bias: Float[Array, "K C"],
    valid: Bool[Array, "B T"],
) -> Assignment:
    """:func:`assign` of rows that follow each other, the first being row 0."""
    B, T, A, H = x.shape
    K, C = bias.shape
    G = A // K
    x = jnp.where(valid[:, :, None, None], x, 0)
    dtype = accumulation_dtype(x.dtype)
    mu = jnp.swapaxes(centroids.astype(dtype), 1, 2)
    bias = bias.astype(dtype)
    # Chunks begin with a whole turn of t mod C, so that candidates are summed by a reshape.
    chunk = min(max(1, CHUNK_SCORES // (B * A * C * C)) * C, T)
    pad = -T % chunk
    x = jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0)))
    valid = jnp.pad(valid, ((0, 0), (0, pad)))

    def step(total: tuple[Array, ...], i: Array) -> tuple[tuple[Array, ...], Array]:
        rows = unit(jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1))
        live = jax.lax.dynamic_slice_in_dim(valid, i * chunk, chunk, axis=1)
        vectors = jnp.transpose(rows.reshape(B, chunk, K, G, H), (2, 0, 1, 3, 4))
        vectors = vectors.reshape(K, B * chunk * G, H)
        live = jnp.broadcast_to(live[None, :, :, None], (K, B, chunk, G)).reshape(K, -1)
        similarity = jnp.matmul(vectors, mu, precision="highest")
        scores = similarity + bias[:, None, :]
        best = jnp.max(scores, axis=2, keepdims=True)
        number = jnp.arange(C, dtype=jnp.int32)[None, None, :]
        # Two plain reductions run several times faster than one argmax on a CPU.
        cluster = jnp.min(jnp.where(scores == best, number, C), axis=2)
        cluster = jnp.where(live, cluster, C)
        member = (number == cluster[:, :, None]).astype(dtype)
        nearest = jnp.sum(member * similarity, axis=2)
        far = jnp.where(live, jnp.exp(-FAR_SHARPNESS * nearest), 0)

        def turns(weighted: Array) -> Array:
            weighted = weighted.reshape(K, B, chunk, G, -1)
            weighted = jnp.pad(weighted, ((0, 0), (0, 0), (0, -chunk % C), (0, 0), (0, 0)))
            return jnp.sum(weighted.reshape(K, -1, C, G, weighted.shape[4]), axis=(1, 3))

        parts = (
            jnp.matmul(jnp.swapaxes(member, 1, 2), vectors, precision="highest"),
            jnp.sum(member, axis=1),
            turns(far[:, :, None] * vectors),
            turns(far)[:, :, 0],
        )
        cluster = jnp.transpose(cluster.reshape(K, B, chunk, G), (1, 2, 0, 3))
        return jax.tree.map(jnp.add, total, parts), cluster.reshape(B, chunk, A)

    zeros = tuple(jnp.zeros(size, dtype) for size in ((K, C, H), (K, C), (K, C, H), (K, C)))
    steps = jnp.arange((T + pad) // chunk, dtype=jnp.int32)
    total, clusters = jax.lax.scan(step, zeros, steps)
    clusters = jnp.moveaxis(clusters, 0, 1).reshape(B, T + pad, A)[:, :T]
    return Assignment(clusters, *total)


def commitment(
    x: Float[Array, "B T A H"],
    centroids: Float[Array, "K C H"],
    clusters: Int[Array, "B T A"],
    valid: Bool[Array, "B T"],
    shards: Shards = WHOLE,
) -> Float[Array, ""]:
    """Mean over valid tokens and heads of |x/|x| - mu_cluster|^2; differentiable in ``x`` only.

    Over the tokens of all ``shards``.
    """
    total = _squared_distance(x, centroids, clusters, valid)
    total, count = shards.total((total, jnp.sum(valid)))
    return (total / jnp.maximum(count * x.shape[2], 1)).astype(jnp.float32)


@jax.custom_vjp
def _squared_distance(
    x: Float[Array, "B T A H"],
    centroids: Float[Array, "K C H"],
    clusters: Int[Array, "B T A"],
    valid: Bool[Array, "B T"],
) -> Float[Array, ""]:
    """Sum over valid tokens and heads of |x/|x| - mu_cluster|^2; differentiable in ``x`` only.

    The gradient is computed from x again: what autodiff would keep is several times as large.
    """
    distance = jnp.square(_away(x, centroids, clusters, valid)[1])
    return jnp.sum(jnp.where(valid[:, :, None, None], distance, 0))


def _away(x: Array, centroids: Array, clusters: Array, valid: Array) -> tuple[Array, Array]:
    """u = x/|x| and u - mu; zeros for x in padding."""
    K, C, _ = centroids.shape
    heads = jnp.arange(x.shape[2], dtype=jnp.int32) // (x.shape[2] // K)
    mu = centroids[heads[None, None, :], jnp.minimum(clusters, C - 1)]
    u = unit(jnp.where(valid[:, :, None, None], x, 0))
    return u, u - mu.astype(u.dtype)


def _squared_distance_fwd(x: Array, *rest: Array) -> tuple[Array, tuple[Array, ...]]:
    return _squared_distance(x, *rest), (x, *rest)


def _squared_distance_bwd(
    residuals: tuple[Array, ...], cotangent: Array
) -> tuple[Array, Array, None, None]:
    x, centroids, clusters, valid = residuals
    u, away = _away(x, centroids, clusters, valid)
    x = jnp.where(valid[:, :, None, None], x, 0).astype(u.dtype)
    length = jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + _TINY)
    across = away - u * jnp.sum(u * away, axis=-1, keepdims=True)
    factor = 2 * cotangent.astype(u.dtype)
    gradient = jnp.where(valid[:, :, None, None], factor * length * across, 0)
    return gradient.astype(residuals[0].dtype), jnp.zeros_like(centroids), None, None


_squared_distance.defvjp(_squared_distance_fwd, _squared_distance_bwd)


def collect(queries: Assignment, keys: Assignment) -> dict[str, Array]:
    """The statistics of one call, all of them sums over tokens; see :func:`moved`."""
    return {
        "query_sums": queries.sums,
        "query_counts": queries.counts,
        "key_sums": keys.sums,
        "key_counts": keys.counts,
        "far_sums": keys.far_sums,
        "far_weights": keys.far_weights,
    }


def moved(
    centroids: Float[Array, "K C H"],
    bias: Float[Array, "K C"],
    idle: Float[Array, "K C"],
    statistics: dict[str, Array],
    *,
    decay: float,
    balance_rate: float,
    reseed_after: int,
) -> tuple[Float[Array, "K C H"], Float[Array, "K C"], Float[Array, "K C"]]:
    """Centroids, bias and idle steps after a training step with these statistics.

    mu_c <- unit(decay mu_c + (1 - decay) m_c), m_c the mean of the members, queries and keys
    weighing half each (the paper's update); a cluster without members stays.
    bias_c <- bias_c + balance_rate sign(mean load - load_c), load the number of keys, then centred
    (balancing without a loss, arXiv 2408.15664).
    A cluster that was without keys for ``reseed_after`` steps running takes its far candidate (see
    :class:`Assignment`) as centroid, and bias 0. A step without any token changes nothing.
    """
    dtype = centroids.dtype
    stats = {name: value.astype(dtype) for name, value in statistics.items()}
    target = jnp.zeros_like(centroids)
    for side in ("query", "key"):
        counts = stats[f"{side}_counts"][..., None]
        target = target + jnp.where(counts > 0, stats[f"{side}_sums"] / jnp.maximum(counts, 1), 0)
    sides = (stats["query_counts"] > 0).astype(dtype) + (stats["key_counts"] > 0).astype(dtype)
    target = target / jnp.maximum(sides, 1)[..., None]
    drifted = unit(decay * centroids + (1 - decay) * target).astype(dtype)
    centroids = jnp.where(sides[..., None] > 0, drifted, centroids)

    load = stats["key_counts"]
    some = jnp.sum(load, axis=1, keepdims=True) > 0
    bias = bias + balance_rate * jnp.sign(jnp.mean(load, axis=1, keepdims=True) - load)
    bias = jnp.where(some, bias - jnp.mean(bias, axis=1, keepdims=True), bias)
    idle = jnp.where(some, jnp.where(load > 0, 0, idle + 1), idle)

    weights = stats["far_weights"]
    again = (idle >= reseed_after) & (weights > 0)
    # Scaled by the weight first: far_sums of tokens near their centroids are tiny numbers.
    far = unit(stats["far_sums"] / jnp.where(weights > 0, weights, 1)[..., None]).astype(dtype)
    centroids = jnp.where(again[..., None], far, centroids)
    return centroids, jnp.where(again, 0, bias), jnp.where(again, 0, idle)
