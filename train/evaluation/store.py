"""Finished samples on disk: appended one by one, never run again, safe from a killed process."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

SAMPLES_FILE = "samples.jsonl"

Budget = int | float | str | None


class Cell(NamedTuple):
    """What a row of results is about; ``budget`` is None for dense attention."""

    task: str
    length: int
    policy: str
    budget: Budget
    protocol: str


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One sample of one cell.

    Attributes:
      cell: which task, length, policy, budget and protocol.
      sample: its number, which is its seed.
      value: its score, or its nats or bits per token.
      metrics: what was measured beside it, such as ``density_bytes``, ``recall``,
        ``evidence_recall``; None where it could not be.
      layers: the same by layer, such as ``recall``.
      depth: where its evidence is, 0 to 1; None if it has none.
      prediction: what was generated.
      picture: what one of its queries attended, as :class:`train.evaluation.results.Picture` has
        it: ``query``, ``chosen`` and ``evidence``; None if it was not kept.
      seconds: that it took.
    """

    cell: Cell
    sample: int
    value: float
    metrics: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    layers: Mapping[str, list[float | None]] = dataclasses.field(default_factory=dict)
    depth: float | None = None
    prediction: str = ""
    picture: Mapping[str, Any] | None = None
    seconds: float = 0.0

    @property
    def key(self) -> tuple[Cell, int]:
        """By which it is found again."""
        return self.cell, self.sample

    def to_json(self) -> dict[str, Any]:
        """A flat object of plain values."""
        rest = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "cell"
        }
        return {**self.cell._asdict(), **rest}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_json`.

        Raises:
          KeyError, TypeError: if a field is missing or not known.
        """
        cell = Cell(**{name: found[name] for name in Cell._fields})
        return cls(cell, **{k: v for k, v in found.items() if k not in Cell._fields})


class SampleStore:
    """``samples.jsonl``: the settings in the first line, then one :class:`Measurement` a line.

    Opening a file that is there goes on with it. A last line that a killed process left unfinished
    is dropped, and its sample counts as not run. Use as a context manager::

        with SampleStore(folder, settings) as store:
            if (cell, number) not in store:
                store.add(run(cell, number))

    Args:
      folder: of the run; made if it is not there.
      settings: plain JSON values that samples depend on and cells do not tell, such as the model.

    Raises:
      ValueError: if the file was made with other settings, or is damaged before its last line.
      BlockingIOError: if another process is writing it.
    """

    def __init__(self, folder: str | os.PathLike, settings: Mapping[str, Any]) -> None:
        self.path = Path(folder) / SAMPLES_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._found = self._read(settings)
        except BaseException:
            os.close(self._file)
            raise

    def __contains__(self, key: tuple[Cell, int]) -> bool:
        return key in self._found

    def __iter__(self) -> Iterator[Measurement]:
        return iter(self._found.values())

    def __len__(self) -> int:
        return len(self._found)

    def add(self, measurement: Measurement) -> None:
        """Append a finished sample; when this returns, it is on the disk.

        Raises:
          ValueError: if it is there already, or holds a number that is not finite.
        """
        if measurement.key in self._found:
            raise ValueError(f"{self.path} holds {measurement.key} already; it was run twice")
        self._append(measurement.to_json())
        self._found[measurement.key] = measurement

    def close(self) -> None:
        """Let others write."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"{self.path} is being written by another process; wait for it, or use another "
                "folder"
            ) from error

    def _read(self, settings: Mapping[str, Any]) -> dict[tuple[Cell, int], Measurement]:
        whole = self.path.read_bytes()
        finished = whole[: whole.rfind(b"\n") + 1]
        if len(finished) < len(whole):
            os.ftruncate(self._file, len(finished))
        rows = [self._parsed(n, line) for n, line in enumerate(finished.splitlines(), start=1)]
        wanted = json.loads(json.dumps({"settings": dict(settings)}, allow_nan=False))
        if not rows:
            self._append(wanted)
            return {}
        self._check_settings(rows[0], wanted)
        measurements = []
        for number, row in enumerate(rows[1:], start=2):
            try:
                measurements.append(Measurement.from_json(row))
            except (KeyError, TypeError) as error:
                raise self._damaged(number, error) from error
        return {measurement.key: measurement for measurement in measurements}

    def _parsed(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise self._damaged(number, error) from error
        if not isinstance(row, dict):
            raise self._damaged(number, TypeError("no object"))
        return row

    def _damaged(self, number: int, error: Exception) -> ValueError:
        return ValueError(
            f"line {number} of {self.path} is damaged ({error}); remove the line, and its sample "
            "runs again"
        )

    def _check_settings(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        if found == wanted:
            return
        was, now = found.get("settings", {}), wanted["settings"]
        different = {
            name: (was.get(name), now.get(name))
            for name in sorted({*was, *now})
            if was.get(name) != now.get(name)
        }
        raise ValueError(
            f"{self.path} was made with other settings, (there, now): {different}; use another "
            "folder, or delete the file"
        )

    def _append(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(row, allow_nan=False, ensure_ascii=False, separators=(",", ":")) + "\n"
        rest = memoryview(line.encode("utf-8"))
        while rest:
            rest = rest[os.write(self._file, rest) :]
        os.fsync(self._file)
