"""The log of random shapes: what the script reads from pytest, and that the page shows it."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = json.loads((ROOT / "benchmarks/results/random_shapes.json").read_text())

REPORT = """<testsuites><testsuite>
<testcase name="a"><properties><property name="interpreted_runs" value="3" />
<property name="worst_error_below_1e-05" value="2e-06" /></properties></testcase>
<testcase name="b"><failure message="no" /><properties>
<property name="interpreted_runs" value="1" />
<property name="worst_error_below_1e-05" value="3e-05" />
<property name="worst_error_below_1e-02" value="0.004" /></properties></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def random_shapes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("random_shapes")


def test_a_report_is_read(random_shapes, tmp_path):
    path = tmp_path / "report.xml"
    path.write_text(REPORT)
    assert random_shapes.read_report(path) == {
        "shapes": 4,
        "passed": 1,
        "failed": ["b"],
        "worst_errors": {"1e-05": 3e-05, "1e-02": 0.004},
    }


def test_rows_take_the_place_of_older_ones(random_shapes, tmp_path):
    path = tmp_path / "rows.json"
    row = {"op": "hamming", "platform": "gpu", "shapes": 1}
    for new in (row, row | {"op": "ranged"}, row | {"shapes": 2}):
        random_shapes.write_row(path, new)
    assert [(x["op"], x["shapes"]) for x in json.loads(path.read_text())] == [
        ("ranged", 1),
        ("hamming", 2),
    ]


def test_the_committed_log_has_passed_and_is_on_the_page(random_shapes):
    page = (ROOT / "docs/kernels.md").read_text()
    logged = [f"{row['op']}_{row['platform']}" for row in ROWS]
    assert logged == [kernel for kernel in random_shapes.KERNELS if kernel in logged]
    for kernel in set(random_shapes.KERNELS) - set(logged):
        op, platform = kernel.rsplit("_", 1)
        assert f"| `{op}` | {platform.upper()} | not logged |" in page
    for row in ROWS:
        assert row["shapes"] >= 100
        assert row["failed"] == []
        assert all(error < float(bound) for bound, error in row["worst_errors"].items())
        assert random_shapes.in_words(row) in page


def test_unknown_kernels_are_refused(random_shapes, tmp_path, capsys):
    with pytest.raises(SystemExit):
        random_shapes.main(["--kernels", "sort_tpu", "--json", str(tmp_path / "rows.json")])
    assert "sort_tpu" in capsys.readouterr().err
