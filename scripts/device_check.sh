#!/usr/bin/env bash
# On a machine with a GPU or TPU: the kernel tests on the chip itself, then the benchmarks to JSON.
#   scripts/device_check.sh [FOLDER] [NAME]     results go to FOLDER/NAME_*.json and FOLDER/*.log
# PYTHON names the interpreter. Needs jax for the chip and what `pip install .[dev]` brings.
# A failing step is reported and the next one still runs: the machine is rare.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-benchmarks/results}
name=${2:-device}
python=${PYTHON:-python}
mkdir -p "$folder"
export JAX_PLATFORMS="${JAX_PLATFORMS:-}" XLA_FLAGS="${XLA_FLAGS:-}" PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD:${PYTHONPATH:-}"
# Dense attention at 128k beside everything else: memory as it is needed.
export XLA_PYTHON_CLIENT_PREALLOCATE="${XLA_PYTHON_CLIENT_PREALLOCATE:-false}"
failed=()

step() {
    local log="$folder/${name}_$1.log"
    shift
    echo "== $*"
    if ! "$@" 2>&1 | tee "$log"; then failed+=("$log"); fi
}

{
    nvidia-smi || true
    "$python" -c 'import jax; print(jax.__version__, jax.devices())'
} 2>&1 | tee "$folder/${name}_machine.log"
platform=$("$python" -c 'import jax; print(jax.default_backend())')
if [ "$platform" = cpu ]; then
    echo "jax sees no accelerator here: nothing to check" >&2
    exit 1
fi
step tests "$python" -m pytest -m device tests/kernels_pallas -p no:cacheprovider -v --durations=10
for suite in selected modules decode window; do
    step "$suite" "$python" scripts/bench_device.py --suites "$suite" --json-folder "$folder" \
        --name "$name"
done
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
