#!/usr/bin/env bash
# One run over all nodes of a Slurm job, one process a node (or a GPU: see below).
#
#   sbatch --nodes 4 --gpus-per-node 8 --time 24:00:00 scripts/launch_slurm.sh \
#       --config configs/infllm_v2_long.py --mesh.fsdp 32 --mesh.data 1
#
# Needs the repository, its .venv and the run folder on a file system that all nodes share. Arguments
# go to `python -m train`. Slurm sends SIGTERM two minutes before the time is up: the run saves, exits
# with 0, and is put back into the queue, where the same command goes on from its checkpoint.
#
#SBATCH --job-name=sparse-attn
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/slurm-%j.log

set -euo pipefail

root="${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}"
cd "$root"
python="${PYTHON:-$root/.venv/bin/python}"
if [[ $# -eq 0 ]]; then
  echo "usage: sbatch [options of sbatch] $0 --config RECIPE [--FIELD VALUE ...]" >&2
  exit 2
fi
if [[ -z "${SLURM_JOB_ID:-}" ]]; then
  echo "$0 runs inside a Slurm job: start it with sbatch; on one machine use $python -m train" >&2
  exit 2
fi

mkdir -p runs
srun --kill-on-bad-exit=1 --label "$python" -m train --distributed "$@" &
steps=$!
stopped=0
# srun passes the signal on to every process of the run.
trap 'stopped=1; kill -TERM "$steps"' TERM
# A trapped signal ends `wait` before the run has saved.
until wait "$steps"; do
  if kill -0 "$steps" 2>/dev/null; then continue; fi
  wait "$steps"
  exit $?
done

if [[ $stopped -eq 1 ]]; then
  echo "out of time with everything saved; back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
