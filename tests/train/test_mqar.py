"""MQAR samples: answerable from the binding, and from nothing else."""

import numpy as np
import pytest

from train.evaluation.mqar import MQAR, draw_samples

TASK = MQAR(length=96, vocab_size=64, pairs=5, gap=20)


def test_every_question_is_answered_by_its_binding_alone():
    samples = draw_samples(TASK, seed=3, count=50)
    for tokens, targets, weights, evidence in zip(
        samples.tokens, samples.targets, samples.weights, samples.evidence, strict=True
    ):
        bindings = dict(zip(tokens[0:10:2].tolist(), tokens[1:10:2].tolist(), strict=True))
        assert len(bindings) == 5
        questions = np.flatnonzero(weights)
        assert len(questions) > 0
        assert questions.min() >= TASK.first_question == 30
        for at in questions:
            assert targets[at] == bindings[int(tokens[at])]
            assert tokens[evidence[at]] == targets[at]
            assert at - evidence[at] > TASK.gap
        others = np.setdiff1d(np.arange(10, 96), questions)
        assert not set(tokens[others].tolist()) & set(bindings)
        assert (tokens[10:] < 32).all()
        assert (tokens[1:10:2] >= 32).all()
        assert (tokens > 0).all()
        assert (evidence[weights == 0] == -1).all()


def test_a_sample_depends_on_its_number_alone():
    whole = draw_samples(TASK, seed=1, count=6)
    part = draw_samples(TASK, seed=1, count=2, first=3)
    np.testing.assert_array_equal(whole.tokens[3:5], part.tokens)
    np.testing.assert_array_equal(whole.targets[3:5], part.targets)
    assert (draw_samples(TASK, seed=2, count=1).tokens != whole.tokens[:1]).any()


def test_a_sample_always_asks():
    samples = draw_samples(MQAR(96, 64, 5, 20, question_rate=1e-6), seed=0, count=3)
    assert (samples.weights.sum(axis=1) == 1).all()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"length": 30}, "use a length above 30"),
        ({"vocab_size": 12}, "at least 14"),
        ({"vocab_size": 63}, "must be even"),
        ({"pairs": 0}, "pairs=0"),
        ({"question_rate": 0.0}, "question_rate"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        MQAR(**{"length": 96, "vocab_size": 64, "pairs": 5, "gap": 20, **sizes})
