"""What a run tells: metrics.jsonl, the terminal, the loss curve, and Weights & Biases if asked."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from models.command_line import quiet_orbax
from train.config import RunConfig, UserError, flatten
from train.flops import TokenFlops
from train.sharding import describe_placement
from train.step import LAYER_RECALL

METRICS_FILE = "metrics.jsonl"
LOSS_CURVE_FILE = "loss.png"

# Keys of metrics.jsonl that depend on the clock; two equal runs agree in all others.
TIMING_FIELDS = (
    "seconds",
    "tokens_per_second",
    "teraflops_per_second",
    "dense_equivalent_teraflops_per_second",
    "mfu",
    "dense_equivalent_mfu",
)

_PLAIN_INTERVAL = 15.0  # seconds between lines where there is no terminal to draw on


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, in the order of steps.

    Opening it for a run that goes on from ``step`` drops the lines of later steps (they will be
    written again) and a line cut short by a killed process.

    Raises:
      UserError: by every method, if the file cannot be written (a full disk, say).
    """

    def __init__(self, run_dir: str | Path, step: int) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        kept = [json.dumps(row) + "\n" for row in read_metrics(run_dir) if row["step"] <= step]
        temporary = self.path.with_suffix(".partial")
        with self._writing():
            temporary.write_text("".join(kept), encoding="utf-8")
            temporary.replace(self.path)
            self._file: TextIO = self.path.open("a", encoding="utf-8")

    def write(self, row: dict[str, float]) -> None:
        """Append one line (not finite: null); it survives the process being killed."""
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        with self._writing():
            self._file.write(json.dumps(finite, allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Make sure of the lines on disk before a checkpoint relies on them."""
        with self._writing():
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; lines that could not be written were reported before."""
        with contextlib.suppress(OSError):
            self._file.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror or error}); free space or make "
                "the folder writable, and run the same command again: it goes on from the last "
                "checkpoint"
            ) from error


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics.jsonl; none if there is no such file."""
    path = Path(run_dir) / METRICS_FILE
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if line.endswith("\n") and isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def without_timing(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what depends on the clock."""
    return [{key: row[key] for key in row if key not in TIMING_FIELDS} for row in rows]


