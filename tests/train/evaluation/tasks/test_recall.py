"""Passkey, copy, JSON key-value, MQAR in words, induction: read back from their text."""

import json
import re

import pytest

from train.evaluation.tasks import Sample, make_sample, score
from train.evaluation.tasks.scoring import begins_with_answer, leading_words


def answered(*answers):
    return Sample("any", 0, "context", "question", answers, ((0, 1),), 10, 1)


def test_passkey(smollm2):
    sample = make_sample("passkey", 0, 800, smollm2)
    (number,) = sample.answers
    assert 10_000 <= int(number) < 100_000
    assert re.findall(r"\d+", sample.context) == [number, number]
    assert score("passkey", f" {number}. Remember it.", sample) == 1
    assert score("passkey", f" {number}0", sample) == 0
    assert score("passkey", f" not {number}", sample) == 0


def test_json_is_json(smollm2):
    sample = make_sample("json_kv", 0, 2000, smollm2)
    pairs = json.loads(sample.context.split("\n", 1)[1])
    (key,) = [key for key in pairs if key in sample.question]
    assert [pairs[key]] == list(sample.answers)
    assert len(pairs) > 15
    assert score("json_kv", f' "{pairs[key]}"', sample) == 1


def test_mqar_asks_for_a_bound_word(smollm2):
    for seed in range(10):
        sample = make_sample("mqar", seed, 600, smollm2)
        bound = dict(re.findall(r"The (\w+) is (\w+)\.", sample.context))
        assert len(bound) == 16
        (noun,) = re.findall(r" The (\w+) is$", sample.question)
        assert [bound[noun]] == list(sample.answers)
        unbound = re.findall(r" ([A-Z]\w+)\.", sample.context)
        assert not {word.lower() for word in unbound} & bound.keys()


def test_induction_repeats_a_word_that_occurs_once(smollm2):
    for seed in range(10):
        sample = make_sample("induction", seed, 600, smollm2)
        sequence = sample.context.split()
        (first,) = sample.question.split()
        assert sequence.count(first) == 1
        assert [sequence[sequence.index(first) + 1]] == list(sample.answers)


def test_copied_words_are_scored_up_to_the_first_error(smollm2):
    sample = make_sample("copy", 0, 800, smollm2)
    passage = sample.answers[0].split()
    assert len(passage) == 16
    assert score("copy", " ".join(passage), sample) == 1
    assert score("copy", " ".join([*passage[:8], "no", *passage[9:]]), sample) == 0.5
    assert score("copy", " ".join(passage[1:]), sample) == 0


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [(" Pearly.", 1), ('"pearly" and', 1), ("pearlyish", 0), ("very pearly", 0), ("", 0)],
)
def test_answer_must_come_first_and_whole(prediction, expected):
    assert begins_with_answer(prediction, answered("pearly")) == expected


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("a b c d", 1), ("a, b", 0.5), ("A B x d", 0.5), ("b a", 0), ("a b c d e", 1)],
)
def test_leading_words(prediction, expected):
    assert leading_words(prediction, answered("a b c d")) == expected
