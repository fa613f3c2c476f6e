"""What is particular to DSA: the indexer's scores, exact ties, the token lists, its loss."""

import dataclasses
import functools

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn import DSA, Dense, dsa_attention
from sparse_attn.documents import place_rows
from sparse_attn.dsa import IndexRows, index_scores, top_tokens

SMALL = DSA(selected_tokens=6, index_heads=3, index_width=8, fit_rows=64)
SHAPE = cases.SHAPES["G2"]
T = 40
LAYOUTS = {
    "one": [1] * 40,
    "padded": [1] * 29 + [0] * 11,
    "packed": [1] * 13 + [2] * 17 + [3] * 2 + [0] * 8,
    "gaps": [1] * 9 + [0] * 3 + [2] * 20 + [0] * 7 + [3],
}


def best_tokens(scores, visible, count):
    """The definition: largest first, of equal ones the later first; ascending."""
    order = sorted(np.flatnonzero(visible), key=lambda s: (-scores[s], -s))
    return sorted(order[:count])


def scores_of(index_q, weight, index_k):
    """I[t, s] of one sequence."""
    return np.einsum(
        "tj,tjs->ts", weight, np.maximum(np.einsum("tjd,sd->tjs", index_q, index_k), 0)
    )


def visible_from(ids):
    """[T, T]: s up to t in the document of t."""
    t = np.arange(len(ids))
    return (ids[:, None] == ids[None]) & (t[None] <= t[:, None]) & (ids > 0)[:, None]