def show_library_messages(console: Console) -> None:
    """Print what the libraries say, such as which implementation ``auto`` chose."""
    quiet_orbax()
    handler = RichHandler(console=console, show_time=False, show_path=False, markup=False)
    for name in ("sparse_attn", "train"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers[:] = [handler]
        logger.propagate = False


class Display:
    """The progress line in a terminal; elsewhere a plain line every few seconds."""

    def __init__(self, console: Console, *, first: int, steps: int, enabled: bool) -> None:
        self._console, self._steps, self._enabled = console, steps, enabled
        self._first, self._begun, self._printed = first, time.monotonic(), 0.0
        self._progress: Progress | None = None
        if enabled and console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._progress.add_task(
                "compiling the first step", total=steps, completed=first, figures=""
            )

    def __enter__(self) -> Display:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._progress:
            self._progress.stop()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show that ``step`` is done."""
        figures = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        if self._progress:
            self._progress.update(
                self._task, completed=step, description="training", figures=figures
            )
            return
        now = time.monotonic()
        if self._enabled and (now - self._printed > _PLAIN_INTERVAL or step == self._steps):
            self._printed = now
            left = (now - self._begun) / max(step - self._first, 1) * (self._steps - step)
            self._console.print(
                f"step {step}/{self._steps}  {figures}  eta {left:.0f} s", highlight=False
            )

    def layers(self, step: int, values: dict[str, float]) -> None:
        """Show the recall of single layers, if it was measured at this step."""
        found = {
            int(name.removeprefix(LAYER_RECALL)): value
            for name, value in values.items()
            if name.startswith(LAYER_RECALL)
        }
        if self._enabled and found:
            listed = "  ".join(f"L{layer} {found[layer]:.2f}" for layer in sorted(found))
            line = f"step {step}  recall of dense attention's keys by layer:  {listed}"
            self._console.print(line, highlight=False, soft_wrap=True)


class Clock:
    """Seconds since training began in this process, and the speed of about the last ten steps.

    Args:
      flops: of a token.
      peak: FLOP/s of all devices together, None if it is not known.
    """

    def __init__(self, flops: TokenFlops, peak: float | None) -> None:
        self._flops, self._peak = flops, peak
        self._begun = self._last = time.monotonic()
        self._steps = 0
        self._tokens = self._seconds = 0.0

    def tick(self, tokens: float) -> dict[str, float]:
        """Timing fields of a step that worked on ``tokens`` tokens: :data:`TIMING_FIELDS`, the
        model FLOPs utilisations where the peak is known.
        """
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._steps += 1
        # The first two steps wait for the compiler and are forgotten.
        kept = 0.0 if self._steps <= 3 else 0.9
        self._tokens = kept * self._tokens + tokens
        self._seconds = kept * self._seconds + seconds
        speed = self._tokens / max(self._seconds, 1e-9)
        fields = {"seconds": now - self._begun, "tokens_per_second": speed}
        kinds = (("", self._flops.executed), ("dense_equivalent_", self._flops.dense_equivalent))
        for kind, flops in kinds:
            fields[f"{kind}teraflops_per_second"] = speed * flops / 1e12
            if self._peak:
                fields[f"{kind}mfu"] = speed * flops / self._peak
        return fields


class Log:
    """Everything a run tells while it trains, wherever it goes.

    Args:
      config: of the run.
      first: finished steps at the start.
      console: for the progress line.
      flops: of a token, see :class:`Clock`.
      peak: see :class:`Clock`.
      writes: whether this process writes metrics.jsonl and reports to wandb.
    """

    def __init__(
        self,
        config: RunConfig,
        first: int,
        console: Console,
        *,
        flops: TokenFlops,
        peak: float | None,
        writes: bool = True,
    ) -> None:
        self._clock = Clock(flops, peak)
        self._file: MetricsFile | None = None
        self._wandb: Wandb | None = None
        with contextlib.ExitStack() as stack:
            if writes:
                self._file = MetricsFile(config.run_dir, first)
                stack.callback(self._file.close)
                self._wandb = Wandb(config)
                stack.callback(self._wandb.close)
            shown = config.logging.progress
            self._display = Display(console, first=first, steps=config.steps, enabled=shown)
            stack.enter_context(self._display)
            self._stack = stack.pop_all()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def step(self, step: int, values: dict[str, float], *, write: bool) -> None:
        """Show that ``step`` is done; ``write``: its values get a line."""
        timing = self._clock.tick(values["tokens"])
        self._display.update(step, values["loss"], timing["tokens_per_second"])
        self._display.layers(step, values)
        if write and self._file and self._wandb:
            row = {"step": step, **values, **timing}
            self._file.write(row)
            self._wandb.log(row)

    def sync(self) -> None:
        """See :meth:`MetricsFile.sync`."""
        if self._file:
            self._file.sync()


class Wandb:
    """Weights & Biases, imported only when the configuration asks for it.

    Raises:
      UserError: if it is asked for and not installed.
    """

    def __init__(self, config: RunConfig) -> None:
        self._run = None
        if config.logging.wandb == "off":
            return
        try:
            import wandb
        except ImportError:
            raise UserError(
                f"--logging.wandb {config.logging.wandb} needs the package wandb; install it with "
                "`pip install 'sparse-attn[wandb]'`, or use --logging.wandb off"
            ) from None
        self._run = wandb.init(
            project=config.logging.wandb_project,
            name=Path(config.run_dir).name,
            dir=config.run_dir,
            mode=config.logging.wandb,
            config=flatten(config),
        )

    def log(self, row: dict[str, Any]) -> None:
        """Send one line of metrics."""
        if self._run:
            self._run.log({key: row[key] for key in row if key != "step"}, step=row["step"])

    def close(self) -> None:
        """Finish sending."""
        if self._run:
            self._run.finish()


def print_placement(console: Console, params: Any) -> None:
    """The table of :func:`train.sharding.describe_placement`."""
    table = Table(title="parameters, their mesh axes, and MiB on each device", title_justify="left")
    for column in ("name", "arrays", "shape", "split over", "MiB"):
        table.add_column(column, justify="right" if column in ("arrays", "MiB") else "left")
    for group in describe_placement(params):
        axes = ", ".join(
            axis or "-" if isinstance(axis, str | None) else "*".join(axis) for axis in group.axes
        )
        sizes = ", ".join(map(str, group.shape))
        size = f"{group.bytes_per_device / 2**20:,.2f}"
        table.add_row(group.name, str(group.count), escape(f"[{sizes}]"), f"({axes})", size)
    console.print(table)


def draw_loss_curve(run_dir: str | Path) -> Path | None:
    """Draw ``loss.png`` from metrics.jsonl; None if nothing was logged."""
    rows = [row for row in read_metrics(run_dir) if "loss" in row]
    if not rows:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="each step")
    axes.plot(steps, smoothed(losses), color="tab:blue", linewidth=1.8, label="smoothed")
    axes.set_title(f"Training loss, {Path(run_dir).name}")
    axes.set_xlabel("step")
    axes.set_ylabel("cross entropy (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(run_dir) / LOSS_CURVE_FILE
    figure.savefig(path, dpi=120)
    return path


def smoothed(values: list[float], share: float = 0.02) -> list[float]:
    """Exponential moving average over about ``share`` of the curve, without a bias at the start."""
    decay = 1 - 1 / max(share * len(values), 1)
    total = weight = 0.0
    result = []
    for value in values:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        result.append(total / weight)
    return result
