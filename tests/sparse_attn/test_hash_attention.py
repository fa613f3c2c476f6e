"""HashAttention against NumPy written from the formulas: selection, losses, state, options."""

import dataclasses
import math

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import jitted
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.hamming import pack_codes
from sparse_attn import Dense, HashAttention, hash_attention
from sparse_attn import hash_training as training

SMALL, PAPER = HashAttention.tiny()
SHAPE = cases.SHAPES["G2"]
T = 40


def phi(mapping, x, j):
    """What list j hashes x [.., H] to, in float64."""
    weights = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(mapping)))
    y = np.asarray(x)
    if mapping.kind == "mlp":
        for layer, bias in (("w_in", "in_bias"), ("w_middle", "middle_bias")):
            y = y @ weights[layer][j] + weights[bias][j]
            y = y / (1 + np.exp(-y))
    return y @ weights["w_out"][j] + weights["out_bias"][j]


def rotated(parts, ids=None):
    """q, k, v in NumPy, rotated by the place in the document."""
    q, k, v, _ = parts
    ids = np.ones(q.shape[:2], int) if ids is None else np.asarray(ids)
    place = np.zeros_like(ids)
    for b, t in np.ndindex(*ids.shape):
        place[b, t] = place[b, t - 1] + 1 if t and ids[b, t] == ids[b, t - 1] else 0
    q, k = (np.asarray(cases.rope(x, jnp.asarray(place))) for x in (q, k[0]))
    return q, k, np.asarray(v[0]), place, ids


