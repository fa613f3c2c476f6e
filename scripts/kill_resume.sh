#!/usr/bin/env bash
# SIGKILL a run at ten random moments, start it again each time, and compare its loss curve with that
# of an uninterrupted run, bit for bit. The log goes to benchmarks/results/kill_resume.txt.
#
#   scripts/kill_resume.sh                                    # configs/tiny.py
#   scripts/kill_resume.sh --config configs/quickstart.py --steps 100 --checkpoint.every 10
#
# Arguments go to scripts/check_resume.py, and what it does not know to `python -m train`.

set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
log="${LOG:-benchmarks/results/kill_resume.txt}"
{
  echo "scripts/kill_resume.sh $*"
  "$python" -c 'import jax, platform; print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {platform.processor() or platform.machine()}")'
  "$python" scripts/check_resume.py --times 1 --kills 10 "$@"
} | tee "$log"