def brute(q, k, v, scores, ids, count):
    """Attention [T, N, H] over the best tokens, and the lists."""
    out, G = np.zeros((*q.shape[:2], v.shape[2])), q.shape[1] // k.shape[1]
    visible, lists = visible_from(ids), []
    for t in range(len(q)):
        keys = best_tokens(scores[t], visible[t], count)
        lists.append(keys)
        for n in range(q.shape[1] if keys else 0):
            logits = k[keys, n // G] @ q[t, n] / np.sqrt(q.shape[2])
            p = np.exp(logits - logits.max())
            out[t, n] = p @ v[keys, n // G] / p.sum()
    return out, lists


@functools.cache
def plain(count):
    """The function, jitted once for a budget."""
    config = DSA(selected_tokens=count)
    return jax.jit(lambda *a: dsa_attention(*a[:6], config=config, segment_ids=a[6]))


@settings(derandomize=True, deadline=None, max_examples=8)
@given(st.sampled_from(sorted(LAYOUTS)), st.sampled_from([1, 7]), st.integers(0, 3))
def test_function_attends_the_best_tokens(layout, count, seed):
    ids = np.asarray(LAYOUTS[layout])
    draw = np.random.default_rng(seed)
    with jax.enable_x64(True):
        q, k, v, _ = (np.asarray(a) for a in cases.arrays(SHAPE, 1, 1, T, seed=seed))
        # Small whole numbers: many scores are equal, many are 0.
        index_q = draw.integers(-2, 3, (1, T, 3, 4)).astype(float)
        weight = draw.integers(-1, 3, (1, T, 3)).astype(float)
        index_k = draw.integers(-2, 3, (1, T, 4)).astype(float)
        padding = (ids == 0)[None, :, None, None]
        poisoned = (np.where(padding, np.nan, x) for x in (k[0], v[0]))
        got = plain(count)(q, *poisoned, index_q, weight, index_k, jnp.asarray(ids)[None])
    scores = scores_of(index_q[0], weight[0], index_k[0])
    want, _ = brute(q[0], k[0, 0], v[0, 0], scores, ids, count)
    np.testing.assert_allclose(got[0], want, atol=1e-12)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([1, 5, 30, 50]))
def test_top_tokens_is_exact_on_ties_signs_and_infinities(seed, count):
    draw = np.random.default_rng(seed)
    values = np.asarray([-np.inf, -3.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 2.5, np.inf], np.float32)
    scores = values[draw.integers(0, len(values), (1, 6, 37))]
    flat = np.where(np.abs(scores) < 1e-30, 0.0, scores)  # a CPU may flush denormals
    visible = draw.random((1, 6, 37)) < 0.8
    chosen = selector(count)(jnp.asarray(flat), jnp.asarray(visible))
    for row in range(6):
        want = best_tokens(flat[0, row], visible[0, row], count)
        assert np.flatnonzero(chosen[0, row]).tolist() == want


@functools.cache
def selector(count):
    return jax.jit(lambda scores, visible: top_tokens(scores, visible, count))


def test_index_scores_follow_the_formula(x64):
    draw = np.random.default_rng(0)
    q, w, k = (draw.standard_normal(size) for size in ((2, 5, 3, 4), (2, 5, 3), (2, 9, 4)))
    start, stop = np.asarray([[0, 0, 2, 2, 4]] * 2), np.asarray([[1, 3, 3, 9, 4]] * 2)
    rows = IndexRows(*(jnp.asarray(a) for a in (q, w, start, stop)))
    scores, visible = index_scores(rows, jnp.asarray(k))
    for b in range(2):
        np.testing.assert_allclose(scores[b], scores_of(q[b], w[b], k[b]), atol=1e-12)
    assert visible[0].sum(-1).tolist() == [1, 3, 1, 7, 0]


def index_arrays(module, x, positions):
    """Index queries, weights and keys from the parameters, by NumPy and the rope alone."""
    p = {name: np.asarray(value[...]) for name, value in nnx.state(module.indexer).items()}
    x = np.asarray(x)
    k = x @ p["key"]
    k = (k - k.mean(-1, keepdims=True)) / np.sqrt(k.var(-1, keepdims=True) + 1e-6)
    k = k * p["key_scale"] + p["key_bias"]
    q = np.einsum("BTD,DId->BTId", x, p["query"])
    weight = x @ p["weight"] / np.sqrt(q.shape[2] * q.shape[3])
    dims = module.config.rotary
    q = np.asarray(cases.rope(jnp.asarray(q), positions, dims=dims))
    k = np.asarray(cases.rope(jnp.asarray(k)[:, :, None], positions, dims=dims))[:, :, 0]
    return q, weight, k


@pytest.mark.parametrize("rotary", [None, 0, 6])
def test_module_selects_and_attends_by_the_definition(rotary, x64):
    config = dataclasses.replace(SMALL, index_rotary=rotary)
    q, k, v, x = cases.arrays(SHAPE, 1, 2, T)
    ids = np.asarray([LAYOUTS["packed"], LAYOUTS["one"]])
    module = cases.mechanism(config, SHAPE)
    out, aux = cases.call(module, (q, k, v, x), segment_ids=jnp.asarray(ids), inspect=True)
    positions = place_rows(
        2, T, length=None, positions=None, segment_ids=jnp.asarray(ids)
    ).positions
    index_q, weight, index_k = index_arrays(module, x, positions)
    at_q, at_k = (np.asarray(cases.rope(a, positions)) for a in (q, k[0]))
    pairs = causal = 0
    for b in range(2):
        scores = scores_of(index_q[b], weight[b], index_k[b])
        want, lists = brute(at_q[b], at_k[b], np.asarray(v[0, b]), scores, ids[b], 6)
        np.testing.assert_allclose(out[b], want, atol=1e-12)
        for t in range(T):
            listed = np.asarray(aux.selection.indices[b, t, 0])
            assert listed.tolist() == lists[t] + [-1] * (6 - len(lists[t]))
        pairs += sum(len(keys) for keys in lists)
        causal += visible_from(ids[b]).sum()
    np.testing.assert_allclose(aux.metrics["density"], pairs / causal, rtol=1e-6)


def test_equal_scores_select_the_latest_tokens_in_prefill_and_decode(x64):
    q, k, v, x = cases.arrays(SHAPE, 1, 1, T)
    module = cases.mechanism(SMALL, SHAPE)
    module.indexer.weight[...] = jnp.zeros_like(module.indexer.weight[...])
    window = cases.forward(cases.mechanism(Dense(window=6), SHAPE), (q, k, v, x))
    np.testing.assert_allclose(cases.forward(module, (q, k, v, x)), window, atol=1e-12)
    step = jax.jit(lambda parts, cache: module(cases.as_heads(*parts), cache)[:2])
    cache = module.init_cache(1, 48, jnp.float64)
    at = 0
    for size in (20, 4, 1, 1):
        out, cache = step(cases.cut((q, k, v, x), at, at + size), cache)
        np.testing.assert_allclose(out, window[:, at : at + size], atol=1e-12)
        at += size


@pytest.mark.full
def test_dense_steps_keep_index_keys(x64):
    parts = cases.arrays(SHAPE, 1, 2, T)
    module = cases.mechanism(SMALL, SHAPE)
    cache = module.init_cache(2, T, jnp.float64)
    step = jax.jit(
        lambda parts, cache, attend: module(cases.as_heads(*parts), cache, attend=attend)[:2],
        static_argnums=2,
    )
    dense = cases.forward(cases.mechanism(Dense(), SHAPE), parts)
    out, cache = step(cases.cut(parts, 0, 30), cache, "dense")
    np.testing.assert_allclose(out, dense[:, :30], atol=1e-12)
    positions = jnp.broadcast_to(jnp.arange(T)[None], (2, T))
    index_k = index_arrays(module, parts[3], positions)[2]
    np.testing.assert_allclose(cache.index_k[:, :30], index_k[:, :30], atol=1e-12)
    out, cache = step(cases.cut(parts, 30, 40), cache, "sparse")
    np.testing.assert_allclose(out, cases.forward(module, parts)[:, 30:], atol=1e-12)
    with pytest.raises(ValueError, match="too small"):
        module(cases.as_heads(*cases.cut(parts, 0, 1)), cache)


def divergence(module, parts, ids, selected):
    """The loss by its formula, over all rows."""
    q, k, _, x = parts
    positions = place_rows(
        q.shape[0], T, length=None, positions=None, segment_ids=jnp.asarray(ids)
    ).positions
    index_q, weight, index_k = index_arrays(module, x, positions)
    at_q, at_k = (np.asarray(cases.rope(a, positions)) for a in (q, k[0]))
    terms = []
    for b in range(q.shape[0]):
        visible, scores = visible_from(ids[b]), scores_of(index_q[b], weight[b], index_k[b])
        for t in np.flatnonzero(ids[b]):
            keys = np.flatnonzero(visible[t])
            p = np.zeros(len(keys))
            for n in range(q.shape[2]):
                logits = at_k[b, keys, n // 2] @ at_q[b, t, n] / np.sqrt(q.shape[3])
                one = np.exp(logits - logits.max())
                p += one / one.sum()
            if selected:
                best = best_tokens(scores[t], visible[t], module.config.selected_tokens)
                p, keys = p[np.isin(keys, best)], np.asarray(best)
            p /= p.sum()
            share = np.exp(scores[t, keys] - scores[t, keys].max())
            terms.append((p * np.log(p / (share / share.sum()))).sum())
    return np.mean(terms)


@pytest.mark.parametrize("attend", ["fit", "sparse"])
def test_the_loss_is_the_divergence_and_trains_the_indexer_only(attend, x64):
    parts = cases.arrays(SHAPE, 1, 2, T)
    ids = np.asarray([LAYOUTS["padded"], LAYOUTS["packed"]])
    module = cases.mechanism(dataclasses.replace(SMALL, indexer_loss=0.5), SHAPE)
    graph, params = nnx.split(module)

    def loss(params, parts):
        merged = nnx.merge(graph, params)
        out, _, aux = merged(cases.as_heads(*parts), segment_ids=jnp.asarray(ids), attend=attend)
        return aux.loss, out

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (value, out), (by_params, by_parts) = run(params, parts)
    want = divergence(module, parts, ids, selected=attend == "sparse")
    np.testing.assert_allclose(value, want * (0.5 if attend == "sparse" else 1), rtol=1e-5)
    assert all((g == 0).all() for g in by_parts)
    by_name = nnx.to_pure_dict(by_params)["indexer"]
    assert all((by_name[name] != 0).any() for name in ("query", "key", "weight", "key_scale"))
    if attend == "fit":
        dense = cases.mechanism(Dense(), SHAPE)
        wanted = cases.forward(dense, parts, segment_ids=jnp.asarray(ids))
        np.testing.assert_allclose(out, wanted, atol=1e-12)


def test_the_output_does_not_train_the_indexer_and_the_loss_can_be_off(x64):
    parts = cases.arrays(SHAPE, 1, 1, T)
    module = cases.mechanism(dataclasses.replace(SMALL, indexer_loss=0.0), SHAPE)
    graph, params = nnx.split(module)

    def total(params, parts):
        out, _, aux = nnx.merge(graph, params)(cases.as_heads(*parts))
        return jnp.sum(out**2), aux.loss

    gradients, loss = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(params, parts)
    assert loss == 0
    assert all((g == 0).all() for g in jax.tree.leaves(gradients[0]))
    assert all((g != 0).any() for g in gradients[1][:3])
    assert (gradients[1][3] == 0).all()


def test_fitting_brings_the_selection_closer_to_dense_attention(x64):
    parts = cases.arrays(SHAPE, 1, 2, T)
    graph, params = nnx.split(cases.mechanism(SMALL, SHAPE))

    @jax.jit
    def step(params):
        def loss(params):
            return nnx.merge(graph, params)(cases.as_heads(*parts), attend="fit")[2].loss

        value, gradient = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)

    losses = []
    for _ in range(60):
        loss, params = step(params)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]


