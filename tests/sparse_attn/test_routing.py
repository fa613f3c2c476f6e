"""What is particular to routing: clusters, ranges, rings, statistics, the paper's balanced mode."""

import dataclasses
import functools
import itertools
import json
import subprocess
import sys

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_cases import SCRIPTS, load_script
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.tiny import config as tiny
from models.generate import generate
from models.transformer import Decoder, abstract, merge, split
from sparse_attn import Dense, HeadShape, Routing, routing_attention
from sparse_attn.documents import place_rows
from sparse_attn.routing_cache import append, empty_cache, gathered_lists, with_rings
from sparse_attn.routing_sorted import check_sort_keys, sort_keys, token_lists
from sparse_attn.routing_state import assign, commitment, moved
from train.loop import plan
from train.step import make_state, make_train_step

SMALL = Routing(clusters=3, cluster_window=4, local_window=3, sinks=2)
PAPER = Routing(clusters=3, cluster_window=6, local_window=4, mode="paper")
SHAPE = cases.SHAPES["G2"]
T = 40
LAYOUTS = {
    "one": [1] * 40,
    "padded": [1] * 29 + [0] * 11,
    "packed": [1] * 13 + [2] * 17 + [3] * 2 + [0] * 8,
    "gaps": [1] * 9 + [0] * 3 + [2] * 20 + [0] * 7 + [3],
}


def units(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def clusters_of(x, centroids, bias):
    """Clusters [B, T, A] by the formula."""
    heads = np.arange(x.shape[2]) // (x.shape[2] // len(centroids))
    scores = np.einsum("BTAH,ACH->BTAC", units(x), centroids[heads]) + bias[heads]
    return scores.argmax(-1)


def documents(ids):
    """(start, stop) of every document."""
    edges = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), len(ids)]
    return [(a, b) for a, b in itertools.pairwise(edges) if ids[a] > 0]


