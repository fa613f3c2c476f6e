"""Quality and densities of a selection against sums over explicit masks."""

import dataclasses

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn import OracleTopK, Selection
from sparse_attn.documents import place_rows
from sparse_attn.metrics import (
    attended_density,
    head_recall,
    measure,
    sample_rows,
    selection_quality,
)
from sparse_attn.registry import MechanismConfig

SHAPE = cases.SHAPES["G2"]
B, T, N, K, G, H = 2, 48, 4, 2, 2, 8


@dataclasses.dataclass(frozen=True)
class Selector(MechanismConfig):
    """Keeps 24 bits a token; its branches have K/V of their own if there are three."""

    branches: int = 1

    @property
    def kv_branches(self):
        return self.branches

    def auxiliary_bits(self, shape, element_bits=16):
        return 24.0


def drawn(lists, block_size, seed=0, packed=True):
    """Random heads, rows with two documents or padding, and a random selection."""
    rng = np.random.default_rng(seed)
    q, k, v, _ = cases.arrays(SHAPE, 1, B, T, seed=seed)
    ids = np.ones((B, T), np.int32)
    if packed:
        ids[0, 16:] = 2
        ids[1, 40:] = 0
    rows = place_rows(B, T, length=None, positions=None, segment_ids=jnp.asarray(ids))
    blocks = T // block_size
    indices = np.full((B, T, lists, 5), -1, np.int32)
    starts = np.asarray(rows.start)
    for b in range(B):
        for t in range(T):
            first, last = int(starts[b, t]) // block_size, t // block_size
            for j in range(lists):
                if ids[b, t] and rng.random() < 0.9:
                    some = np.arange(first, last + 1)
                    some = np.sort(rng.permutation(some)[: rng.integers(1, 6)])
                    indices[b, t, j, : len(some)] = some
    assert indices.max() < blocks
    return (q, k[0], v[0]), Selection(jnp.asarray(indices), block_size), rows


