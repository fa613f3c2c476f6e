"""What is particular to MoBA: a list per query head, the own block inside k, the hard gate."""

import functools

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import attend_listed, best_blocks, layout, listed
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn import MoBA, dense_attention, moba_attention

(SMALL,) = MoBA.tiny()
SHAPE = cases.SHAPES["G2"]
T = 40


def brute_lists(config, q, k):
    """Blocks of every row and query head of one document: the own one, and the best earlier."""
    size, group = config.selection_block, q.shape[1] // k.shape[1]
    lists = []
    for t in range(len(q)):
        own = t // size
        means = [k[size * j : size * (j + 1)].mean(axis=0) for j in range(own)]
        row = []
        for n in range(q.shape[1]):
            scores = [float(q[t, n] @ mean[n // group]) for mean in means]
            row.append(best_blocks([*scores, 0.0], config.selected_blocks, {own}))
        lists.append(row)
    return lists


@pytest.mark.parametrize(
    "implementation", [pytest.param("reference", marks=pytest.mark.full), "xla"]
)
@pytest.mark.parametrize("selected", [2, pytest.param(3, marks=pytest.mark.full)])
def test_selection_and_output_equal_brute_force(implementation, selected, x64):
    parts = cases.arrays(SHAPE, 1, 1, T)
    config = MoBA(selection_block=8, selected_blocks=selected)
    module = cases.mechanism(config, SHAPE, implementation=implementation)
    out, aux = cases.call(module, parts, inspect=True)
    positions = jnp.arange(T)[None]
    q, k = (np.asarray(cases.rope(a, positions))[0] for a in (parts[0], parts[1][0]))
    want = brute_lists(config, q, k)
    assert aux.selection.indices.shape == (1, T, 4, selected)
    for t in range(T):
        for n in range(4):
            assert listed(aux.selection.indices[0], t, n) == want[t][n], (t, n)
    np.testing.assert_allclose(
        out[0], attend_listed(q, k, np.asarray(parts[2])[0, 0], want, 8), atol=1e-12
    )
    attended = [
        sum(min(8, t + 1 - 8 * j) for j in blocks) for t, row in enumerate(want) for blocks in row
    ]
    density = sum(attended) / (4 * T * (T + 1) / 2)
    np.testing.assert_allclose(aux.metrics["density"], density, rtol=1e-6)
    np.testing.assert_allclose(config.density(T), density, rtol=1e-12)


@functools.cache
def function(config):
    return jax.jit(lambda q, k, v, ids: moba_attention(q, k, v, config=config, segment_ids=ids))


@settings(derandomize=True, deadline=None, max_examples=8)
@given(
    config=st.sampled_from([SMALL, MoBA(selection_block=4, selected_blocks=4)]),
    lengths=st.sampled_from([(48,), (33, 7), (1, 8, 25), (5,)]),
    seed=st.integers(0, 2**31),
)
def test_function_on_packed_documents_equals_brute_force(config, lengths, seed):
    total, size = 48, config.selection_block
    ids, starts = layout(lengths, size, total)
    with jax.enable_x64(True):
        parts = cases.arrays(SHAPE, 1, 1, total, seed=seed)
        q, k, v = parts[0], parts[1][0], parts[2][0]
        out = np.asarray(function(config)(q, k, v, jnp.asarray(ids)[None]))[0]
    q, k, v = (np.asarray(a)[0] for a in (q, k, v))
    for start, length in zip(starts, lengths, strict=True):
        document = slice(start, start + length)
        lists = brute_lists(config, q[document], k[document])
        want = attend_listed(q[document], k[document], v[document], lists, size)
        np.testing.assert_allclose(out[document], want, atol=1e-12)
    assert (out[ids == 0] == 0).all()


def test_one_block_is_attention_within_it(x64):
    q, k, v, _ = cases.arrays(SHAPE, 1, 1, T)
    out = moba_attention(q, k[0], v[0], config=MoBA(selection_block=8, selected_blocks=1))
    ids = jnp.arange(T)[None] // 8 + 1
    np.testing.assert_allclose(out, dense_attention(q, k[0], v[0], segment_ids=ids), atol=1e-12)


def test_unselected_blocks_get_no_gradient(x64):
    q, k, v, _ = cases.arrays(SHAPE, 1, 1, T)
    lists = brute_lists(SMALL, np.asarray(q)[0], np.asarray(k)[0, 0])

    def last_row(k, v):
        return jnp.sum(moba_attention(q, k[0], v[0], config=SMALL)[0, T - 1, 0] ** 2)

    by_k, by_v = jax.jit(jax.grad(last_row, argnums=(0, 1)))(k, v)
    touched = [s // 8 in lists[T - 1][0] for s in range(T)]
    for gradient in (by_k, by_v):
        np.testing.assert_array_equal((gradient[0, 0, :, 0] != 0).all(axis=-1), touched)
        assert (gradient[0, 0, :, 1] == 0).all()


def test_cache_holds_the_means_of_whole_blocks(x64):
    parts = cases.arrays(SHAPE, 1, 2, T)
    module = cases.mechanism(SMALL, SHAPE)
    cache = module.init_cache(2, T, jnp.float64)
    step = jax.jit(lambda parts, cache: module(cases.as_heads(*parts), cache)[1])
    for start, stop in ((0, 13), (13, 26), (26, 39)):
        cache = step(cases.cut(parts, start, stop), cache)
    positions = jnp.broadcast_to(jnp.arange(T)[None], (2, T))
    k = np.asarray(cases.rope(parts[1][0], positions))
    for j in range(4):
        mean = k[:, 8 * j : 8 * (j + 1)].mean(axis=1)
        np.testing.assert_allclose(cache.means[:, :, :, j], mean, atol=1e-14)
    assert (np.asarray(cache.means)[:, :, :, 4:] == 0).all()


@pytest.mark.parametrize("attend", ["dense", "fit"])
def test_dense_attend_is_dense(attend, x64):
    parts = cases.arrays(SHAPE, 1, 1, T)
    module = cases.mechanism(SMALL, SHAPE)
    out, aux = cases.call(module, parts, attend=attend)
    want = cases.forward(cases.mechanism(SMALL.covering(T), SHAPE), parts)
    np.testing.assert_allclose(out, want, atol=1e-12)
    assert float(aux.loss) == 0
    assert aux.selection is None
    cache = module.init_cache(1, T, jnp.float64)
    if attend == "fit":
        with pytest.raises(ValueError, match="without a cache"):
            module(cases.as_heads(*parts), cache, attend=attend)
    else:
        dense, sparse = (
            jax.jit(lambda p, c, a=a: module(cases.as_heads(*p), c, attend=a)[1])(parts, cache)
            for a in ("dense", "sparse")
        )
        for a, b in zip(jax.tree.leaves(dense), jax.tree.leaves(sparse), strict=True):
            np.testing.assert_array_equal(a, b)


def test_sizes_are_checked_and_counted():
    with pytest.raises(ValueError, match="selection_block=0"):
        MoBA(selection_block=0)
    with pytest.raises(ValueError, match="selected_blocks=0"):
        MoBA(selected_blocks=0)
    module = cases.mechanism(SMALL, SHAPE, dtype=jnp.float32)
    with pytest.raises(ValueError, match="capacity=0"):
        module.init_cache(1, 0, jnp.float32)
    default = MoBA()
    assert (default.selection_block, default.selected_blocks) == (512, 3)
    assert default.alignment == 512
    assert default.auxiliary_bits(SHAPE, 16) == 2 * 8 * 16 / 512
    assert default.covering(1500).selected_blocks == 3
    assert default.density(512) == 1.0