def test_sizes_of_the_config():
    assert DSA(index_width=64).rotary == 32
    assert DSA(index_width=6).rotary == 2
    assert DSA(index_rotary=0).rotary == 0
    assert SMALL.auxiliary_bits(SHAPE, 16) == 128
    assert SMALL.density(6) == 1
    assert SMALL.density(40) == pytest.approx((21 + 34 * 6) / 820)
    assert SMALL.covering(40).selected_tokens == 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selected_tokens": 0}, "selected_tokens=0 must be at least 1"),
        ({"index_heads": 0}, "index_heads=0"),
        ({"index_width": 0}, "index_width=0"),
        ({"fit_rows": 0}, "fit_rows=0"),
        ({"indexer_loss": -1.0}, "indexer_loss=-1.0 must not be negative"),
        ({"index_rotary": 3}, "index_rotary=3 must be even"),
        ({"index_rotary": 10}, "between 0 and index_width=8"),
    ],
)
def test_configs_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_calls_that_make_no_sense_are_refused():
    module = cases.mechanism(SMALL, SHAPE, dtype=jnp.float32)
    q, k, v, x = cases.arrays(SHAPE, 1, 1, 4, dtype=jnp.float32)
    with pytest.raises(ValueError, match="without a cache only"):
        module(cases.as_heads(q, k, v, x), module.init_cache(1, 8, jnp.float32), attend="fit")
    with pytest.raises(ValueError, match="capacity=0"):
        module.init_cache(1, 0, jnp.float32)
    with pytest.raises(ValueError, match="rollback=-1"):
        module.init_cache(1, 4, jnp.float32, rollback=-1)
    index_q, weight, index_k = jnp.ones((1, 4, 3, 2)), jnp.ones((1, 4, 3)), jnp.ones((1, 4, 2))
    for arguments, message in (
        ((q, k[0], v[0, :, :3], index_q, weight, index_k), "do not fit together"),
        ((q, k[0], v[0], index_q[:, :3], weight, index_k), "must be"),
        ((q, k[0], v[0], index_q, weight[..., :2], index_k), "index_weight"),
        ((q, k[0], v[0], index_q, weight, index_k[..., :1]), "index_k"),
    ):
        with pytest.raises(ValueError, match=message):
            dsa_attention(*arguments)