def attended(config, query_clusters, key_clusters, ids):
    """For every row and query head the tokens it attends, by the definition."""
    N, K = query_clusters.shape[1], key_clusters.shape[1]
    lists = [[[] for _ in range(config.heads)] for _ in ids]
    for start, stop in documents(ids):
        for t in range(start, stop):
            edge = t - config.local_window
            local = list(range(max(start, edge + 1), t + 1))
            sinks = [j for j in range(start, start + config.sinks) if j <= edge]
            for n in range(config.heads):
                routed = []
                if n < N:
                    own = query_clusters[t, n]
                    members = key_clusters[:, n // (N // K)] == own
                    routed = [j for j in range(start + config.sinks, edge + 1) if members[j]]
                lists[t][n] = sinks + routed[-config.cluster_window :] + local
    return lists


def softmax_over(q, k, v, lists):
    """Attention [T, N, H] of every row over its listed keys."""
    G = q.shape[1] // k.shape[1]
    out = np.zeros((*q.shape[:2], v.shape[2]))
    for t, of_row in enumerate(lists):
        for n, keys in enumerate(of_row):
            if keys:
                logits = k[keys, n // G] @ q[t, n] / np.sqrt(q.shape[2])
                weights = np.exp(logits - logits.max())
                out[t, n] = weights @ v[keys, n // G] / weights.sum()
    return out


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the definition above needs to know of a config."""

    local_window: int
    sinks: int
    cluster_window: int
    heads: int


def state_of(module):
    return np.asarray(module.centroids[...]), np.asarray(module.bias[...])


@functools.cache
def plain(config):
    """The function, jitted once for a config."""
    return jax.jit(
        lambda q, k, v, centroids, bias, ids: routing_attention(
            q, k, v, centroids, bias, config=config, segment_ids=ids
        )
    )


@settings(derandomize=True, deadline=None, max_examples=12)
@given(
    st.sampled_from([("G2", 2, 3), ("G4", 0, 3), ("G2", 2, 1)]),
    st.sampled_from(sorted(LAYOUTS)),
    st.integers(0, 5),
)
def test_causal_mode_attends_what_the_definition_says(case, layout, seed):
    (name, sinks, window), ids = case, np.asarray(LAYOUTS[layout])
    shape = cases.SHAPES[name]
    config = dataclasses.replace(SMALL, sinks=sinks, local_window=window)
    with jax.enable_x64(True):
        draw = np.random.default_rng(seed)
        q, k, v, _ = (np.asarray(a) for a in cases.arrays(shape, 1, 1, T, seed=seed))
        centroids = units(draw.standard_normal((shape.kv_heads, 3, 8)))
        bias = 0.2 * draw.standard_normal((shape.kv_heads, 3))
        got = plain(config)(q, k[0], v[0], centroids, bias, jnp.asarray(ids)[None])[0]
    query_clusters = clusters_of(q, centroids, bias)[0]
    key_clusters = clusters_of(k[0], centroids, bias)[0]
    sizes = Sizes(window, sinks, 4, shape.query_heads)
    want = softmax_over(q[0], k[0, 0], v[0, 0], attended(sizes, query_clusters, key_clusters, ids))
    np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("routing_heads", [1, None])
def test_module_routes_unrotated_and_attends_rotated_heads(routing_heads, x64):
    config = dataclasses.replace(SMALL, routing_heads=routing_heads)
    q, k, v, x = cases.arrays(SHAPE, 1, 2, T)
    ids = np.asarray([LAYOUTS["packed"], LAYOUTS["one"]])
    module = cases.mechanism(config, SHAPE)
    assert module.centroids.shape == (routing_heads or 2, 3, 8)
    out, aux = cases.call(module, (q, k, v, x), segment_ids=jnp.asarray(ids), inspect=True)
    centroids, bias = state_of(module)
    routed = centroids.shape[0]
    positions = place_rows(
        2, T, length=None, positions=None, segment_ids=jnp.asarray(ids)
    ).positions
    rotated = [np.asarray(cases.rope(a, positions)) for a in (q, k[0])]
    sizes = Sizes(3, 2, 4, SHAPE.query_heads)
    pairs = 0
    for b in range(2):
        lists = attended(
            sizes,
            clusters_of(np.asarray(q[:, :, : 2 * routed]), centroids, bias)[b],
            clusters_of(np.asarray(k[0][:, :, :routed]), centroids, bias)[b],
            ids[b],
        )
        want = softmax_over(rotated[0][b], rotated[1][b], np.asarray(v[0, b]), lists)
        np.testing.assert_allclose(out[b], want, atol=1e-12)
        indices = np.asarray(aux.selection.indices[b])
        for t in range(T):
            for n in range(4):
                listed = lists[t][n]
                assert indices[t, n].tolist() == listed + [-1] * (indices.shape[2] - len(listed))
                pairs += len(listed)
    causal = sum((b - a) * (b - a + 1) / 2 for row in ids for a, b in documents(row))
    np.testing.assert_allclose(aux.metrics["density"], pairs / (4 * causal), rtol=1e-6)
    assert 0 < float(aux.metrics["captured_mass"]) < 1


def test_density_bounds_what_is_attended(x64):
    parts = cases.arrays(SHAPE, 1, 1, T)
    aux = cases.call(cases.mechanism(SMALL, SHAPE), parts, inspect=True)[1]
    assert float(aux.metrics["density"]) <= SMALL.density(T) < 0.5
    assert Routing(clusters=1, cluster_window=T).density(T) == 1
    pairs = 3 * 6 * 7 / 2
    assert PAPER.density(T) == pytest.approx(pairs / (T * (T + 1) / 2))
    assert SMALL.auxiliary_bits(SHAPE) == 64
    assert dataclasses.replace(SMALL, routing_heads=1).auxiliary_bits(SHAPE) == 32


def test_bias_moves_the_assignment_and_the_first_of_equal_scores_wins(x64):
    x = jnp.asarray([[[[1.0, 0.0]], [[0.0, 1.0]], [[-2.0, 0.0]], [[3.0, 3.0]]]])
    centroids = jnp.asarray([[[1.0, 0.0], [0.0, 1.0]]])
    valid = jnp.ones((1, 4), bool)
    plain = assign(x, centroids, jnp.zeros((1, 2)), valid)
    assert plain.clusters[0, :, 0].tolist() == [0, 1, 1, 0]
    shifted = assign(x, centroids, jnp.asarray([[0.0, 0.1]]), valid)
    assert shifted.clusters[0, :, 0].tolist() == [0, 1, 1, 1]
    padded = assign(x, centroids, jnp.zeros((1, 2)), jnp.asarray([[True, True, False, True]]))
    assert padded.clusters[0, :, 0].tolist() == [0, 1, 2, 0]
    np.testing.assert_allclose(padded.counts, [[2, 1]])


def statistics(module, parts, ids):
    run = jax.jit(lambda parts, ids: module(cases.as_heads(*parts), segment_ids=ids)[2].statistics)
    return run(parts, jnp.asarray(ids))


@pytest.mark.parametrize("config", [SMALL, PAPER])
def test_statistics_are_sums_over_valid_tokens(config, x64):
    q, k, v, x = cases.arrays(SHAPE, 1, 2, T)
    ids = np.asarray([LAYOUTS["gaps"], LAYOUTS["padded"]])
    padding = (ids == 0)[None, :, :, None, None]
    module = cases.mechanism(config, SHAPE)
    got = statistics(module, (q, jnp.where(padding, jnp.nan, k), v, x), ids)
    centroids, bias = state_of(module)
    keys = q if config.mode == "paper" else k[0]
    for side, array in (("query", q), ("key", keys)):
        vectors = units(np.asarray(array))
        chosen = clusters_of(np.asarray(array), centroids, bias)
        per_head = vectors.shape[2] // 2
        sums, counts = np.zeros((2, 3, 8)), np.zeros((2, 3))
        far, weights = np.zeros((2, 3, 8)), np.zeros((2, 3))
        for b, t in zip(*np.nonzero(ids), strict=True):
            for a in range(vectors.shape[2]):
                head, c, one = a // per_head, chosen[b, t, a], vectors[b, t, a]
                sums[head, c] += one
                counts[head, c] += 1
                weight = np.exp(-32 * (one @ centroids[head, c]))
                far[head, t % 3] += weight * one
                weights[head, t % 3] += weight
        np.testing.assert_allclose(got[f"{side}_sums"], sums, atol=1e-9)
        np.testing.assert_allclose(got[f"{side}_counts"], counts)
    np.testing.assert_allclose(got["far_sums"], far, rtol=1e-7)
    np.testing.assert_allclose(got["far_weights"], weights, rtol=1e-7)


@pytest.mark.parametrize("config", [SMALL, PAPER])
def test_statistics_of_halves_add_up_to_the_whole(config, x64):
    q, k, v, x = cases.arrays(SHAPE, 1, 4, T)
    ids = np.asarray([LAYOUTS[name] for name in ("one", "padded", "packed", "gaps")])
    module = cases.mechanism(config, SHAPE)
    whole = statistics(module, (q, k, v, x), ids)
    halves = [
        statistics(module, (q[s], k[:, s], v[:, s], x[s]), ids[s])
        for s in (slice(0, 2), slice(2, 4))
    ]
    for name, value in whole.items():
        np.testing.assert_allclose(
            halves[0][name] + halves[1][name], value, rtol=1e-12, atol=1e-12, err_msg=name
        )


def test_chunks_of_long_sequences_change_nothing(monkeypatch, x64):
    q = cases.arrays(SHAPE, 1, 2, T)[0]
    module = cases.mechanism(SMALL, SHAPE)
    state = module.centroids[...], module.bias[...]
    valid = jnp.asarray(LAYOUTS["gaps"])[None] > 0
    valid = jnp.concatenate([valid, ~valid])
    whole = assign(q, *state, valid)
    monkeypatch.setattr("sparse_attn.routing_state.CHUNK_SCORES", 200)
    pieces = assign(q, *state, valid)
    np.testing.assert_array_equal(pieces.clusters, whole.clusters)
    for name in ("sums", "counts", "far_sums", "far_weights"):
        np.testing.assert_allclose(getattr(pieces, name), getattr(whole, name), rtol=1e-12)


def random_statistics(seed, empty=()):
    draw = np.random.default_rng(seed)
    made = {}
    for side in ("query", "key"):
        counts = draw.integers(1, 9, (2, 3)).astype(float)
        for head, cluster in empty:
            counts[head, cluster] = 0
        made[f"{side}_counts"] = counts
        made[f"{side}_sums"] = draw.standard_normal((2, 3, 8)) * counts[..., None]
    weights = np.exp(10 * draw.standard_normal((2, 3)))
    made["far_weights"] = weights
    made["far_sums"] = weights[..., None] * draw.standard_normal((2, 3, 8))
    return made


def test_update_follows_the_members_and_balances(x64):
    config = dataclasses.replace(SMALL, decay=0.9, balance_rate=0.25)
    module = cases.mechanism(config, SHAPE)
    before, _ = state_of(module)
    stats = random_statistics(1)
    module.update_state({name: jnp.asarray(value) for name, value in stats.items()})
    means = [stats[f"{s}_sums"] / stats[f"{s}_counts"][..., None] for s in ("query", "key")]
    want = units(0.9 * before + 0.1 * (means[0] + means[1]) / 2)
    np.testing.assert_allclose(module.centroids[...], want, atol=1e-9)
    load = stats["key_counts"]
    signs = np.sign(load.mean(axis=1, keepdims=True) - load)
    bias = 0.25 * (signs - signs.mean(axis=1, keepdims=True))
    np.testing.assert_allclose(module.bias[...], bias, atol=1e-12)
    assert (bias != 0).any()
    assert (module.idle[...] == 0).all()

    paper = cases.mechanism(dataclasses.replace(PAPER, balance_rate=0.25), SHAPE)
    paper.update_state({name: jnp.asarray(value) for name, value in stats.items()})
    assert (paper.bias[...] == 0).all()


def test_a_cluster_that_stays_empty_moves_to_a_far_member(x64):
    config = dataclasses.replace(SMALL, reseed_after=2)
    module = cases.mechanism(config, SHAPE)
    before, _ = state_of(module)
    stats = random_statistics(2, empty=[(1, 2)])
    given_stats = {name: jnp.asarray(value) for name, value in stats.items()}
    module.update_state(given_stats)
    np.testing.assert_array_equal(module.centroids[...][1, 2], before[1, 2])
    assert module.idle[...].tolist() == [[0, 0, 0], [0, 0, 1]]
    module.update_state(given_stats)
    want = units(stats["far_sums"][1, 2])
    np.testing.assert_allclose(module.centroids[...][1, 2], want, atol=1e-9)
    assert module.bias[...][1, 2] == 0
    assert module.idle[...][1, 2] == 0

    # A step without tokens changes nothing at all, and no candidate means no new place.
    state = (module.centroids[...], module.bias[...], module.idle[...])
    nothing = jax.tree.map(jnp.zeros_like, given_stats)
    options = {"decay": 0.999, "balance_rate": 0.1, "reseed_after": 1}
    for a, b in zip(moved(*state, nothing, **options), state, strict=True):
        np.testing.assert_array_equal(a, b)
    without = {**given_stats, "far_weights": jnp.zeros((2, 3)), "far_sums": jnp.zeros((2, 3, 8))}
    assert moved(*state, without, **options)[2][1, 2] == 1


def test_the_farthest_token_dominates_its_candidates(x64):
    draw = np.random.default_rng(3)
    centroids = np.zeros((1, 2, 8))
    centroids[0, :, 0] = 1.0, -1.0
    near = np.zeros((1, 12, 1, 8))
    near[..., 0] = 1.0
    near += 0.05 * draw.standard_normal(near.shape)
    near[0, 5, 0] = [0, 1.0, 0, 0, 0, 0, 0, 0]
    found = assign(
        jnp.asarray(near), jnp.asarray(centroids), jnp.zeros((1, 2)), jnp.ones((1, 12), bool)
    )
    candidate = units(np.asarray(found.far_sums))[0, 1]  # row 5 is a candidate for centroid 1
    assert candidate @ near[0, 5, 0] > 0.999


def test_k_means_finds_separated_directions(x64):
    """Statistics and update together, repeated: every direction ends up with a centroid."""
    draw = np.random.default_rng(4)
    directions = np.eye(8)[:3]
    labels = draw.integers(0, 3, (4, T, 2))
    vectors = directions[labels] + 0.05 * draw.standard_normal((4, T, 2, 8))
    config = dataclasses.replace(SMALL, decay=0.5, balance_rate=0.0, reseed_after=1)
    shape = cases.SHAPES["G1"]
    module = cases.mechanism(config, shape)
    graph, state = nnx.split(module)
    v, x = jnp.zeros((1, 4, T, 2, 6)), jnp.zeros((4, T, 12))
    heads = (jnp.asarray(vectors), jnp.asarray(vectors)[None], v, x)

    @jax.jit
    def step(state):
        module = nnx.merge(graph, state)
        module.update_state(module(cases.as_heads(*heads))[2].statistics)
        return nnx.state(module)

    for _ in range(12):
        state = step(state)
    nnx.update(module, state)
    centroids = np.asarray(module.centroids[...])
    similarity = np.einsum("KCH,dH->KCd", centroids, directions)
    assert (similarity.max(axis=1) > 0.99).all()


def test_commitment_loss_and_its_gradient(x64):
    q, k, v, x = cases.arrays(SHAPE, 1, 2, T)
    ids = jnp.asarray([LAYOUTS["padded"], LAYOUTS["one"]])
    config = dataclasses.replace(SMALL, commitment=0.5)
    module = cases.mechanism(config, SHAPE)
    centroids, bias = state_of(module)
    valid = np.asarray(ids) > 0

    def loss(parts, attend):
        return module(cases.as_heads(*parts), segment_ids=ids, attend=attend)[2].loss

    chosen = [clusters_of(np.asarray(array), centroids, bias) for array in (q, k[0])]

    def by_formula(q, k):
        total = 0.0
        for array, clusters in zip((q, k), chosen, strict=True):
            heads = np.arange(array.shape[2])
            mu = centroids[heads // (array.shape[2] // 2)][heads[None, None], clusters]
            unit = array / jnp.linalg.norm(array, axis=-1, keepdims=True)
            distance = jnp.where(valid[..., None], jnp.sum((unit - mu) ** 2, axis=-1), 0)
            total += 0.25 * jnp.sum(distance) / (valid.sum() * array.shape[2])
        return total

    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, gradients = run((q, k, v, x), "sparse")
    wanted = by_formula(q, k[0])
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    of_q, of_k = jax.grad(by_formula, argnums=(0, 1))(q, k[0])
    np.testing.assert_allclose(gradients[0], of_q, atol=1e-8)
    np.testing.assert_allclose(gradients[1][0], of_k, atol=1e-8)
    assert (gradients[2] == 0).all()

    value, gradients = run((q, k, v, x), "fit")
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    assert all((gradient == 0).all() for gradient in gradients)
    assert run((q, k, v, x), "dense")[0] == 0
    zero = commitment(q, module.centroids[...], jnp.zeros((2, T, 4), jnp.int32), ids < 0)
    assert zero == 0


@pytest.mark.parametrize("config", [SMALL, PAPER])
@pytest.mark.parametrize("attend", ["dense", "fit"])
def test_dense_attendance_is_dense_and_still_reports_statistics(config, attend, x64):
    parts = cases.arrays(SHAPE, 1, 1, T)
    module = cases.mechanism(config, SHAPE)
    out, aux = cases.call(module, parts, attend=attend)
    np.testing.assert_allclose(
        out, cases.forward(cases.mechanism(Dense(), SHAPE), parts), atol=1e-12
    )
    assert float(aux.statistics["key_counts"].sum()) == T * (4 if config is PAPER else 2)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"routing_heads": None}, marks=pytest.mark.full),
        {"routing_heads": 1},
        {"local_window": 1},
    ],
)
def test_gradients_of_the_joint_softmax_equal_plain_autodiff(changes, x64):
    parts = cases.arrays(SHAPE, 1, 2, T)
    seed = jnp.asarray(np.random.default_rng(6).standard_normal((2, T, 4, 8)))
    config = dataclasses.replace(SMALL, **changes)
    results = []
    for implementation in ("xla", "reference"):
        module = cases.mechanism(config, SHAPE, implementation=implementation)
        total = jax.grad(lambda p, m=module: jnp.sum(m(cases.as_heads(*p))[0] * seed))
        results.append(jax.jit(total)(parts))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


# Cache


@pytest.fixture(scope="module")
def decoding():
    """A jitted step over any number of tokens, and the outputs of whole sequences."""
    with jax.enable_x64(True):
        parts = cases.arrays(SHAPE, 1, 2, 60)
        module = cases.mechanism(SMALL, SHAPE)
        step = jax.jit(
            lambda parts, cache, ids: module(cases.as_heads(*parts), cache, segment_ids=ids)[:2]
        )
        return module, parts, step, np.asarray(cases.forward(module, parts))


@pytest.mark.full
@settings(derandomize=True, deadline=None, max_examples=6)
@given(st.integers(0, 10_000))
def test_any_mix_of_appends_and_truncations_equals_the_whole(decoding, seed):
    module, parts, step, whole = decoding
    draw = np.random.default_rng(seed)
    with jax.enable_x64(True):
        cache = module.init_cache(2, 60, jnp.float64, rollback=5)
        lengths, undoable = np.zeros(2, int), np.zeros(2, int)
        for _ in range(14):
            size = int(draw.choice([1, 4, 17]))
            wanted = np.minimum(draw.integers(0, size + 1, 2), 60 - lengths)
            places = np.minimum(lengths[:, None] + np.arange(size)[None], 59)
            chunk = tuple(
                jnp.stack([a[..., b, places[b], :, :] for b in range(2)], axis=-4)
                if a.ndim > 3
                else jnp.stack([a[b, places[b]] for b in range(2)])
                for a in parts
            )
            ids = (np.arange(size)[None] < wanted[:, None]).astype(np.int32)
            out, cache = step(chunk, cache, jnp.asarray(ids))
            for b in range(2):
                got = out[b, : wanted[b]]
                want = whole[b, lengths[b] : lengths[b] + wanted[b]]
                np.testing.assert_allclose(got, want, atol=1e-12)
            lengths += wanted
            undoable = np.minimum(undoable + wanted, 5)
            if draw.random() < 0.5:
                undone = draw.integers(0, undoable + 1)
                lengths, undoable = lengths - undone, undoable - undone
                cache = cache.truncate(jnp.asarray(lengths))
            assert cache.length.tolist() == lengths.tolist()


@pytest.mark.full
def test_rings_hold_the_last_members_however_they_were_filled(x64):
    draw = np.random.default_rng(8)
    tokens = 34
    clusters = jnp.asarray(draw.integers(0, 2, (2, tokens, 2)), jnp.int32)
    config = dataclasses.replace(SMALL, clusters=2, cluster_window=1, local_window=3)
    size = 1 + 15 + 1
    for sizes in ([1] * 20 + [14], [16, 16, 2], [tokens]):
        cache = empty_cache(config, SHAPE, 2, batch=2, capacity=40, rollback=1, dtype=jnp.float64)
        at = 0
        for step in sizes:
            rows = place_rows(2, step, length=cache.length, positions=None, segment_ids=None)
            k = jnp.zeros((2, step, 2, 8))
            cache = append(cache, k, k, clusters[:, at : at + step], rows)
            at += step
        if sizes == [tokens]:
            token = jnp.arange(40)[None]
            eligible = (token >= 2) & (token < cache.length[:, None])
            cache = with_rings(cache, sort_keys(cache.cluster, eligible, 2))
        for b, head, c in itertools.product(range(2), range(2), range(2)):
            members = [j for j in range(2, tokens - 3) if int(clusters[b, j, head]) == c]
            assert int(cache.count[b, head, c]) == len(members)
            for number in range(max(0, len(members) - size), len(members)):
                assert int(cache.members[b, head, c, number % size]) == members[number]


def test_a_decode_step_reads_a_list_whose_size_does_not_follow_the_capacity(x64):
    for capacity in (128, 1024):
        cache = empty_cache(
            SMALL, SHAPE, 2, batch=1, capacity=capacity, rollback=3, dtype=jnp.float64
        )
        rows = place_rows(1, 1, length=cache.length, positions=None, segment_ids=None)
        lists = gathered_lists(cache, jnp.zeros((1, 1, 4), jnp.int32), rows, 4)
        assert lists.shape == (1, 1, 4, 2 + 4 + 15 + 3)


@pytest.mark.full
def test_dense_steps_keep_rings_up_to_date_and_inspection_agrees(x64):
    parts = cases.arrays(SHAPE, 1, 2, T)
    module = cases.mechanism(SMALL, SHAPE)
    whole, aux = cases.call(module, parts, inspect=True)
    dense = cases.forward(cases.mechanism(Dense(), SHAPE), parts)
    step = jax.jit(
        lambda parts, cache, attend, inspect: module(
            cases.as_heads(*parts), cache, attend=attend, inspect=inspect
        ),
        static_argnums=(2, 3),
    )
    cache = module.init_cache(2, T, jnp.float64)
    at = 0
    for size in (20, 1, 1, 1):
        out, cache, _ = step(cases.cut(parts, at, at + size), cache, "dense", False)
        np.testing.assert_allclose(out, dense[:, at : at + size], atol=1e-12)
        at += size
    for size in (16,):
        out, cache, found = step(cases.cut(parts, at, at + size), cache, "sparse", True)
        np.testing.assert_allclose(out, whole[:, at : at + size], atol=1e-12)
        np.testing.assert_array_equal(
            found.selection.indices, aux.selection.indices[:, at : at + size]
        )
        assert found.statistics == {}
        at += size
    with pytest.raises(ValueError, match="too small"):
        module(cases.as_heads(*cases.cut(parts, 0, 8)), cache)


# The paper's mode


def balanced(config, q, k, routed_q, routed_k, v, centroids, ids):
    """The definition: every cluster takes its most similar tokens of each document."""
    tokens, heads = q.shape[:2]
    total, times = np.zeros((tokens, heads, v.shape[2])), np.zeros((tokens, heads))
    union = [[set() for _ in range(heads)] for _ in range(tokens)]
    for start, stop in documents(ids):
        for n in range(heads):
            g = n // (heads // k.shape[1])
            for mu in centroids[n // (heads // len(centroids))]:

                def best(x, mu=mu, start=start, stop=stop):
                    similarity = units(x[start:stop]) @ mu
                    order = sorted(range(stop - start), key=lambda i: (-similarity[i], -i))
                    return sorted(start + i for i in order[: config.cluster_window])

                keys = best(routed_k[:, g])
                for t in best(routed_q[:, n]):
                    seen = [j for j in keys if j <= t]
                    if seen:
                        logits = k[seen, g] @ q[t, n] / np.sqrt(q.shape[2])
                        p = np.exp(logits - logits.max())
                        total[t, n] += p @ v[seen, n // (heads // v.shape[1])] / p.sum()
                        times[t, n] += 1
                        union[t][n] |= set(seen)
    return total / np.maximum(times, 1)[..., None], union


@pytest.mark.parametrize(
    ("layout", "shared"),
    [
        (None, False),
        ("packed", True),
        ("gaps", False),
        pytest.param(None, True, marks=pytest.mark.full),
        pytest.param("packed", False, marks=pytest.mark.full),
        pytest.param("gaps", True, marks=pytest.mark.full),
    ],
)
def test_paper_mode_is_the_balanced_definition(layout, shared, x64):
    config = dataclasses.replace(PAPER, shared_qk=shared, routing_heads=1)
    q, k, v, x = cases.arrays(SHAPE, 1, 1, T)
    ids = None if layout is None else jnp.asarray(LAYOUTS[layout])[None]
    module = cases.mechanism(config, SHAPE)
    out, aux = cases.call(module, (q, k, v, x), segment_ids=ids, inspect=True)
    rows = place_rows(1, T, length=None, positions=None, segment_ids=ids)
    centroids, _ = state_of(module)
    routed_q, routed_k = np.asarray(q[0, :, :2]), np.asarray(k[0, 0, :, :1])
    at_q, at_k = routed_q, routed_k
    if shared:
        at_q = at_k = np.sqrt(8) * units(routed_q)
        routed_k = routed_q
    at_q, at_k = (
        np.asarray(cases.rope(jnp.asarray(a)[None], rows.positions))[0] for a in (at_q, at_k)
    )
    ids = np.ones(T, int) if ids is None else np.asarray(ids)[0]
    values = np.asarray(v[0, 0, :, :1])
    want, union = balanced(config, at_q, at_k, routed_q, routed_k, values, centroids, ids)
    np.testing.assert_allclose(out[0, :, :2], want, atol=1e-9)
    for t in range(T):
        for n in range(2):
            listed = [j for j in np.asarray(aux.selection.indices[0, t, n]).tolist() if j >= 0]
            assert listed == sorted(union[t][n])
    window = cases.mechanism(Dense(window=4), SHAPE)
    local = cases.forward(
        window, (q, k, v, x), segment_ids=None if layout is None else jnp.asarray(ids)[None]
    )
    np.testing.assert_allclose(out[0, :, 2:], local[0, :, 2:], atol=1e-12)


def test_of_equally_similar_tokens_the_later_ones_are_members(x64):
    config = dataclasses.replace(PAPER, clusters=1, shared_qk=False)
    q, k, v, x = cases.arrays(SHAPE, 1, 1, 12)
    same = jnp.ones_like(q)
    module = cases.mechanism(config, SHAPE)
    heads = cases.as_heads(same, jnp.ones_like(k), v, x)
    selection = jax.jit(lambda: module(heads, inspect=True)[2].selection)()
    assert [i for i in selection.indices[0, -1, 0].tolist() if i >= 0] == [6, 7, 8, 9, 10, 11]
    assert (selection.indices[0, 5] == -1).all()


def test_paper_mode_cannot_decode(x64):
    module = cases.mechanism(PAPER, SHAPE)
    with pytest.raises(ValueError, match='paper" is not causal'):
        module.init_cache(1, 8, jnp.float64)
    cache = cases.mechanism(SMALL, SHAPE).init_cache(1, 8, jnp.float64)
    parts = cases.arrays(SHAPE, 1, 1, 4)
    with pytest.raises(ValueError, match='use mode="causal"'):
        module(cases.as_heads(*parts), cache)


def test_generation_refuses_paper_mode_and_explains():
    model = dataclasses.replace(tiny.model, attention=PAPER, layers=1)
    with pytest.raises(ValueError, match=r"not causal: a later token can\s+change"):
        generate(Decoder(model, rngs=nnx.Rngs(0)), [[1, 2, 3]], 2)


# Training


def test_a_training_step_moves_the_centroids_once():
    draw = np.random.default_rng(9)
    ones = np.ones((4, 16))
    batch = {
        "tokens": draw.integers(3, 259, (4, 16)).astype(np.int32),
        "targets": draw.integers(3, 259, (4, 16)).astype(np.int32),
        "weights": ones.astype(np.float32),
        "segment_ids": ones.astype(np.int32),
        "positions": np.tile(np.arange(16, dtype=np.int32), (4, 1)),
    }
    attention = dataclasses.replace(SMALL, decay=0.9)
    model = dataclasses.replace(tiny.model, attention=attention, layers=1, remat="full")
    config = dataclasses.replace(
        tiny, model=model, batch_size=4, sequence_length=16, microbatches=2
    )
    _, placement = plan(config)
    state = make_state(config, placement)
    graph = abstract(config.model)[0]

    @jax.jit
    def updated(params, state):
        decoder = merge(graph, params, state)
        rest = {name: batch[name] for name in ("segment_ids", "positions")}
        decoder.update_state(decoder.hidden(batch["tokens"], **rest).aux.statistics)
        return split(decoder)[2]

    before = jax.device_get(state.state)
    expected = jax.device_get(updated(state.params, state.state))
    state, metrics = make_train_step(config, placement)(state, placement.put_batch(batch))
    assert float(metrics["aux_loss"]) > 0
    old, want, got = (
        tree["layers"]["0"]["attention"]["mechanism"]
        for tree in (before, expected, jax.device_get(state.state))
    )
    assert ((old["centroids"] * got["centroids"]).sum(-1) < 1 - 1e-6).any()
    np.testing.assert_allclose(np.linalg.norm(got["centroids"], axis=-1), 1, rtol=1e-5)
    for name in ("centroids", "bias", "idle"):
        np.testing.assert_allclose(got[name], want[name], atol=1e-5, err_msg=name)


# Mistakes, and the scripts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clusters": 0}, "clusters=0 must be at least 1"),
        ({"cluster_window": 0}, "cluster_window=0"),
        ({"local_window": 0}, "local_window=0"),
        ({"reseed_after": 0}, "reseed_after=0"),
        ({"sinks": -1}, "sinks=-1 must not be negative"),
        ({"balance_rate": -0.1}, "balance_rate=-0.1"),
        ({"commitment": -1.0}, "commitment=-1.0"),
        ({"routing_heads": 0}, "routing_heads=0 must be at least 1, or None"),
        ({"decay": 1.0}, "decay=1.0 must lie in"),
        ({"mode": "fast"}, "mode='fast' is unknown"),
    ],
)
def test_configs_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_calls_that_make_no_sense_are_refused():
    wide = HeadShape(4, 2, 8, 8, 16)
    with pytest.raises(ValueError, match="routing_heads=3 is more than kv_heads=2"):
        cases.mechanism(dataclasses.replace(SMALL, routing_heads=3), wide)
    module = cases.mechanism(SMALL, SHAPE, dtype=jnp.float32)
    with pytest.raises(ValueError, match="capacity=0"):
        module.init_cache(1, 0, jnp.float32)
    with pytest.raises(ValueError, match="rollback=-1"):
        module.init_cache(1, 4, jnp.float32, rollback=-1)
    q, k, v, x = cases.arrays(SHAPE, 1, 1, 4, dtype=jnp.float32)
    with pytest.raises(ValueError, match="without a cache only"):
        module(cases.as_heads(q, k, v, x), module.init_cache(1, 8, jnp.float32), attend="fit")
    with pytest.raises(ValueError, match="beyond 32 bits; use fewer clusters"):
        check_sort_keys(4096, 2**18, 2**20)
    centroids = jnp.ones((2, 3, 8))
    for arguments, options, message in (
        ((q, k[0], v[0], jnp.ones((3, 3, 8))), {}, "K' <= 2"),
        ((q, k[0], v[0], jnp.ones((2, 3, 4))), {}, "H=8"),
        ((q, k[0], v[0], centroids, jnp.ones((2, 4))), {}, "bias.shape"),
        ((q, k[0], v[0], centroids), {"config": PAPER}, "routing_attention is causal"),
        ((q, k[0], v[0], centroids), {"routed_by": (q[:, :2], k[0])}, "must have the shapes"),
    ):
        with pytest.raises(ValueError, match=message):
            routing_attention(*arguments, **options)


def test_plain_function_is_the_module(x64):
    q, k, v, x = cases.arrays(SHAPE, 1, 1, T)
    module = cases.mechanism(SMALL, SHAPE)
    positions = jnp.arange(T)[None]
    run = jax.jit(
        lambda q, k, v: routing_attention(
            cases.rope(q, positions),
            cases.rope(k, positions),
            v,
            5.0 * module.centroids[...],
            routed_by=(q, k),
            config=SMALL,
        )
    )
    np.testing.assert_allclose(run(q, k[0], v[0]), cases.forward(module, (q, k, v, x)), atol=1e-12)


def test_sorted_keys_and_lists_of_a_known_case():
    clusters = jnp.asarray([[[0], [1], [0], [0], [1], [0], [0], [2]]], jnp.int32)
    eligible = jnp.asarray([[False, True, True, True, True, True, True, False]])
    lines = sort_keys(clusters, eligible, 2)
    assert lines.tolist() == [[2, 3, 5, 6, 8 + 1, 8 + 4, 16 + 0, 16 + 7]]
    config = Routing(clusters=2, cluster_window=2, local_window=2, sinks=1)
    rows = place_rows(1, 8, length=None, positions=None, segment_ids=None)
    lists = token_lists(config, jnp.zeros((1, 8, 1), jnp.int32), lines, rows, heads=1)
    # Row 7 attends sink 0, the last two of cluster 0 up to token 5, and tokens 6 and 7.
    assert lists[0, 7, 0].tolist() == [0, 3, 5, 6, 7]
    assert lists[0, 3, 0].tolist() == [0, 2, 3, -1, -1]


def test_leak_script_finds_the_leak_in_paper_mode_only():
    script = load_script("routing_leak")
    paper, causal = script.configs(clusters=4, window=16)
    leaking, tight = script.leak(paper, 64), script.leak(causal, 64)
    assert [row["changed"] for row in tight] == ["last 1", "last 16", "cut after the row"]
    for row in leaking:
        assert row["other_keys"] > 0
        assert row["other_output"] > 0
        assert row["largest_change"] > 1e-3
    for row in tight:
        assert row["other_keys"] == 0
        assert row["other_output"] == 0
        assert row["largest_change"] < 1e-14


def test_benchmark_measures_a_layer_and_survives_a_missing_peer(tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, SCRIPTS / "bench_routing.py", "--lengths", "256"]
    options = ["--sides", "routing,peer", "--repetitions", "1", "--directions", "forward"]
    where = ["--json", file, "--peer-python", "/nonexistent/python", "--threads", "2"]
    run = subprocess.run([*command, *options, *where], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    ours, grouped, peer = json.loads(file.read_text())
    assert "/nonexistent/python cannot be started" in peer["error"]
    assert (ours["kv_heads"], grouped["kv_heads"]) == (8, 2)
    for row in (ours, grouped):
        assert row["seconds"] > 0
        assert row["cpu_seconds"] > 0
        assert row["keys"] == 256
    wrong = subprocess.run([*command[:2], "--lengths", "100"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "multiples of 256" in wrong.stderr
