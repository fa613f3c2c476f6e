"""Variable tracking and the two tasks about frequent words, read back from their text."""

import re
from collections import Counter

import pytest

from train.evaluation.tasks import ExhaustedError, Noise, Request, make_sample
from train.evaluation.tasks.counting import common_words
from train.evaluation.tasks.scoring import string_match_all

ASSIGNED = re.compile(r"VAR (\w+) = (?:VAR )?(\w+)")


def holding(text, value):
    """Variables that hold ``value`` once all assignments of ``text`` ran in order."""
    held = {}
    for name, source in ASSIGNED.findall(text):
        held[name] = held.get(source, source)
    return {name for name, now in held.items() if now == value}


@pytest.mark.parametrize("haystack", ["noise", "text"])
def test_variables_hold_the_value(smollm2, text, haystack):
    for seed in range(10):
        hay = text if haystack == "text" else haystack
        sample = make_sample("vt", seed, 1500, smollm2, haystack=hay)
        (value,) = set(re.findall(r"\d{5}", sample.question))
        assert holding(sample.context, value) == set(sample.answers)
        assert len(sample.answers) == 5
        assert len(sample.evidence) == 5


def test_variable_tracking_shows_a_solved_example(smollm2):
    sample = make_sample("vt", 0, 1500, smollm2)
    example, _ = sample.context.split("\n\n")
    (value,) = set(re.findall(r"hold the value (\d{5})", example))
    solved = example.split("They are:")[1].split()
    assert holding(example, value) == set(solved)
    assert {len(name) for name in solved} == {3}


def entries(text):
    return re.findall(r"(\d+)\. (\w+)", text)


@pytest.mark.parametrize(
    ("length", "often", "seldom", "solved_words", "solved_often", "solved_seldom"),
    [(1500, 6, 1, 20, 3, 1), (5000, 30, 3, 40, 10, 3)],
)
def test_common_words(smollm2, length, often, seldom, solved_words, solved_often, solved_seldom):
    sample = make_sample("cwe", 1, length, smollm2)
    example, asked = sample.context.split("\n\n")
    listed, counted = entries(example.split("Question")[0]), entries(asked)
    for numbered, few, many, total in (
        (listed, solved_seldom, solved_often, solved_words),
        (counted, seldom, often, None),
    ):
        assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
        counts = Counter(word for _, word in numbered)
        assert sorted(set(counts.values())) == [few, many]
        assert sum(count == many for count in counts.values()) == 10
        assert total in (None, len(counts))
    counts = Counter(word for _, word in counted)
    assert {word for word, count in counts.items() if count == often} == set(sample.answers)
    solved = Counter(word for _, word in listed)
    answer = example.split("in the list are:")[-1]
    common = [word for word, count in solved.items() if count == solved_often]
    assert string_match_all(answer, common) == 1
    assert len(sample.evidence) == 10 * often


def test_common_words_run_out():
    request = Request("cwe", 0, 10**6, 11_000, Noise())
    with pytest.raises(ExhaustedError, match=r"length=1000000 takes more than the \d+ words"):
        common_words(request)


def test_frequent_words(smollm2):
    sample = make_sample("fwe", 2, 3000, smollm2)
    counts = Counter(sample.context.splitlines()[1].split())
    dots, *others = counts.most_common(5)
    assert dots[0] == "..."
    assert [word for word, _ in others[:3]] == list(sample.answers)
    assert others[2][1] > others[3][1]
    # zeta(2) draws: the second and third are 1/4 and 1/9 of the first.
    assert others[0][1] == pytest.approx(dots[1] / 4, abs=1)
    assert others[1][1] == pytest.approx(dots[1] / 9, abs=1)
    assert len(sample.evidence) == sum(count for _, count in others[:3])


def test_smallest_frequent_words_have_one_answer(smollm2):
    sample = make_sample("fwe", 2, 420, smollm2)
    counts = Counter(sample.context.splitlines()[1].split()).most_common()
    assert [word for word, _ in counts[1:4]] == list(sample.answers)
    assert len({count for _, count in counts[:5]}) == 5
