"""Kill a run with SIGKILL at random steps, start it again, and compare with an uninterrupted run.

    python scripts/check_resume.py --config configs/tiny.py --times 5
    python scripts/check_resume.py --config configs/tiny.py --times 1 --kills 10

Every trial trains in a folder of its own, is killed when a randomly drawn step appears in its
metrics.jsonl (``--kills``: so often), and is started again with the same command. Its metrics.jsonl
must then equal the uninterrupted run's bit for bit, apart from the fields that tell the time.
Arguments that are not listed here go to ``python -m train``.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from readable_help import HelpFormatter
from rich.console import Console
from rich.table import Table

from models.command_line import quiet_orbax
from train.checkpoint import Checkpoints
from train.reporting import read_metrics, without_timing


def main(arguments: list[str] | None = None) -> int:
    """Run the trials and print a table; 0 if every one of them agreed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--config", default="configs/tiny.py", help="the recipe")
    parser.add_argument("--times", type=int, default=5, help="trials")
    parser.add_argument("--kills", type=int, default=1, help="in each trial")
    parser.add_argument("--seed", type=int, default=None, help="of the steps to kill at")
    parser.add_argument("--folder", type=Path, default=None, help="keep the runs here")
    options, overrides = parser.parse_known_args(arguments)
    if options.times < 1:
        parser.error(f"--times {options.times} must be at least 1")
    if options.kills < 1:
        parser.error(f"--kills {options.kills} must be at least 1")
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    draw = random.Random(seed)
    quiet_orbax()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        command = [sys.executable, "-m", "train", "--config", options.config, *overrides]
        command.append("--no-evaluate-at-end")
        expected = finish(command, folder / "uninterrupted")
        steps = [row["step"] for row in expected]
        table = Table(title=f"SIGKILL and resume, {options.config}, seed {seed}")
        for column in ("trial", "killed after step", "resumed from", "lines", "bitwise equal"):
            table.add_column(column, justify="right")
        equal = 0
        for trial in range(1, options.times + 1):
            run_dir = folder / f"trial-{trial}"
            kills = [
                kill(command, run_dir, at=at)
                for at in sorted(draw.choices(steps[:-1], k=options.kills))
            ]
            rows = finish(command, run_dir)
            same = json.dumps(rows) == json.dumps(expected)
            equal += same
            table.add_row(
                str(trial),
                ", ".join(str(reached) for reached, _ in kills),
                ", ".join(str(saved or "start") for _, saved in kills),
                str(len(rows)),
                "yes" if same else "NO",
            )
    Console().print(table)
    print(f"{equal} of {options.times} resumed runs equal the uninterrupted one")
    return 0 if equal == options.times else 1


def finish(command: list[str], run_dir: Path) -> list[dict]:
    """Run to the end; the lines of metrics.jsonl without timing."""
    done = subprocess.run([*command, "--run-dir", str(run_dir)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the run in {run_dir} failed:\n{done.stderr}")
    return without_timing(read_metrics(run_dir))


def kill(command: list[str], run_dir: Path, *, at: int) -> tuple[int, int | None]:
    """Start a run and SIGKILL it once step ``at`` is reported.

    Returns:
      The last reported step, and the checkpoint it left (None: none was complete).
    """
    process = subprocess.Popen(
        [*command, "--run-dir", str(run_dir)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    reached = 0
    while reached < at and process.poll() is None:
        rows = read_metrics(run_dir)
        reached = rows[-1]["step"] if rows else 0
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = read_metrics(run_dir)
    with Checkpoints(run_dir, read_only=True) as checkpoints:
        return (rows[-1]["step"] if rows else 0), checkpoints.latest


if __name__ == "__main__":
    sys.exit(main())
