"""The small world: every answer is found again by reading the story's sentences."""

import re

import pytest

from train.evaluation.tasks import Sample, make_sample
from train.evaluation.tasks.stories import PEOPLE, score

FACT = re.compile(r"(\w+) (went to|took|put down) the (\w+)\.")


def read(text):
    """Rooms of people, and the rooms every thing was seen in, from the sentences alone."""
    rooms, holders, seen = {}, {}, {}
    for person, verb, what in FACT.findall(text):
        assert person in PEOPLE
        if verb == "went to":
            assert rooms.get(person) != what
            rooms[person] = what
            for thing in (thing for thing, holder in holders.items() if holder == person):
                seen[thing].append(what)
        elif verb == "took":
            assert what not in holders
            assert what not in seen or seen[what][-1] == rooms[person]
            holders[what] = person
            seen.setdefault(what, [rooms[person]])
        else:
            assert holders.pop(what) == person
    return rooms, seen


def answer(question, text):
    rooms, seen = read(text)
    if found := re.search(r"Where is ([A-Z]\w+)\?", question):
        return rooms[found[1]]
    if found := re.search(r"Where is the (\w+)\?", question):
        return seen[found[1]][-1]
    found = re.search(r"Where was the (\w+) before the (\w+)\?", question)
    assert seen[found[1]].count(found[2]) == 1
    return seen[found[1]][seen[found[1]].index(found[2]) - 1]


def parts(sample):
    example, _, story = sample.context.partition("\nText: ")
    return example, story


@pytest.mark.parametrize("facts", [1, 2, 3])
def test_answers_follow_from_the_story(smollm2, text, facts):
    for seed in range(8):
        sample = make_sample(f"babilong_qa{facts}", seed, 700, smollm2, haystack=text)
        example, story = parts(sample)
        assert answer(sample.question, story) == sample.answers[0]
        solved = re.fullmatch(r"(.*)Example: (.*) Question: (.*) Answer: (\w+)", example, re.S)
        assert answer(solved[3], solved[2]) == solved[4]


@pytest.mark.parametrize("facts", [1, 2, 3])
def test_evidence_answers_alone(smollm2, text, facts):
    for seed in range(8):
        sample = make_sample(f"babilong_qa{facts}", seed, 700, smollm2, haystack=text)
        told = [sample.context[start:end] for start, end in sample.evidence]
        assert facts <= len(told)
        story = " ".join(told)
        if facts == 1:
            assert answer(sample.question, story) == sample.answers[0]
        # Where it was taken need not be told when it was carried on from there.
        rooms = re.findall(r"went to the (\w+)", story)
        assert sample.answers[0] in rooms
        thing = re.search(r"the (\w+) before|is the (\w+)\?", sample.question)
        if thing:
            assert (thing[1] or thing[2]) in story


def test_two_facts_are_a_taking_and_a_walk(smollm2, text):
    verbs = []
    for seed in range(8):
        sample = make_sample("babilong_qa2", seed, 700, smollm2, haystack=text)
        verbs.append([FACT.search(sample.context[slice(*span)])[2] for span in sample.evidence])
    assert all(found[:2] == ["took", "went to"] for found in verbs)
    assert any(found[2:] == ["put down"] for found in verbs)


@pytest.mark.parametrize(
    ("prediction", "question", "expected"),
    [
        (" The kitchen.", "Where is Clara?", 1),
        ("kitchen", "Where is Clara?", 1),
        ("In the kitchen or the attic.", "Where is Clara?", 0),
        ("In the attic.", "Where is Clara?", 0),
        ("She left. kitchen", "Where is Clara?", 0),
        ("Kitchen. Then the attic.", "Where is Clara?", 1),
        ("kitchen, before the attic", "Where was the apple before the attic?", 1),
        ("", "Where is Clara?", 0),
    ],
)
def test_score(prediction, question, expected):
    sample = Sample("babilong_qa1", 0, "context", question, ("kitchen",), ((0, 1),), 10, 1)
    assert score(prediction, sample) == expected