def masks(selection, rows):
    """(causal [B, T, S], listed [B, T, N, S]) as booleans."""
    s = np.arange(T)
    start, index = np.asarray(rows.start), np.asarray(rows.index)
    causal = (s >= start[..., None]) & (s <= index[..., None])
    listed = np.zeros((B, T, N, T), bool)
    indices = np.asarray(selection.indices)
    lists = indices.shape[2]
    for b, t, n in np.ndindex(B, T, N):
        for block in indices[b, t, n * lists // N]:
            if block >= 0:
                at = block * selection.block_size
                listed[b, t, n, at : at + selection.block_size] = True
    return causal, listed & causal[:, :, None]


def probabilities(q, k, causal):
    repeated = np.repeat(np.asarray(k), G, axis=2)
    logits = np.einsum("btnh,bsnh->btns", np.asarray(q), repeated) / np.sqrt(H)
    e = np.where(causal[:, :, None], np.exp(logits), 0)
    return e / np.maximum(e.sum(-1, keepdims=True), 1e-300)


@pytest.mark.parametrize(
    ("lists", "block_size", "window", "branches"),
    [(N, 1, None, 1), (K, 8, 5, 1), (1, 4, 5, 3)],
)
def test_measure_equals_sums_over_masks(lists, block_size, window, branches, x64):
    heads, selection, rows = drawn(lists, block_size)
    config = Selector(branches=branches)
    run = jax.jit(
        lambda heads, selection: measure(
            *heads, selection, rows, config=config, shape=SHAPE, sinks=2, recent=3, window=window
        )
    )
    got = {name: float(value) for name, value in run(heads, selection).items()}
    causal, listed = masks(selection, rows)
    s, index, start = np.arange(T), np.asarray(rows.index), np.asarray(rows.start)
    near = causal & (s > index[..., None] - (window or 0))
    p = probabilities(*heads[:2], causal)
    valid = np.asarray(rows.valid)
    every = listed | near[:, :, None]
    np.testing.assert_allclose(got["density"], every.sum() / (N * causal.sum()), rtol=1e-6)

    some = np.zeros((B, T), bool)
    for b in range(B):
        places = np.flatnonzero(valid[b])
        some[b, places[[len(places) * i // 8 - 1 for i in range(1, 9)]]] = True
    assert (some.sum(axis=1) == 8).all()
    pairs = causal.sum(-1)[some].sum()
    groups = listed.reshape(B, T, K, G, T).any(axis=3)
    if branches == 1:
        fetched = (groups | near[:, :, None]).sum((2, 3))
    else:
        fetched = groups.sum((2, 3)) + K * near.sum(-1)
    fetched = fetched[some].sum()
    np.testing.assert_allclose(got["fetched_density"], fetched / (K * pairs), rtol=1e-6)
    read = fetched * 2 * H * 2 + pairs * 24 / 8
    np.testing.assert_allclose(got["bytes_density"], read / (K * pairs * 2 * H * 2), rtol=1e-6)
    attended = (listed.sum((2, 3)) + N * near.sum(-1))[some].sum()
    spent = attended * 4 * H + pairs * 2 * G * 24 / 16
    np.testing.assert_allclose(got["flops_density"], spent / (N * pairs * 4 * H), rtol=1e-6)
    assert got["auxiliary_bits"] == 24

    beyond = (s >= start[..., None] + 2) & (s <= index[..., None] - 3)
    want = {"recall_top32": [], "recall_beyond": [], "captured_mass": [], "output_error": []}
    by_head = [[] for _ in range(N)]
    for b, t in np.argwhere(some):
        for n in range(N):
            row = p[b, t, n]
            value = np.asarray(heads[2])[b, :, n // G]
            for name, keys in (("recall_top32", causal[b, t]), ("recall_beyond", beyond[b, t])):
                top = [x for x in np.argsort(-row * keys)[:32] if (row * keys)[x] > 0]
                if top:
                    want[name].append(listed[b, t, n][top].mean())
                    if name == "recall_beyond":
                        by_head[n].append(want[name][-1])
            mass = row[listed[b, t, n]].sum()
            want["captured_mass"].append(mass)
            sparse = (row * listed[b, t, n]) @ value / max(mass, 1e-30)
            dense = row @ value
            error = np.linalg.norm(sparse - dense) / np.linalg.norm(dense)
            want["output_error"].append(error)
    for name, values in want.items():
        np.testing.assert_allclose(got[name], np.mean(values), rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(
        got["output_error_p95"], np.percentile(want["output_error"], 95), rtol=1e-5
    )

    def others(selection):
        recall = head_recall(*heads[:2], selection, rows, sinks=2, recent=3)
        quality = selection_quality(*heads, selection, rows)
        return recall, quality, attended_density(selection, rows, window=window)

    recall, quality, density = jax.jit(others)(selection)
    np.testing.assert_allclose(recall, [np.mean(values) for values in by_head], rtol=1e-5)
    assert {name: float(x) for name, x in quality.items()} == pytest.approx(
        {name: got[name] for name in quality}
    )
    assert float(density) == pytest.approx(got["density"])


def jitted(heads, selection, rows):
    @jax.jit
    def run(q, k, v):
        return measure(q, k, v, selection, rows, config=Selector(), shape=SHAPE)

    return run(*heads)


def test_everything_selected_is_dense(x64):
    heads, _, rows = drawn(1, 1, packed=False)
    indices = jnp.arange(T, dtype=jnp.int32)[None, None, None, :]
    causal = jnp.arange(T, dtype=jnp.int32)[None, :, None, None]
    indices = jnp.broadcast_to(jnp.where(indices <= causal, indices, -1), (B, T, 1, T))
    got = jitted(heads, Selection(indices, 1), rows)
    for name in ("recall_top32", "recall_beyond", "captured_mass", "density", "fetched_density"):
        assert float(got[name]) == pytest.approx(1), name
    assert float(got["output_error"]) < 1e-9
    assert float(got["bytes_density"]) == pytest.approx(1 + 3 / (K * 2 * H * 2))
    assert float(got["flops_density"]) == pytest.approx(1 + 2 * G * 1.5 / (N * 4 * H))


def test_nothing_but_padding_measures_zero():
    q, k, v, _ = cases.arrays(SHAPE, 1, B, T, dtype=jnp.float32)
    ids = jnp.zeros((B, T), jnp.int32)
    rows = place_rows(B, T, length=None, positions=None, segment_ids=ids)
    selection = Selection(jnp.full((B, T, 1, 2), -1, jnp.int32), 1)
    got = jitted((q, k[0], v[0]), selection, rows)
    assert {name: float(value) for name, value in got.items()} == {
        name: 24.0 if name == "auxiliary_bits" else 0.0 for name in got
    }


def test_padding_is_not_measured(x64):
    shape = cases.SHAPES["G1"]
    parts = cases.arrays(shape, 1, 2, T)
    module = cases.mechanism(OracleTopK(budget=3, sinks=1, recent=2), shape)
    for few in (6, 20):
        ids = jnp.broadcast_to(jnp.arange(T) < few, (2, T)).astype(jnp.int32)
        padded = cases.call(module, parts, segment_ids=ids, inspect=True)[1].metrics
        alone = cases.call(module, cases.cut(parts, 0, few), inspect=True)[1].metrics
        assert float(alone["captured_mass"]) > 0.3
        for name, value in alone.items():
            assert float(padded[name]) == pytest.approx(float(value)), name


def test_a_policy_reports_what_it_attends(x64):
    shape = cases.SHAPES["G1"]
    parts = cases.arrays(shape, 1, 1, T)
    module = cases.mechanism(OracleTopK(budget=6, sinks=2, recent=4), shape)
    _, aux = cases.call(module, parts, inspect=True)
    attended = sum(min(t, 12) for t in range(1, T + 1))
    assert float(aux.metrics["density"]) == pytest.approx(attended / (T * (T + 1) / 2))
    sampled = [t + 1 for t in np.asarray(sample_rows(T, 8))]
    fetched = sum(min(t, 12) for t in sampled) / sum(sampled)
    assert float(aux.metrics["fetched_density"]) == pytest.approx(fetched)
    # The oracle reads all keys (8 of 8 + 6 channels) to choose, and then what it chose.
    assert float(aux.metrics["bytes_density"]) == pytest.approx(8 / 14 + fetched)
    assert float(aux.metrics["flops_density"]) == pytest.approx(8 / 14 + fetched)
    beyond = [t - 6 for t in sampled if t > 6]
    recall = np.mean([min(6, n) / min(32, n) for n in beyond])
    assert float(aux.metrics["recall_beyond"]) == pytest.approx(recall)
