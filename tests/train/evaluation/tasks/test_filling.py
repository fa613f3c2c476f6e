"""The search for the largest sample, on a task whose samples have a known number of tokens."""

import pytest

from train.evaluation.tasks import Draft, ExhaustedError, Noise, Request, Task, fill
from train.evaluation.tasks.scoring import all_answers
from train.tokenizer import ByteTokenizer

QUESTION, ANSWER, START = 3, 5, 1


def stars(per_unit, smallest=1, there_are=10**9):
    """A task whose context has ``per_unit`` bytes for each unit of size."""

    def build(request):
        if request.size > there_are:
            raise ExhaustedError(f"only {there_are} stars")
        context = "*" * (per_unit * request.size)
        return Draft(context, "?" * QUESTION, ["*"], [(0, 1)])

    return Task(build, all_answers, ANSWER, smallest=smallest)


def filled(task, length):
    request = Request("stars", 0, length, 0, Noise())
    return len(fill(task, request, ByteTokenizer(), ANSWER).context)


@pytest.mark.parametrize("per_unit", [1, 3, 7])
@pytest.mark.parametrize("smallest", [0, 1, 2, 5])
def test_largest_size_that_fits(per_unit, smallest):
    least = per_unit * smallest + QUESTION + ANSWER + START
    for length in range(least, least + 60):
        room = length - QUESTION - ANSWER - START
        assert filled(stars(per_unit, smallest), length) == room // per_unit * per_unit


def test_smallest_does_not_fit():
    with pytest.raises(ValueError, match=r"smallest sample takes 23 tokens, 5 of .* length=22"):
        filled(stars(7, smallest=2), 22)


@pytest.mark.parametrize("there_are", range(2, 12))
def test_material_is_asked_for_only_as_it_is_needed(there_are):
    needed = 7 * there_are + QUESTION + ANSWER + START
    assert filled(stars(7, there_are=there_are), needed - 1) == 7 * there_are - 7
    with pytest.raises(ExhaustedError, match=f"only {there_are} stars"):
        filled(stars(7, there_are=there_are), needed)
