"""From finished samples to rows of results: means with intervals, differences from dense."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

from train.evaluation.statistics import Better, Interval, interval, paired_difference, suspicious
from train.evaluation.store import Budget, Cell, Measurement

DENSE = "dense"

INSPECTED = {
    "density": "density_pairs",
    "fetched_density": "density_fetched",
    "bytes_density": "density_bytes",
    "flops_density": "density_flops",
    "auxiliary_bits": "auxiliary_bits",
    "recall_top32": "recall",
    "recall_beyond": "recall_beyond",
    "captured_mass": "captured_mass",
    "output_error": "output_error",
    "output_error_p95": "output_error_p95",
    "evidence_recall": "evidence_recall",
}
"""What rows call the figures of :func:`sparse_attn.metrics.measure`."""

METRICS = tuple(INSPECTED.values())


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What a reader needs to know of a cell beside its name.

    Attributes:
      metric: what ``value`` is, with its unit.
      better: whether a higher or a lower ``value`` is.
      dense_layers: layers that were left dense.
      sinks: first keys that are always attended; None where the mechanism has none.
      recent: last keys that are.
      seed: of the first sample.
      haystack: what the evidence was hidden in.
      implementation: of the attention.
      device: that it ran on.
      jax: its version.
    """

    metric: str = "score"
    better: Better = "higher"
    dense_layers: tuple[int, ...] = ()
    sinks: int | None = None
    recent: int | None = None
    seed: int = 0
    haystack: str = ""
    implementation: str = ""
    device: str = ""
    jax: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """A cell: mean of its samples with a 95 % interval, and what it costs.

    ``difference`` and its interval are sparse minus dense over the samples that both have, and
    ``suspicious`` says that sparse is better by it. ``metrics`` has means over samples of
    :data:`METRICS`: four densities (attended over causal pairs; keys fetched per kv head over
    causal keys; bytes with the selector's over dense bytes; operations with the selector's over
    dense), bits the selector keeps a token, recall of the 32 most attended keys and of the
    evidence. What is not known is absent there and None elsewhere.
    """

    cell: Cell
    conditions: Conditions
    value: float
    low: float | None
    high: float | None
    samples: int
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    suspicious: bool = False
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A flat object: the cell, numbers, every metric (null where unknown), conditions."""
        own = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("cell", "conditions", "metrics")
        }
        metrics = {name: self.metrics.get(name) for name in METRICS}
        return {
            **self.cell._asdict(),
            **own,
            **metrics,
            **dataclasses.asdict(self.conditions),
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_json`."""
        conditions = {f.name: found[f.name] for f in dataclasses.fields(Conditions)}
        conditions["dense_layers"] = tuple(conditions["dense_layers"])
        own = {
            field.name: found[field.name]
            for field in dataclasses.fields(cls)
            if field.name not in ("cell", "conditions", "metrics")
        }
        return cls(
            cell=Cell(*(found[name] for name in Cell._fields)),
            conditions=Conditions(**conditions),
            metrics={name: found[name] for name in METRICS if found[name] is not None},
            **own,
        )


def row_metrics(
    layers: Sequence[Mapping[str, float]],
) -> tuple[dict[str, float | None], dict[str, list[float | None]]]:
    """Means over layers, and figures by layer, of what each layer's inspection reported.

    Args:
      layers: one mapping a layer, named as by :func:`sparse_attn.metrics.measure`; empty for layers
        that were not inspected, which stay out of the means.

    Returns:
      ``metrics`` and ``layers`` of a :class:`~train.evaluation.store.Measurement`. Figures that are
      not finite are None.
    """
    by_layer = {
        ours: [_finite(layer.get(theirs)) for layer in layers]
        for theirs, ours in INSPECTED.items()
        if any(theirs in layer for layer in layers)
    }
    means = {name: _mean(values) for name, values in by_layer.items()}
    return means, {k: v for k, v in by_layer.items() if k in ("recall", "evidence_recall")}


def summarise(
    measurements: Iterable[Measurement], conditions: Callable[[Cell], Conditions]
) -> list[Row]:
    """One row a cell, in a fixed order whatever the order of the samples.

    Dense attention is the same under every protocol: where it was not run under a cell's own, the
    samples of another one serve for the difference.
    """
    cells = by_cell(measurements)
    return [_row(cell, found, conditions(cell), cells) for cell, found in cells.items()]


def by_cell(measurements: Iterable[Measurement]) -> dict[Cell, list[Measurement]]:
    """Samples of every cell by their number; cells by task, length, protocol, policy and budget."""
    cells: dict[Cell, list[Measurement]] = {}
    for measurement in sorted(measurements, key=lambda m: (cell_order(m.cell), m.sample)):
        cells.setdefault(measurement.cell, []).append(measurement)
    return cells


def cell_order(cell: Cell) -> tuple[Any, ...]:
    """Sorts cells: dense first, budgets by size."""
    return (
        cell.task,
        cell.length,
        cell.protocol,
        cell.policy != DENSE,
        cell.policy,
        _budget_order(cell.budget),
    )


def _budget_order(budget: Budget) -> tuple[int, float, str]:
    if isinstance(budget, int | float):
        return 1, float(budget), ""
    return (0, 0.0, "") if budget is None else (2, 0.0, budget)


def _row(
    cell: Cell,
    found: list[Measurement],
    conditions: Conditions,
    cells: Mapping[Cell, list[Measurement]],
) -> Row:
    mean, low, high = interval([measurement.value for measurement in found])
    difference = None if cell.policy == DENSE else _difference(cell, found, cells)
    against = difference or Interval(math.nan, math.nan, math.nan)
    metrics = {name: _mean([m.metrics.get(name) for m in found]) for name in METRICS}
    return Row(
        cell,
        conditions,
        value=mean,
        low=_finite(low),
        high=_finite(high),
        samples=len(found),
        difference=_finite(against.mean),
        difference_low=_finite(against.low),
        difference_high=_finite(against.high),
        suspicious=suspicious(against, conditions.better),
        metrics={name: mean for name, mean in metrics.items() if mean is not None},
    )


def _difference(
    cell: Cell, found: list[Measurement], cells: Mapping[Cell, list[Measurement]]
) -> Interval | None:
    """Against dense on the same samples; None if there are none."""
    dense: dict[int, float] = {}
    for other, measurements in cells.items():
        same_task = (other.task, other.length) == (cell.task, cell.length)
        if other.policy == DENSE and same_task:
            own = other.protocol == cell.protocol
            values = {m.sample: m.value for m in measurements}
            dense = {**dense, **values} if own else {**values, **dense}
    pairs = [(m.value, dense[m.sample]) for m in found if m.sample in dense]
    if not pairs:
        return None
    ours, theirs = zip(*pairs, strict=True)
    return paired_difference(ours, theirs)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
