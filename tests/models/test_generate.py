"""Generation against teacher forcing, and the independence of prompts in a ragged batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import generate as generation
from models.generate import Sampling, generate, sample, stream
from models.transformer import Decoder, ModelConfig, split
from sparse_attn.dense import Dense
from sparse_attn.nsa import NSA
from sparse_attn.policies import StreamingLLM

V = 48
DENSE = Dense(implementation="reference")
SPARSE = dataclasses.replace(NSA.tiny()[0], implementation="reference")
PROMPTS = [[5, 9, 2, 40, 7, 7, 1, 30, 12, 3, 19], [11, 4], [8] * 17]
NEW = 6


def make(attention):
    config = ModelConfig(
        vocab_size=V,
        layers=2,
        model_width=32,
        query_heads=4,
        kv_heads=2,
        head_width=8,
        mlp_width=48,
        attention=attention,
        tie_embeddings=False,
    )
    return Decoder(config, rngs=nnx.Rngs(jax.random.key(3, impl="rbg"))).unstacked()


@pytest.fixture(scope="module", params=["dense", "nsa"])
def decoder(request):
    return make(DENSE if request.param == "dense" else SPARSE)


@pytest.fixture(scope="module")
def plain():
    return make(DENSE)


@pytest.fixture(scope="module")
def greedy(decoder):
    return generate(decoder, PROMPTS, NEW)


def test_greedy_is_the_argmax_of_teacher_forcing(decoder, greedy):
    width = max(map(len, PROMPTS)) + NEW
    rows = [prompt + new for prompt, new in zip(PROMPTS, greedy, strict=True)]
    tokens = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    ids = jnp.asarray([[int(t < len(row)) for t in range(width)] for row in rows])
    logits = jax.jit(lambda tokens: decoder(tokens, segment_ids=ids).logits)(tokens)
    best = np.argmax(logits, axis=-1)
    for i, (prompt, new) in enumerate(zip(PROMPTS, greedy, strict=True)):
        assert len(new) == NEW
        assert new == best[i, len(prompt) - 1 : len(prompt) - 1 + NEW].tolist()
    assert len({tuple(new) for new in greedy}) == len(PROMPTS)


def test_ragged_batch_equals_one_prompt_at_a_time(decoder, greedy):
    assert [generate(decoder, [prompt], NEW)[0] for prompt in PROMPTS] == greedy


def test_sampled_continuation_does_not_depend_on_the_batch(plain):
    options = {"temperature": 1.3, "top_k": 20, "top_p": 0.95}
    together = generate(plain, PROMPTS, NEW, seed=[4, 5, 6], **options)
    assert generate(plain, PROMPTS[1:2], NEW, seed=5, **options) == together[1:2]
    assert generate(plain, PROMPTS, NEW, seed=[4, 5, 6], **options) == together
    assert generate(plain, PROMPTS, NEW, seed=[7, 8, 9], **options) != together


def test_stop_token_ends_its_prompt_alone(decoder, greedy):
    stop = greedy[0][2]
    expected = [new[: new.index(stop)] if stop in new else new for new in greedy]
    assert generate(decoder, PROMPTS, NEW, stop_tokens=[stop]) == expected
    everything = [new[0] for new in greedy]
    assert generate(decoder, PROMPTS, NEW, stop_tokens=everything) == [[], [], []]


def test_other_prompts_of_a_batch_compile_nothing(decoder, greedy):
    graphdef = split(decoder)[0]
    programs = [
        generation._prefill(graphdef, "sparse"),
        generation._first(graphdef, Sampling()),
        generation._decode(graphdef, Sampling()),
    ]
    before = [program._cache_size() for program in programs]
    assert min(before) >= 1
    assert generate(decoder, [prompt[1:] for prompt in PROMPTS], NEW + 5) != greedy
    assert [program._cache_size() for program in programs] == before


def test_stream_yields_step_by_step(decoder, greedy):
    steps = list(stream(decoder, PROMPTS, NEW, Sampling()))
    assert [list(column) for column in zip(*steps, strict=True)] == greedy


def draws(logits, sampling, count=400):
    batch = jnp.broadcast_to(jnp.asarray(logits, jnp.float32)[None, :], (count, len(logits)))
    positions = jnp.arange(count, dtype=jnp.int32)
    return np.asarray(sample(batch, sampling, jnp.zeros((count,), jnp.uint32), positions))


def test_sampling_keeps_exactly_what_top_k_and_top_p_leave():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert set(draws(logits, Sampling(1.0))) == {0, 1, 2, 3}
    assert set(draws(logits, Sampling(1.0, top_k=2))) == {0, 1}
    assert set(draws(logits, Sampling(1.0, top_k=9))) == {0, 1, 2, 3}
    assert set(draws(logits, Sampling(1.0, top_p=0.65))) == {0, 1}
    assert set(draws(logits, Sampling(1.0, top_p=0.75))) == {0, 1, 2}
    assert set(draws(logits, Sampling(1.0, top_p=0.01))) == {0}
    # After top_k=2 the probabilities are 4/7 and 3/7.
    assert set(draws(logits, Sampling(1.0, top_k=2, top_p=0.5))) == {0}
    assert set(draws(logits, Sampling(0.0))) == {0}


def test_sampling_frequencies_follow_the_temperature():
    probability = np.asarray([0.4, 0.3, 0.2, 0.1])
    for temperature in (1.0, 0.5):
        found = np.bincount(draws(np.log(probability), Sampling(temperature), 4000)) / 4000
        wanted = probability ** (1 / temperature) / (probability ** (1 / temperature)).sum()
        np.testing.assert_allclose(found, wanted, atol=0.03)


def test_random_numbers_are_keyed_by_seed_and_position():
    logits = jax.random.normal(jax.random.key(0), (1, 64))
    four = jnp.broadcast_to(logits, (4, 64))
    drawn = sample(four, Sampling(5.0), jnp.asarray([1, 1, 2, 1]), jnp.asarray([7, 7, 7, 8]))
    alone = sample(logits, Sampling(5.0), jnp.asarray([2]), jnp.asarray([7]))
    assert drawn[0] == drawn[1]
    assert drawn[2] == alone[0]
    assert len(set(drawn.tolist())) == 3


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], 4), {}, "no prompts were given"),
        (([[1], []], 4), {}, "prompt 1 is empty"),
        (([[1, V, -1]], 4), {}, rf"prompt 0 has token ids \[{V}, -1\] outside vocab_size={V}"),
        (([[1]], 0), {}, "max_new_tokens=0 must be at least 1"),
        (([[1]], 4), {"seed": [1, 2]}, "2 seeds for 1 prompts"),
        (([[1]], 4), {"temperature": -1.0}, "temperature=-1.0 must not be negative"),
        (([[1]], 4), {"top_k": 0}, "top_k=0 must be at least 1"),
        (([[1]], 4), {"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
    ],
)
def test_nonsense_requests_are_refused(plain, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        generate(plain, *arguments, **options)


def test_mechanisms_that_see_the_future_are_refused(plain, monkeypatch):
    monkeypatch.setattr(type(plain.config.attention), "causal", False)
    with pytest.raises(ValueError, match="which is not causal: a later token can change"):
        generate(plain, [[1]], 2)


def test_prefill_in_chunks_changes_no_token(decoder):
    # The second prompt ends in the first piece, the third one at the end of the second piece.
    prompts = [[3 + i % 40 for i in range(150)], [11, 4], [8, 5] * 64]
    whole = generate(decoder, prompts, NEW)
    assert generate(decoder, prompts, NEW, prefill_chunk=40) == whole
    with pytest.raises(ValueError, match="prefill_chunk=0"):
        generate(decoder, prompts, NEW, prefill_chunk=0)


def test_a_prompt_read_densely_is_followed_by_sparse_tokens(plain):
    prompt, few = PROMPTS[0], make(StreamingLLM(sinks=1, recent=2, implementation="reference"))
    found = generate(few, [prompt], NEW, dense_prompt=True)[0]
    caches = few.init_caches(1, 64)
    output = jax.jit(lambda *inputs: few(*inputs, attend="dense"))(np.array([prompt]), caches)
    step = jax.jit(lambda *inputs: few(*inputs))
    expected = []
    for _ in range(NEW):
        expected.append(int(np.argmax(output.logits[0, -1])))
        output = step(np.array([expected[-1:]]), output.caches)
    assert found == expected
    assert found[0] == generate(plain, [prompt], 1)[0][0]
    assert found != generate(few, [prompt], NEW)[0]


def test_a_caller_can_end_a_prompt(plain):
    greedy = generate(plain, PROMPTS, NEW)
    seen = {}

    def ended(row, tokens):
        seen[row] = list(tokens)
        return len(tokens) == (2, 4, NEW + 1)[row]

    assert generate(plain, PROMPTS, NEW, ended=ended) == [greedy[0][:2], greedy[1][:4], greedy[2]]
    assert seen[1] == greedy[1][:4]
