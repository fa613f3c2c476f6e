"""Batches: exact resume, equal shares, and held-out text that training never sees."""

import dataclasses
import json

import numpy as np
import pytest

from train.corpus import SPLITS
from train.data import (
    DataConfig,
    cache_folder,
    encode_documents,
    evaluation_documents,
    load_splits,
    make_tokenizer,
    make_train_iterator,
    validation_batches,
)
from train.packing import check_segments
from train.tokenizer import ByteTokenizer, TokenizerConfig

T, B, ALIGNMENT = 64, 4, 16
WORDS = [
    "peace",
    "commerce",
    "revenue",
    "treaties",
    "Congress",
    "harvests",
    "navigation",
    "prosperity",
]
KEYS = {"tokens", "targets", "weights", "segment_ids", "positions"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A little corpus whose documents name themselves in every line."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        line = f"Document {i} speaks of {WORDS[i % 8]} and {WORDS[-i % 7]}, number {i}.\n"
        (folder / f"{i:02}.txt").write_text(line * (1 + i % 7), encoding="utf-8")
    return DataConfig(
        source=str(folder),
        validation_fraction=0.2,
        evaluation_fraction=0.2,
        cache_dir=str(folder.parent / "cache"),
    )


@pytest.fixture(scope="module")
def tokenizer(config):
    return make_tokenizer(config, TokenizerConfig(vocab_size=300))


def _iterator(config, tokenizer, **settings):
    settings = {"sequence_length": T, "batch_size": B, "alignment": ALIGNMENT, "seed": 5} | settings
    return make_train_iterator(config, tokenizer, **settings)


def _assert_equal(one, two):
    assert one.keys() == two.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], two[key], err_msg=key)


def epochs(iterator):
    (value,) = iterator.epochs.values()
    return value


def test_batches_have_the_stated_arrays(config, tokenizer):
    batch = next(_iterator(config, tokenizer))
    assert set(batch) == KEYS
    for key, array in batch.items():
        assert array.shape == (B, T)
        assert array.dtype == (np.float32 if key == "weights" else np.int32)
    check_segments(batch["segment_ids"], ALIGNMENT)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_an_epoch_holds_every_training_token_once(config, tokenizer, prefetch):
    changed = DataConfig(**{**vars(config), "prefetch": prefetch})
    encoded = encode_documents(load_splits(config)["train"], tokenizer)
    last = np.zeros(len(encoded.tokens), bool)
    last[encoded.bounds[1:] - 1] = True
    iterator = _iterator(changed, tokenizer, batch_size=1)
    for _ in range(2):
        rows = [next(iterator)]
        while epochs(iterator) % 1:
            rows.append(next(iterator))
        batch = {key: np.concatenate([row[key] for row in rows]) for key in KEYS}
        live = batch["weights"] > 0
        np.testing.assert_array_equal(
            np.sort(batch["tokens"][live]), np.sort(encoded.tokens[~last])
        )
    assert epochs(iterator) == 2.0
    iterator.close()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_is_exact(config, tokenizer, prefetch):
    config = DataConfig(**{**vars(config), "prefetch": prefetch})
    iterator = _iterator(config, tokenizer)
    states, batches = [], []
    for _ in range(25):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    assert epochs(iterator) > 1
    for step in (0, 1, 7, 24):
        fresh = _iterator(config, tokenizer)
        next(fresh)
        fresh.set_state(json.loads(states[step]))
        assert fresh.get_state() == json.loads(states[step])
        for expected in batches[step : step + 3]:
            _assert_equal(next(fresh), expected)
    iterator.set_state(json.loads(states[3]))
    _assert_equal(next(iterator), batches[3])


def test_rows_may_repeat_themselves(config, tokenizer):
    repeating = DataConfig(**{**vars(config), "repeats": 0.4})
    state = _iterator(repeating, tokenizer, sequence_length=4 * T).get_state()
    one, two, plain = (
        _iterator(c, tokenizer, sequence_length=4 * T) for c in (repeating, repeating, config)
    )
    changed = 0
    for _ in range(4):
        batch, as_read = next(one), next(plain)
        _assert_equal(batch, next(two))
        for name in ("segment_ids", "positions", "weights"):
            np.testing.assert_array_equal(batch[name], as_read[name])
        changed += (batch["tokens"] != as_read["tokens"]).sum()
    assert changed > 0
    with pytest.raises(ValueError, match="made with fingerprint"):
        plain.set_state(state)
    with pytest.raises(ValueError, match="repeats=1 must be a share"):
        DataConfig(repeats=1)


