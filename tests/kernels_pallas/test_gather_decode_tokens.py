"""Gathered decoding of single tokens: rows of every width, to the end of the buffer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.gather_decode import gather_decode, gather_tokens, tokens


def example(width, value_width, *, B=2, T=2, S=11, K=2, N=4, P=5):
    rng = np.random.default_rng(width)
    q = jnp.asarray(rng.normal(size=(B, T, N, width)))
    k = jnp.asarray(rng.normal(size=(B, S, K, width)))
    v = jnp.asarray(rng.normal(size=(B, S, K, value_width)))
    # Every list ends with the last token, behind whose last head nothing follows in memory.
    lists = [[*np.sort(rng.choice(S - 1, P - 1, replace=False)), S - 1] for _ in range(B * T * K)]
    indices = jnp.asarray(lists, jnp.int32).reshape(B, T, K, P)
    return q, k, v, indices, jnp.full((B, T), S - 1, jnp.int32)


# 64 is copied with what follows it, the others are not; 40 leaves no row to spare.
@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (40, 79), (39, 80), (64, 16)])
def test_matches_reference(width, value_width, x64):
    q, k, v, indices, positions = example(width, value_width)

    def run(implementation):
        def loss(q, k, v):
            output = gather_decode(
                q, k, v, indices, block_size=1, positions=positions, implementation=implementation
            )
            return jnp.sum(output.out**2) + jnp.sum(output.lse**2), output

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    got, want = run("xla"), run("reference")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_neighbours_in_memory_may_hold_anything(x64):
    q, k, v, indices, positions = example(64, 64)
    indices = indices.at[:, :, :, 1:].set(-1)
    kept = np.zeros(k.shape[:3], bool)
    for b, t, j in np.ndindex(*indices.shape[:3]):
        kept[b, int(indices[b, t, j, 0]), j] = True
    k, v = (jnp.where(kept[..., None], x, jnp.nan) for x in (k, v))
    out = gather_decode(q, k, v, indices, block_size=1, positions=positions).out
    for b, t, n in np.ndindex(2, 2, 4):
        j = n // 2
        np.testing.assert_allclose(out[b, t, n], v[b, int(indices[b, t, j, 0]), j], rtol=1e-12)


@pytest.mark.parametrize("lists", [1, pytest.param(2, marks=pytest.mark.full), 4])
@pytest.mark.parametrize("implementation", ["reference", "xla", "xla in parts"])
def test_keys_with_their_values_give_what_both_give(x64, monkeypatch, lists, implementation):
    if implementation == "xla in parts":
        implementation = "xla"
        monkeypatch.setattr(tokens, "KEYS_PER_PART", 2)
        monkeypatch.setattr(tokens, "WIDE", 11)
    q, k, v, indices, positions = example(8, 6)
    indices = jnp.concatenate([indices, indices], axis=2)[:, :, :lists].at[0, 1, 0].set(-1)
    positions = positions.at[1, 0].set(4)
    kv = jnp.concatenate([k, v], axis=3)

    def total(output):
        return jnp.sum(output.out**2) + jnp.sum(jnp.where(output.lse > -1e3, output.lse, 0) ** 2)

    def together(q, kv):
        output = gather_tokens(q, kv, indices, positions=positions, implementation=implementation)
        return total(output), output

    def apart(q, kv):
        output = gather_decode(
            q,
            kv[..., :8],
            kv[..., 8:],
            indices,
            block_size=1,
            positions=positions,
            implementation="reference",
        )
        return total(output), output

    got, want = (
        jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))(q, kv) for f in (together, apart)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_keys_without_values_are_refused():
    q, k, _, indices, positions = example(8, 6)
    with pytest.raises(ValueError, match=r"must be \[B, S, K, H \+ Hv\] with H=8"):
        gather_tokens(q, k, indices, positions=positions)
