"""Tasks x lengths x policies x budgets on one model, sample by sample, resumable.

    plan = Plan(tasks=("niah_single_1", "perplexity"), lengths=(1024,), samples=4,
                policies=("dense", "quest"), budgets=(1 / 8, 1 / 32))
    results = run(Subject(decoder, tokenizer, texts), plan, folder)

Samples are the outer loop: all policies and budgets of a sample share its dense prefill
(:mod:`train.evaluation.protocols`), and an unfinished evaluation is even. Every finished sample is
on the disk before the next begins and never runs again; :func:`run` ends with the report.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from models.transformer import Decoder
from models.upcycle import attending
from sparse_attn.dense import Dense
from sparse_attn.registry import MECHANISMS, POLICIES, MechanismConfig, parse_mechanism
from train.evaluation.html_report import write_reports
from train.evaluation.protocols import (
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
from train.evaluation.tasks import TASKS, Sample, make_sample, prompt_tokens
from train.evaluation.tasks import score as task_score
from train.tokenizer import Tokenizer

PERPLEXITY = "perplexity"
OWN = "own"
"""The policy that is the model's own attention."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is asked of a model.

    Attributes:
      tasks: names in :data:`train.evaluation.tasks.TASKS`, and "perplexity": nats a token of the
        last ``scored`` tokens of a held-out text.
      lengths: tokens of a sample, at most.
      samples: of every task and length; sample i is made from seed i.
      policies: "dense", "own" (the model's own attention), or a mechanism or policy with its
        settings, ``NAME:FIELD=VALUE,...``.
      budgets: tried in turn by every policy that has a budget, as numbers of keys or shares of
        them; none: the policy's own.
      protocol: which part of a sample is attended sparsely, "A", "B" or "C".
      scored: tokens whose likelihood is perplexity's.

    Raises:
      ValueError: if a name is unknown, a policy cannot be read, or a number is out of range.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...] = (1024,)
    samples: int = 16
    policies: tuple[str, ...] = (DENSE,)
    budgets: tuple[int | float, ...] = ()
    protocol: Protocol = "B"
    scored: int = 512

    def __post_init__(self) -> None:
        known = (PERPLEXITY, *sorted(TASKS))
        unknown = [task for task in self.tasks if task not in known]
        if unknown or not self.tasks:
            raise ValueError(f"tasks={self.tasks}: choose some of {', '.join(known)}")
        if self.protocol not in ("A", "B", "C"):
            raise ValueError(f"protocol={self.protocol!r} is unknown; use A, B or C")
        if self.samples < 1 or self.scored < 1:
            raise ValueError(f"samples={self.samples} and scored={self.scored} must be at least 1")
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError(f"lengths={self.lengths} must be some numbers of tokens")
        if PERPLEXITY in self.tasks and min(self.lengths) < self.scored + 2:
            raise ValueError(
                f"perplexity of the last scored={self.scored} tokens needs lengths of at least "
                f"{self.scored + 2}, not {self.lengths}; lower --scored"
            )
        for _ in self.attentions():
            pass

    def attentions(self) -> Iterator[tuple[str, Budget, MechanismConfig | None]]:
        """(policy, budget, mechanism) of every column; None for "dense" and "own"."""
        for policy in self.policies:
            if policy in (DENSE, OWN):
                yield policy, None, None
                continue
            attention: Any = parse_mechanism(policy, MECHANISMS | POLICIES)
            if not self.budgets or not hasattr(attention, "budget"):
                yield policy, getattr(attention, "budget", None), attention
                continue
            for budget in self.budgets:
                yield policy, budget, dataclasses.replace(attention, budget=budget)


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model that is asked.

    Attributes:
      decoder: with its own attention.
      tokenizer: its own.
      texts: sample i of the held-out texts, at least so many tokens, start token included.
      name: for the report.
      dense_layers: layers that stay dense under every policy.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    texts: Callable[[int, int], Int[np.ndarray, "T"]]
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
    models = _Models(subject)
    attentions = {(policy, budget): found for policy, budget, found in plan.attentions()}
    jobs = list(itertools.product(range(plan.samples), plan.lengths, plan.tasks))
    fixed = {"model": subject.name, "scored": plan.scored, **(settings or {})}
    of, done = len(jobs) * len(attentions), 0
    with SampleStore(folder, fixed) as store:
        for number, length, task in jobs:
            cells = [Cell(task, length, p, b, plan.protocol) for p, b in attentions]
            missing = [cell for cell in cells if (cell, number) not in store]
            done += len(cells) - len(missing)
            if not missing:
                continue
            question = _question(subject, plan, task, length, number)
            prefix: Prefix | None = None
            # Budgets of a policy share its caches.
            for policy, group in itertools.groupby(missing, key=lambda cell: cell.policy):
                caches: Any = None
                for cell in group:
                    begun = time.monotonic()
                    decoder = models.of(policy, attentions[policy, cell.budget])
                    if prefix is None:
                        prefix = prefill(models.prefilling(plan), question.parts, plan.protocol)
                    if caches is None:
                        caches = fill_caches(decoder, question.parts, prefix)
                    found = question.ask(decoder, prefix, caches, sparse=policy != DENSE)
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
        planned = {
            (Cell(task, length, p, b, plan.protocol), number)
            for number, length, task in jobs
            for p, b in attentions
        }
        measurements = [m for m in store if m.key in planned]
    results = Results.of(
        f"{subject.name}: {', '.join(plan.tasks)}",
        measurements,
        lambda cell: _conditions(cell, subject, attentions[cell.policy, cell.budget]),
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
            target = dataclasses.replace(
                self._own.config, attention=Dense(), attention_overrides=(), dense_layers=()
            )
            self._dense = attending(self._own, target)

    def of(self, policy: str, attention: MechanismConfig | None) -> Decoder:
        if policy == OWN:
            return self._own
        if attention is None:
            return self._need_dense(policy)
        target = dataclasses.replace(
            self._own.config,
            attention=attention,
            attention_overrides=(),
            dense_layers=self._subject.dense_layers,
        )
        return attending(self._need_dense(policy), target)

    def prefilling(self, plan: Plan) -> Decoder:
        """What reads the dense part of a sample."""
        return self._own if plan.protocol == "C" else self._need_dense(f"protocol {plan.protocol}")

    def _need_dense(self, what: str) -> Decoder:
        if self._dense is None:
            raise ValueError(
                f"{what} needs a model with one K/V branch, and "
                f"{type(self._own.config.attention).__name__} has others of its own; use "
                f"--policies {OWN} --protocol C"
            )
        return self._dense


@dataclasses.dataclass(frozen=True)
class _Question:
    """A sample as tokens, and how an answer to it becomes a measurement."""

    parts: Parts
    sample: Sample | None
    tokenizer: Tokenizer

    def ask(
        self, decoder: Decoder, prefix: Prefix, caches: Sequence[Any], *, sparse: bool
    ) -> Measurement:
        """The measurement, without its cell and number."""
        nowhere = Cell("", 0, "", None, "")
        if self.sample is None:
            scored = score(decoder, self.parts, prefix, caches, inspect=sparse)
            metrics, layers = row_metrics(scored.layers)
            return Measurement(nowhere, 0, float(np.mean(scored.nats)), metrics, layers)
        tokens, reports = answer(
            decoder,
            self.parts,
            prefix,
            caches,
            stop_tokens=(self.tokenizer.eos_id,),
            inspect=sparse,
        )
        text = self.tokenizer.decode(tokens)
        metrics, layers = row_metrics(reports)
        return Measurement(
            nowhere,
            0,
            task_score(self.sample.task, text, self.sample),
            metrics,
            layers,
            depth=self.sample.depth if self.sample.evidence else None,
            prediction=text,
        )


def _question(subject: Subject, plan: Plan, task: str, length: int, number: int) -> _Question:
    if task == PERPLEXITY:
        tokens = np.asarray(subject.texts(number, length), np.int32)[:length]
        return _Question(text_parts(tokens, plan.scored), None, subject.tokenizer)
    sample = make_sample(task, number, length, subject.tokenizer)
    prompt = prompt_tokens(sample, subject.tokenizer)
    room = np.zeros(sample.answer_tokens, np.int32)
    return _Question(Parts(prompt.context, prompt.question, room), sample, subject.tokenizer)


def _conditions(cell: Cell, subject: Subject, attention: MechanismConfig | None) -> Conditions:
    text = cell.task == PERPLEXITY
    return Conditions(
        metric="nats a token" if text else "score",
        better="lower" if text else "higher",
        dense_layers=subject.dense_layers if attention is not None else (),
        sinks=getattr(attention, "sinks", None),
        recent=getattr(attention, "recent", None),
        haystack="held-out text" if text else str(TASKS[cell.task].haystack or ""),
        implementation=getattr(attention, "implementation", "auto"),
        device=jax.devices()[0].device_kind,
        jax=jax.__version__,
    )
