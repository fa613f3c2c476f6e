"""A run killed with SIGKILL at a random step goes on as if nothing had happened."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_killed_runs_equal_the_uninterrupted_one(texts, compilations, tmp_path):
    arguments = [
        *("--times", "1", "--kills", "2", "--config", "configs/tiny.py"),
        *("--steps", "60", "--checkpoint.every", "7", "--logging.inspect-every", "0"),
        *("--model.attention", "dense", "--model.layers", "1"),
        *("--data.source", str(texts), "--data.cache-dir", str(tmp_path / "cache")),
        *("--data.validation-fraction", "0.2", "--data.evaluation-fraction", "0.2"),
        *("--folder", str(tmp_path)),
    ]
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(compilations),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [sys.executable, "scripts/check_resume.py", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 resumed runs equal the uninterrupted one" in done.stdout
    killed = [line.split() for line in done.stdout.splitlines() if "yes" in line]
    assert len(killed) == 1
    assert len((tmp_path / "trial-1" / "metrics.jsonl").read_text().splitlines()) == 60
