"""Tasks x lengths x policies x budgets on one model, sample by sample, resumable.

    plan = Plan(tasks=("niah_single_1", "perplexity"), lengths=(1024,), samples=4,
                policies=("dense", "quest"), budgets=(1 / 8, 1 / 32))
    results = run(Subject(decoder, tokenizer, documents), plan, folder)

Samples are the outer loop: all policies and budgets of a sample share its dense prefill
(:mod:`train.evaluation.protocols`), and an unfinished evaluation is even. Every finished sample is
on the disk before the next begins and never runs again; :func:`run` ends with the report.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from models.loading.mapping import MappingFile, read_mapping
from models.transformer import Decoder
from models.upcycle import attending, densely
from sparse_attn.dense import Dense
from sparse_attn.registry import (
    MECHANISMS,
    POLICIES,
    MechanismConfig,
    listed,
    parse_mechanism,
)
from train.evaluation.evidence import chosen_keys, evidence_recall
from train.evaluation.html_report import write_reports
from train.evaluation.protocols import (
    Inspection,
    Parts,
    Prefix,
    Protocol,
    answer,
    fill_caches,
    prefill,
    score,
    text_parts,
)
from train.evaluation.results import Results
from train.evaluation.rows import DENSE, Conditions, row_metrics
from train.evaluation.store import Budget, Cell, Measurement, SampleStore
from train.evaluation.tasks import TASKS, Sample, evidence_tokens, make_sample, prompt_tokens
from train.evaluation.tasks import score as task_score
from train.tokenizer import Tokenizer

PERPLEXITY, ROLLING = "perplexity", "rolling_perplexity"
OWN = "own"
"""The policy that is the model's own attention."""
MAPPING = "mapping:"
"""Before the file of learnt selectors in the name of a policy."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is asked of a model.

    Attributes:
      tasks: names in :data:`train.evaluation.tasks.TASKS`; "perplexity": nats a token of the last
        ``scored`` tokens of a held-out text; "rolling_perplexity": of whole texts, in windows that
        follow each other, each a sample. Windows hold ``lengths`` tokens, the first of which is
        given, so protocols make no difference; what is left after a text's last one is not read.
      lengths: tokens of a sample, at most.
      samples: of every task and length; sample i is made from seed i.
      policies: "dense", "own" (the model's own attention), a mechanism or policy with its
        settings, ``NAME:FIELD=VALUE,...``, or the selectors of a mapping file, ``mapping:FILE``.
      budgets: tried in turn by every policy that has a budget, as numbers of keys or shares of
        them; none: the policy's own.
      protocols: which part of a sample is attended sparsely, some of "A", "B" and "C"; dense
        attention, which they do not change, runs under the first alone.
      scored: tokens whose likelihood is perplexity's.

    Raises:
      ValueError: if a name is unknown, a policy cannot be read, or a number is out of range.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...] = (1024,)
    samples: int = 16
    policies: tuple[str, ...] = (DENSE,)
    budgets: tuple[int | float, ...] = ()
    protocols: tuple[Protocol, ...] = ("B",)
    scored: int = 512

    def __post_init__(self) -> None:
        known = (PERPLEXITY, ROLLING, *sorted(TASKS))
        unknown = [task for task in self.tasks if task not in known]
        if unknown or not self.tasks:
            wrong = unknown[0] if unknown else ""
            raise ValueError(f"tasks={self.tasks}: choose some of {listed(known, wrong)}")
        if not self.protocols or set(self.protocols) - {"A", "B", "C"}:
            raise ValueError(f"protocols={self.protocols}: use some of A, B and C")
        if self.samples < 1 or self.scored < 1:
            raise ValueError(f"samples={self.samples} and scored={self.scored} must be at least 1")
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError(f"lengths={self.lengths} must be some numbers of tokens")
        if PERPLEXITY in self.tasks and min(self.lengths) < self.scored + 2:
            raise ValueError(
                f"perplexity of the last scored={self.scored} tokens needs lengths of at least "
                f"{self.scored + 2}, not {self.lengths}; lower --scored"
            )
        _ = self.columns  # what cannot be read is found now

    @functools.cached_property
    def columns(self) -> tuple[Column, ...]:
        """What every sample of a task is asked with, in order; files of mappings are read once."""
        return tuple(self._columns())

    def _columns(self) -> Iterator[Column]:
        for policy in self.policies:
            if policy in (DENSE, OWN):
                yield Column(policy)
                continue
            mapping: MappingFile | None = None
            attention: Any
            if policy.startswith(MAPPING):
                path = Path(policy.removeprefix(MAPPING))
                mapping = read_mapping(path)
                attention = mapping.attention
                # Another file under the same name is another column.
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                policy = f"{MAPPING}{path.name}@{digest[:8]}"
            else:
                try:
                    attention = parse_mechanism(policy, MECHANISMS | POLICIES)
                except ValueError as error:
                    raise ValueError(
                        f"policies={self.policies}: {error}; beside those, {DENSE}, {OWN} and "
                        f"{MAPPING}FILE"
                    ) from error
            if not self.budgets or not hasattr(attention, "budget"):
                yield Column(policy, getattr(attention, "budget", None), attention, mapping)
                continue
            for budget in self.budgets:
                changed = dataclasses.replace(attention, budget=budget)
                yield Column(policy, budget, changed, mapping)


class Column(NamedTuple):
    """A policy at a budget; ``attention`` is None for "dense" and "own"."""

    policy: str
    budget: Budget = None
    attention: MechanismConfig | None = None
    mapping: MappingFile | None = None


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model that is asked.

    Attributes:
      decoder: with its own attention.
      tokenizer: its own.
      documents: held-out texts as tokens, start token included; with a number, those that have as
        many tokens, cut there.
      name: for the report.
      dense_layers: layers that stay dense under every policy.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    documents: Callable[[int | None], Sequence[Int[np.ndarray, "T"]]]
    name: str = "model"
    dense_layers: tuple[int, ...] = ()


def run(
    subject: Subject,
    plan: Plan,
    folder: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[int, int, Cell, int], None] = lambda done, of, cell, sample: None,
) -> Results:
    """Run what is missing of ``plan`` in ``folder`` and write results.json, report.md and
    report.html there.

    ``settings``: plain values that the samples depend on, such as the checkpoint; a folder that was
    made with others is refused. ``progress`` is told after every sample of a cell.

    Raises:
      ValueError: if the model cannot be asked this, or the folder belongs to other settings.
      BlockingIOError: if another process is writing there.
    """
    models, texts = _Models(subject), _Texts(subject, plan)
    columns: dict[tuple[str, str, Budget], Column] = {
        (protocol, column.policy, column.budget): column
        for protocol in plan.protocols
        for column in plan.columns
        if column.policy != DENSE or protocol == plan.protocols[0]
    }
    jobs = list(itertools.product(range(plan.samples), plan.lengths, plan.tasks))
    fixed = {"model": subject.name, "scored": plan.scored, **(settings or {})}
    of, done = len(jobs) * len(columns), 0
    for length, task in itertools.product(plan.lengths, plan.tasks):
        if task in (PERPLEXITY, ROLLING):  # whether there are enough is known before the first runs
            texts.sample(task, length, plan.samples - 1)
    planned: set[tuple[Cell, int]] = set()
    with SampleStore(folder, fixed) as store:
        for number, length, task in jobs:
            cells = [Cell(task, length, p, b, protocol) for protocol, p, b in columns]
            planned |= {(cell, number) for cell in cells}
            missing = [cell for cell in cells if (cell, number) not in store]
            done += len(cells) - len(missing)
            if not missing:
                continue
            question = _question(subject, texts, task, length, number)
            prefix: Prefix | None = None
            # Cells of a protocol share its dense pass, budgets of a policy its caches.
            for (protocol, policy), group in itertools.groupby(
                missing, key=lambda cell: (cell.protocol, cell.policy)
            ):
                if prefix is None or prefix.protocol != protocol:
                    prefix = prefill(models.prefilling(protocol), question.parts, protocol)
                caches: Any = None
                for cell in group:
                    begun = time.monotonic()
                    decoder = models.of(columns[protocol, policy, cell.budget])
                    if caches is None:
                        caches = fill_caches(decoder, question.parts, prefix)
                    # One sample is looked at; pictures of all would fill the disk.
                    found = question.ask(
                        decoder, prefix, caches, sparse=policy != DENSE, draw=number == 0
                    )
                    store.add(
                        dataclasses.replace(
                            found,
                            cell=cell,
                            sample=number,
                            seconds=round(time.monotonic() - begun, 3),
                        )
                    )
                    done += 1
                    progress(done, of, cell, number)
        measurements = [m for m in store if m.key in planned]
    results = Results.of(
        f"{subject.name}: {', '.join(plan.tasks)}",
        measurements,
        lambda cell: _conditions(cell, subject, columns[cell.protocol, cell.policy, cell.budget]),
        settings={**fixed, **dataclasses.asdict(plan)},
        environment={"device": jax.devices()[0].device_kind, "jax": jax.__version__},
    )
    write_reports(results, folder)
    return results


class _Models:
    """The subject with the attention of every column, on the same weights."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._own = subject.decoder.unstacked()
        branches = {run.attention.kv_branches for run in self._own.config.runs}
        self._dense: Decoder | None = None
        if branches == {1}:
            self._dense = densely(self._own)
        self._made: dict[tuple[str, Budget], Decoder] = {}

    def of(self, column: Column) -> Decoder:
        """Made once: a mapping's arrays are placed anew every time."""
        key = column.policy, column.budget
        if key not in self._made:
            self._made[key] = self._attending(column)
        return self._made[key]

    def _attending(self, column: Column) -> Decoder:
        if column.policy == OWN:
            return self._own
        dense = self._need_dense(column.policy)
        if column.attention is None:
            return dense
        config = dataclasses.replace(
            self._own.config,
            attention=Dense(),
            attention_overrides=(),
            dense_layers=self._subject.dense_layers,
        )
        if column.mapping is not None:
            target = column.mapping.configured(config, column.attention)
            return attending(dense, target, column.mapping)
        return attending(dense, dataclasses.replace(config, attention=column.attention))

    def prefilling(self, protocol: Protocol) -> Decoder:
        """What reads the dense part of a sample."""
        return self._own if protocol == "C" else self._need_dense(f"protocol {protocol}")

    def _need_dense(self, what: str) -> Decoder:
        if self._dense is None:
            raise ValueError(
                f"{what} needs a model with one K/V branch, and "
                f"{type(self._own.config.attention).__name__} has others of its own; use "
                f"--policies {OWN} --protocols C"
            )
        return self._dense


