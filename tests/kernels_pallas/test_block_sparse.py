"""Block-sparse attention: every execution against the reference, outputs and gradients."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.block_sparse import block_sparse_attention, xla

EXECUTIONS = ("dense", "key_major", "query_major")
TUNINGS = {
    "dense": xla.Tuning(execution="dense", dense_elements=512),
    "key_major": xla.Tuning(execution="key_major", rows_per_step=12),
    "query_major": xla.Tuning(execution="query_major", tile=6, blocks_per_step=2, tiles_at_once=2),
}


def random_lists(rng, shape, blocks):
    """Ascending lists of 0..P distinct blocks, -1 trailing; the first query's are empty."""
    indices = np.full(shape, -1, np.int32)
    for place in np.ndindex(*shape[:3]):
        count = 0 if place[1] == 0 else int(rng.integers(0, min(shape[3], blocks) + 1))
        indices[place][:count] = np.sort(rng.choice(blocks, count, replace=False))
    return indices


def example(seed, *, B=2, T=21, S=21, N=4, K=2, J=2, H=8, Hv=6, L=4, P=3, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.normal(size=(B, T, N, H)), dtype)
    k = jnp.asarray(rng.normal(size=(B, S, K, H)), dtype)
    v = jnp.asarray(rng.normal(size=(B, S, K, Hv)), dtype)
    indices = jnp.asarray(random_lists(rng, (B, T, J, P), -(-S // L)))
    return q, k, v, indices


def attend_with(execution):
    """The api's call bound to the reference, or to one execution of the xla backend."""
    if execution == "reference":
        return functools.partial(block_sparse_attention, implementation="reference")

    def attend(q, k, v, indices, *, block_size, positions, causal=True):
        return xla.block_sparse_attention(
            q,
            k,
            v,
            indices,
            block_size=block_size,
            positions=positions,
            causal=causal,
            scale=q.shape[3] ** -0.5,
            tuning=TUNINGS[execution],
        )

    return attend


@functools.cache
def compiled(execution, block_size, causal):
    """One jitted function a configuration, so that tests of equal shapes share compilations."""
    attend = attend_with(execution)

    def loss(q, k, v, indices, positions, weights, lse_weights):
        output = attend(q, k, v, indices, block_size=block_size, positions=positions, causal=causal)
        lse = jnp.where(jnp.isneginf(output.lse), 0.0, output.lse) * lse_weights
        return jnp.sum((output.out * weights).astype(lse.dtype)) + jnp.sum(lse), output

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


def value_and_gradients(execution, q, k, v, indices, *, positions=None, block_size=4, causal=True):
    """(out, lse) and the gradients of a random function of both."""
    rng = np.random.default_rng(99)
    weights = jnp.asarray(rng.normal(size=(*q.shape[:3], v.shape[3])), q.dtype)
    lse_weights = jnp.asarray(rng.normal(size=q.shape[:3]), jnp.promote_types(q.dtype, jnp.float32))
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(q.shape[1])[None, :], q.shape[:2])
    run = compiled(execution, block_size, causal)
    positions = positions.astype(jnp.int32)
    gradients, output = run(q, k, v, indices, positions, weights, lse_weights)
    return output, gradients


def assert_same(actual, expected, tolerance):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


CASES = {
    "G = 2, list a kv head": {},
    "list a query head": {"J": 4},
    "G = 1, ragged S, odd P": {
        "N": 2,
        "T": 13,
        "S": 18,
        "P": 5,
        "with_positions": True,
    },
    "G = 4, one list, Hv = H": {"K": 1, "J": 1, "Hv": 8},
    "one list for all kv heads, token lists": {"J": 1, "L": 1, "P": 7},
    "not causal, T > S": {"S": 9, "causal": False},
}


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(x64, execution, case):
    arguments = dict(CASES[case])
    options = {"block_size": arguments.get("L", 4), "causal": arguments.pop("causal", True)}
    with_positions = arguments.pop("with_positions", False)
    q, k, v, indices = example(3, **arguments)
    if with_positions:
        rng = np.random.default_rng(5)
        options["positions"] = jnp.asarray(
            rng.integers(-1, k.shape[1], size=q.shape[:2]), jnp.int32
        )
    actual = value_and_gradients(execution, q, k, v, indices, **options)
    assert_same(actual, value_and_gradients("reference", q, k, v, indices, **options), 1e-11)


@pytest.mark.parametrize("execution", ["reference", *EXECUTIONS])
def test_rows_that_see_nothing(execution):
    q, k, v, indices = example(4, dtype=jnp.float32)
    indices = indices.at[:, 5:9].set(-1)
    positions = jnp.broadcast_to(jnp.arange(21)[None, :], (2, 21)).at[:, 12].set(-1)
    output, gradients = value_and_gradients(
        execution, q, k, v, indices, block_size=4, positions=positions
    )
    for dead in (slice(0, 1), slice(5, 9), slice(12, 13)):
        assert np.all(np.asarray(output.out)[:, dead] == 0)
        assert np.all(np.isneginf(np.asarray(output.lse)[:, dead]))
        assert np.all(np.asarray(gradients[0])[:, dead] == 0)
    assert all(np.all(np.isfinite(g)) for g in gradients)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_everything_empty(execution):
    q, k, v, indices = example(4, dtype=jnp.float32)
    output, gradients = value_and_gradients(
        execution, q, k, v, jnp.full_like(indices, -1), block_size=4
    )
    assert np.all(np.asarray(output.out) == 0)
    assert np.all(np.isneginf(output.lse))
    assert all(np.all(np.asarray(g) == 0) for g in gradients)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_poison_in_what_nobody_sees_does_not_leak(execution):
    q, k, v, indices = example(6, dtype=jnp.float32)
    blocks = jnp.where(indices == 3, -1, indices)
    if execution == "dense":
        blocks = indices
    positions = jnp.broadcast_to(jnp.minimum(jnp.arange(21), 17)[None, :], (2, 21))
    positions = positions.at[:, 7].set(-1)
    options = {"block_size": 4, "positions": positions}
    expected = value_and_gradients(execution, q, k, v, blocks, **options)
    poisoned_q = q.at[:, 7].set(jnp.nan)
    # Rows after the last position of the batch and, where blocks are loaded one by one, a block
    # in nobody's list.
    poisoned_k, poisoned_v = k.at[:, 18:].set(jnp.nan), v.at[:, 18:].set(jnp.nan)
    if execution != "dense":
        poisoned_k = poisoned_k.at[:, 12:16].set(jnp.nan)
        poisoned_v = poisoned_v.at[:, 12:16].set(jnp.nan)
    actual = value_and_gradients(execution, poisoned_q, poisoned_k, poisoned_v, blocks, **options)
    assert_same(actual, expected, 1e-6)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_second_run_is_bitwise_equal(execution):
    arguments = example(7, dtype=jnp.float32)
    first = value_and_gradients(execution, *arguments, block_size=4)
    second = value_and_gradients(execution, *arguments, block_size=4)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_large_logits(execution):
    q, k, v, indices = example(8, dtype=jnp.float32)
    q, k = 40 * q, 5 * k
    output, gradients = value_and_gradients(execution, q, k, v, indices, block_size=4)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in (q, k, v)]
        expected, expected_gradients = value_and_gradients(
            "reference", *wide, indices, block_size=4
        )
    assert np.nanmax(np.abs(np.where(np.isinf(expected.lse), 0, expected.lse))) > 200
    np.testing.assert_allclose(output.out, expected.out, atol=2e-3)
    np.testing.assert_allclose(output.lse, expected.lse, rtol=1e-5)
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=2e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_bfloat16(execution):
    q, k, v, indices = example(9, dtype=jnp.bfloat16)
    output, gradients = value_and_gradients(execution, q, k, v, indices, block_size=4)
    expected, expected_gradients = value_and_gradients("reference", q, k, v, indices, block_size=4)
    assert output.lse.dtype == jnp.float32
    assert output.out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(output.out, np.float32), np.asarray(expected.out, np.float32), atol=0.02
    )
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        assert actual.dtype == jnp.bfloat16
        actual, wanted = np.asarray(actual, np.float32), np.asarray(wanted, np.float32)
        np.testing.assert_allclose(actual, wanted, atol=0.03 * np.abs(wanted).max())


