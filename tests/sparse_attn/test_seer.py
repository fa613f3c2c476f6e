"""What is particular to SeerAttention: the gate, what it learns from, budget and threshold."""

import dataclasses
import functools

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import attend_listed, best_blocks, layout, listed
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn import Seer

BUDGET, THRESHOLD = Seer.tiny()
SHAPE = cases.SHAPES["G2"]
T = 40


def rotate(x, positions):
    """Rope of x [A, heads, H] in NumPy arrays."""
    return np.asarray(cases.rope(jnp.asarray(x)[None], jnp.asarray(positions)[None]))[0]


def gates(module, q, k):
    """gate[t][h]: softmax over the blocks before row t's own, from un-rotated q and k."""
    w_q, w_k = np.asarray(module.gate.w_q[...]), np.asarray(module.gate.w_k[...])
    T, K, H = q.shape[0], k.shape[1], q.shape[2]
    queries = np.stack([q.reshape(T, K, -1)[:, h] @ w_q[h] for h in range(K)], axis=1)
    queries = rotate(queries, np.arange(T))
    whole = [k[8 * j : 8 * (j + 1)] for j in range(T // 8)]
    pooled = [np.concatenate([b.max(0), b.min(0), b.mean(0)], axis=-1) for b in whole]
    keys = np.zeros((len(whole), K, H))
    for j, features in enumerate(pooled):
        for h in range(K):
            keys[j, h] = features[h] @ w_k[h]
    if whole:
        keys = rotate(keys, 8 * np.arange(len(whole)))
    result = []
    for t in range(T):
        row = []
        for h in range(K):
            logits = keys[: t // 8, h] @ queries[t, h] / np.sqrt(H)
            e = np.exp(logits - logits.max(initial=-np.inf)) if logits.size else logits
            row.append(e / e.sum() if logits.size else e)
        result.append(row)
    return result


def brute_lists(config, gate):
    """Blocks of every row and kv head: the own one, and the best or the good enough."""
    lists = []
    for t, row in enumerate(gate):
        own = t // 8
        if config.threshold is None:
            chosen = [best_blocks([*g, 0.0], config.slots, {own}) for g in row]
        else:
            chosen = [[*np.flatnonzero(g >= config.threshold).tolist(), own] for g in row]
        lists.append(chosen)
    return lists


def by_head(lists):
    return [[blocks for blocks in row for _ in range(2)] for row in lists]


def rotated(parts):
    q, k, v = (np.asarray(a) for a in (parts[0][0], parts[1][0, 0], parts[2][0, 0]))
    at = np.arange(len(q))
    return q, k, rotate(q, at), rotate(k, at), v


@pytest.mark.parametrize(
    "implementation", [pytest.param("reference", marks=pytest.mark.full), "xla"]
)
@pytest.mark.parametrize("config", [BUDGET, THRESHOLD, Seer(selection_block=8, selected_tokens=24)])
def test_selection_and_output_equal_brute_force(config, implementation, x64):
    parts = cases.arrays(SHAPE, 1, 1, T)
    module = cases.mechanism(config, SHAPE, implementation=implementation)
    out, aux = cases.call(module, parts, inspect=True)
    q, k, q_rotated, k_rotated, v = rotated(parts)
    want = brute_lists(config, gates(module, q, k))
    assert aux.selection.indices.shape == (1, T, 2, config.slots)
    for t in range(T):
        for h in range(2):
            assert listed(aux.selection.indices[0], t, h) == want[t][h], (t, h)
    expected = attend_listed(q_rotated, k_rotated, v, by_head(want), 8)
    np.testing.assert_allclose(out[0], expected, atol=1e-12)
    assert 0 < float(aux.metrics["captured_mass"]) < 1
    assert float(aux.metrics["density"]) <= config.density(T) + 1e-6
    assert float(aux.loss) == 0


@functools.cache
def packed(config):
    module = cases.mechanism(config, SHAPE)
    return (
        module,
        jax.jit(
            lambda parts, ids: module(cases.as_heads(*parts), segment_ids=ids, attend="fit")[2].loss
        ),
        jax.jit(lambda parts, ids: module(cases.as_heads(*parts), segment_ids=ids)[0]),
    )


def divergence(module, parts, rows):
    """Sum over ``rows`` and kv heads of KL(target || gate), and how many there are."""
    raw_q, raw_k, q, k_rotated, _ = rotated(parts)
    gate = gates(module, raw_q, raw_k)
    total, count = 0.0, 0
    for t in rows:
        own = t // 8
        if own == 0:
            continue
        for h in range(2):
            best = np.zeros(own)
            for n in (2 * h, 2 * h + 1):
                logits = k_rotated[: t + 1, h] @ q[t, n] / np.sqrt(8)
                p = np.exp(logits - logits.max())
                p /= p.sum()
                best = np.maximum(best, p[: 8 * own].reshape(own, 8).max(axis=1))
            target = best / best.sum()
            total += np.sum(target * (np.log(target) - np.log(gate[t][h])))
            count += 1
    return total, count


@pytest.mark.full
@settings(derandomize=True, deadline=None, max_examples=6)
@given(
    config=st.sampled_from([BUDGET, THRESHOLD]),
    lengths=st.sampled_from([(48,), (33, 7), (1, 8, 25), (5,)]),
    seed=st.integers(0, 2**31),
)
def test_packed_documents_equal_brute_force(config, lengths, seed):
    """Outputs and fit loss; all 48 rows are sampled."""
    total = 48
    ids, starts = layout(lengths, 8, total)
    with jax.enable_x64(True):
        module, loss_of, forward = packed(config)
        parts = cases.arrays(SHAPE, 1, 1, total, seed=seed)
        segment_ids = jnp.asarray(ids)[None]
        out, loss = np.asarray(forward(parts, segment_ids))[0], float(loss_of(parts, segment_ids))
        sums = np.zeros(2)
        for start, length in zip(starts, lengths, strict=True):
            document = cases.cut(parts, start, start + length)
            q, k, q_rotated, k_rotated, v = rotated(document)
            lists = brute_lists(config, gates(module, q, k))
            want = attend_listed(q_rotated, k_rotated, v, by_head(lists), 8)
            np.testing.assert_allclose(out[start : start + length], want, atol=1e-12)
            sums += divergence(module, document, range(length))
    np.testing.assert_allclose(loss, sums[0] / max(sums[1], 1), rtol=1e-6)
    assert (out[ids == 0] == 0).all()


def test_fit_loss_is_the_divergence_on_sampled_rows(x64):
    config = dataclasses.replace(BUDGET, fit_rows=4)
    parts = cases.arrays(SHAPE, 1, 1, T)
    module = cases.mechanism(config, SHAPE)
    out, aux = cases.call(module, parts, attend="fit")
    total, count = divergence(module, parts, [9, 19, 29, 39])
    np.testing.assert_allclose(aux.loss, total / count, rtol=1e-6)
    dense = cases.forward(cases.mechanism(config.covering(T), SHAPE), parts)
    np.testing.assert_allclose(out, dense, atol=1e-12)


@pytest.mark.parametrize("joint", [False, True])
def test_only_the_gate_learns_from_the_loss_and_only_from_it(joint, x64):
    module = cases.mechanism(dataclasses.replace(BUDGET, joint=joint), SHAPE)
    graphdef, params = nnx.split(module)
    parts = cases.arrays(SHAPE, 1, 1, T)

    def run(attend, weight_out, weight_loss):
        def total(params, parts):
            out, _, aux = nnx.merge(graphdef, params)(cases.as_heads(*parts), attend=attend)
            return weight_out * jnp.sum(out**2) + weight_loss * aux.loss

        return jax.jit(jax.grad(total, argnums=(0, 1)))(params, parts)

    def silent(tree):
        return all((g == 0).all() for g in jax.tree.leaves(tree))

    by_gate, by_parts = run("sparse", 0.0, 1.0)
    assert silent(by_gate) != joint
    assert silent(by_parts)
    if joint:
        return
    by_gate, by_parts = run("fit", 0.0, 1.0)
    assert all((g != 0).any() for g in jax.tree.leaves(by_gate))
    assert silent(by_parts)
    by_gate, by_parts = run("sparse", 1.0, 0.0)
    assert silent(by_gate)
    assert all((g != 0).any() for g in by_parts[:3])


def test_loss_falls_and_recall_rises_when_the_gate_learns(x64):
    parts = cases.arrays(SHAPE, 1, 1, T, scale=2.0)
    module = cases.mechanism(BUDGET, SHAPE)
    graphdef, params = nnx.split(module)

    @jax.jit
    def step(params):
        def loss(params):
            return nnx.merge(graphdef, params)(cases.as_heads(*parts), attend="fit")[2].loss

        value, gradient = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)

    def captured(params):
        aux = cases.call(nnx.merge(graphdef, params), parts, inspect=True)[1]
        return float(aux.metrics["captured_mass"])

    losses, before = [], captured(params)
    for _ in range(60):
        loss, params = step(params)
        losses.append(float(loss))
    assert losses[-1] < 0.6 * losses[0]
    assert captured(params) > before


@pytest.mark.parametrize("rollback", [0, 3])
def test_cache_holds_the_gate_keys_of_whole_blocks(rollback, x64):
    parts = cases.arrays(SHAPE, 1, 2, T)
    module = cases.mechanism(BUDGET, SHAPE)
    cache = module.init_cache(2, T, jnp.float64, rollback=rollback)
    assert cache.tail.shape[1] == 7 + rollback
    step = jax.jit(
        lambda parts, cache, attend: module(cases.as_heads(*parts), cache, attend=attend)[1],
        static_argnames="attend",
    )
    for (start, stop), attend in (((0, 13), "sparse"), ((13, 26), "dense"), ((26, 39), "sparse")):
        cache = step(cases.cut(parts, start, stop), cache, attend=attend)
    k = parts[1][0]
    pieces = k[:, :32].reshape(2, 4, 8, 2, 8)
    want = cases.rope(module.gate.keys(pieces), jnp.broadcast_to(8 * jnp.arange(4)[None], (2, 4)))
    np.testing.assert_allclose(
        jnp.transpose(cache.gate_keys, (0, 3, 1, 2))[:, :4], want, atol=1e-14
    )
    assert (np.asarray(cache.gate_keys)[:, :, :, 4:] == 0).all()
    with pytest.raises(ValueError, match="without a cache"):
        module(cases.as_heads(*parts), cache, attend="fit")


def test_threshold_bounds_the_slots():
    assert Seer(selected_tokens=None, threshold=0.005).slots == 201
    assert Seer(selected_tokens=None, threshold=1.0).slots == 2
    assert Seer(selected_tokens=None, threshold=0.1).slots == 11
    default = Seer()
    assert default.slots == 64
    assert default.auxiliary_bits(SHAPE, 16) == 2 * 8 * 16 / 64
    covering = THRESHOLD.covering(20)
    assert (covering.selected_tokens, covering.threshold) == (24, None)
    assert default.density(4096) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection_block": 0}, "selection_block=0"),
        ({"fit_rows": 0}, "fit_rows=0"),
        ({"threshold": 0.1}, "give one of them"),
        ({"selected_tokens": None}, "give one of them"),
        ({"selected_tokens": 100}, "positive multiple of selection_block=64"),
        ({"selected_tokens": 0}, "positive multiple"),
        ({"selected_tokens": None, "threshold": 0.0}, r"threshold=0.0 must lie in \(0, 1\]"),
        ({"selected_tokens": None, "threshold": 1.5}, "threshold=1.5"),
    ],
)
def test_bad_configurations_name_the_values(changes, message):
    with pytest.raises(ValueError, match=message):
        Seer(**changes)


def test_cache_sizes_are_checked():
    module = cases.mechanism(BUDGET, SHAPE, dtype=jnp.float32)
    with pytest.raises(ValueError, match="rollback=-1"):
        module.init_cache(1, 8, jnp.float32, rollback=-1)