@dataclasses.dataclass(frozen=True)
class _Question:
    """A sample as tokens, and how an answer to it becomes a measurement.

    ``evidence``: positions of its tokens in the context.
    """

    parts: Parts
    sample: Sample | None
    tokenizer: Tokenizer
    evidence: Int[np.ndarray, "E"]

    def ask(
        self,
        decoder: Decoder,
        prefix: Prefix,
        caches: Sequence[Any],
        *,
        sparse: bool,
        draw: bool,
    ) -> Measurement:
        """The measurement, without its cell and number; with a picture to ``draw``, if asked."""
        nowhere = Cell("", 0, "", None, "")
        if self.sample is None:
            scored = score(decoder, self.parts, prefix, caches, inspect=sparse)
            metrics, layers = row_metrics(scored.layers)
            value = float(np.mean(scored.nats))
            picture = self._picture(scored.inspection) if draw else None
            return Measurement(nowhere, 0, value, metrics, layers, picture=picture)
        tokens, seen = answer(
            decoder,
            self.parts,
            prefix,
            caches,
            stop_tokens=(self.tokenizer.eos_id,),
            inspect=sparse,
        )
        text = self.tokenizer.decode(tokens)
        metrics, layers = row_metrics(self._with_evidence(seen))
        return Measurement(
            nowhere,
            0,
            task_score(self.sample.task, text, self.sample),
            metrics,
            layers,
            depth=self.sample.depth if self.sample.evidence else None,
            prediction=text,
            picture=self._picture(seen) if draw else None,
        )

    def _with_evidence(self, seen: Inspection) -> list[dict[str, float]]:
        """Figures by layer, recall of the evidence among them where there is any."""
        if not len(self.evidence) or not len(seen.queries):
            return list(seen.layers)
        return [
            figures
            if selection is None
            else figures
            | {
                "evidence_recall": evidence_recall(
                    np.asarray(selection.indices), selection.block_size, seen.queries, self.evidence
                )
            }
            for figures, selection in zip(seen.layers, seen.selections, strict=True)
        ]

    def _picture(self, seen: Inspection) -> dict[str, Any] | None:
        """What the last inspected row attended; None if no layer selects."""
        if not len(seen.queries) or all(one is None for one in seen.selections):
            return None
        query = int(seen.queries[-1])
        chosen = [
            ()
            if selection is None
            else chosen_keys(np.asarray(selection.indices[-1]), selection.block_size, query)
            for selection in seen.selections
        ]
        return {"query": query, "chosen": chosen, "evidence": self.evidence.tolist()}


