"""Published tokenizers under our protocol: round trips, bytes, special tokens, GGUF's rules."""

import io
import json

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as kinds

from models.loading.gguf_tokenizer import read_tokenizer
from models.loading.tokenizer import HuggingFaceTokenizer
from train.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer

TEXTS = [
    f"The state of the union, number {i}.\n\nOur people  are at peace; it's {i * 37} dollars."
    for i in range(60)
]
AWKWARD = [
    "",
    " ",
    "  a  b   ",
    "\n\n\n a\n\tb\r\n",
    "<|end|> and <|start|>text<|end|>",
    "é日本語🎉\u200d\ufeff",
    "a\0b\0\0",
    "\ufffd ⁇ ",
    "it's 12345,678.90 WE'LL",
    "\x7f\x01\x1f",
    "".join(map(chr, range(300))),
    "peace " * 200,
]


def byte_level(normalizer=None):
    backend = Backend(kinds.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


@pytest.fixture(scope="module")
def backend():
    return byte_level()


@pytest.fixture(scope="module")
def tokenizer(backend):
    return HuggingFaceTokenizer(backend.to_str(), {"bos": 1, "eos": 0})


def llama_model(**changes):
    """A sentencepiece model as Llama 2's: unknown 0, bos 1, eos 2, no padding, a space in front."""
    model = io.BytesIO()
    options = {
        "vocab_size": 320,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, **options | changes
    )
    return model.getvalue()


def test_satisfies_the_protocol(tokenizer, backend):
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.vocab_size == backend.get_vocab_size()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 0, 0)
    assert tokenizer.token_bytes[:2].tolist() == [0, 0]


@pytest.mark.parametrize("text", [*AWKWARD, TEXTS[3]], ids=range(len(AWKWARD) + 1))
def test_round_trip_and_bytes_are_exact(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([1, *ids, 0]) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert not set(ids.tolist()) & {0, 1}


def test_ids_are_those_of_the_package(tokenizer, backend):
    assert tokenizer.encode(TEXTS[7]).tolist() == backend.encode(TEXTS[7]).ids
    for ids, text in zip(tokenizer.encode_batch(AWKWARD), AWKWARD, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert tokenizer.encode_batch([]) == []


def test_special_tokens_are_read_only_when_asked_for(tokenizer):
    text = "<|start|>peace<|end|>"
    ids = tokenizer.encode(text, special_tokens=True)
    assert (ids[0], ids[-1]) == (1, 0)
    assert tokenizer.decode(ids) == "peace"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.token_id("<|start|>") == 1
    assert tokenizer.token_id("<|other|>") is None


def test_wrong_input_is_refused(tokenizer):
    with pytest.raises(ValueError, match=f"token {tokenizer.vocab_size} is outside"):
        tokenizer.decode([tokenizer.vocab_size])
    with pytest.raises(ValueError, match="lone surrogates"):
        tokenizer.encode("a\ud800")
    with pytest.raises(ValueError, match="no definition of a tokenizer"):
        HuggingFaceTokenizer("{}", {"eos": 0})
    with pytest.raises(ValueError, match="names no end token"):
        HuggingFaceTokenizer(tokenizer.definition, {"bos": 1})


def test_normalised_text_comes_back_normalised():
    tokenizer = HuggingFaceTokenizer(byte_level(normalizers.NFC()).to_str(), {"eos": 0})
    ids = tokenizer.encode("e\u0301")
    assert tokenizer.decode(ids) == "é"
    assert tokenizer.token_bytes[ids].sum() == len("é".encode())


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (1, 0, 0)
    assert load_tokenizer(tmp_path / "tokenizer.json").fingerprint == tokenizer.fingerprint
    # Some folders name the tokens elsewhere, or only their ids.
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="names no end token"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": [0, 1], "bos_token_id": null}')
    assert (load_tokenizer(tmp_path).eos_id, load_tokenizer(tmp_path).bos_id) == (0, 0)
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<|start|>"}}')
    assert load_tokenizer(tmp_path).bos_id == 1


def test_byte_fallback_with_a_space_in_front():
    """The form of Llama 2's tokenizer.json: spaces as marks, bytes as pieces, a space in front."""
    letters = sorted(set("".join(TEXTS).replace(" ", "▁").replace("\n", "")) | {"▁"})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters, "▁the"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    tokens += ["th", "the"]
    backend = Backend(
        kinds.BPE(
            {token: i for i, token in enumerate(tokens)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = HuggingFaceTokenizer(backend.to_str(), {"bos": 1, "eos": 2})
    for text in ("the state of the union", "日本 é\n\n x", TEXTS[0]):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode()) + 1  # the space in front


def test_published_sentencepiece_models_keep_their_ids(tmp_path):
    tokenizer = SentencePieceTokenizer(llama_model())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    for text in [text for text in AWKWARD if "\0" not in text] + TEXTS[:3]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        if text:
            assert tokenizer.token_bytes[ids].sum() == len(text.encode()) + 1
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    assert tokenizer.encode(TEXTS[5]).tolist() == processor.encode(TEXTS[5])
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint


def test_sentencepiece_without_an_end_is_refused():
    with pytest.raises(ValueError, match="has no end token"):
        SentencePieceTokenizer(llama_model(eos_id=-1))


def gguf_field(backend, rule, **changes):
    """The metadata that a GGUF file with ``backend``'s tokens would have."""
    definition = json.loads(backend.to_str())
    vocabulary = sorted(definition["model"]["vocab"].items(), key=lambda pair: pair[1])
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": [token for token, _ in vocabulary],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in definition["model"]["merges"]],
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(vocabulary) - 2),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
    } | changes
    return lambda name, default=None: values.get(name, default)


@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_gguf_tokenizers_lose_nothing(backend, rule):
    tokenizer = read_tokenizer(gguf_field(backend, rule))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 0, 0)
    for text in [*AWKWARD, *TEXTS[:3]]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|start|>a", special_tokens=True)[0] == 1


def test_gguf_rule_of_gpt2_equals_the_original(backend):
    tokenizer = read_tokenizer(gguf_field(backend, "gpt-2"))
    for text in TEXTS[:5]:
        assert tokenizer.encode(text).tolist() == backend.encode(text).ids


@pytest.mark.parametrize(
    ("rule", "pieces"),
    [
        ("gpt-2", ["In", " 12345", ",", "6", " we", "'ll"]),
        ("smollm", ["In", " ", "1", "2", "3", "4", "5", ",", "6", " we", "'ll"]),
        ("llama-bpe", ["In", " ", "123", "45", ",", "6", " we", "'ll"]),
        ("qwen2", ["In", " ", "1", "2", "3", "4", "5", ",", "6", " we", "'ll"]),
    ],
)
def test_gguf_rules_split_digits_each_in_its_way(backend, rule, pieces):
    definition = json.loads(read_tokenizer(gguf_field(backend, rule)).definition)
    splitter = Backend.from_str(json.dumps(definition)).pre_tokenizer
    split = splitter.pre_tokenize_str("In 12345,6 we'll")
    assert [piece.replace("Ġ", " ") for piece, _ in split] == pieces


def test_gguf_tokenizers_of_other_kinds_are_refused(backend):
    assert read_tokenizer(lambda name, default=None: default) is None
    with pytest.raises(ValueError, match="'llama' with the splitting rule 'gpt-2'"):
        read_tokenizer(gguf_field(backend, "gpt-2", **{"tokenizer.ggml.model": "llama"}))
    with pytest.raises(ValueError, match=r"splitting rule 'tekken'.*tokenizer=False"):
        read_tokenizer(gguf_field(backend, "tekken"))
