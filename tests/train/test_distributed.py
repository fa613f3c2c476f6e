"""Runs of several processes, joined over loopback, against runs of one."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from train.config import UserError
from train.distributed import Agreement, Processes, join
from train.reporting import read_metrics, without_timing

ROOT = Path(__file__).parents[2]


@pytest.fixture
def flags(texts, tmp_path):
    return [
        *("--config", "configs/tiny.py", "--steps", "4", "--checkpoint.every", "2"),
        *("--model.attention", "dense", "--model.layers", "1", "--logging.inspect-every", "0"),
        *("--data.source", str(texts), "--data.cache-dir", str(tmp_path / "cache")),
        *("--data.validation-fraction", "0.2", "--data.evaluation-fraction", "0.2"),
        "--no-evaluate-at-end",
    ]


@pytest.fixture
def start(flags, compilations, tmp_path):
    """Start processes of one run with so many devices each; stopped at the end of the test."""
    running = []

    def start(run_dir, *more, processes=1, devices=1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(compilations),
            "XLA_FLAGS": f"--xla_backend_optimization_level=0 "
            f"--xla_force_host_platform_device_count={devices}",
        }
        mine = []
        for index in range(processes):
            joining = [
                *("--processes.coordinator", f"127.0.0.1:{port}"),
                *("--processes.count", str(processes), "--processes.index", str(index)),
            ]
            mine.append(
                subprocess.Popen(
                    [
                        *(sys.executable, "-m", "train", *flags, "--run-dir", str(run_dir)),
                        *(joining if processes > 1 else ()),
                        *more,
                    ],
                    cwd=ROOT,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        running.extend(mine)
        return mine

    yield start
    for process in running:
        process.kill()
        process.communicate()


def finish(processes):
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)
    return said


def assert_same_curve(run_dir, expected):
    found, expected = (without_timing(read_metrics(folder)) for folder in (run_dir, expected))
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    # The same text in the same order, whoever read it; sums over devices round differently.
    assert [row["tokens"] for row in found] == [row["tokens"] for row in expected]
    for name in ("loss", "grad_norm"):
        values = [[row[name] for row in rows] for rows in (found, expected)]
        np.testing.assert_allclose(*values, rtol=2e-5)


def test_two_processes_train_like_one_and_either_goes_on_from_the_other(start, tmp_path):
    finish(start(tmp_path / "one"))
    first, second = finish(start(tmp_path / "two", processes=2))
    assert_same_curve(tmp_path / "two", tmp_path / "one")
    assert "2 device(s)" in first
    assert "device(s)" not in second, "only the first process tells"

    shutil.copytree(tmp_path / "two", tmp_path / "grown")
    shutil.rmtree(tmp_path / "grown" / "checkpoints" / "4")
    mesh = ("--mesh.data", "1", "--mesh.fsdp", "2", "--mesh.sequence", "2")
    (said,) = finish(start(tmp_path / "grown", *mesh, devices=4))
    assert "from step 2" in said
    assert_same_curve(tmp_path / "grown", tmp_path / "one")


@pytest.mark.full
def test_a_signal_to_one_process_stops_all_of_them_after_the_same_step(start, tmp_path):
    run_dir = tmp_path / "run"
    processes = start(run_dir, "--steps", "100000", processes=2)
    while len(read_metrics(run_dir)) < 3:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    first, _ = finish(processes)
    assert "stopped by a signal to another process after step" in " ".join(first.split())
    steps = [row["step"] for row in read_metrics(run_dir)]
    assert (run_dir / "checkpoints" / str(steps[-1])).is_dir()


def test_a_lone_process_obeys_at_once():
    import jax

    agreement = Agreement(jax.make_mesh((1,), ("data",)))
    assert [agreement.stops(wanted) for wanted in (False, True)] == [False, True]


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": 2},
        {"index": 0},
        {"coordinator": "here:1"},
        {"coordinator": "here:1", "count": 2, "index": 2},
    ],
)
def test_processes_that_cannot_be_told_apart(wrong):
    with pytest.raises(ValueError, match=r"count=.* and"):
        Processes(**wrong)


def test_no_cluster_around_is_an_error_with_the_way_out(monkeypatch):
    def refuse(**known):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr("jax.distributed.initialize", refuse)
    with pytest.raises(UserError, match=r"did not find each other .*--processes.coordinator"):
        join(Processes())
