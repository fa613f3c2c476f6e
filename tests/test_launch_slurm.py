"""scripts/launch_slurm.sh with stand-ins for Slurm's commands."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "launch_slurm.sh"
SRUN = """#!/usr/bin/env bash
trap 'echo saved; exit 0' TERM
echo "srun $*"
touch running
[[ -n "$QUICK" ]] && exit "$QUICK"
for _ in {1..300}; do sleep 0.05; done
"""


@pytest.fixture
def launch(tmp_path):
    commands = {"srun": SRUN, "scontrol": '#!/usr/bin/env bash\necho "scontrol $*"\n'}
    for name, text in commands.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "PYTHON": "python3",
    }

    def launch(*arguments, **more):
        return subprocess.Popen(
            ["bash", SCRIPT, *arguments],
            env=environment | more,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return launch


@pytest.mark.parametrize("status", [0, 3])
def test_the_job_ends_as_its_run_does(launch, status):
    process = launch("--config", "a.py", QUICK=str(status), SLURM_JOB_ID="7")
    said, _ = process.communicate(timeout=30)
    assert process.returncode == status
    assert "python3 -m train --distributed --config a.py" in said
    assert "scontrol" not in said


def test_a_job_out_of_time_saves_and_queues_again(launch, tmp_path):
    process = launch("--config", "a.py", QUICK="", SLURM_JOB_ID="7")
    while not (tmp_path / "running").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert said.index("saved") < said.index("scontrol requeue 7")


@pytest.mark.parametrize(
    ("arguments", "job", "message"),
    [((), "7", "usage: sbatch"), (("--config", "a.py"), "", "start it with sbatch")],
)
def test_how_to_start_it(launch, arguments, job, message):
    process = launch(*arguments, SLURM_JOB_ID=job)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 2
    assert message in said
