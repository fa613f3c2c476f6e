"""Upcycling: equal to the dense model where the mechanism covers everything, close elsewhere."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.transformer import Decoder, ModelConfig, merge, split
from models.upcycle import attending, upcycle
from sparse_attn.dense import Dense
from sparse_attn.hash_attention import HashAttention
from sparse_attn.nsa import NSA
from sparse_attn.policies import OracleTopK

SPARSE = dataclasses.replace(NSA.tiny()[0], implementation="reference")
CONFIG = ModelConfig(
    vocab_size=48,
    layers=2,
    model_width=32,
    query_heads=4,
    kv_heads=2,
    head_width=8,
    mlp_width=48,
    attention=Dense(implementation="reference"),
    qkv_bias=True,
    query_key_norm=True,
)
T = 24


def continued(attention, **changes):
    return dataclasses.replace(CONFIG, attention=attention, **changes)


TOKENS = jax.random.randint(jax.random.key(1), (2, T), 0, 48)


def fresh():
    return nnx.Rngs(jax.random.key(1, impl="rbg"))


@pytest.fixture(scope="module")
def dense():
    """A dense decoder whose biases and norms are not at their initial values."""
    graphdef, params, state = split(Decoder(CONFIG, rngs=nnx.Rngs(jax.random.key(0, impl="rbg"))))
    rng = np.random.default_rng(7)
    params = jax.tree.map(
        lambda a: a + jnp.asarray(0.1 * rng.normal(size=a.shape), a.dtype), params
    )
    return nnx.merge(graphdef, params, state)


@pytest.fixture(scope="module")
def dense_logits(dense):
    return logits(dense)


@functools.partial(jax.jit, static_argnames="graphdef")
def apply(graphdef, params, state):
    return merge(graphdef, params, state)(TOKENS).logits


def logits(decoder):
    return apply(*split(decoder))


def test_covering_model_equals_the_dense_one(dense, dense_logits):
    sparse = upcycle(split(dense)[1], CONFIG, continued(SPARSE.covering(T)), rngs=fresh())
    assert sparse.config == dataclasses.replace(CONFIG, attention=SPARSE.covering(T))
    np.testing.assert_allclose(logits(sparse), dense_logits, rtol=1e-4, atol=1e-4)


def test_grouping_of_the_source_is_kept_and_changes_no_value(dense):
    loop = dense.unstacked()
    unstacked = upcycle(
        split(loop)[1], loop.config, continued(SPARSE, scan_layers=False), rngs=fresh()
    )
    assert sorted(unstacked.layers) == ["0", "1"]
    stacked = upcycle(split(dense)[1], CONFIG, continued(SPARSE), rngs=fresh())
    assert sorted(stacked.layers) == ["0-1"]
    jax.tree.map(np.testing.assert_array_equal, split(stacked.unstacked())[1], split(unstacked)[1])


def test_sparse_model_starts_from_copies_and_open_branches(dense, dense_logits):
    sparse = upcycle(split(dense)[1], CONFIG, continued(SPARSE), rngs=fresh())
    params, before = split(sparse)[1], split(dense)[1]
    attention, old = (p["layers"]["0-1"]["attention"] for p in (params, before))
    for name in ("k", "v", "k_bias", "v_bias"):
        assert attention[name].shape[1] == 3
        for branch in range(3):
            np.testing.assert_array_equal(attention[name][:, branch], old[name][:, 0])
    np.testing.assert_array_equal(
        attention["k_norm"]["scale"], np.repeat(old["k_norm"]["scale"], 3, axis=1)
    )
    for name in ("q", "q_bias", "o"):
        np.testing.assert_array_equal(attention[name], old[name])
    gates = np.asarray(attention["mechanism"]["gates"]["bias"])
    assert (gates[..., 1:] >= 0).all()
    assert (gates[..., 0] < gates[..., 1]).all()
    np.testing.assert_array_equal(params["embedding"], before["embedding"])

    def loss(logits):
        logp = jax.nn.log_softmax(logits[:, :-1], axis=-1)
        return float(-jnp.mean(jnp.take_along_axis(logp, TOKENS[:, 1:, None], axis=-1)))

    assert np.isfinite(loss(logits(sparse)))
    assert abs(loss(logits(sparse)) - loss(dense_logits)) < 0.5


def test_some_layers_can_stay_dense(dense, dense_logits):
    sparse = upcycle(
        split(dense)[1], CONFIG, continued(SPARSE.covering(T), dense_layers=(1,)), rngs=fresh()
    )
    assert sorted(sparse.layers) == ["0", "1"]
    assert split(sparse)[1]["layers"]["1"]["attention"]["k"].shape[0] == 1
    np.testing.assert_allclose(logits(sparse), dense_logits, rtol=1e-4, atol=1e-4)


def test_a_model_continues_as_itself(dense, dense_logits):
    again = upcycle(split(dense)[1], CONFIG, CONFIG, rngs=fresh())
    np.testing.assert_array_equal(logits(again), dense_logits)
    sparse = upcycle(split(dense)[1], CONFIG, continued(SPARSE), rngs=fresh())
    _, params, state = split(sparse)
    fewer = dataclasses.replace(SPARSE, selected_blocks=3)
    shorter = upcycle(params, sparse.config, continued(fewer), rngs=fresh(), state=state)
    jax.tree.map(np.testing.assert_array_equal, split(shorter)[1], params)


def test_other_attention_on_the_same_arrays(dense, dense_logits):
    covered = attending(dense, continued(OracleTopK(budget=T)))
    np.testing.assert_allclose(logits(covered), dense_logits, rtol=1e-4, atol=1e-4)
    ours, theirs = (split(decoder.unstacked())[1] for decoder in (covered, dense))
    assert ours["embedding"] is theirs["embedding"]
    assert logits(attending(dense, continued(OracleTopK(budget=1)))).shape == dense_logits.shape
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.mechanism\.phi_k.* mapping file"):
        attending(dense, continued(HashAttention.tiny()[0]))
    three = Decoder(continued(SPARSE), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="layer 0: 3 K/V branches of NSA cannot become the 1"):
        attending(three, CONFIG)
    with pytest.raises(ValueError, match="mlp_width: 48 -> 64"):
        attending(dense, dataclasses.replace(CONFIG, mlp_width=64))


def test_wrong_parameters_are_refused(dense):
    params = split(dense)[1]
    wider = dataclasses.replace(CONFIG, mlp_width=64)
    with pytest.raises(ValueError, match=r"entries differ, the first is 'layers.0-1.mlp.down'"):
        upcycle(params, wider, wider, rngs=fresh())
    with pytest.raises(ValueError, match="mlp_width: 48 -> 64"):
        upcycle(params, CONFIG, wider, rngs=fresh())


def test_branches_and_mechanisms_that_do_not_fit_are_refused(dense):
    sparse = upcycle(split(dense)[1], CONFIG, continued(SPARSE), rngs=fresh())
    params = split(sparse)[1]
    with pytest.raises(ValueError, match="layer 0: 3 K/V branches of NSA cannot become the 1"):
        upcycle(params, sparse.config, CONFIG, rngs=fresh())
    longer = dataclasses.replace(SPARSE, compression_block=8)
    with pytest.raises(ValueError, match="its parameters change shape"):
        upcycle(params, sparse.config, continued(longer), rngs=fresh())
