"""Two evaluations side by side, with intervals of the paired differences.

    python scripts/compare_runs.py runs/a runs/b [--changed] [--json FILE]

Both are folders with a results.json, or the files themselves. Cells that both have are compared on
the sample numbers that both have. Equal numbers are equal samples where tokenizer, haystack and
answer tokens are the same; settings that differ are printed first.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from train.evaluation import tables
from train.evaluation.results import Results
from train.evaluation.rows import cell_order
from train.evaluation.statistics import Interval, paired_difference
from train.evaluation.store import Cell

_FILE_WIDTH = 150


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare two evaluations."""

    first: Annotated[Path, tyro.conf.Positional]
    """The folder of a run, or its results.json."""
    second: Annotated[Path, tyro.conf.Positional]
    """Another one."""
    changed: bool = False
    """Show only cells whose difference has an interval without zero."""
    json: Path | None = None
    """Write the comparison there as well."""


@dataclasses.dataclass(frozen=True)
class Compared:
    """A cell of both runs: their means over ``samples`` common samples, and second minus first."""

    cell: Cell
    metric: str
    samples: int
    first: float
    second: float
    difference: Interval

    @property
    def changed(self) -> bool:
        """Whether the interval of the difference excludes zero."""
        return self.difference.low > 0 or self.difference.high < 0

    def to_json(self) -> dict[str, Any]:
        """A flat object; an interval that is not known is null."""
        mean, *ends = self.difference
        low, high = (None if math.isnan(end) else end for end in ends)
        return {
            **self.cell._asdict(),
            "metric": self.metric,
            "samples": self.samples,
            "first": self.first,
            "second": self.second,
            "difference": mean,
            "difference_low": low,
            "difference_high": high,
            "changed": self.changed,
        }


def compare(first: Results, second: Results) -> list[Compared]:
    """Every cell that both have samples of.

    Raises:
      ValueError: if there is none, or a cell's values are different things.
    """
    ours, theirs = (
        {one.cell: dict(zip(one.samples, one.values, strict=True)) for one in results.scores}
        for results in (first, second)
    )
    metrics = [{row.cell: row.conditions.metric for row in run.rows} for run in (first, second)]
    compared = []
    for cell in sorted(ours.keys() & theirs.keys(), key=cell_order):
        common = sorted(ours[cell].keys() & theirs[cell].keys())
        if not common:
            continue
        if metrics[0][cell] != metrics[1][cell]:
            raise ValueError(
                f"{cell} states {metrics[0][cell]!r} in one run and {metrics[1][cell]!r} in the "
                "other; they cannot be subtracted"
            )
        before, after = ([run[cell][n] for n in common] for run in (ours, theirs))
        compared.append(
            Compared(
                cell,
                metrics[0][cell],
                len(common),
                math.fsum(before) / len(common),
                math.fsum(after) / len(common),
                paired_difference(after, before),
            )
        )
    if not compared:
        raise ValueError(
            f"{first.title!r} and {second.title!r} have no sample in common; compare runs of the "
            "same tasks, lengths, policies, budgets and protocols"
        )
    return compared


def different(first: Results, second: Results) -> dict[str, tuple[Any, Any]]:
    """Settings and environment in which the runs differ."""
    ours, theirs = ({**run.settings, **run.environment} for run in (first, second))
    return {
        name: (ours.get(name), theirs.get(name))
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    }


def show(compared: list[Compared], console: Console) -> None:
    """The table."""
    table = Table(box=box.SIMPLE)
    for name in ("task", "protocol", "method", "metric"):
        table.add_column(name, no_wrap=True)
    for name in ("length", "samples", "first", "second", "second - first \\[95 %]"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in compared:
        cell = one.cell
        low, high = (None if math.isnan(end) else end for end in one.difference[1:])
        table.add_row(
            cell.task,
            cell.protocol,
            tables.method(cell.policy, cell.budget),
            one.metric,
            f"{cell.length:,}",
            str(one.samples),
            tables.number(one.first),
            tables.number(one.second),
            tables.span(one.difference.mean, low, high).replace("[", "\\["),
            style="bold" if one.changed else None,
        )
    console.print(table)


def main(arguments: Arguments) -> None:
    """Load, compare, print, and write."""
    first, second = Results.load(arguments.first), Results.load(arguments.second)
    compared = compare(first, second)
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=_FILE_WIDTH)
    for name, values in different(first, second).items():
        console.print(f"{name}: {values[0]} | {values[1]}", markup=False)
    shown = [one for one in compared if one.changed or not arguments.changed]
    show(shown, console)
    changed = sum(one.changed for one in compared)
    console.print(f"{changed} of {len(compared)} cells differ beyond their interval")
    if arguments.json is not None:
        rows = [one.to_json() for one in compared]
        arguments.json.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
