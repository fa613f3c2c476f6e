"""``results.json``: all that reports and comparisons are made of."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from train.evaluation.rows import Conditions, Row, by_cell, summarise
from train.evaluation.store import Cell, Measurement

RESULTS_FILE = "results.json"
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Scores:
    """Every sample of a cell: its number, its value, and the depth of its evidence."""

    cell: Cell
    samples: tuple[int, ...]
    values: tuple[float, ...]
    depths: tuple[float | None, ...]


@dataclasses.dataclass(frozen=True)
class Layers:
    """A metric of a cell by layer, mean over its samples; None where it was not measured."""

    cell: Cell
    metric: str
    values: tuple[float | None, ...]


@dataclasses.dataclass(frozen=True)
class Picture:
    """What one query of one sample attended.

    ``chosen`` [layers][lists][...]: positions of the keys, ascending; a list is what heads share,
    and a layer that does not select has none.
    ``query``: its position, and so the last key it sees. ``evidence``: positions of the evidence.
    """

    cell: Cell
    sample: int
    query: int
    chosen: tuple[tuple[tuple[int, ...], ...], ...]
    evidence: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Results:
    """A finished evaluation. Equal samples give equal results, whenever and in what order they ran.

    Attributes:
      title: of the report.
      settings: what was evaluated and how, by name.
      environment: where, by name.
      rows: one a cell.
      scores: one a cell.
      layers: figures by layer.
      pictures: of chosen queries.
    """

    title: str
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    rows: tuple[Row, ...]
    scores: tuple[Scores, ...]
    layers: tuple[Layers, ...] = ()
    pictures: tuple[Picture, ...] = ()

    @classmethod
    def of(
        cls,
        title: str,
        measurements: Iterable[Measurement],
        conditions: Callable[[Cell], Conditions],
        *,
        settings: Mapping[str, Any],
        environment: Mapping[str, Any],
    ) -> Self:
        """Summarise finished samples."""
        cells = by_cell(measurements)
        rows = summarise((m for found in cells.values() for m in found), conditions)
        scores = (
            Scores(
                cell,
                tuple(m.sample for m in found),
                tuple(m.value for m in found),
                tuple(m.depth for m in found),
            )
            for cell, found in cells.items()
        )
        layers = (made for cell, found in cells.items() for made in _layers(cell, found))
        pictures = (
            Picture(cell, m.sample, **{name: _tuples(value) for name, value in m.picture.items()})
            for cell, found in cells.items()
            for m in found
            if m.picture is not None
        )
        return cls(
            title, settings, environment, tuple(rows), tuple(scores), tuple(layers), tuple(pictures)
        )

    def save(self, folder: str | os.PathLike) -> Path:
        """Write ``results.json``; a reader never sees half of it."""
        found = {
            "format": _FORMAT,
            "title": self.title,
            "settings": dict(self.settings),
            "environment": dict(self.environment),
            "rows": [row.to_json() for row in self.rows],
            **{
                name: [_flat(one) for one in getattr(self, name)]
                for name in ("scores", "layers", "pictures")
            },
        }
        path = Path(folder) / RESULTS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".partial")
        part.write_text(_dumped(found), encoding="utf-8")
        part.replace(path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Read a run's folder, or its ``results.json``.

        Raises:
          FileNotFoundError: if there is none.
          ValueError: if it is no results file of this format.
        """
        file = Path(path)
        file = file / RESULTS_FILE if file.is_dir() else file
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            raise ValueError(
                f"{file} is no results file of format {_FORMAT}; give the folder of a run"
            )
        return cls(
            found["title"],
            found["settings"],
            found["environment"],
            tuple(Row.from_json(row) for row in found["rows"]),
            tuple(Scores(**_nested(one)) for one in found["scores"]),
            tuple(Layers(**_nested(one)) for one in found["layers"]),
            tuple(Picture(**_nested(one)) for one in found["pictures"]),
        )


def _layers(cell: Cell, found: list[Measurement]) -> list[Layers]:
    made = []
    for name in sorted({name for measurement in found for name in measurement.layers}):
        columns = zip(*(m.layers[name] for m in found if name in m.layers), strict=True)
        known = [[value for value in column if value is not None] for column in columns]
        means = tuple(sum(column) / len(column) if column else None for column in known)
        made.append(Layers(cell, name, means))
    return made


def _flat(one: Scores | Layers | Picture) -> dict[str, Any]:
    rest = {f.name: getattr(one, f.name) for f in dataclasses.fields(one) if f.name != "cell"}
    return {**one.cell._asdict(), **rest}


def _nested(found: Mapping[str, Any]) -> dict[str, Any]:
    rest = {name: _tuples(value) for name, value in found.items() if name not in Cell._fields}
    return {"cell": Cell(*(found[name] for name in Cell._fields)), **rest}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _dumped(found: Mapping[str, Any]) -> str:
    """JSON with a line for every member of every list at the top."""
    parts = []
    for name, value in found.items():
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        if isinstance(value, list) and value:
            lines = (json.dumps(one, allow_nan=False, ensure_ascii=False) for one in value)
            text = "[\n  " + ",\n  ".join(lines) + "\n ]"
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
