"""Registration, and the validation of sizes."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_attn import AttentionOutput, HeadShape, build_mechanism, merge, registered
from sparse_attn.nsa import NSA, NSAAttention

SHAPE = HeadShape(query_heads=4, kv_heads=2, head_width=8, value_width=8, model_width=16)


def test_registry_builds_the_module_of_a_config():
    assert registered()[NSA] is NSAAttention
    assert isinstance(build_mechanism(NSA(), SHAPE, rngs=nnx.Rngs(0)), NSAAttention)
    with pytest.raises(TypeError, match=r"known: \[.*NSA"):
        build_mechanism("nsa", SHAPE, rngs=nnx.Rngs(0))


def test_indivisible_heads_are_refused():
    with pytest.raises(ValueError, match="query_heads=6 is not a multiple of kv_heads=4"):
        HeadShape(query_heads=6, kv_heads=4, head_width=8, value_width=8, model_width=16)


def test_merge_of_disjoint_parts_is_softmax_over_the_union(x64):
    rng = np.random.default_rng(0)
    logits, values = rng.standard_normal(7) * 5, rng.standard_normal((7, 3))

    def part(index):
        if not index:
            return AttentionOutput(jnp.zeros((1, 1, 1, 3)), jnp.full((1, 1, 1), -jnp.inf))
        p = np.exp(logits[index])
        return AttentionOutput(
            jnp.asarray((p @ values[index]) / p.sum())[None, None, None],
            jnp.asarray(np.log(p.sum()))[None, None, None],
        )

    got = merge(part([0, 2]), part([]), part([1, 3, 4, 5, 6]))
    want = part(list(range(7)))
    np.testing.assert_allclose(got.out, want.out, atol=1e-12)
    np.testing.assert_allclose(got.lse, want.lse, atol=1e-12)
    nothing = merge(part([]), part([]))
    assert (nothing.out == 0).all()
    assert jnp.isneginf(nothing.lse).all()
