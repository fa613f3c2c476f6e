import numpy as np
import pytest

from train.evaluation.bytes_model import ByteModel


def brute_force(train: list[bytes], context: bytes, byte: int) -> float:
    """Witten-Bell written as the formula says, over dictionaries."""
    probability = 1 / 256
    for order in range(min(len(context), 2) + 1):
        tail = context[len(context) - order :]
        after = [
            document[i + order]
            for document in train
            for i in range(len(document) - order)
            if document[i : i + order] == tail
        ]
        if after:
            distinct = len(set(after))
            probability = (after.count(byte) + distinct * probability) / (len(after) + distinct)
    return probability


TRAIN = [b"abracadabra", b"", b"a", "cafés à la carte".encode(), b"ab"]


def test_agrees_with_the_formula():
    model = ByteModel.fit(TRAIN)
    text = "abracafé zq\x00abr".encode()
    expected = [brute_force(TRAIN, text[:i], text[i]) for i in range(len(text))]
    found = model.probabilities(np.frombuffer(text, np.uint8))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_first_scored_byte_sees_what_came_before():
    model = ByteModel.fit(TRAIN)
    text = np.frombuffer(b"abracad", np.uint8)
    np.testing.assert_allclose(
        model.probabilities(text, first=3), model.probabilities(text)[3:], rtol=0
    )
    assert model.bits(b"abracad", 3) == pytest.approx(-np.log2(model.probabilities(text))[3:].sum())


@pytest.mark.parametrize("context", [b"", b"a", b"ab", b"zz", b"ra"])
def test_probabilities_sum_to_one(context):
    model = ByteModel.fit(TRAIN)
    total = sum(
        model.probabilities(np.frombuffer(context + bytes([b]), np.uint8), len(context))[0]
        for b in range(256)
    )
    assert total == pytest.approx(1.0, abs=1e-12)


def test_counts_do_not_cross_documents():
    joined = ByteModel.fit([b"xyxy", b"zwzw"])
    after_y = joined.probabilities(np.frombuffer(b"yz", np.uint8), 1)[0]
    unseen = joined.probabilities(np.frombuffer(b"yw", np.uint8), 1)[0]
    assert after_y == pytest.approx(unseen)


def test_bits_per_byte_of_a_uniform_source_is_eight():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 256, 400_000, dtype=np.uint8).tobytes()
    held_out = rng.integers(0, 256, 20_000, dtype=np.uint8).tobytes()
    order0_limit = 8.0
    assert ByteModel.fit([train]).bits_per_byte([(held_out, 0)]) > order0_limit


def test_bits_per_byte_of_a_markov_source_reaches_its_entropy():
    rng = np.random.default_rng(1)
    # Every byte is one of two successors of the byte before, with equal odds: exactly one bit.
    choices = rng.integers(0, 2, 200_000)
    state, text = 0, np.empty(len(choices), np.uint8)
    for i, choice in enumerate(choices):
        state = (5 * state + 17 + 64 * choice) % 256
        text[i] = state
    data = text.tobytes()
    found = ByteModel.fit([data[:180_000]]).bits_per_byte([(data[180_000:], 2)])
    assert 1.0 <= found < 1.02


def test_refuses_nothing():
    with pytest.raises(ValueError, match="no byte"):
        ByteModel.fit([b"", b""])
    with pytest.raises(ValueError, match="no byte to score"):
        ByteModel.fit([b"a"]).bits_per_byte([(b"abc", 3)])
    with pytest.raises(ValueError, match="not fitted"):
        ByteModel().bits(b"abc")
