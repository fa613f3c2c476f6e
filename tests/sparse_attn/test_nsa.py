"""What is particular to NSA: branches, gates, forced blocks, selector gradients, configuration."""

import dataclasses

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_attn import NSA, Dense

SMALL = NSA.tiny()[0]
SHAPE = cases.SHAPES["G2"]
T = 40


def run(config, parts, **options):
    """(output, aux), jitted."""
    return cases.call(cases.mechanism(config, SHAPE), parts, **options)


@pytest.mark.parametrize("cached", [False, True])
def test_window_branch_sees_exactly_w_keys(cached, x64):
    config = dataclasses.replace(SMALL, gates=(0.0, 0.0, 1.0))
    parts = cases.arrays(SHAPE, 3, 1, T)
    module = cases.mechanism(config, SHAPE)
    if cached:
        cache = module.init_cache(1, T, jnp.float64)
        step = jax.jit(lambda p, c: module(cases.as_heads(*p), c)[:2])
        outs = []
        for t in range(T):
            out, cache = step(cases.cut(parts, t, t + 1), cache)
            outs.append(out)
        got = jnp.concatenate(outs, axis=1)
    else:
        got = cases.forward(module, parts)
    window = cases.mechanism(Dense(window=config.window), SHAPE)
    want = cases.forward(window, (parts[0], parts[1][2:], parts[2][2:], parts[3]))
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_compressed_branch_is_attention_over_entries(x64):
    config = dataclasses.replace(SMALL, gates=(1.0, 0.0, 0.0), compression="mean")
    parts = cases.arrays(SHAPE, 3, 1, T)
    q, k, v, _ = parts
    got = run(config, parts)[0]
    starts = np.arange(0, T - 3, 2)
    k_cmp = jnp.stack([k[0][:, i : i + 4].mean(axis=1) for i in starts], axis=1)
    v_cmp = jnp.stack([v[0][:, i : i + 4].mean(axis=1) for i in starts], axis=1)
    positions = jnp.arange(T)[None]
    q = cases.rope(q, positions)
    k_cmp = cases.rope(k_cmp, jnp.asarray(starts)[None])
    for t in (0, 2, 3, 17, 39):
        seen = starts + 3 <= t
        if not seen.any():
            assert (got[0, t] == 0).all()
            continue
        for n in range(4):
            logits = k_cmp[0, seen, n // 2] @ q[0, t, n] / np.sqrt(8)
            want = jax.nn.softmax(logits) @ v_cmp[0, seen, n // 2]
            np.testing.assert_allclose(got[0, t, n], want, atol=1e-12)


def test_forced_blocks_count_inside_n(x64):
    parts = cases.arrays(SHAPE, 3, 2, T)
    selection = run(SMALL, parts, inspect=True)[1].selection
    assert selection.block_size == 8
    assert selection.indices.shape == (2, T, 2, 4)
    for t in range(T):
        for blocks in np.asarray(selection.indices[:, t]).reshape(-1, 4):
            listed = [b for b in blocks if b >= 0]
            assert listed == sorted(set(listed))
            assert len(listed) == min(4, t // 8 + 1)
            assert {0, t // 8, max(t // 8 - 1, 0)} <= set(listed)


def test_inspection_reports_quality_and_density(x64):
    parts = cases.arrays(SHAPE, 3, 1, T)
    aux = run(SMALL, parts, inspect=True)[1]
    assert 0 < float(aux.metrics["recall_top32"]) < 1
    assert 0 < float(aux.metrics["captured_mass"]) < 1
    covering = run(SMALL.covering(T), parts, inspect=True)[1].metrics
    np.testing.assert_allclose(covering["recall_top32"], 1.0)
    np.testing.assert_allclose(covering["captured_mass"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(covering["density"], 1.0)
    np.testing.assert_allclose(covering["output_error"], 0.0, atol=1e-6)


def gradients_of(config, parts, attend="sparse", loss_only=False):
    """Gradients of a random functional of the output (+ auxiliary loss) for params and inputs."""
    module = cases.mechanism(config, SHAPE)
    graphdef, params = nnx.split(module)
    seed = jnp.asarray(np.random.default_rng(4).standard_normal((1, T, 4, 8)))

    def total(params, parts):
        out, _, aux = nnx.merge(graphdef, params)(cases.as_heads(*parts), attend=attend)
        return aux.loss if loss_only else jnp.sum(out * seed) + aux.loss

    by_params, by_parts = jax.jit(jax.grad(total, argnums=(0, 1)))(params, parts)
    return nnx.to_pure_dict(by_params), by_parts


def test_selector_gradient_options_train_what_they_say(x64):
    parts = cases.arrays(SHAPE, 3, 1, T)
    through, _ = gradients_of(SMALL, parts)
    none, _ = gradients_of(dataclasses.replace(SMALL, selector_gradient="none"), parts)
    kl, _ = gradients_of(dataclasses.replace(SMALL, selector_gradient="kl"), parts)
    assert (through["compress_k"]["w_in"] != 0).any()
    assert all((g == 0).all() for g in jax.tree.leaves(none["compress_k"]))
    assert (none["compress_v"]["w_in"] != 0).any()
    assert (kl["compress_k"]["w_in"] != 0).any()

    config = dataclasses.replace(SMALL, selector_gradient="kl")
    only_loss, by_parts = gradients_of(config, parts, attend="fit", loss_only=True)
    assert (only_loss["compress_k"]["w_in"] != 0).any()
    assert all((g == 0).all() for g in jax.tree.leaves(only_loss["compress_v"]))
    assert all((g == 0).all() for g in by_parts)


def test_kl_loss_falls_when_the_selector_learns(x64):
    parts = cases.arrays(SHAPE, 3, 1, T)
    module = cases.mechanism(dataclasses.replace(SMALL, selector_gradient="kl"), SHAPE)
    graphdef, params = nnx.split(module)

    @jax.jit
    def step(params):
        def loss(params):
            return nnx.merge(graphdef, params)(cases.as_heads(*parts))[2].loss

        value, gradient = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)

    losses = []
    for _ in range(40):
        loss, params = step(params)
        losses.append(float(loss))
    assert losses[0] > 0
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.full
def test_straight_through_keeps_the_value_and_adds_the_block_gradient(x64):
    parts = cases.arrays(SHAPE, 3, 1, T)
    straight = dataclasses.replace(SMALL, selector_gradient="straight_through")
    np.testing.assert_allclose(run(straight, parts)[0], run(SMALL, parts)[0], atol=1e-13)

    # The added term alone, against the derivative of sum_j p_j <cotangent, contribution_j>.
    only_selected = dataclasses.replace(straight, gates=(0.0, 1.0, 0.0), compression="mean")
    frozen = dataclasses.replace(SMALL, gates=(0.0, 1.0, 0.0), compression="mean")
    with_term = gradients_of(only_selected, parts)[1]
    without = gradients_of(frozen, parts)[1]
    added = with_term[1][0] - without[1][0]
    assert (without[1][0] == 0).all()

    q, k, v, _ = (np.asarray(a) for a in parts)
    seed = np.random.default_rng(4).standard_normal((1, T, 4, 8))
    selection = run(frozen, parts, inspect=True)[1].selection
    indices = np.asarray(selection.indices)[0]
    positions = jnp.arange(T)[None]
    q_rot = np.asarray(cases.rope(jnp.asarray(q), positions))[0]
    k_rot = np.asarray(cases.rope(jnp.asarray(k[1]), positions))[0]
    starts = np.arange(0, T - 3, 2)
    weights = {-1: 1.0, 0: 2.0, 1: 2.0, 2: 2.0, 3: 1.0}

    def functional(raw):
        k_cmp = jnp.stack([raw[0, i : i + 4].mean(axis=0) for i in starts])
        k_cmp = cases.rope(k_cmp[None], jnp.asarray(starts)[None])[0]
        total = 0.0
        for t in range(3, T):
            seen = jnp.asarray(starts + 3 <= t)
            for h in range(2):
                p = 0.0
                for n in (2 * h, 2 * h + 1):
                    logits = k_cmp[:, h] @ q_rot[t, n] / np.sqrt(8)
                    p = p + jax.nn.softmax(jnp.where(seen, logits, -jnp.inf)) / 4
                listed = indices[t, h][indices[t, h] >= 0]
                tokens = [s for j in listed for s in range(8 * j, 8 * j + 8) if s <= t]
                for n in (2 * h, 2 * h + 1):
                    a = k_rot[tokens, h] @ q_rot[t, n] / np.sqrt(8)
                    a = np.exp(a - a.max())
                    a /= a.sum()
                    for j in listed:
                        inside = [x for x, s in enumerate(tokens) if s // 8 == j]
                        part = a[inside] @ v[1, 0, np.asarray(tokens)[inside], h]
                        importance = sum(
                            w * p[4 * j + m]
                            for m, w in weights.items()
                            if 0 <= 4 * j + m < len(starts)
                        )
                        total = total + importance * float(part @ seed[0, t, n])
        return total

    want = jax.grad(functional)(jnp.asarray(k[0]))
    np.testing.assert_allclose(added[0], want[0], atol=1e-10)


def test_fresh_gates_are_close_to_window_attention():
    module = cases.mechanism(SMALL, SHAPE, dtype=jnp.float32)
    gates = module.gates(jnp.zeros((1, 1, SHAPE.model_width)))
    np.testing.assert_allclose(gates[0, 0, 0], jax.nn.sigmoid(jnp.array([-2.0, -2.0, 2.0])))


@pytest.mark.full
def test_dense_attend_lifts_the_budget_and_keeps_the_cache_going(x64):
    config = dataclasses.replace(SMALL, gates=(0.0, 1.0, 0.0))
    parts = cases.arrays(SHAPE, 3, 1, T)
    want = run(SMALL.covering(T), parts)[0]
    np.testing.assert_allclose(run(config, parts, attend="dense")[0], want, atol=1e-12)
    module = cases.mechanism(config, SHAPE)
    cache = module.init_cache(1, T, jnp.float64)
    _, dense_cache, _ = module(cases.as_heads(*parts), cache, attend="dense")
    _, sparse_cache, _ = module(cases.as_heads(*parts), cache)
    for a, b in zip(jax.tree.leaves(dense_cache), jax.tree.leaves(sparse_cache), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compression_stride": 5}, "must divide"),
        ({"compression_block": 128}, "needs l <= L"),
        ({"selected_blocks": 2}, "cannot hold the forced"),
        ({"window": 0}, "window=0"),
        ({"recent_blocks": 0}, "own block"),
        ({"mode": "mean_pool"}, "mean_pool"),
    ],
)
def test_bad_configurations_name_the_values(changes, message):
    with pytest.raises(ValueError, match=message):
        NSA(**changes)


def test_wrong_number_of_branches_is_refused(x64):
    with pytest.raises(ValueError, match="kv_branches=3"):
        run(SMALL, cases.arrays(SHAPE, 1, 1, T))


def test_density_is_an_upper_bound_of_the_measured_one(x64):
    parts = cases.arrays(SHAPE, 3, 1, T)
    measured = float(run(SMALL, parts, inspect=True)[1].metrics["density"])
    assert measured <= SMALL.density(T)
    assert NSA().density(65536) < 0.12


def test_density_at_lengths_whose_pairs_need_more_than_32_bits():
    config = NSA()
    length = 2**20
    # Selected and window keys are few there: what is left is an entry every 16 tokens.
    keys = 16 * 64 + 512 + (length - 32) / 2 / 16
    assert config.density(length) == pytest.approx(keys / (length / 2), rel=2e-3)
