"""What the repository promises about itself: commands, versions, and no address of any host."""

import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
TEXT = {
    *(".py", ".md", ".toml", ".txt", ".sh", ".yml", ".yaml", ".cfg", ".ini", ".json"),
    *(".ipynb", ""),
}
# The licence's own text names its publisher.
WITH_ADDRESSES = {"LICENSE"}
ADDRESS = re.compile(r"(https?|ftp|git|ssh)(\+\w+)?" + r"://", re.IGNORECASE)


def text_files():
    git = shutil.which("git")
    if git and (ROOT / ".git").exists():
        command = [git, "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        files = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        made = re.compile(
            r"(^|/)(\.(?!ci/)[^/]+|__pycache__|runs|build|dist|site|[^/]+\.egg-info)/"
        )
        files = [
            file for file in ROOT.rglob("*") if not made.search(file.relative_to(ROOT).as_posix())
        ]
    return [file for file in files if file.suffix in TEXT and file.is_file()]


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def make_targets():
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_no_file_names_a_host():
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in text_files()
        if file.name not in WITH_ADDRESSES
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if ADDRESS.search(line)
    ]
    assert found == []


def test_constraints_pin_exact_versions():
    for line in constraints():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+", line), line
    names = [re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in constraints()]
    assert len(names) == len(set(names))


def test_constraints_cover_and_satisfy_the_dependencies():
    pinned = {
        re.sub(r"[-_.]+", "-", name).lower(): Version(pin)
        for name, pin in (line.split("==") for line in constraints())
    }
    described = project()
    extras = described["optional-dependencies"]
    wanted = described["dependencies"] + extras["dev"]
    for line in wanted:  # grows
        requirement = Requirement(line)
        if requirement.name == described["name"]:
            wanted += [part for extra in requirement.extras for part in extras[extra]]
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert pinned[name] in requirement.specifier, line


def test_version_is_the_same_everywhere():
    described = project()["version"]
    assert version("sparse-attn") == described
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading is not None
    assert heading.group(1) == described


def test_python_version_is_the_oldest_supported():
    oldest = (ROOT / ".python-version").read_text().strip()
    assert project()["requires-python"] == f">={oldest}"


@pytest.mark.parametrize(
    "document",
    [
        *("README.md", "CONTRIBUTING.md", "docs/benchmarks.md", "docs/training.md"),
        *("docs/parallel.md", "docs/evaluation.md", "docs/smollm2.md"),
    ],
)
def test_documents_name_real_commands(document):
    text = (ROOT / document).read_text()
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", "\n".join(code_of(text))))
    assert named - make_targets() == set()
    for path in re.findall(
        r"(?:scripts|configs|docs|tests)/[\w/.-]+\w(?![\w<])", "\n".join(code_of(text))
    ):
        assert (ROOT / path).exists(), path


def code_of(markdown):
    """Fenced blocks and inline code."""
    fenced = re.findall(r"```\w*\n(.*?)```", markdown, re.DOTALL)
    return fenced + re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", markdown, flags=re.DOTALL))


@pytest.mark.parametrize("target", ["train", "test", "test-full", "lint", "bench"])
def test_make_sets_up_what_a_target_needs(target):
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    listed = subprocess.run(
        [make, "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True
    )
    assert listed.returncode == 0, listed.stderr
    assert "scripts/set_up.sh .venv" in listed.stdout
    needs_tools = target in ("test", "test-full", "lint")
    assert ('".[dev]"' in listed.stdout) == needs_tools


def test_links_between_documents_lead_somewhere():
    for file in text_files():
        if file.suffix != ".md":
            continue
        for target in re.findall(r"\]\(([^)#]+)", file.read_text()):
            assert (file.parent / target).exists(), f"{file.relative_to(ROOT)} links to {target}"


def test_set_up_explains_a_missing_python(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    run = subprocess.run(
        ["bash", ROOT / "scripts" / "set_up.sh", tmp_path / "venv", "."],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(tmp_path / "python")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "is not a Python >= 3.12" in run.stderr
    assert not (tmp_path / "venv").exists()


def test_importing_the_library_needs_jax_and_flax_only():
    """What takes long to import is imported where it is used, not by ``import sparse_attn``."""
    code = (
        "import sys, jax, flax.nnx; before = set(sys.modules); import sparse_attn; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    ours = {"sparse_attn", "kernels_pallas", "jax", "flax", "jaxtyping"}
    assert set(run.stdout.split()) <= ours | sys.stdlib_module_names, run.stderr
