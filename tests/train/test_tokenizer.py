"""Tokenizers lose nothing, count bytes exactly and train alike every time."""

import numpy as np
import pytest

from train.tokenizer import (
    ByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerConfig,
    build_tokenizer,
    load_tokenizer,
    train_sentencepiece,
)

TEXTS = [
    f"The state of the union, number {i}.\n\nOur people  are at peace; revenue is {i * 37} dollars."
    f"\n\tThe Congress will consider the report of the {word} at its next session.\n"
    for i, word in enumerate(["Secretary", "Treasury", "Navy", "President", "committee"] * 8)
]
CONFIG = TokenizerConfig(vocab_size=320)
AWKWARD = [
    "",
    " ",
    "  a  b   ",
    "\n\n\n a\n\tb\r\n",
    "▁x▁▁ y▁",
    "▁",
    "<s></s><unk><pad><0x41>",
    "é日本語🎉\u200d\ufeff",
    "a\0b\0\0",
    "\ufffd ⁇ ",
    "e\u0301 ﬁ ① \u00a0\u3000\u2028",
    "\x7f\x01\x1f",
    "".join(map(chr, range(300))),
    "peace " * 500,
]


@pytest.fixture(scope="module")
def model():
    return train_sentencepiece(TEXTS, CONFIG)


@pytest.fixture(scope="module", params=["sentencepiece", "bytes"])
def tokenizer(request, model):
    return SentencePieceTokenizer(model) if request.param == "sentencepiece" else ByteTokenizer()


def test_satisfies_the_protocol(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes[:3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("text", [*AWKWARD, TEXTS[3]], ids=range(len(AWKWARD) + 1))
def test_round_trip_and_bytes_are_exact(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id]) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert not set(ids.tolist()) & {0, 1, 2}
    assert ids.size == 0 or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)


def test_batch_equals_one_by_one(tokenizer):
    for ids, text in zip(tokenizer.encode_batch(AWKWARD), AWKWARD, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert tokenizer.encode_batch([]) == []


def test_half_a_character_decodes_to_the_replacement(tokenizer):
    ids = tokenizer.encode("日")
    assert tokenizer.decode(ids[:-1]) == "\ufffd"


def test_wrong_input_is_refused(tokenizer):
    with pytest.raises(ValueError, match=rf"token {tokenizer.vocab_size} is outside .*\[0, "):
        tokenizer.decode([5, tokenizer.vocab_size])
    with pytest.raises(ValueError, match="token -1 is outside"):
        tokenizer.decode([-1])
    with pytest.raises(ValueError, match="surrogates"):
        tokenizer.encode("a\ud800")


def test_byte_ids_are_the_bytes():
    assert ByteTokenizer().encode("Aé").tolist() == [3 + 0x41, 3 + 0xC3, 3 + 0xA9]
    assert ByteTokenizer().vocab_size == 259


def test_sentencepiece_compresses_what_it_was_trained_on(model):
    tokenizer = SentencePieceTokenizer(model)
    assert tokenizer.vocab_size == 320
    for text in TEXTS:
        assert len(tokenizer.encode(text)) < len(text.encode()) * 0.8
    newline, two = tokenizer.encode("\n")[0], tokenizer.encode("\n\n")
    assert len(two) == 1
    assert two[0] != newline


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_training_is_deterministic(algorithm):
    config = TokenizerConfig(vocab_size=320, algorithm=algorithm)
    one, two = (train_sentencepiece(TEXTS, config) for _ in range(2))
    assert one == two
    assert one != train_sentencepiece(TEXTS[:20], config)
    tokenizer = SentencePieceTokenizer(one)
    assert [tokenizer.decode(tokenizer.encode(text)) for text in AWKWARD] == AWKWARD


def test_training_bytes_bound_the_text():
    half = sum(map(len, TEXTS)) // 2
    config = TokenizerConfig(vocab_size=310, training_bytes=half)
    bounded = train_sentencepiece(TEXTS, config)
    assert bounded != train_sentencepiece(TEXTS, TokenizerConfig(vocab_size=310))
    assert SentencePieceTokenizer(bounded).vocab_size == 310


def test_text_the_trainer_cannot_show_is_left_out_not_the_rest():
    spoilt = [text.replace("revenue", "▁\0") for text in TEXTS]
    clean = [text.replace("revenue", "\n") for text in TEXTS]
    assert train_sentencepiece(spoilt, CONFIG) == train_sentencepiece(clean, CONFIG)


def test_too_little_text_is_an_error():
    with pytest.raises(ValueError, match=r"vocab_size=4096 cannot be trained on 8 bytes.*smaller"):
        train_sentencepiece(["too tiny"], TokenizerConfig())
    with pytest.raises(ValueError, match="no text in the 2 documents"):
        train_sentencepiece(["", "\n"], CONFIG)


def test_cache_is_used_and_repaired(tmp_path, monkeypatch, caplog):
    first = build_tokenizer(CONFIG, TEXTS, tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.read_bytes() == first.model

    def refuse(*arguments):
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr("train.tokenizer.train_sentencepiece", refuse)
        assert build_tokenizer(CONFIG, TEXTS, tmp_path).fingerprint == first.fingerprint
        with pytest.raises(AssertionError, match="trained again"):
            build_tokenizer(CONFIG, TEXTS[1:], tmp_path)
        with pytest.raises(AssertionError, match="trained again"):
            build_tokenizer(TokenizerConfig(vocab_size=321), TEXTS, tmp_path)
    path.write_bytes(first.model[: len(first.model) // 2])
    assert build_tokenizer(CONFIG, TEXTS, tmp_path).fingerprint == first.fingerprint
    assert "unusable and trained again" in caplog.text
    assert path.read_bytes() == first.model
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_cache_folder_that_cannot_be_written(tmp_path, caplog, model):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    tokenizer = build_tokenizer(CONFIG, TEXTS, blocked)
    assert tokenizer.fingerprint == SentencePieceTokenizer(model).fingerprint
    assert "cannot be cached" in caplog.text


def test_save_and_load(tokenizer, tmp_path, model):
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert loaded.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(loaded.encode(TEXTS[0]), tokenizer.encode(TEXTS[0]))
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer.json"):
        load_tokenizer(tmp_path)
    if isinstance(tokenizer, SentencePieceTokenizer):
        other = train_sentencepiece(TEXTS[:20], CONFIG)
        (tmp_path / "saved" / "tokenizer.model").write_bytes(other)
        with pytest.raises(ValueError, match="come from different tokenizers"):
            load_tokenizer(tmp_path / "saved")
        (tmp_path / "saved" / "tokenizer.model").write_bytes(b"nonsense")
        with pytest.raises(ValueError, match="8 bytes are no sentencepiece model"):
            load_tokenizer(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").write_text('{"kind": "words"}')
    with pytest.raises(ValueError, match="damaged"):
        load_tokenizer(tmp_path / "saved")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "words"}, "kind='words'"),
        ({"algorithm": "word"}, "algorithm='word'"),
        ({"vocab_size": 256}, "vocab_size=256 leaves no room"),
        ({"training_bytes": 0}, "training_bytes=0"),
    ],
)
def test_config_is_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**settings)
    assert TokenizerConfig(kind="bytes", vocab_size=259).kind == "bytes"
