"""Time tile sizes of the kernels on the chip of this machine and write them as data.

    python scripts/tune_tiles.py                                # all ops at 32k and 128k
    python scripts/tune_tiles.py --ops ranged_attention --lengths 8192,32768
    python scripts/tune_tiles.py --compile-only v6e             # no chip here: what would fit

A search starts with the tiles that the rule of a kernel chooses, tries half and twice of each size,
and goes on from the fastest until nothing is faster by 1 %. A candidate that the kernel refuses by
its estimate of memory, or that does not compile, is a row with its error. Times are medians over
``--repetitions`` calls after one to warm up. The winners go to kernels_pallas/tiles/<chip>.json,
which the kernels read: only calls with equal sizes, at least as long as what was measured.

Nothing is timed, and no table is written, where the chip is not: ``--compile-only`` compiles the
candidates for a TPU generation (v5e, v5p, v6e; needs libtpu), or lowers them for a GPU (h100), and
says which would fit.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import kernel_calls
from kernel_calls import Call, Implementation, Sizes
from readable_help import HelpFormatter
from rich.console import Console
from rich.table import Table

from kernels_pallas import tuned
from kernels_pallas.ahead_of_time import TPU_CHIPS, compile_for_tpu, lower_for_gpu
from kernels_pallas.tuned import Entry, Question

GPU_CHIPS = ("h100",)
MEMORY_ONLY = ("pieces", "selected", "rank_elements", "own_rows")
"""Sizes that bound memory or choose between layouts: not part of a search."""

GAIN = 0.99
"""What a step of the search has to bring; less is noise."""

Measure = Callable[[Call, Entry], float]


@dataclasses.dataclass
class Trial:
    """A candidate and its seconds, or why it has none."""

    tiles: dict[str, int]
    seconds: float | None = None
    error: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune, or compile candidates; 2 where there is no chip to time."""
    options = parse(arguments)
    if options.compile_only:
        return compile_candidates(options)
    backend = jax.default_backend()
    if backend not in ("tpu", "gpu"):
        print(
            f"jax sees no TPU or GPU here ({backend}): nothing can be timed, no table is written. "
            f"--compile-only {'|'.join([*TPU_CHIPS, *GPU_CHIPS])} checks the candidates without "
            "the chip.",
            file=sys.stderr,
        )
        return 2
    chip = jax.devices()[0].device_kind
    measure = Stopwatch(options.repetitions)
    for call in chosen_calls(options, "mosaic_tpu" if backend == "tpu" else "mosaic_gpu"):
        tune(call, chip, measure)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)

    def names(text: str) -> tuple[str, ...]:
        return tuple(part for part in text.split(",") if part)

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in names(text))

    add = parser.add_argument
    add("--ops", type=names, default=kernel_calls.OPS, help="of " + ",".join(kernel_calls.OPS))
    add("--lengths", type=numbers, default=(32768, 131072), help="tokens of a sequence: T,T,...")
    add("--query-heads", type=int, default=Sizes.query_heads, help="of every op")
    add("--kv-heads", type=int, default=Sizes.kv_heads, help="of every op")
    add("--width", type=int, default=Sizes.width, help="of a head")
    add("--dtype", default=Sizes.dtype, help="of queries, keys and values")
    add("--block", type=int, default=Sizes.block, help="tokens of a selected block")
    add("--repetitions", type=int, default=10, help="timed calls of a candidate")
    add("--compile-only", choices=[*TPU_CHIPS, *GPU_CHIPS], help="a chip that need not be here")
    options = parser.parse_args(arguments)
    unknown = set(options.ops) - set(kernel_calls.OPS)
    if unknown:
        parser.error(f"--ops {','.join(sorted(unknown))}: choose from {','.join(kernel_calls.OPS)}")
    if options.repetitions < 1:
        parser.error(f"--repetitions {options.repetitions} must be at least 1")
    return options


def chosen_calls(options: argparse.Namespace, implementation: Implementation) -> Iterator[Call]:
    sizes = Sizes(
        query_heads=options.query_heads,
        kv_heads=options.kv_heads,
        width=options.width,
        dtype=options.dtype,
        block=options.block,
    )
    for length in options.lengths:
        yield from kernel_calls.calls(length, implementation, sizes, options.ops)


def questions_of(call: Call, trace: Callable[..., Any]) -> list[Question]:
    """What the kernels of a call ask that is this call's to tune; ``trace`` traces it."""
    with tuned.using(()), tuned.asked() as questions:
        # A function of its own: jax asks nothing again of one that it has traced.
        trace(lambda *arrays: call.function(*arrays), *call.shapes)
    mine = (q for q in questions if q.op in call.tunes and q.direction == call.direction)
    return list(dict.fromkeys(mine))


def candidate_of(question: Question, tiles: dict[str, int]) -> Entry:
    """``tiles`` as an answer to one question."""
    return Entry(
        question.op, question.direction, question.length, dict(question.sizes), dict(tiles)
    )


def rule_of(question: Question) -> dict[str, int]:
    """The sizes of a search, as the rule chooses them."""
    by_rule = dataclasses.asdict(question.by_rule)
    return {name: value for name, value in by_rule.items() if name not in MEMORY_ONLY}