class _Texts:
    """Held-out texts as samples."""

    def __init__(self, subject: Subject, plan: Plan) -> None:
        self._subject, self._plan = subject, plan
        self._known: dict[tuple[str, int], list[Parts]] = {}

    def sample(self, task: str, length: int, number: int) -> Parts:
        """The context that is given and the tokens that are scored."""
        known = self._known.get((task, length))
        if known is None:
            make = self._windows if task == ROLLING else self._ends
            known = self._known[task, length] = make(length)
        if number >= len(known):
            what = "windows" if task == ROLLING else "documents"
            raise ValueError(
                f"{len(known)} held-out {what} have {length} tokens; use at most as many "
                f"--samples, not {self._plan.samples}, or shorter --lengths"
            )
        return known[number]

    def _ends(self, length: int) -> list[Parts]:
        scored = self._plan.scored
        return [text_parts(np.asarray(t), scored) for t in self._subject.documents(length)]

    def _windows(self, length: int) -> list[Parts]:
        nothing, found = np.zeros(0, np.int32), []
        for tokens in self._subject.documents(None):
            tokens = np.asarray(tokens, np.int32)
            if tokens[-1] == self._subject.tokenizer.eos_id:
                tokens = tokens[:-1]
            for begin in range(0, len(tokens) - length + 1, length - 1):
                window = tokens[begin : begin + length]
                found.append(Parts(window[:1], nothing, window[1:]))
        return found


