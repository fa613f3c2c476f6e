"""Tables of a report, as text: for HTML, Markdown and the terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from train.evaluation.rows import Row
from train.evaluation.store import Budget

_PLACE = ("task", "protocol", "method", "length")
_COSTS = {
    "density_pairs": "pairs",
    "density_fetched": "fetched",
    "density_bytes": "bytes",
    "density_flops": "FLOPs",
    "auxiliary_bits": "bits a token",
    "recall": "recall of top 32",
    "evidence_recall": "recall of evidence",
    "captured_mass": "softmax mass",
    "output_error": "output error",
}


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text; the first ``names`` columns are words, ``marked`` rows stand out."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int = 3
    marked: frozenset[int] = frozenset()

    def markdown(self) -> str:
        """A table in Markdown."""
        rule = ["---" if number < self.names else "---:" for number in range(len(self.columns))]
        lines = [self.columns, rule, *self.rows]
        return "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        )


def method(policy: str, budget: Budget) -> str:
    """A policy with its budget, as tables call it; a share as 1/32 where it is one."""
    if isinstance(budget, float) and 0 < budget < 1 and (1 / budget).is_integer():
        return f"{policy} 1/{round(1 / budget)}"
    return policy if budget is None else f"{policy} {budget}"


def panel_name(task: str, length: int, protocol: str) -> str:
    """What a panel is about."""
    return f"{task} at {length:,}, protocol {protocol}"


def number(value: float | None) -> str:
    """Three digits, or a dash."""
    return "-" if value is None else f"{value:.3f}"


def span(mean: float | None, low: float | None, high: float | None) -> str:
    """A mean with its interval."""
    if mean is None:
        return "-"
    return f"{mean:.3f}" if low is None or high is None else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def said(row: Row) -> str:
    """A cell in one line, for the pointer."""
    cost = row.metrics.get("density_bytes")
    reads = "" if cost is None else f", reads {cost:.1%} of the bytes"
    shown = "" if row.cell.budget is None else f"{row.cell.budget}: "
    return f"{shown}{span(row.value, row.low, row.high)}, {row.samples} samples{reads}"


def scores(rows: Sequence[Row]) -> Table:
    """Every cell's mean and its difference from dense; flagged cells are marked."""
    return Table(
        (*_PLACE, "metric", "samples", "mean [95 %]", "minus dense [95 %]"),
        tuple(
            (
                *_place(row),
                row.conditions.metric,
                str(row.samples),
                span(row.value, row.low, row.high),
                _difference(row),
            )
            for row in rows
        ),
        marked=frozenset(n for n, row in enumerate(rows) if row.suspicious),
    )


def flagged(rows: Sequence[Row]) -> Table:
    """Cells where sparse is better than dense."""
    found = [row for row in rows if row.suspicious]
    return Table(
        (*_PLACE, "mean", "minus dense [95 %]"),
        tuple((*_place(row), number(row.value), _difference(row)) for row in found),
    )


def costs(rows: Sequence[Row]) -> Table:
    """Densities, bits and recall of every cell; columns that nobody measured are left out."""
    kept = [name for name in _COSTS if any(name in row.metrics for row in rows)]
    return Table(
        (*_PLACE, *(_COSTS[name] for name in kept)),
        tuple((*_place(row), *(_cost(row, name) for name in kept)) for row in rows if kept),
    )


def conditions(rows: Sequence[Row]) -> Table:
    """What was held fixed for each method, once for all tasks it is the same for."""
    found: dict[tuple[str, ...], None] = {}
    for row in rows:
        held = row.conditions
        found[
            row.cell.policy,
            row.cell.protocol,
            _layers(held.dense_layers),
            "-" if held.sinks is None else str(held.sinks),
            "-" if held.recent is None else str(held.recent),
            str(held.seed),
            held.haystack or "the task's",
            held.implementation,
            held.device,
            held.jax,
        ] = None
    columns = (
        *("policy", "protocol", "dense layers", "sinks", "recent", "first seed", "haystack"),
        *("implementation", "device", "jax"),
    )
    return Table(columns, tuple(sorted(found)), names=len(columns))


def _place(row: Row) -> tuple[str, ...]:
    cell = row.cell
    return cell.task, cell.protocol, method(cell.policy, cell.budget), f"{cell.length:,}"


def _difference(row: Row) -> str:
    return span(row.difference, row.difference_low, row.difference_high)


def _cost(row: Row, name: str) -> str:
    value = row.metrics.get(name)
    return f"{value:.1f}" if value is not None and name == "auxiliary_bits" else number(value)


def _layers(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers)) or "none"
