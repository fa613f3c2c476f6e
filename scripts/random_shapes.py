"""Hold every kernel to its reference on 100 random shapes and write down what came of it.

    python scripts/random_shapes.py --json benchmarks/results/random_shapes.json
    python scripts/random_shapes.py --kernels ranged_tpu,hamming_gpu --json rows.json

A row is one kernel in the interpreter of its platform, which runs on a CPU: shapes interpreted,
tests passed and failed, and the worst error (root mean square of the difference over that of the
reference) among the comparisons held to each bound; none where results are integers and have to
be equal. Rows of kernels that are not asked for are kept. 5 to 10 minutes a kernel.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import jax
from readable_help import HelpFormatter

ROOT = Path(__file__).parent.parent
OPS = ("ranged", "block_sparse", "block_scores", "hamming", "gather_decode")
KERNELS = tuple(f"{op}_{platform}" for platform in ("tpu", "gpu") for op in OPS)
TESTS = " or ".join(
    f"random_{what}" for what in ("shapes", "selections", "decodes", "blocks", "tokens")
)
ERROR = "worst_error_below_"


def read_report(path: Path) -> dict[str, Any]:
    """The columns that a junit report of the kernel tests holds."""
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    shapes, errors = 0, dict[str, float]()
    for item in (x for case in cases for x in case.iter("property")):
        name, value = item.attrib["name"], float(item.attrib["value"])
        if name == "interpreted_runs":
            shapes += int(value)
        elif name.startswith(ERROR):
            bound = name.removeprefix(ERROR)
            errors[bound] = max(value, errors.get(bound, 0.0))
    return {
        "shapes": shapes,
        "passed": len(cases) - len(failed),
        "failed": [case.attrib["name"] for case in failed],
        "worst_errors": errors,
    }


def run_kernel(kernel: str) -> dict[str, Any]:
    """Run the random tests of ``kernel`` (an op and a platform) and return its row."""
    op, platform = kernel.rsplit("_", 1)
    file = f"tests/kernels_pallas/test_{op}_mosaic_{platform}.py"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", file, "-m", "full", "-k", TESTS]
        command += ["-p", "no:cacheprovider", "--junitxml", str(report)]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=False)
        if not report.exists():
            raise RuntimeError(f"{' '.join(command)} wrote no report: did it start?")
        columns = read_report(report)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"op": op, "platform": platform, **columns, "jax": jax.__version__, "date": today}


def write_row(path: Path, row: dict[str, Any]) -> None:
    """Put ``row`` in the place of an earlier one of its kernel."""
    rows = json.loads(path.read_text()) if path.exists() else []
    name = (row["platform"], row["op"])
    rows = [x for x in rows if (x["platform"], x["op"]) != name] + [row]
    rows.sort(key=lambda x: KERNELS.index(f"{x['op']}_{x['platform']}"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")


def in_words(row: dict[str, Any]) -> str:
    """The row's line in the table of docs/kernels.md."""
    errors = row["worst_errors"]
    none = "-" if errors else "exact"
    cells = [f"`{row['op']}`", row["platform"].upper(), str(row["shapes"]), str(len(row["failed"]))]
    cells += [f"{errors[b]:.1e}" if b in errors else none for b in ("1e-05", "1e-02")]
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> int:
    """Run, print and write; 0 if shapes were interpreted and nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--kernels", default=",".join(KERNELS), help="op_platform, ...")
    parser.add_argument("--json", type=Path, required=True, help="the rows")
    options = parser.parse_args(arguments)
    kernels = options.kernels.split(",")
    for unknown in set(kernels) - set(KERNELS):
        parser.error(f"no kernel is called {unknown!r}; there are {', '.join(KERNELS)}")
    failures = 0
    for kernel in kernels:
        row = run_kernel(kernel)
        write_row(options.json, row)
        failures += len(row["failed"]) or row["shapes"] == 0
        print("op, platform, shapes, failed, worst error below 1e-5 and below 1e-2:")
        print(in_words(row), flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
