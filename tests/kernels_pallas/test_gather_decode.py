"""Gathered decoding against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.gather_decode import as_tokens, gather_blocks, gather_decode


def example(seed, *, J, T=3, S=22, N=4, K=2, L=4, P=3, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.normal(size=(2, T, N, 8)), dtype)
    k = jnp.asarray(rng.normal(size=(2, S, K, 8)), dtype)
    v = jnp.asarray(rng.normal(size=(2, S, K, 6)), dtype)
    indices = np.full((2, T, J, P), -1, np.int32)
    blocks = -(-S // L)
    for place in np.ndindex(2, T, J):
        count = 0 if place[1] == T - 1 else int(rng.integers(1, min(P, blocks) + 1))
        indices[place][:count] = np.sort(rng.choice(blocks, count, replace=False))
    positions = jnp.asarray(rng.integers(S // 2, S, size=(2, T)), jnp.int32)
    return q, k, v, jnp.asarray(indices), positions


def run(implementation, q, k, v, indices, positions, **options):
    def loss(q, k, v):
        output = gather_decode(
            q, k, v, indices, positions=positions, implementation=implementation, **options
        )
        lse = jnp.where(jnp.isneginf(output.lse), 0.0, output.lse)
        return jnp.sum(output.out**2).astype(lse.dtype) + jnp.sum(lse**2), output

    gradients, output = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return output, gradients


@pytest.mark.parametrize(
    ("J", "block_size", "causal"), [(1, 4, True), (2, 4, True), (4, 4, False), (2, 1, True)]
)
def test_matches_reference(x64, J, block_size, causal):
    q, k, v, indices, positions = example(0, J=J, L=block_size)
    options = {"block_size": block_size, "causal": causal}
    actual = run("xla", q, k, v, indices, positions, **options)
    expected = run("reference", q, k, v, indices, positions, **options)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_block_larger_than_the_buffer(x64):
    q, k, v, indices, positions = example(1, J=2, S=6, L=6)
    options = {"block_size": 16}
    actual = run("xla", q, k, v, indices, positions, **options)
    expected = run("reference", q, k, v, indices, positions, **options)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_rows_that_see_nothing():
    q, k, v, indices, positions = example(2, J=2, dtype=jnp.float32)
    positions = positions.at[:, 0].set(-1)
    output, gradients = run("xla", q, k, v, indices, positions, block_size=4)
    for dead in (0, 2):
        assert np.all(np.asarray(output.out)[:, dead] == 0)
        assert np.all(np.isneginf(np.asarray(output.lse)[:, dead]))
        assert np.all(np.asarray(gradients[0])[:, dead] == 0)
    assert all(np.all(np.isfinite(g)) for g in gradients)


def test_poison_after_the_position_does_not_leak():
    q, k, v, indices, positions = example(3, J=2, dtype=jnp.float32)
    positions = jnp.full_like(positions, 13)
    clean = gather_decode(q, k, v, indices, positions=positions, block_size=4)
    k, v = k.at[:, 14:].set(jnp.nan), v.at[:, 14:].set(jnp.nan)
    poisoned = gather_decode(q, k, v, indices, positions=positions, block_size=4)
    np.testing.assert_array_equal(clean.out, poisoned.out)
    np.testing.assert_array_equal(clean.lse, poisoned.lse)


def test_temporary_memory_does_not_grow_with_the_cache():
    def temporary_bytes(capacity):
        cache = jax.ShapeDtypeStruct((1, capacity, 2, 16), jnp.float32)
        q = jax.ShapeDtypeStruct((1, 1, 4, 16), jnp.float32)
        indices = jax.ShapeDtypeStruct((1, 1, 2, 4), jnp.int32)
        positions = jax.ShapeDtypeStruct((1, 1), jnp.int32)

        def step(q, k, v, indices, positions):
            return gather_decode(q, k, v, indices, positions=positions, block_size=16)

        compiled = jax.jit(step).lower(q, cache, cache, indices, positions).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(16384) == temporary_bytes(4096)


def blocked(seed, *, J, L=4, M=6, **sizes):
    """The arguments of ``example`` with keys and values in blocks, and token by token."""
    q, k, v, indices, positions = example(seed, J=J, S=L * M, L=L, **sizes)
    k_blocks = k.reshape(2, M, L, 2, -1).transpose(0, 3, 1, 4, 2)
    v_blocks = v.reshape(2, M, L, 2, -1).transpose(0, 3, 1, 2, 4)
    for a, b in zip(as_tokens(k_blocks, v_blocks), (k, v), strict=True):
        np.testing.assert_array_equal(a, b)
    return (q, k_blocks, v_blocks, indices, positions), (q, k, v, indices, positions)


@pytest.mark.parametrize(("J", "causal"), [(1, True), (2, True), (4, False)])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_blocks_give_what_tokens_give(x64, J, causal, implementation):
    in_blocks, by_token = blocked(5, J=J)

    def total(q, k, v):
        output = gather_blocks(
            q,
            k,
            v,
            *in_blocks[3:4],
            positions=in_blocks[4],
            causal=causal,
            implementation=implementation,
        )
        lse = jnp.where(jnp.isneginf(output.lse), 0.0, output.lse)
        return jnp.sum(output.out**2) + jnp.sum(lse**2), output

    gradients, output = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*in_blocks[:3])
    expected, wanted = run("reference", *by_token, block_size=4, causal=causal)
    np.testing.assert_allclose(output.out, expected.out, atol=1e-12)
    np.testing.assert_allclose(output.lse, expected.lse, atol=1e-12)
    np.testing.assert_allclose(gradients[0], wanted[0], atol=1e-11)
    for a, b in zip(as_tokens(*gradients[1:]), wanted[1:], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)


def test_blocks_that_disagree_are_refused():
    (q, k, v, indices, positions), _ = blocked(6, J=2, dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"must be \[B, K, M, H, L\]"):
        gather_blocks(q, k, v[:, :, :, :3], indices, positions=positions)
    with pytest.raises(ValueError, match="gather_blocks: query heads N=4"):
        gather_blocks(q, k[:, [0, 1, 1]], v[:, [0, 1, 1]], indices, positions=positions)


def test_errors_name_the_values():
    q, k, v, indices, positions = example(4, J=2, dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"positions \(2, 2\)"):
        gather_decode(q, k, v, indices, positions=positions[:, :2], block_size=4)
    with pytest.raises(ValueError, match="gather_decode: block_size=0"):
        gather_decode(q, k, v, indices, positions=positions, block_size=0)
