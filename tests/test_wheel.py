"""The wheel holds the packages and nothing else, and works where there is no repository."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("configs", "kernels_pallas", "models", "sparse_attn", "train")
PROGRAMS = ("train", "train.evaluate", "models.generate", "models.export_mapping")
EXTRAS = {"cuda13", "data", "dev", "docs", "harness", "tpu", "wandb"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built by setuptools from a copy, without a network."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    for name in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    # A table of measured tile sizes, as scripts/tune_tiles.py writes it on a chip.
    (copy / "kernels_pallas" / "tiles").mkdir(exist_ok=True)
    (copy / "kernels_pallas" / "tiles" / "chip.json").write_text("{}")
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, out], cwd=copy, capture_output=True, text=True
    )
    (built,) = out.glob("*.whl") if not done.returncode else [None]
    assert built is not None, done.stderr
    return built


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory):
    """Runs Python in an empty folder with the unpacked wheel, not the repository, on its path."""
    unpacked, folder = tmp_path_factory.mktemp("unpacked"), tmp_path_factory.mktemp("empty")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(unpacked)},
            capture_output=True,
            text=True,
        )

    return run


def test_it_holds_the_packages_their_data_and_the_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        described = archive.read(metadata).decode()
    files = {name for name in names if ".dist-info/" not in name}
    source = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".json") and path.is_file()
    }
    assert files == source | {"kernels_pallas/tiles/chip.json"}
    (licence,) = (name for name in names if name.endswith("/licenses/LICENSE"))
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    extras = {line.split()[1] for line in described.splitlines() if line[:15] == "Provides-Extra:"}
    assert extras == EXTRAS


def test_its_programs_and_recipes_work_from_anywhere(elsewhere):
    code = (
        "import importlib, sparse_attn\n"
        f"for name in {PROGRAMS}:\n"
        "    main = importlib.import_module('models.command_line' if name == 'models.generate' else"
        " 'train.__main__' if name == 'train' else name).main\n"
        "    try:\n"
        "        assert main(['--help']) == 0\n"
        "    except SystemExit as stop:\n"
        "        assert not stop.code\n"
        "from train.config import load_recipe\n"
        "print(load_recipe('tiny').run_dir, sparse_attn.__file__)"
    )
    done = elsewhere("-c", code)
    assert done.returncode == 0, done.stderr
    for program in PROGRAMS:
        assert f"usage: python -m {program}" in done.stdout
    assert "runs/tiny" in done.stdout.splitlines()[-1]
    assert "unpacked" in done.stdout.splitlines()[-1]


@pytest.mark.full
def test_it_is_installed_into_an_empty_environment(wheel, tmp_path):
    """With its dependencies, from a package index; then a recipe trains from another folder."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    binaries = tmp_path / "venv" / "bin"
    pip = [binaries / "python", "-m", "pip", "install", "-qq", "-c", ROOT / "constraints.txt"]
    subprocess.run([*pip, wheel], check=True)
    (tmp_path / "empty").mkdir()
    environment = {
        name: value
        for name, value in {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}.items()
        if name not in ("PYTHONPATH", "XLA_FLAGS")
    }

    def run(*command):
        done = subprocess.run(
            command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "venv" in run(
        binaries / "python", "-c", "import sparse_attn; print(sparse_attn.__file__)"
    )
    for program in PROGRAMS:
        assert "usage:" in run(binaries / "python", "-m", program, "--help")
    run(binaries / "sparse-attn-train", "--config", "tiny", "--steps", "3")
    run(binaries / "sparse-attn-evaluate", "--checkpoint", "runs/tiny", "--evaluation.windows", "2")
    saved = json.loads((tmp_path / "empty" / "runs" / "tiny" / "evaluation.json").read_text())
    assert saved["step"] == 3
    said = run(
        *(binaries / "sparse-attn-generate", "--model", "runs/tiny"),
        *("--prompt", "The", "--max-new-tokens", "4"),
    )
    assert said