def test_auto_follows_the_static_rule_and_says_so(caplog):
    tuning = xla.Tuning()
    assert xla.choose_execution(256, 32, "cpu", tuning) == "dense"
    assert xla.choose_execution(32768, 64, "cpu", tuning) == "key_major"
    assert xla.choose_execution(32768, 1, "cpu", tuning) == "query_major"
    assert xla.choose_execution(32768, 64, "gpu", tuning) == "query_major"
    q, k, v, indices = example(10, S=23, T=23, dtype=jnp.float32)
    xla._logged.clear()
    with caplog.at_level(logging.INFO, logger="sparse_attn"):
        block_sparse_attention(q, k, v, indices, block_size=4)
        block_sparse_attention(q, k, v, indices, block_size=4)
    lines = [r.getMessage() for r in caplog.records if "runs dense" in r.getMessage()]
    assert lines == ["block_sparse_attention over S=23 with 3 blocks of 4 runs dense"]


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_temporary_memory_is_subquadratic(execution):
    def temporary_bytes(length):
        attend = attend_with(execution)
        shapes = [(1, length, 4, 8), (1, length, 2, 8), (1, length, 2, 8)]
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        indices = jax.ShapeDtypeStruct((1, length, 2, 4), jnp.int32)

        def loss(q, k, v, indices):
            positions = jnp.arange(length, dtype=jnp.int32)[None, :]
            return jnp.sum(attend(q, k, v, indices, block_size=16, positions=positions).out)

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays, indices).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096) <= 4.4 * temporary_bytes(1024)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": jnp.zeros((2, 21, 3, 2), jnp.int32)}, r"indices \(2, 21, 3, 2\)"),
        ({"indices": jnp.zeros((2, 21, 2, 0), jnp.int32)}, "no slots"),
        ({"indices": jnp.zeros((2, 21, 2, 2), jnp.float32)}, "int32"),
        ({"k": jnp.zeros((2, 20, 2, 8))}, "disagree"),
        ({"q": jnp.zeros((2, 21, 3, 8))}, "N=3 is not a multiple of K=2"),
        ({"q": jnp.zeros((2, 21, 4))}, "4 axes"),
        ({"block_size": 0}, "block_size=0"),
        ({"positions": jnp.zeros((2, 5), jnp.int32)}, r"positions \(2, 5\)"),
        ({"implementation": "cuda"}, "unknown"),
    ],
)
def test_errors_name_the_values(change, message):
    q, k, v, indices = example(0, dtype=jnp.float32)
    arguments = {"q": q, "k": k, "v": v, "indices": indices, "block_size": 4} | change
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**arguments)