def neighbours(tiles: dict[str, int]) -> Iterator[dict[str, int]]:
    """Half and twice of each size."""
    for name, value in tiles.items():
        for other in (value // 2, 2 * value):
            if other >= 1:
                yield tiles | {name: other}


def search(question: Question, seconds_of: Callable[[Entry], float]) -> list[Trial]:
    """All that was tried, the rule's tiles first; ``seconds_of`` raises for what cannot run."""
    trials: list[Trial] = []

    def attempt(tiles: dict[str, int]) -> Trial:
        known = next((trial for trial in trials if trial.tiles == tiles), None)
        if known is not None:
            return known
        trial = Trial(tiles)
        try:
            trial.seconds = seconds_of(candidate_of(question, tiles))
        except Exception as failure:  # whatever the compiler says of it: a row, and the next one
            trial.error = first_line(failure)
        trials.append(trial)
        return trial

    best = attempt(rule_of(question))
    while True:
        timed = [t for t in map(attempt, neighbours(best.tiles)) if t.seconds is not None]
        faster = min(timed, key=lambda trial: trial.seconds or 0.0, default=best)
        if best.seconds is None or not faster.seconds or faster.seconds > GAIN * best.seconds:
            return trials
        best = faster


def tune(call: Call, chip: str, measure: Measure) -> list[Entry]:
    """Search for every kernel of ``call``, print what was tried and write the winners."""
    entries = []
    for question in questions_of(call, jax.eval_shape):
        trials = search(question, lambda entry: measure(call, entry))
        show(f"{chip}: {describe(call, question)}", trials)
        if trials[0].seconds is None:
            print(f"the tiles by rule do not run: {trials[0].error}", file=sys.stderr)
            continue
        best = min(trials, key=lambda t: float("inf") if t.seconds is None else t.seconds)
        entries.append(
            dataclasses.replace(
                candidate_of(question, best.tiles),
                seconds=best.seconds,
                seconds_by_rule=trials[0].seconds,
                jax=jax.__version__,
                date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            )
        )
    if entries:
        tuned.write_table(tuned.table_path(chip), chip, entries)
    return entries


@dataclasses.dataclass
class Stopwatch:
    """Median wall seconds of a call with a candidate's tiles, on this machine's chip."""

    repetitions: int
    drawn: tuple[Call, Any] | None = None

    def __call__(self, call: Call, entry: Entry) -> float:
        if self.drawn is None or self.drawn[0] is not call:
            self.drawn = None  # Frees the last call's arrays before the next are made.
            self.drawn = call, call.draw()
        arrays = self.drawn[1]
        with tuned.using([entry]):
            # A function of its own: jax remembers what it traced with other tiles.
            compiled = jax.jit(lambda *arrays: call.function(*arrays)).lower(*arrays).compile()
        jax.block_until_ready(compiled(*arrays))
        times = []
        for _ in range(self.repetitions):
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arrays))
            times.append(time.perf_counter() - start)
        return statistics.median(times)


def compile_candidates(options: argparse.Namespace) -> int:
    """Print which candidates would fit a chip that is not here; 1 if a rule's choice does not."""
    chip, failures = options.compile_only, 0
    on_tpu = chip in TPU_CHIPS

    def build(function: Callable[..., Any], *shapes: Any) -> Any:
        fresh = lambda *arrays: function(*arrays)  # noqa: E731 - traced anew for each candidate
        return (
            compile_for_tpu(fresh, *shapes, chip=chip) if on_tpu else lower_for_gpu(fresh, *shapes)
        )

    for call in chosen_calls(options, "mosaic_tpu" if on_tpu else "mosaic_gpu"):
        for question in questions_of(call, build):
            by_rule = rule_of(question)
            rows = []
            for tiles in (by_rule, *neighbours(by_rule)):
                try:
                    with tuned.using([candidate_of(question, tiles)]):
                        built = build(call.function, *call.shapes)
                except Exception as failure:
                    rows.append((tiles, first_line(failure)))
                    failures += tiles == by_rule
                    continue
                held = built.memory_analysis().temp_size_in_bytes if on_tpu else None
                fits = "lowered" if held is None else f"fits, {held / 2**20:.0f} MiB temporary"
                rows.append((tiles, fits))
            show_rows(f"{chip}, compiled only: {describe(call, question)}", "outcome", rows)
    return 1 if failures else 0


def describe(call: Call, question: Question) -> str:
    sizes = ", ".join(f"{name}={value}" for name, value in question.sizes)
    within = "" if question.op == call.op else f" in {call.op}"
    return f"{question.op}{within} {question.direction} at {call.length} ({sizes})"


def first_line(failure: Exception) -> str:
    text = str(failure).strip() or "no message"
    return f"{type(failure).__name__}: {text.splitlines()[0][:120]}"


def show(title: str, trials: list[Trial]) -> None:
    def outcome(trial: Trial) -> str:
        return trial.error or f"{1e3 * (trial.seconds or 0.0):.3f}"

    show_rows(title, "ms", [(trial.tiles, outcome(trial)) for trial in trials])


def show_rows(title: str, column: str, rows: Sequence[tuple[dict[str, int], str]]) -> None:
    table = Table(title=title)
    for name in rows[0][0]:
        table.add_column(name, justify="right")
    table.add_column(column)
    for tiles, outcome in rows:
        table.add_row(*(str(value) for value in tiles.values()), outcome)
    Console(width=None if sys.stdout.isatty() else 180).print(table)


if __name__ == "__main__":
    sys.exit(main())