def structure(config, module, parts, ids=None):
    """For every row and list: (b, t, j, query heads, u_q, u_k, first, t, amount, q, k, v)."""
    q, k, v, place, ids = rotated(parts, ids)
    N, K = q.shape[2], k.shape[2]
    lists = K if config.share == "kv" else N
    amounts = config.budget if isinstance(config.budget, tuple) else (config.budget,) * lists
    of_list = [range(j * (N // lists), (j + 1) * (N // lists)) for j in range(lists)]
    u_q = [phi(module.phi_q, q[:, :, list(heads)], j) for j, heads in enumerate(of_list)]
    u_k = [phi(module.phi_k, k[:, :, j * K // lists], j) for j in range(lists)]
    for b, t in np.ndindex(*ids.shape):
        if ids[b, t] == 0:
            continue
        for j, heads in enumerate(of_list):
            kv = j * K // lists
            first = t - place[b, t]
            amount = amounts[j]
            if isinstance(amount, float):
                amount = math.ceil(round(amount * (place[b, t] + 1), 9))
            yield {
                "row": (b, t),
                "list": j,
                "heads": heads,
                "kv": kv,
                "first": first,
                "amount": amount,
                "candidates": list(range(first + config.sinks, t - config.recent + 1)),
                "q": q[b, t, list(heads)],
                "k": k[b, :, kv],
                "v": v[b, :, kv],
                "u_q": u_q[j][b, t],
                "u_k": u_k[j][b],
            }


def levels(config, u):
    """What a query's bits count: soft bits rounded to one of L levels, times L - 1."""
    steps = config.query_levels - 1
    soft = np.tanh(u / (config.final_temperature if config.anneal_steps else 1.0))
    return 2 * np.ceil(steps * (soft + 1) / 2 - 0.5) - steps


def select(config, item):
    """Step 3 of the module's docstring, by a sort."""
    t, first = item["row"][1], item["first"]
    agree = levels(config, item["u_q"]) @ np.where(item["u_k"] > 0, 1, -1).T
    agree = agree.max(axis=0) if config.group_score == "max" else agree.sum(axis=0)
    ordered = sorted(item["candidates"], key=lambda s: (-agree[s], -s))
    sinks = range(first, min(first + config.sinks, t + 1))
    recent = range(max(first, t - config.recent + 1), t + 1)
    return sorted({*sinks, *recent, *ordered[: item["amount"]]})


def attention(item, keys):
    logits = item["q"] @ item["k"][keys].T / np.sqrt(item["q"].shape[-1])
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ item["v"][keys]


def check_output(config, module, parts, ids=None, call=None):
    if call is None:
        out, aux = cases.call(module, parts, inspect=True)
    else:
        out, aux = call(parts, jnp.asarray(ids))
    want = np.zeros(out.shape)
    indices = np.asarray(aux.selection.indices)
    for item in structure(config, module, parts, ids):
        b, t = item["row"]
        keys = select(config, item)
        want[b, t, list(item["heads"])] = attention(item, keys)
        listed = indices[b, t, item["list"]]
        assert listed[listed >= 0].tolist() == keys
    np.testing.assert_allclose(out, want, atol=1e-12)
    return aux


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(SMALL, budget=(3, 0.25)),
        dataclasses.replace(SMALL, bits=8, budget=0, sinks=0),
        dataclasses.replace(PAPER, budget=0.1),
        dataclasses.replace(PAPER, mapping="mlp", budget=(1, 2, 0.5, 9), recent=1),
    ],
    ids=["kv per list", "nothing but recent", "query fraction", "query per list"],
)
def test_selection_and_output_follow_the_formulas(config, x64):
    module = cases.mechanism(config, SHAPE)
    module.phi_k.out_bias[...] = module.phi_k.out_bias[...] + 0.3
    aux = check_output(config, module, cases.arrays(SHAPE, 1, 2, T))
    assert aux.selection.block_size == 1
    np.testing.assert_allclose(aux.metrics["density"], config.density(T), rtol=1e-6)


@pytest.fixture(scope="module")
def packed_call():
    """A module and one compiled call of it, for layouts of 2 x 24 tokens."""
    with jax.enable_x64(True):
        config = dataclasses.replace(SMALL, budget=0.25, sinks=1, recent=2)
        module = cases.mechanism(config, SHAPE)

        def call(parts, ids):
            return module(cases.as_heads(*parts), segment_ids=ids, inspect=True)[::2]

        return config, module, jax.jit(call)


@settings(derandomize=True, deadline=None, max_examples=8)
@given(lengths=st.lists(st.integers(1, 17), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_packed_and_padded_layouts_follow_the_formulas(packed_call, lengths, seed):
    ids = np.zeros((2, 24), np.int32)
    packed = np.repeat(np.arange(len(lengths)) + 1, lengths)[:24]
    ids[0, : len(packed)] = packed
    ids[1, : lengths[0]] = 1
    config, module, call = packed_call
    with jax.enable_x64(True):
        check_output(config, module, cases.arrays(SHAPE, 1, 2, 24, seed=seed), ids, call)


def test_codes_are_cached_once_and_dense_steps_keep_them(x64):
    config = SMALL
    module = cases.mechanism(config, SHAPE)
    parts = cases.arrays(SHAPE, 1, 2, T)
    dense = cases.forward(cases.mechanism(Dense(), SHAPE), parts)
    sparse = cases.forward(module, parts)
    cache = module.init_cache(2, T, jnp.float64)
    assert cache.codes.nbytes * 8 / (2 * cache.codes.shape[3]) == config.auxiliary_bits(SHAPE)
    steps = {
        attend: jax.jit(lambda p, c, a=attend: module(cases.as_heads(*p), c, attend=a)[:2])
        for attend in ("dense", "sparse")
    }
    out, cache = steps["dense"](cases.cut(parts, 0, 21), cache)
    np.testing.assert_allclose(out, dense[:, :21], atol=1e-12)
    for t in range(21, 25):
        out, cache = steps["dense"](cases.cut(parts, t, t + 1), cache)
        np.testing.assert_allclose(out[:, 0], dense[:, t], atol=1e-12)
    for t in range(25, 29):
        out, cache = steps["sparse"](cases.cut(parts, t, t + 1), cache)
        np.testing.assert_allclose(out[:, 0], sparse[:, t], atol=1e-12)
    k = rotated(parts)[1]
    for j in range(2):
        want = np.asarray(pack_codes(jnp.asarray(phi(module.phi_k, k[:, :, j], j) > 0)))
        np.testing.assert_array_equal(cache.codes[:, j, :, :29], want.transpose(0, 2, 1)[..., :29])
    np.testing.assert_array_equal(cache.codes[..., 29:], 0)


def softplus(x):
    return np.logaddexp(0.0, x)


def target_of(config, item):
    """The fit_top candidates with the most attention, the most recent of equals first; theirs."""
    t, first = item["row"][1], item["first"]
    logits = item["q"] @ item["k"][first : t + 1].T / np.sqrt(item["q"].shape[-1])
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    wanted = (p / p.sum(axis=-1, keepdims=True)).sum(axis=0)
    if config.value_aware_target:
        wanted = wanted * np.linalg.norm(item["v"][first : t + 1], axis=-1)
    ordered = sorted(item["candidates"], key=lambda s: (-wanted[s - first], -s))
    best = ordered[: config.fit_top]
    return best, wanted[np.asarray(best, int) - first]


def want_fit(config, module, parts, ids=None, steps=0, tau=1.0):
    """Loss, recall and worst recall over all rows (``fit_rows`` >= T)."""
    scramble = jitted(training.scramble)
    total, count = 0.0, 0
    hits, wanted = {}, {}
    codes_q, codes_k = {}, {}
    for item in structure(config, module, parts, ids):
        t, j = item["row"][1], item["list"]
        relaxed_q, relaxed_k = np.tanh(item["u_q"] / tau), np.tanh(item["u_k"] / tau)
        codes_q.setdefault(j, []).extend(relaxed_q)
        codes_k.setdefault(j, []).append(relaxed_k[t])
        if config.hard_keys:
            relaxed_k = np.where(item["u_k"] > 0, 1.0, -1.0)
        z = relaxed_q.mean(axis=0) @ relaxed_k.T
        (target, attention), candidates = target_of(config, item), item["candidates"]
        weight = config.positive_weight + config.positive_weight_per_token * (t - item["first"] + 1)
        if config.loss == "bce":
            for s in candidates:
                total += weight * softplus(-z[s]) if s in target else softplus(z[s])
                count += 1
        elif candidates:
            draw = np.arange(training.RANKING_NEGATIVES) + (t + 1) * training.RANKING_NEGATIVES
            shift = np.asarray(scramble(jnp.asarray(draw, jnp.uint32), jnp.asarray(steps)))
            for s in candidates[0] + shift.astype(int) % len(candidates):
                if s not in target:
                    weights = attention**config.target_power
                    total += (weights * softplus(z[s] - z[target])).sum()
                    count += weights.sum()
        found = set(select(config, item)) & set(target)
        hits[j] = hits.get(j, 0) + len(found)
        wanted[j] = wanted.get(j, 0) + len(target)
    loss = total / max(count, 1)
    for side in (codes_q, codes_k):
        means = np.stack([np.mean(values, axis=0) for values in side.values()])
        loss += config.balance * (means**2).mean()
    recalls = [hits[j] / wanted[j] for j in hits]
    return loss, sum(hits.values()) / sum(wanted.values()), min(recalls), count


FIT = dataclasses.replace(SMALL, fit_rows=64, fit_top=6)


@pytest.mark.parametrize(
    "changes",
    [
        {"positive_weight": 3.0, "positive_weight_per_token": 0.1},
        {"share": "query", "mapping": "linear", "value_aware_target": True, "balance": 0.5},
        {"loss": "ranking", "budget": 0.25, "hard_keys": True, "balance": 0.1},
        pytest.param(
            {"loss": "ranking", "share": "query", "balance": 0.2, "value_aware_target": True},
            marks=pytest.mark.full,
        ),
        {"loss": "ranking", "target_power": 0.5},
        {"loss": "ranking", "share": "query", "target_power": 1.0, "value_aware_target": True},
    ],
    ids=["bce", "bce query", "ranking", "ranking query", "weighed", "weighed query"],
)
def test_fit_loss_and_recall_follow_the_formulas(changes, x64):
    config = dataclasses.replace(FIT, anneal_steps=10, final_temperature=0.25, **changes)
    module = cases.mechanism(config, SHAPE)
    module.steps[...] = jnp.asarray(5.0)
    ids = np.asarray([[1] * 17 + [2] * 11 + [3] * 4, [1] * 26 + [0] * 6], np.int32)
    parts = cases.arrays(SHAPE, 1, 2, 32)
    out, aux = cases.call(module, parts, attend="fit", segment_ids=jnp.asarray(ids))
    loss, recall, worst, _ = want_fit(config, module, parts, ids, steps=5, tau=0.25**0.5)
    np.testing.assert_allclose(aux.loss, loss, rtol=2e-6)
    np.testing.assert_allclose(aux.metrics["hash_recall"], recall, rtol=1e-6)
    np.testing.assert_allclose(aux.metrics["hash_recall_worst"], worst, rtol=1e-6)
    np.testing.assert_allclose(aux.metrics["hash_temperature"], 0.5, rtol=1e-6)
    dense = cases.mechanism(Dense(), SHAPE)
    want = cases.forward(dense, parts, segment_ids=jnp.asarray(ids))
    np.testing.assert_allclose(out, want, atol=1e-12)


@pytest.mark.full
def test_chunks_of_fitted_rows_change_nothing(x64, monkeypatch):
    module = cases.mechanism(FIT, SHAPE)
    parts = cases.arrays(SHAPE, 1, 1, 36)

    def run():
        graph, params = nnx.split(module)

        def loss(params):
            return nnx.merge(graph, params)(cases.as_heads(*parts), attend="fit")[2].loss

        return jax.jit(jax.value_and_grad(loss))(params)

    want = run()
    monkeypatch.setattr("sparse_attn.masked.CHUNK_ELEMENTS", 1)
    for a, b in zip(jax.tree.leaves(run()), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(
    "config", [dataclasses.replace(SMALL, budget=(3, 0.25)), PAPER], ids=["kv", "query"]
)
def test_one_kv_head_at_a_time_changes_nothing(config, x64, monkeypatch):
    module = cases.mechanism(config, SHAPE)
    parts = cases.arrays(SHAPE, 1, 2, T)
    ids = jnp.asarray(np.repeat([[1, 2, 3], [1, 1, 0]], [20, 17, 3], axis=1))
    weights = jnp.asarray(np.random.default_rng(3).standard_normal((2, T, 4, 8)))

    def run():
        def total(parts):
            out = module(cases.as_heads(*parts), segment_ids=ids)[0]
            return jnp.sum(weights * out), out

        return jax.jit(jax.value_and_grad(total, has_aux=True))(parts)

    want = run()
    monkeypatch.setattr("sparse_attn.one_head.TOGETHER_BYTES", 0)
    for a, b in zip(jax.tree.leaves(run()), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-13)


def gradients(config, parts, attend, only_loss=False, ids=None):
    module = cases.mechanism(config, SHAPE)
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    seed = jnp.asarray(np.random.default_rng(4).standard_normal((1, T, 4, 8)))

    def total(params, parts):
        module = nnx.merge(graph, params, rest)
        out, _, aux = module(cases.as_heads(*parts), attend=attend, segment_ids=ids)
        return aux.loss + (0.0 if only_loss else jnp.sum(out * seed)), aux

    run = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    (by_params, by_parts), aux = run(params, parts)
    return nnx.to_pure_dict(by_params), by_parts, aux


@pytest.mark.parametrize(("loss", "hard_keys"), [("bce", False), ("ranking", True)])
def test_fit_gradient_reaches_the_mappings_alone(loss, hard_keys, x64):
    parts = cases.arrays(SHAPE, 1, 1, T)
    config = dataclasses.replace(FIT, loss=loss, hard_keys=hard_keys, balance=0.1)
    by_params, by_parts, _ = gradients(config, parts, "fit", only_loss=True)
    assert set(by_params) == {"phi_q", "phi_k"}
    for gradient in jax.tree.leaves(by_params):
        assert (gradient != 0).any()
    for gradient in by_parts:
        assert (gradient == 0).all()


@pytest.mark.full
def test_joint_loss_adds_to_the_model_without_touching_it(x64):
    parts = cases.arrays(SHAPE, 1, 1, T)
    alone, by_parts, aux = gradients(dataclasses.replace(FIT, joint_loss=0.0), parts, "sparse")
    assert all((gradient == 0).all() for gradient in jax.tree.leaves(alone))
    assert float(aux.loss) == 0
    assert aux.statistics == {}
    config = dataclasses.replace(FIT, joint_loss=0.3)
    joint, with_loss, aux = gradients(config, parts, "sparse")
    for a, b in zip(with_loss, by_parts, strict=True):
        np.testing.assert_array_equal(a, b)
    fitted, _, fit = gradients(config, parts, "fit", only_loss=True)
    np.testing.assert_allclose(aux.loss, 0.3 * fit.loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(joint), jax.tree.leaves(fitted), strict=True):
        np.testing.assert_allclose(a, 0.3 * b, rtol=1e-5, atol=1e-12)
    assert aux.metrics.keys() == fit.metrics.keys()


def test_padding_full_of_nan_leaves_the_fit_finite(x64):
    q, k, v, x = cases.arrays(SHAPE, 1, 1, T)
    ids = jnp.asarray([[1] * 29 + [0] * 11], jnp.int32)
    clean = gradients(FIT, (q, k, v, x), "fit", only_loss=True, ids=ids)
    poisoned = (q, k.at[:, :, 29:].set(jnp.nan), v.at[:, :, 29:].set(jnp.nan), x)
    got = gradients(FIT, poisoned, "fit", only_loss=True, ids=ids)
    for a, b in zip(jax.tree.leaves(got[0]), jax.tree.leaves(clean[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert float(got[2].loss) == float(clean[2].loss) > 0


def test_documents_without_candidates_have_no_loss():
    parts = cases.arrays(SHAPE, 1, 1, 5, dtype=jnp.float32)
    for loss in ("bce", "ranking"):
        module = cases.mechanism(dataclasses.replace(FIT, loss=loss), SHAPE, dtype=jnp.float32)
        aux = cases.call(module, parts, attend="fit")[1]
        assert float(aux.loss) == 0
        assert float(aux.metrics["hash_recall"]) == 1


@pytest.mark.parametrize("mapping", ["mlp", "linear"])
def test_maps_begin_as_projections_that_keep_angles(mapping):
    config = dataclasses.replace(SMALL, mapping=mapping, bits=256, hidden=128, query_levels=2)
    module = cases.mechanism(config, SHAPE, dtype=jnp.float32)
    x, y = np.random.default_rng(0).standard_normal((2, 1, 200, 2, 2, 8)).astype(np.float32)
    far = np.mean((module.phi_q(x) > 0) != (module.phi_k(y) > 0), axis=-1)
    cosine = np.sum(x * y, axis=-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    assert np.corrcoef(far.ravel(), np.arccos(cosine).ravel())[0, 1] > 0.95


def test_fitting_teaches_the_codes_what_attention_wants():
    config = dataclasses.replace(
        FIT, hidden=16, bits=32, budget=6, anneal_steps=60, final_temperature=0.3
    )
    parts = cases.arrays(SHAPE, 1, 2, 64, dtype=jnp.float32, scale=2.0)
    module = cases.mechanism(config, SHAPE, dtype=jnp.float32)
    # Maps that begin alike know much already: let them begin unrelated.
    module.phi_k.w_out[...] = jnp.roll(module.phi_k.w_out[...], 1, axis=2)
    graph, params, state = nnx.split(module, nnx.Param, ...)

    @jax.jit
    def step(params, state):
        def loss(params):
            aux = nnx.merge(graph, params, state)(cases.as_heads(*parts), attend="fit")[2]
            return aux.loss, aux

        grads, aux = jax.grad(loss, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - 0.03 * jnp.sign(g), params, grads)
        learnt = nnx.merge(graph, params, state)
        learnt.update_state(aux.statistics)
        return params, nnx.split(learnt, nnx.Param, ...)[2], aux

    metrics = []
    for _ in range(60):
        params, state, aux = step(params, state)
        metrics.append(jax.device_get(aux.metrics))
    assert metrics[0]["hash_recall"] < 0.4
    assert metrics[-1]["hash_recall"] > metrics[0]["hash_recall"] + 0.25
    assert metrics[0]["hash_temperature"] == 1
    assert metrics[-1]["hash_temperature"] < 0.31


def test_progress_counts_steps_that_taught_and_sets_the_temperature():
    config = dataclasses.replace(SMALL, anneal_steps=4, final_temperature=0.25)
    module = cases.mechanism(config, SHAPE, dtype=jnp.float32)
    module.update_state({})
    module.update_state({"fitted": jnp.asarray(0.0)})
    assert float(module.steps[...]) == 0
    for microbatches in (1.0, 3.0):
        module.update_state({"fitted": jnp.asarray(microbatches)})
    assert float(module.steps[...]) == 2
    for steps, want in ((0, 1.0), (2, 0.5), (4, 0.25), (9, 0.25)):
        got = training.temperature(config, jnp.asarray(float(steps)))
        np.testing.assert_allclose(got, want, rtol=1e-6)
    assert float(training.temperature(SMALL, jnp.asarray(50.0))) == 1


def test_sampled_rows_cover_the_sequence_and_move_with_the_steps():
    picked = [np.asarray(training.pick_rows(1000, 16, jnp.asarray(float(s)))) for s in range(20)]
    edges = np.arange(17) * 1000 // 16
    for rows in picked:
        assert (rows >= edges[:-1]).all()
        assert (rows < edges[1:]).all()
    assert len({tuple(rows) for rows in picked}) == 20
    np.testing.assert_array_equal(picked[3], training.pick_rows(1000, 16, jnp.asarray(3.0)))
    np.testing.assert_array_equal(training.pick_rows(5, 16, jnp.asarray(3.0)), np.arange(5))


@pytest.mark.parametrize("config", [SMALL, PAPER], ids=["kv", "query"])
def test_the_function_equals_the_module(config, x64):
    parts = cases.arrays(SHAPE, 1, 2, T)
    module = cases.mechanism(config, SHAPE)
    ids = jnp.asarray([[1] * 22 + [2] * 18, [1] * 30 + [0] * 10], jnp.int32)
    q, k, v, _, _ = rotated(parts, ids)
    lists = config.lists(SHAPE)
    by_list = [[phi(module.phi_k, k[:, :, j * 2 // lists], j) > 0] for j in range(lists)]
    k_codes = pack_codes(jnp.asarray(np.concatenate(by_list).transpose(1, 2, 0, 3)))
    by_head = [levels(config, phi(module.phi_q, q[:, :, n], n * lists // 4)) for n in range(4)]
    edges = np.arange(2 - config.query_levels, config.query_levels, 2)[:, None]
    bits = np.stack(by_head, axis=2)[:, :, :, None] > edges
    q_codes = pack_codes(jnp.asarray(bits.reshape(2, T, -1, config.bits)))
    got = jax.jit(
        lambda q, k, v: hash_attention(q, k, v, q_codes, k_codes, config=config, segment_ids=ids)
    )(q, k, v)
    np.testing.assert_allclose(got, cases.forward(module, parts, segment_ids=ids), atol=1e-12)
    with pytest.raises(ValueError, match=r"q_codes\.shape"):
        hash_attention(q, k, v, q_codes[..., :0], k_codes, config=config)
    with pytest.raises(ValueError, match=r"k_codes\.shape"):
        hash_attention(q, k, v, q_codes, k_codes[:, :, :1], config=config)


def test_default_configuration_of_the_function():
    q, k, v, _ = cases.arrays(SHAPE, 1, 1, 9, dtype=jnp.float32)
    q_codes, k_codes = jnp.zeros((1, 9, 4, 1), jnp.uint32), jnp.zeros((1, 9, 2, 1), jnp.uint32)
    got = hash_attention(q, k[0], v[0], q_codes, k_codes)
    weights = np.tril(np.ones((9, 9)))
    for n in range(4):
        logits = np.asarray(q[0, :, n] @ k[0, 0, :, n // 2].T) / np.sqrt(8)
        p = np.exp(logits) * weights
        want = p / p.sum(axis=1, keepdims=True) @ np.asarray(v[0, 0, :, n // 2])
        np.testing.assert_allclose(got[0, :, n], want, atol=1e-5)


def test_fractions_are_exact_ratios():
    seen = jnp.arange(1, 5000)
    for amount, ratio in ((0.1, (1, 10)), (1 / 32, (1, 32)), (1.0, (1, 1)), (0.07, (7, 100))):
        config = dataclasses.replace(SMALL, budget=amount)
        from sparse_attn.hash_selection import budget_at, slots

        want = -(-np.asarray(seen) * ratio[0] // ratio[1])
        np.testing.assert_array_equal(budget_at(amount, seen), want)
        room = min(4999, int(want[-1]) + config.sinks + config.recent)
        assert slots(config, 4999, 2) == room
    assert int(budget_at(7, seen)[0]) == 7


def test_density_and_bits():
    config = dataclasses.replace(SMALL, budget=(2, 0.5))
    pairs = [min(t + 1, 5 + k) for t in range(30) for k in (2, -(-(t + 1) // 2))]
    assert config.density(30) == pytest.approx(sum(pairs) / 2 / (30 * 31 / 2))
    assert SMALL.covering(30).density(30) == 1
    assert SMALL.auxiliary_bits(SHAPE) == 2 * 32
    assert PAPER.auxiliary_bits(SHAPE) == 4 * 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 12}, "bits=12 must be a positive multiple of 8"),
        ({"bits": 0}, "bits=0"),
        ({"mapping": "tree"}, "mapping='tree' is unknown"),
        ({"share": "all"}, "share='all' is unknown"),
        ({"loss": "mse"}, "loss='mse' is unknown"),
        ({"recent": 0}, "recent=0 must be at least 1"),
        ({"fit_rows": 0}, "fit_rows=0 must be at least 1"),
        ({"sinks": -1}, "sinks=-1 must not be negative"),
        ({"joint_loss": -0.5}, "joint_loss=-0.5 must not be negative"),
        ({"final_temperature": 0.0}, "final_temperature=0.0"),
        ({"target_power": 0.5}, "weighs the targets of loss=.ranking., not of .bce."),
        ({"budget": -3}, "budget=-3 must not be negative"),
        ({"budget": 1.5}, "budget=1.5: a fraction"),
        ({"budget": 1e-6}, "use an int for a number of tokens"),
        ({"budget": (3, 2.0)}, "a fraction of the context"),
        ({"budget": ()}, "names no list"),
        ({"query_levels": 1}, "query_levels=1 must be between 2"),
    ],
)
def test_configurations_that_cannot_hold(changes, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        HashAttention(**changes)


def test_calls_that_cannot_be():
    with pytest.raises(ValueError, match=r"has 3 entries, share='kv' makes 2 lists"):
        cases.mechanism(dataclasses.replace(SMALL, budget=(1, 2, 3)), SHAPE)
    module = cases.mechanism(SMALL, SHAPE, dtype=jnp.float32)
    parts = cases.arrays(SHAPE, 1, 1, 4, dtype=jnp.float32)
    with pytest.raises(ValueError, match="without a cache only"):
        module(cases.as_heads(*parts), module.init_cache(1, 8, jnp.float32), attend="fit")
    with pytest.raises(ValueError, match="capacity=0"):
        module.init_cache(1, 0, jnp.float32)
    with pytest.raises(ValueError, match="capacity 3 is too small"):
        module(cases.as_heads(*parts), module.init_cache(1, 3, jnp.float32))
