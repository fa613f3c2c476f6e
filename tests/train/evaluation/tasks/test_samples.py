"""What every sample of every task promises."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from train.evaluation.tasks import TASKS, evidence_tokens, make_sample, prompt_tokens, score
from train.tokenizer import ByteTokenizer

# What qa_1 and qa_2 read need not be installed; they are in test_questions.py.
every_task = pytest.mark.parametrize("task", sorted({*TASKS} - {"qa_1", "qa_2"}))
# Above every task's smallest sample: bytes, and tokens of about four bytes.
LENGTHS = {"bytes": (3000, 4000), "smollm2": (1100, 4500)}
draws = hypothesis.given(
    seed=st.integers(0, 2**31), share=st.floats(0, 1), vocabulary=st.sampled_from(sorted(LENGTHS))
)


def drawn(examples):
    return hypothesis.settings(
        derandomize=True, max_examples=examples, deadline=None, database=None
    )


def sample_for(task, seed, share, vocabulary, tokenizers, text):
    low, high = LENGTHS[vocabulary]
    haystack = text if TASKS[task].haystack == "text" else None
    length = low + round(share * (high - low))
    return make_sample(task, seed, length, tokenizers[vocabulary], haystack=haystack)


def without_evidence(sample):
    text, end = "", 0
    for start, stop in sample.evidence:
        text, end = text + sample.context[end:start] + "\0", stop
    return text + sample.context[end:]


def check(sample, again, tokenizer):
    prompt = prompt_tokens(sample, tokenizer)
    assert len(prompt.tokens) + sample.answer_tokens <= sample.length
    assert again == sample
    assert sample.evidence == tuple(sorted(sample.evidence))
    for answer in sample.answers:
        assert any(answer in sample.context[start:end] for start, end in sample.evidence)
        # Rooms of a story are named by other facts too; test_stories.py finds its answers again.
        assert sample.task.startswith("babilong") or answer not in without_evidence(sample)
    assert score(sample.task, " " + ", ".join(sample.answers) + ".", sample) == 1
    assert score(sample.task, sample.question, sample) == 0
    assert score(sample.task, "", sample) == 0
    evidence = evidence_tokens(sample, tokenizer)
    assert (np.diff(evidence) > 0).all()
    assert evidence[0] >= 1
    assert evidence[-1] < len(prompt.context)
    shown = tokenizer.decode(prompt.tokens[evidence])
    for start, end in sample.evidence:
        assert sample.context[start:end] in shown


@every_task
@drawn(3)
@draws
def test_samples(task, seed, share, vocabulary, tokenizers, text):
    arguments = (task, seed, share, vocabulary, tokenizers, text)
    check(sample_for(*arguments), sample_for(*arguments), tokenizers[vocabulary])


@pytest.mark.full
@every_task
@drawn(200)
@draws
def test_samples_at_large(task, seed, share, vocabulary, tokenizers, text):
    arguments = (task, seed, share, vocabulary, tokenizers, text)
    check(sample_for(*arguments), sample_for(*arguments), tokenizers[vocabulary])


@every_task
def test_another_seed_is_another_sample(task, tokenizers, text):
    first, second = (sample_for(task, seed, 0, "bytes", tokenizers, text) for seed in (0, 1))
    assert first.context != second.context


@every_task
def test_no_length_is_wasted(task, tokenizers, text):
    sample = sample_for(task, 0, 1, "smollm2", tokenizers, text)
    used = len(prompt_tokens(sample, tokenizers["smollm2"]).tokens) + sample.answer_tokens
    assert used > 0.9 * sample.length


@every_task
def test_fewer_answer_tokens_leave_more_context(task, smollm2, text):
    haystack = text if TASKS[task].haystack == "text" else None
    samples = [
        make_sample(task, 1, 1500, smollm2, haystack=haystack, answer_tokens=tokens)
        for tokens in (4, 400)
    ]
    assert len(samples[0].context) > len(samples[1].context)
    assert [sample.answer_tokens for sample in samples] == [4, 400]


@pytest.mark.parametrize("task", sorted(name for name in TASKS if TASKS[name].places))
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_depth_is_heeded(task, depth, smollm2, text):
    haystack = text if TASKS[task].haystack == "text" else None
    sample = make_sample(task, 2, 2000, smollm2, haystack=haystack, depth=depth)
    assert sample.depth == pytest.approx(depth, abs=0.2)
    assert make_sample(task, 2, 2000, smollm2, haystack=haystack, depth=depth) == sample


def test_arguments_are_checked(smollm2):
    with pytest.raises(ValueError, match="task='niah' is not known; choose of"):
        make_sample("niah", 0, 1000, smollm2)
    with pytest.raises(ValueError, match="'noise' or 'text'"):
        make_sample("niah_single_1", 0, 1000, smollm2, haystack="essays")
    with pytest.raises(ValueError, match="makes its whole context itself"):
        make_sample("niah_multikey_2", 0, 1000, smollm2, haystack="noise")
    with pytest.raises(ValueError, match=r"depth=1\.5"):
        make_sample("niah_single_1", 0, 1000, smollm2, depth=1.5)
    with pytest.raises(ValueError, match=r"smallest sample takes \d+ tokens.*length=150"):
        make_sample("niah_single_1", 0, 150, smollm2)


def test_start_token_shifts_the_evidence(smollm2, text):
    sample = make_sample("niah_single_2", 0, 600, smollm2, haystack=text)
    apart = prompt_tokens(sample, smollm2, start=False)
    assert prompt_tokens(sample, smollm2).tokens.tolist() == [
        smollm2.bos_id,
        *apart.tokens.tolist(),
    ]
    shifted = evidence_tokens(sample, smollm2) - evidence_tokens(sample, smollm2, start=False)
    assert set(shifted.tolist()) == {1}


def test_evidence_counts_every_token_that_touches_it(text):
    tokenizer = ByteTokenizer()
    sample = make_sample("niah_single_2", 0, 1000, tokenizer, haystack=text)
    (span,) = sample.evidence
    place = len(sample.context[: span[0]].encode())
    size = len(sample.context[slice(*span)].encode())
    tokens = evidence_tokens(sample, tokenizer, start=False)
    assert tokens.tolist() == list(range(place, place + size))


def test_evidence_behind_a_space_that_the_tokenizer_adds(text):
    class Prefixing(ByteTokenizer):
        def encode(self, text):
            return super().encode(" " + text)

    sample = make_sample("niah_single_2", 0, 1000, ByteTokenizer(), haystack=text)
    plain = evidence_tokens(sample, ByteTokenizer())
    assert (evidence_tokens(sample, Prefixing()) == plain + 1).all()


def test_evidence_has_no_place_in_a_changed_text(text):
    class Shortening(ByteTokenizer):
        def encode(self, text):
            return super().encode(text.replace("the", ""))

    sample = make_sample("niah_single_2", 0, 1000, ByteTokenizer(), haystack=text)
    with pytest.raises(ValueError, match="the tokenizer changes this text"):
        evidence_tokens(sample, Shortening())


def test_the_usual_text_is_held_out(smollm2):
    sample = make_sample("niah_single_2", 5, 700, smollm2)
    other = make_sample("niah_single_2", 6, 700, smollm2)
    assert "the" in sample.context.split()
    assert sample.context[:400] != other.context[:400]


def test_samples_are_frozen(smollm2):
    sample = make_sample("niah_single_1", 0, 400, smollm2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample.seed = 1
