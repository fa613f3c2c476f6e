"""Walking the listed blocks of a blocked cache, against the reference of block-sparse attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.block_sparse.reference import block_sparse_attention
from kernels_pallas.gather_decode import as_tokens, gather_blocks, walk


def arguments(lists, slots, query_heads=4, kv_heads=2, dtype=jnp.float64, blocks=7, length=8):
    """q, k, v, indices (ragged lists, one empty), positions (one of padding)."""
    draw = np.random.default_rng(slots)
    q = draw.normal(size=(2, 3, query_heads, 8))
    k = draw.normal(size=(2, kv_heads, blocks, 8, length))
    v = draw.normal(size=(2, kv_heads, blocks, length, 6))
    positions = np.array([[55, 17, -1], [4, 30, 41]])
    indices = np.full((2, 3, lists, slots), -1)
    for b in range(2):
        for t in range(3):
            for j in range(lists):
                own = positions[b, t] // length
                count = min(draw.integers(0, slots + 1), own + 1)
                indices[b, t, j, :count] = np.sort(draw.choice(own + 1, count, replace=False))
    indices[1, 1, 0] = -1
    heads = (jnp.asarray(a, dtype) for a in (q, k, v))
    return *heads, jnp.asarray(indices, jnp.int32), jnp.asarray(positions, jnp.int32)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("keys_per_step", [16, 512])
@pytest.mark.parametrize(("lists", "slots"), [(1, 4), (2, 1), (2, 7), (4, 5)])
def test_equals_the_specification(x64, monkeypatch, implementation, keys_per_step, lists, slots):
    monkeypatch.setattr(walk, "KEYS_PER_STEP", keys_per_step)
    q, k, v, indices, positions = arguments(lists, slots)
    out, lse = jax.jit(
        lambda *a: gather_blocks(*a[:4], positions=a[4], implementation=implementation)
    )(q, k, v, indices, positions)
    want = block_sparse_attention(
        q, *as_tokens(k, v), indices, block_size=8, positions=positions, causal=True, scale=8**-0.5
    )
    np.testing.assert_allclose(out, want.out, atol=1e-13)
    np.testing.assert_allclose(lse, want.lse, atol=1e-13)
    assert (np.asarray(out)[0, 2] == 0).all()
    assert np.isneginf(np.asarray(lse)[0, 2]).all()


def test_bfloat16_accumulates_in_float32():
    q, k, v, indices, positions = arguments(2, 7, dtype=jnp.bfloat16)
    out, lse = gather_blocks(q, k, v, indices, positions=positions, scale=0.5)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    wide = (a.astype(jnp.float32) for a in (q, k, v))
    want = gather_blocks(*wide, indices, positions=positions, scale=0.5)
    np.testing.assert_allclose(out.astype(jnp.float32), want.out, atol=2e-2)
    np.testing.assert_allclose(lse, want.lse, rtol=1e-5)


def test_work_follows_the_lists_not_the_cache(x64):
    """Blocks that no list names may hold anything, save block 0, which unused slots load."""
    q, k, v, indices, positions = arguments(2, 3)
    named = np.isin(np.arange(7), np.asarray(indices))
    named[0] = True
    hole = jnp.asarray(~named)[None, None, :, None, None]
    assert not named.all()
    poisoned = gather_blocks(
        q, jnp.where(hole, jnp.nan, k), jnp.where(hole, jnp.nan, v), indices, positions=positions
    )
    want = gather_blocks(q, k, v, indices, positions=positions)
    np.testing.assert_array_equal(poisoned.out, want.out)


def test_large_logits():
    q, k, v, indices, positions = arguments(2, 7, dtype=jnp.float32)
    out, lse = gather_blocks(q * 300, k, v, indices, positions=positions)
    want = gather_blocks(q * 300, k, v, indices, positions=positions, implementation="reference")
    assert np.abs(np.where(np.isneginf(lse), 0, lse)).max() > 300
    np.testing.assert_allclose(out, want.out, atol=1e-3)
