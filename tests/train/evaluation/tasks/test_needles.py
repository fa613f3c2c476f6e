"""RULER's eight retrieval tasks: how many needles, of what kind, where."""

import re

import numpy as np
import pytest

from train.evaluation.tasks import TASKS, make_sample, words

NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.")


def needles(sample):
    return NEEDLE.findall(sample.context)


@pytest.fixture(scope="module")
def samples(smollm2, text):
    return {
        task: make_sample(
            task, 7, 1500, smollm2, haystack=text if TASKS[task].haystack == "text" else None
        )
        for task in TASKS
        if task.startswith("niah")
    }


@pytest.mark.parametrize(
    ("task", "needle_count", "keys", "asked", "kind"),
    [
        ("niah_single_1", 1, 1, 1, "numbers"),
        ("niah_single_2", 1, 1, 1, "numbers"),
        ("niah_single_3", 1, 1, 1, "uuids"),
        ("niah_multikey_1", 4, 4, 1, "numbers"),
        ("niah_multivalue", 4, 1, 4, "numbers"),
        ("niah_multiquery", 4, 4, 4, "numbers"),
    ],
)
def test_needles_between_lines_or_sentences(samples, task, needle_count, keys, asked, kind):
    sample = samples[task]
    found = needles(sample)
    assert len(found) == needle_count
    assert {name for name, _, _ in found} == {kind}
    assert len({key for _, key, _ in found}) == keys
    assert len(sample.answers) == asked
    asked_for = {key for _, key, value in found if value in sample.answers}
    assert all(key in sample.question for key in asked_for)
    assert {key for _, key, _ in found if key in sample.question} == asked_for


@pytest.mark.parametrize(("task", "kind"), [("niah_multikey_2", 0), ("niah_multikey_3", 1)])
def test_every_line_is_a_needle(samples, task, kind):
    sample = samples[task]
    lines = sample.context.splitlines()[1:]
    assert len(lines) > 10
    assert len(needles(sample)) == len(lines)
    width = (7, 36)[kind]
    assert {len(value) for _, _, value in needles(sample)} == {width}
    assert len({key for _, key, _ in needles(sample)}) == len(lines)


def test_evidence_is_the_needles_asked_for(samples):
    for sample in samples.values():
        shown = [sample.context[start:end] for start, end in sample.evidence]
        expected = [m.group() for m in NEEDLE.finditer(sample.context) if m[3] in sample.answers]
        assert shown == expected


def test_one_answer_is_asked_for_in_the_singular(samples):
    assert samples["niah_single_1"].question.endswith("mentioned in the provided text is")
    assert "all the special magic numbers" not in samples["niah_multikey_1"].question
    assert samples["niah_multivalue"].question.endswith("mentioned in the provided text are")
    assert re.search(r"for \S+, \S+, \S+, and \S+ ment", samples["niah_multiquery"].question)


def test_keys_do_not_depend_on_the_length(smollm2, text):
    short, long = (
        make_sample("niah_multikey_1", 3, length, smollm2, haystack=text) for length in (500, 3000)
    )
    assert short.question == long.question
    assert sorted(needles(short)) == sorted(needles(long))


def test_drawn_strings_are_different_and_absent():
    for kind in ("words", "numbers", "uuids"):
        drawn = words.draw(kind, 500, np.random.default_rng(0))
        assert len(set(drawn)) == 500
        assert words.draw(kind, 20, np.random.default_rng(0)) == drawn[:20]
        rest = words.draw(kind, 499, np.random.default_rng(0), without=f"... {drawn[0]} ...")
        assert rest == drawn[1:]
    with pytest.raises(ValueError, match="more than half of the"):
        words.draw("words", 60_000, np.random.default_rng(0))


def test_noise_surrounds_the_first_task(samples):
    lines = samples["niah_single_1"].context.splitlines()[1:]
    assert len(set(lines)) == 2
