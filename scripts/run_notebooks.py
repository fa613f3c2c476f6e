"""Run the notebooks from top to bottom and save them with what they printed and drew.

    python scripts/run_notebooks.py                # all of notebooks/, minutes
    python scripts/run_notebooks.py 01 04          # those whose names begin so

Each runs in an empty folder, by a kernel of this Python that knows nothing of a user's Jupyter
settings, and is saved only if every cell succeeded. What differs between two machines or two runs
without meaning anything (times, versions, names of kernels) is not saved. Needs the packages
nbclient and ipykernel.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Where Jupyter keeps its files; without it jupyter_core warns of a move.
os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")

import nbformat
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from readable_help import HelpFormatter
from traitlets import default

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


class OwnPython(KernelSpecManager):
    """The kernel is this Python, whatever kernels are installed."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "--log-level=ERROR"]
        argv += ["-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python", name=kernel_name)


class OwnKernel(AsyncKernelManager):
    """Starts that kernel, and nothing else."""

    @default("kernel_spec_manager")
    def _kernel_spec_manager(self) -> OwnPython:
        return OwnPython()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=HelpFormatter
    )
    parser.add_argument("names", nargs="*", help="beginnings of file names; all without any")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds that a cell may take")
    options = parser.parse_args(arguments)
    paths = notebooks(options.names)
    if not paths:
        parser.error(f"no notebook's name begins with one of {options.names}")
    for path in paths:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            executed = execute(read(path), folder, timeout=options.timeout)
        write(executed, path)
        size, seconds = path.stat().st_size / 1000, time.monotonic() - begun
        print(f"{path.relative_to(ROOT)}: {size:.0f} kB, {seconds:.0f} s", flush=True)
    return 0


def notebooks(beginnings: Sequence[str] = ()) -> list[Path]:
    """The project's notebooks in order, or those whose names begin with one of these."""
    found = sorted(FOLDER.glob("*.ipynb"))
    return [path for path in found if not beginnings or path.name.startswith(tuple(beginnings))]


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def write(notebook: NotebookNode, path: Path) -> None:
    """Save what :func:`normalised` leaves."""
    nbformat.write(normalised(notebook), path)


def parameters(notebook: NotebookNode) -> NotebookNode:
    """The cell with the tag ``parameters``: the first one with code.

    Raises:
      ValueError: if the first cell with code has no such tag.
    """
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    if "parameters" not in cell.metadata.get("tags", ()):
        raise ValueError(f"the first code cell, {cell.id!r}, lacks the tag 'parameters'")
    return cell


def with_parameters(notebook: NotebookNode, values: Mapping[str, Any]) -> NotebookNode:
    """A copy whose parameters have these values.

    Raises:
      ValueError: if the notebook has no parameter of a name.
    """
    notebook = nbformat.from_dict(notebook)
    cell = parameters(notebook)
    known = [
        target.id
        for statement in ast.parse(cell.source).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    ]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no parameter; there are {', '.join(known)}")
    cell.source = "\n".join([cell.source, *(f"{name} = {v!r}" for name, v in values.items())])
    return notebook


def execute(
    notebook: NotebookNode, folder: str | os.PathLike, *, timeout: int | None = None
) -> NotebookNode:
    """A copy of ``notebook`` with its outputs, run in ``folder``; this checkout is importable.

    Args:
      notebook: any.
      folder: the working directory.
      timeout: seconds that a cell may take.

    Raises:
      nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    notebook = nbformat.from_dict(notebook)
    with tempfile.TemporaryDirectory() as settings:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "IPYTHONDIR": settings,
            "JUPYTER_CONFIG_DIR": settings,
            "TF_CPP_MIN_LOG_LEVEL": "3",  # XLA complains of slow machines
        }
        client = NotebookClient(
            notebook,
            kernel_manager_class=OwnKernel,
            resources={"metadata": {"path": str(folder)}},
            timeout=timeout,
            record_timing=False,
        )
        asyncio.run(client.async_execute(env=environment))
    return notebook


def normalised(notebook: NotebookNode) -> NotebookNode:
    """A copy without what a run leaves in the metadata, and with neighbouring lines joined.

    Cells keep their ids and tags.
    """
    notebook = nbformat.from_dict(notebook)
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type != "code":
            continue
        cell.outputs = _joined(cell.outputs)
        for output in cell.outputs:
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
    return notebook


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """How a stream is cut into pieces depends on the clock."""
    joined: list[NotebookNode] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last and output.output_type == "stream" == last.output_type and output.name == last.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


if __name__ == "__main__":
    sys.exit(main())