def test_positions_may_be_spread(config, tokenizer):
    plain = _iterator(config, tokenizer)
    spread = DataConfig(**{**vars(config), "positions_up_to": 40 * T})
    one, two = _iterator(spread, tokenizer), _iterator(spread, tokenizer)
    state, jumps = one.get_state(), 0
    for _ in range(4):
        batch, as_read = next(one), next(plain)
        positions = batch.pop("positions")
        counted = as_read.pop("positions")
        _assert_equal(batch, as_read)
        np.testing.assert_array_equal(next(two)["positions"], positions)
        assert (positions >= counted).all()
        assert positions.max() < 40 * T
        inside = (batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]) & (
            batch["segment_ids"][:, 1:] > 0
        )
        steps = np.diff(positions, axis=1)[inside]
        assert (steps >= 1).all()
        jumps += (steps > 1).sum()
    assert jumps > 4
    with pytest.raises(ValueError, match="made with fingerprint"):
        plain.set_state(state)


def test_state_of_another_input_is_refused(config, tokenizer):
    iterator = _iterator(config, tokenizer)
    state = iterator.get_state()
    for other in (
        _iterator(config, tokenizer, seed=6),
        _iterator(config, tokenizer, sequence_length=2 * T),
        _iterator(config, tokenizer, batch_size=2),
        _iterator(config, tokenizer, alignment=8),
        _iterator(config, ByteTokenizer()),
    ):
        with pytest.raises(ValueError, match=r"made with fingerprint .* restore them or start"):
            other.set_state(state)
    for damaged in ({}, {**state, "input": None}, {**state, "input": {"next_index": "x"}}):
        with pytest.raises(ValueError, match="no input state"):
            iterator.set_state(damaged)
    with pytest.raises(ValueError, match="next_index=-1"):
        iterator.set_state({**state, "input": {"next_index": -1}})


def test_seed_changes_the_batches(config, tokenizer):
    one, two = (next(_iterator(config, tokenizer, seed=seed)) for seed in (0, 1))
    assert (one["tokens"] != two["tokens"]).any()