def _question(subject: Subject, texts: _Texts, task: str, length: int, number: int) -> _Question:
    if task in (PERPLEXITY, ROLLING):
        parts, nothing = texts.sample(task, length, number), np.zeros(0, np.int32)
        return _Question(parts, None, subject.tokenizer, nothing)
    sample = make_sample(task, number, length, subject.tokenizer)
    prompt = prompt_tokens(sample, subject.tokenizer)
    room = np.zeros(sample.answer_tokens, np.int32)
    parts = Parts(prompt.context, prompt.question, room)
    evidence = evidence_tokens(sample, subject.tokenizer)
    return _Question(parts, sample, subject.tokenizer, evidence)


def _conditions(cell: Cell, subject: Subject, column: Column) -> Conditions:
    text, attention = cell.task in (PERPLEXITY, ROLLING), column.attention
    dense_layers = set(subject.dense_layers if attention is not None else ())
    if column.mapping is not None:
        dense_layers |= set(column.mapping.dense_layers)
    return Conditions(
        metric="nats a token" if text else "score",
        better="lower" if text else "higher",
        dense_layers=tuple(sorted(dense_layers)),
        sinks=getattr(attention, "sinks", None),
        recent=getattr(attention, "recent", None),
        haystack="held-out text" if text else str(TASKS[cell.task].haystack or ""),
        implementation=getattr(attention, "implementation", "auto"),
        device=jax.devices()[0].device_kind,
        jax=jax.__version__,
    )
