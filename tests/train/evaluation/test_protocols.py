"""Protocols against the plain way: every mechanism does its own dense prefill, then goes sparse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.config import ModelConfig
from models.transformer import Decoder, merge, split
from models.upcycle import attending
from sparse_attn.dense import Dense
from sparse_attn.hash_attention import HashAttention
from sparse_attn.infllm_v2 import InfLLMV2
from sparse_attn.policies import H2O, DoubleSparsity, OracleTopK, Quest, StreamingLLM
from train.evaluation import protocols
from train.evaluation.protocols import Parts, fill_caches, prefill, score, text_parts

CONFIG = ModelConfig(
    vocab_size=50,
    layers=2,
    model_width=16,
    query_heads=4,
    kv_heads=2,
    head_width=8,
    mlp_width=24,
    attention=Dense(),
    scan_layers=False,
)
ENDS = {"sinks": 2, "recent": 4}
MECHANISMS = {
    "oracle": OracleTopK(budget=5, **ENDS),
    "streaming": StreamingLLM(**ENDS),
    "quest": Quest(budget=8, page=4, **ENDS),
    "double_sparsity": DoubleSparsity(budget=5, width=4, **ENDS),
    "h2o": H2O.tiny()[0],
    "infllm_v2": InfLLMV2.tiny()[0],
    "hash": dataclasses.replace(HashAttention.tiny()[0], budget=5),
}
RNG = np.random.default_rng(0)
PARTS = Parts(*(RNG.integers(0, 50, n).astype(np.int32) for n in (70, 9, 5)))


@pytest.fixture(scope="module")
def dense():
    # Large weights, so that attention is far from uniform.
    decoder = Decoder(CONFIG, rngs=nnx.Rngs(jax.random.key(0, impl="rbg")))
    for layer in decoder.layers.values():
        layer.attention.q[...] = 4 * layer.attention.q[...]
    return decoder


def with_mechanism(dense, name):
    target = dataclasses.replace(CONFIG, attention=MECHANISMS[name])
    if name != "hash":
        return attending(dense, target)
    decoder = Decoder(target, rngs=nnx.Rngs(jax.random.key(5, impl="rbg")))
    nnx.update(decoder, nnx.state(dense))
    return decoder


def plainly(decoder, protocol):
    """Logits before every answer token, each mechanism on its own."""
    sparse = {"A": 4, "B": 13, "C": 83}[protocol]
    tokens = np.concatenate([PARTS.context, PARTS.question, PARTS.answer])[None, :-1]
    caches, logits = decoder.init_caches(1, 90), []
    graphdef, params, state = split(decoder)
    call = jax.jit(
        lambda tokens, caches, attend: merge(graphdef, params, state)(
            tokens, caches, attend=attend
        ),
        static_argnames="attend",
    )
    for piece, attend in ((tokens[:, :-sparse], "dense"), (tokens[:, -sparse:], "sparse")):
        if piece.size:
            output = call(jnp.asarray(piece), caches, attend=attend)
            caches = output.caches
            logits.append(output.logits[0])
    return jnp.concatenate(logits)[-len(PARTS.answer) :]


QUICK = [("quest", "B"), ("hash", "A")]
REST = [(n, p) for n in MECHANISMS for p in ("A", "B", "C") if (n, p) not in QUICK]


@pytest.mark.parametrize(
    ("name", "protocol"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.full) for case in REST)]
)
def test_a_shared_prefill_changes_nothing(dense, name, protocol):
    decoder = with_mechanism(dense, name)
    prefix = prefill(dense, PARTS, protocol)
    caches = fill_caches(decoder, PARTS, prefix)
    logits = plainly(decoder, protocol)
    log_p = jax.nn.log_softmax(logits)[jnp.arange(5), PARTS.answer]
    for _ in range(2):  # the caches serve again
        got = score(decoder, PARTS, prefix, caches)
        np.testing.assert_allclose(got.nats, -log_p, atol=2e-5)
        np.testing.assert_array_equal(got.greedy, jnp.argmax(logits, -1) == PARTS.answer)
    exact = score(dense, PARTS, prefix, fill_caches(dense, PARTS, prefix))
    assert np.abs(got.nats - exact.nats).max() > 1e-4  # sparse attention matters here


def test_one_set_of_caches_serves_all_budgets(dense):
    narrow = with_mechanism(dense, "quest")
    wide = attending(
        dense, dataclasses.replace(narrow.config, attention=MECHANISMS["quest"].covering(100))
    )
    prefix = prefill(dense, PARTS, "B")
    caches = fill_caches(narrow, PARTS, prefix)
    exact = score(dense, PARTS, prefix, fill_caches(dense, PARTS, prefix))
    np.testing.assert_allclose(score(wide, PARTS, prefix, caches).nats, exact.nats, atol=2e-5)
    assert np.abs(score(narrow, PARTS, prefix, caches).nats - exact.nats).max() > 1e-4


def test_selections_are_measured_layer_by_layer(dense):
    oracle = dataclasses.replace(CONFIG, attention=MECHANISMS["oracle"], dense_layers=(0,))
    decoder = attending(dense, oracle)
    prefix = prefill(dense, PARTS, "B")
    caches = fill_caches(decoder, PARTS, prefix)
    measured = score(decoder, PARTS, prefix, caches, inspect=True).layers
    assert measured[0] == {}
    for report in measured[1:]:
        assert 0 < report["captured_mass"] < 1
        assert report["bytes_density"] > 0


def test_alike_layers_share_a_program(dense):
    decoder = with_mechanism(dense, "quest")
    prefix = prefill(dense, PARTS, "B")
    caches = fill_caches(decoder, PARTS, prefix)
    score(decoder, PARTS, prefix, caches)
    before = protocols._call.cache_info().misses
    score(decoder, PARTS, prefix, caches)
    assert protocols._call.cache_info().misses == before
    graphs = {layer.graphdef for layer in protocols._layers(decoder)}
    assert len(graphs) == 1


def test_texts_and_answers():
    parts = text_parts(np.arange(20), 6)
    np.testing.assert_array_equal(parts.answer, np.arange(14, 20))
    dense_part, sparse = parts.split("B")
    np.testing.assert_array_equal(dense_part, np.arange(13))
    np.testing.assert_array_equal(sparse, np.arange(13, 19))
    with pytest.raises(ValueError, match="no context before its last=6"):
        text_parts(np.arange(7), 6)
    empty = np.zeros(0, np.int32)
    with pytest.raises(ValueError, match="needs an answer"):
        Parts(np.arange(3), empty, empty)


def test_greedy_decoding_begins_with_the_answer_exactly_when_scored_so(dense):
    prefix = prefill(dense, PARTS, "C")
    prompt = np.concatenate([PARTS.context, PARTS.question])
    from models.generate import generate

    (continuation,) = generate(dense, [prompt.tolist()], 3)
    for answer, exact in ((continuation, True), ([*continuation[:2], 49], continuation[2] == 49)):
        parts = dataclasses.replace(PARTS, answer=np.asarray(answer, np.int32))
        assert score(dense, parts, prefix, fill_caches(dense, parts, prefix)).exact is exact


def test_protocols_are_checked(dense):
    with pytest.raises(ValueError, match="protocol='D' is unknown"):
        prefill(dense, PARTS, "D")
    with pytest.raises(ValueError, match=r"pass decoder\.unstacked"):
        prefill(dense.stacked(), PARTS, "B")