def test_processes_share_the_batch_of_one_process(config, tokenizer):
    whole = _iterator(config, tokenizer)
    parts = [_iterator(config, tokenizer, process_index=i, process_count=2) for i in range(2)]
    for _ in range(12):
        shares = [next(part) for part in parts]
        assert shares[0]["tokens"].shape == (B // 2, T)
        _assert_equal(
            {key: np.concatenate([share[key] for share in shares]) for key in KEYS}, next(whole)
        )
    assert parts[0].get_state() == parts[1].get_state() == whole.get_state()
    parts[1].set_state(whole.get_state())
    np.testing.assert_array_equal(next(parts[1])["tokens"], next(whole)["tokens"][B // 2 :])
    assert epochs(parts[0]) == pytest.approx(epochs(_at(config, tokenizer, 12)))


def _at(config, tokenizer, step):
    iterator = _iterator(config, tokenizer)
    for _ in range(step):
        next(iterator)
    return iterator


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 3, "process_count": 2}, "batch_size=3 is not a positive multiple of .*=2"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"process_index": 2, "process_count": 2}, "process_index=2 is not in"),
        ({"sequence_length": 60}, "sequence_length=60 is not a positive multiple of .*=16"),
    ],
)
def test_sizes_that_do_not_fit(config, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        _iterator(config, tokenizer, **settings)


def test_held_out_text_is_never_trained_on(config, tokenizer):
    splits = load_splits(config)
    held_out = {split: set(splits[split]["name"]) for split in SPLITS}
    iterator = _iterator(config, tokenizer, batch_size=1)
    seen = set()
    while epochs(iterator) < 2:
        for row in next(iterator)["tokens"]:
            seen |= {int(line.split()[1]) for line in _lines(tokenizer.decode(row))}
    expected = {int(name[:2]) for name in held_out["train"]}
    assert seen == expected
    for split in ("validation", "evaluation"):
        documents = evaluation_documents(config, tokenizer, split)
        assert {document.name for document in documents} == held_out[split]
        assert not seen & {int(document.name[:2]) for document in documents}


def _lines(text):
    return [line for line in text.split("\n") if line.startswith("Document ") and " speaks" in line]


def test_the_tokenizer_sees_training_text_only(config, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        "train.data.build_tokenizer", lambda config, texts, cache: seen.extend(texts)
    )
    make_tokenizer(config, TokenizerConfig(vocab_size=300))
    assert seen == load_splits(config)["train"]["text"][:]
    assert len(seen) < 40


def test_sotu_is_evaluated_after_1970_only():
    documents = evaluation_documents(DataConfig(), ByteTokenizer(), documents=6, max_tokens=200)
    assert len(documents) == 6
    assert all(document.year > 1970 for document in documents)
    years = {split: set(dataset["year"]) for split, dataset in load_splits(DataConfig()).items()}
    assert max(years["train"]) < min(years["validation"]) < 1971 == min(years["evaluation"])


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_evaluation_documents_account_for_every_byte(config, tokenizer, kind):
    tokenizer = tokenizer if kind == "sentencepiece" else ByteTokenizer()
    for document in evaluation_documents(config, tokenizer):
        assert document.tokens[0] == tokenizer.bos_id
        assert document.tokens[-1] == tokenizer.eos_id
        assert document.tokens.dtype == np.int32
        assert tokenizer.token_bytes[document.tokens].sum() == len(document.text.encode())
    short = evaluation_documents(config, tokenizer, documents=2, max_tokens=20)
    assert len(short) == 2
    for document in short:
        assert len(document.tokens) == 20
        assert tokenizer.decode(document.tokens) == document.text
        assert tokenizer.token_bytes[document.tokens].sum() == len(document.text.encode())


def test_a_cut_never_splits_a_character(tmp_path, monkeypatch):
    (tmp_path / "one.txt").write_text("日本語" * 9, encoding="utf-8")
    (tmp_path / "two.txt").write_text("\ufffd" * 9, encoding="utf-8")
    config = DataConfig(source=str(tmp_path), validation_fraction=0, evaluation_fraction=0)
    monkeypatch.setattr(
        "train.data.load_splits",
        lambda config, real=load_splits: {"evaluation": real(config)["train"]},
    )
    for limit, length in ((8, 7), (9, 7), (10, 10)):
        one, two = evaluation_documents(config, ByteTokenizer(), max_tokens=limit)
        assert len(one.tokens) == len(two.tokens) == length
        assert two.text == "\ufffd" * ((length - 1) // 3)
        assert one.text == ("日本語" * 9)[: (length - 1) // 3]


def test_evaluation_requests_that_make_no_sense(config, tokenizer):
    with pytest.raises(ValueError, match="'train' is what the model has seen"):
        evaluation_documents(config, tokenizer, "train")
    with pytest.raises(ValueError, match="documents=0"):
        evaluation_documents(config, tokenizer, documents=0)
    with pytest.raises(ValueError, match="max_tokens=2"):
        evaluation_documents(config, tokenizer, max_tokens=2)
    nothing = DataConfig(**{**vars(config), "evaluation_fraction": 0})
    with pytest.raises(ValueError, match=r"'evaluation' of .*corpus.* has no document"):
        evaluation_documents(nothing, tokenizer)


@pytest.fixture
def mixed(config, tmp_path):
    """A second source, and both in proportion 3 : 1."""
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"chapter {i} of another book " * (i % 5 + 3))
    mixture = ((config.source, 3.0), (str(tmp_path), 1.0))
    return dataclasses.replace(config, mixture=mixture)


def test_rows_of_a_mixture_keep_to_its_weights(mixed, tokenizer):
    (first, _), (second, _) = mixed.mixture
    alone = {
        name: _iterator(
            dataclasses.replace(mixed, mixture=(), source=name), tokenizer, batch_size=1
        )
        for name in (first, second)
    }
    iterator = _iterator(mixed, tokenizer, batch_size=1)
    order = []
    for _ in range(40):
        row = next(iterator)
        expected = {
            name: np.array_equal(peek(alone[name])["tokens"], row["tokens"]) for name in alone
        }
        assert sum(expected.values()) == 1
        (source,) = (name for name, same in expected.items() if same)
        next(alone[source])
        order.append(source)
    assert [order.count(name) for name in (first, second)] == [30, 10]
    assert all(order[i : i + 4].count(second) == 1 for i in range(0, 40, 4))
    for name, one in alone.items():
        assert iterator.epochs[name] == pytest.approx(one.epochs[name])
    assert set(iterator.packing) == {first, second}


def only(config, source):
    return dataclasses.replace(config, mixture=(), source=source)


def peek(iterator):
    """The next batch, which stays the next one."""
    state = iterator.get_state()
    batch = next(iterator)
    iterator.set_state(state)
    return batch


def test_a_mixture_is_shared_and_resumed_like_one_source(mixed, tokenizer):
    whole = _iterator(mixed, tokenizer)
    parts = [_iterator(mixed, tokenizer, process_index=i, process_count=2) for i in (0, 1)]
    for _ in range(7):
        batch = next(whole)
        shares = [next(part) for part in parts]
        for key in KEYS:
            np.testing.assert_array_equal(
                np.concatenate([share[key] for share in shares]), batch[key]
            )
    fresh = _iterator(mixed, tokenizer)
    fresh.set_state(json.loads(json.dumps(whole.get_state())))
    _assert_equal(next(fresh), next(whole))
    other = dataclasses.replace(mixed, mixture=tuple((name, 1.0) for name, _ in mixed.mixture))
    with pytest.raises(ValueError, match="fingerprint"):
        _iterator(other, tokenizer).set_state(whole.get_state())


def test_held_out_text_of_a_mixture_is_that_of_all_sources(mixed):
    joined = load_splits(mixed)
    for split, documents in joined.items():
        expected = [
            f"{source}/{name}"
            for source, _ in mixed.mixture
            for name in load_splits(dataclasses.replace(mixed, mixture=(), source=source))[split][
                "name"
            ]
        ]
        assert documents["name"][:] == expected


def test_a_text_in_two_sources_may_not_be_trained_on_and_held_out(config, tmp_path):
    held_out = load_splits(config)["evaluation"]["text"][0]
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    # Training gets it, whatever its name's hash says.
    wanted = dataclasses.replace(config, mixture=((config.source, 1.0), (str(tmp_path), 1.0)))
    for i in range(20):
        (tmp_path / f"copy{i}.txt").write_text(held_out if i == 3 else f"more {i}")
    names = load_splits(only(wanted, str(tmp_path)))
    assert "copy3.txt" in names["train"]["name"][:]
    with pytest.raises(ValueError, match="the same document"):
        load_splits(wanted)


def test_validation_batches_hold_the_split_once(config, tokenizer):
    encoded = encode_documents(load_splits(config)["validation"], tokenizer)
    batches = validation_batches(config, tokenizer, T, B, ALIGNMENT)
    stacked = {key: np.concatenate([batch[key] for batch in batches]) for key in KEYS}
    assert all(batch["tokens"].shape == (B, T) for batch in batches)
    live = stacked["weights"] > 0
    assert live.sum() == encoded.lengths.sum()
    text_bytes = sum(len(text.encode()) for text in load_splits(config)["validation"]["text"])
    assert tokenizer.token_bytes[stacked["targets"][live]].sum() == text_bytes
    assert (stacked["segment_ids"][~live] == 0).all()
    again = validation_batches(config, tokenizer, T, B, ALIGNMENT, batches=1)
    assert len(again) == 1
    _assert_equal(again[0], batches[0])
    # More rows a batch than the split has: one batch, filled with padding.
    (one,) = validation_batches(config, tokenizer, T, 100, ALIGNMENT)
    assert one["tokens"].shape == (100, T)
    assert one["weights"].sum() == live.sum()
    assert (one["segment_ids"][-1] == 0).all()


def test_encoded_text_is_cached_and_repaired(config, tokenizer, tmp_path, monkeypatch, caplog):
    documents = load_splits(config)["train"]
    first = encode_documents(documents, tokenizer, tmp_path)
    assert first.tokens.dtype == np.uint16
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "encode_batch", None)
        second = encode_documents(documents, tokenizer, tmp_path)
    path.write_bytes(whole[:100])
    third = encode_documents(documents, tokenizer, tmp_path)
    assert "unusable and made again" in caplog.text
    assert path.read_bytes() == whole
    for other in (second, third):
        np.testing.assert_array_equal(other.tokens, first.tokens)
        np.testing.assert_array_equal(other.bounds, first.bounds)
        assert other.fingerprint == first.fingerprint
    bytes_ = encode_documents(documents, ByteTokenizer(), tmp_path)
    assert bytes_.fingerprint != first.fingerprint
    assert len(list(tmp_path.iterdir())) == 2


def test_cache_folder_follows_config_and_environment(monkeypatch, tmp_path):
    assert cache_folder(DataConfig(cache_dir="here")).as_posix() == "here"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(DataConfig()) == tmp_path / "sparse-attn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder(DataConfig()) == tmp_path / "home" / ".cache" / "sparse-attn"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": ""}, "source is empty"),
        ({"train_until": 1980}, "train_until=1980 must be before validation_until=1970"),
        ({"validation_fraction": 1.0}, r"validation_fraction=1.0 must be in \[0, 1\)"),
        (
            {"validation_fraction": 0.5, "evaluation_fraction": 0.5},
            "leave nothing to train on",
        ),
        ({"prefetch": -1}, "prefetch=-1"),
        ({"mixture": (("a", 1.0), ("a", 2.0))}, "different sources"),
        ({"mixture": (("a", 1.0), ("b", 0.0))}, "positive weights"),
        ({"length_bins": (64, 64)}, r"length_bins=\(64, 64\) must be positive and ascending"),
    ],
)
def test_config_is_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)
