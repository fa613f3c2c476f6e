"""The plain functions equal the modules."""

import dataclasses

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn import NSA, Dense, block_sparse_attention, dense_attention, nsa_attention
from sparse_attn.types import no_rope

SHAPE = cases.SHAPES["G2"]
SMALL = dataclasses.replace(NSA.tiny()[0], compression="mean")
T = 40


def test_nsa_attention_equals_the_module(x64):
    q, k, v, x = cases.arrays(SHAPE, 3, 2, T)
    module = cases.mechanism(SMALL, SHAPE)

    heads = dataclasses.replace(cases.as_heads(q, k, v, x), rope=no_rope)
    want = jax.jit(lambda: module(heads)[0])()
    attend = jax.jit(lambda k, v: nsa_attention(q, k, v, module.gates(x), config=SMALL))
    got = attend(k, v)
    np.testing.assert_allclose(got, want, atol=1e-12)
    shared = attend(k[1], v[1])
    stacked = attend(k[jnp.array([1, 1, 1])], v[jnp.array([1, 1, 1])])
    np.testing.assert_array_equal(shared, stacked)


def test_dense_attention_equals_softmax(x64):
    q, k, v, _ = cases.arrays(SHAPE, 1, 2, T)
    mask = np.tril(np.ones((T, T), bool))
    repeated = [np.repeat(np.asarray(a[0]), 2, axis=2) for a in (k, v)]
    logits = np.einsum("btnh,bsnh->bnts", q, repeated[0]) / np.sqrt(8)
    want = np.einsum(
        "bnts,bsnh->btnh", jax.nn.softmax(np.where(mask, logits, -np.inf)), repeated[1]
    )
    np.testing.assert_allclose(dense_attention(q, k[0], v[0]), want, atol=1e-12)


def test_block_sparse_attention_with_every_block_is_dense(x64):
    q, k, v, _ = cases.arrays(SHAPE, 1, 2, T)
    indices = jnp.broadcast_to(jnp.arange(5, dtype=jnp.int32)[None, None, None], (2, T, 1, 5))
    got = block_sparse_attention(q, k[0], v[0], indices, block_size=8).out
    np.testing.assert_allclose(got, dense_attention(q, k[0], v[0]), atol=1e-12)


def test_bad_arguments_carry_shapes():
    q, k, v, _ = cases.arrays(SHAPE, 2, 1, T, dtype=jnp.float32)
    with pytest.raises(ValueError, match="must both be"):
        nsa_attention(q, k, v, jnp.zeros((1, T, 4, 3)), config=SMALL)
    with pytest.raises(ValueError, match=r"gates\.shape"):
        nsa_attention(q, k[0], v[0], jnp.zeros((1, T, 4, 2)), config=SMALL)
    with pytest.raises(ValueError, match="window=0"):
        dense_attention(q, k[0], v[0], window=0)
    assert Dense().density(10) == 1.0
