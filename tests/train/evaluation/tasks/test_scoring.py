import pytest

from train.evaluation.tasks.scoring import clean, string_match_all, string_match_part


def test_all_is_the_share_of_answers_found():
    answers = ("1234567", "7654321")
    assert string_match_all("They are 1234567 and 7654321.", answers) == 1
    assert string_match_all("7654321, I think", answers) == 0.5
    assert string_match_all("none", answers) == 0


def test_all_looks_for_substrings_whatever_their_case():
    assert string_match_all("xABCy", ("abc",)) == 1
    assert string_match_all("91234567", ("1234567",)) == 1
    assert string_match_all("1,234,567", ("1234567",)) == 0


def test_part_needs_one_answer():
    assert string_match_part("in Paris, France", ("France", "the french republic")) == 1
    assert string_match_part("in Spain", ("France", "the french republic")) == 0


def test_harness_would_score_half_of_that():
    assert string_match_all("in Paris, France", ("France", "the french republic")) == 0.5


@pytest.mark.parametrize(
    ("raw", "cleaned"), [("  a\tb \n", "a\nb"), ("\x00a", "a"), ("a\x1fb", "a\nb"), ("é", "é")]
)
def test_control_characters_become_line_breaks(raw, cleaned):
    assert clean(raw) == cleaned


def test_answers_do_not_reach_over_control_characters():
    assert string_match_all("12\t34", ("1234",)) == 0