def test_default_positions_need_as_many_queries_as_keys():
    q, k, v, indices = example(0, T=5, S=9, dtype=jnp.float32)
    with pytest.raises(ValueError, match="5 queries over 9 keys"):
        block_sparse_attention(q, k, v, indices, block_size=4)


def test_a_shape_that_a_named_backend_does_not_serve_is_not_a_value_error():
    q, k, v, indices = example(0, dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match="block_size=4"):
        block_sparse_attention(q, k, v, indices, block_size=4, implementation="mosaic_tpu")


@pytest.fixture
def forget_compilations():
    """Hundreds of kept executables exhaust the memory maps of a process."""
    yield
    compiled.cache_clear()
    jax.clear_caches()


@pytest.mark.full
@pytest.mark.parametrize("seed", range(100))
def test_random_shapes_match_reference(x64, forget_compilations, seed):
    rng = np.random.default_rng(1000 + seed)
    kv_heads = int(rng.integers(1, 4))
    query_heads = kv_heads * int(rng.integers(1, 5))
    keys, block = int(rng.integers(1, 200)), int(rng.choice([1, 4, 16, 64]))
    q, k, v, indices = example(
        seed,
        B=int(rng.integers(1, 3)),
        T=int(rng.integers(1, 200)),
        S=keys,
        N=query_heads,
        K=kv_heads,
        J=int(rng.choice([1, kv_heads, query_heads])),
        L=block,
        P=int(rng.integers(1, 17)),
    )
    options = {
        "block_size": block,
        "causal": bool(rng.integers(0, 2)),
        "positions": jnp.asarray(rng.integers(-1, keys, size=q.shape[:2]), jnp.int32),
    }
    expected = value_and_gradients("reference", q, k, v, indices, **options)
    for execution in EXECUTIONS:
        actual = value_and_gradients(execution, q, k, v, indices, **options)
        assert_same(actual, expected, 1e-10)
