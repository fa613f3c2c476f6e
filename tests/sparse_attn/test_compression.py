"""Learned compression against its formula, entry by entry."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_attn.compression import Compression, entry_count

SIZES = {"block": 6, "stride": 2, "kv_heads": 2, "width": 4}


def pieces_of(x, stride):
    return x.reshape(x.shape[0], -1, stride, *x.shape[2:])


@pytest.mark.parametrize("kind", ["mlp", "linear", "mean"])
def test_entries_equal_the_formula(kind, x64):
    phi = Compression(kind, **SIZES, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    if kind != "mean":
        phi.b_in[...] = jnp.asarray(np.random.default_rng(3).standard_normal(phi.b_in.shape))
    x = np.random.default_rng(1).standard_normal((2, 16, 2, 4))
    got = phi(pieces_of(jnp.asarray(x), 2))
    assert got.shape == (2, entry_count(16, 6, 2), 2, 4)
    for i in range(got.shape[1]):
        block = x[:, 2 * i : 2 * i + 6]
        if kind == "mean":
            want = block.mean(axis=1)
        else:
            flat = np.einsum("blKH,KlHF->bKF", block + np.asarray(phi.position), phi.w_in)
            want = flat + np.asarray(phi.b_in)
            if kind == "mlp":
                want = want / (1 + np.exp(-want))
                want = np.einsum("bKF,KFH->bKH", want, phi.w_out) + np.asarray(phi.b_out)
        np.testing.assert_allclose(got[:, i], want, atol=1e-12)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_mean_initialisation_is_exactly_the_mean(kind, x64):
    phi = Compression(kind, **SIZES, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    phi.initialize_mean()
    mean = Compression("mean", **SIZES, rngs=nnx.Rngs(0))
    pieces = pieces_of(jnp.asarray(np.random.default_rng(0).standard_normal((1, 12, 2, 4))), 2)
    np.testing.assert_allclose(phi(pieces), mean(pieces), atol=1e-12)


def test_too_few_tokens_for_one_entry_raise():
    phi = Compression("mean", **SIZES, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="2 pieces of 2 tokens hold no block of 6"):
        phi(jnp.zeros((1, 2, 2, 2, 4)))


def test_entry_count():
    assert [entry_count(t, 32, 16) for t in (0, 31, 32, 47, 48, 1024)] == [0, 0, 1, 1, 2, 63]
