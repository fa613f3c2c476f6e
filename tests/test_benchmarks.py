"""The benchmark scripts: picks are what they claim, and a tiny run writes the promised rows."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from evaluation_cases import SCRIPTS, load_script

COLUMNS = {
    *("op", "mechanism", "picks", "union_ratio", "implementation", "direction", "length"),
    *("seconds", "cpu_seconds", "temp_bytes", "ratio_to_dense", "device", "jax"),
}


picks = load_script("bench_picks")


@pytest.mark.parametrize("make", [picks.replaced_picks, picks.uniform_picks])
def test_picks_are_legal_selections(make):
    length, block, selected = 200, 8, 6
    indices = make(length, 2, selected, block, seed=3)
    own = np.arange(length)[None, :, None] // block
    listed = indices >= 0
    assert indices.shape == (1, length, 2, selected)
    assert indices.dtype == np.int32
    assert (listed.sum(-1) == np.minimum(own + 1, selected)).all()
    assert (listed[..., :-1] >= listed[..., 1:]).all()  # -1 trails
    assert (np.diff(indices, axis=-1)[listed[..., 1:]] > 0).all()  # ascending and unique
    assert (indices[..., 0] == 0).all()
    assert (indices.max(-1) == own).all()
    for recent in (0, 1):
        wanted = np.maximum(own - recent, 0)[..., None]
        assert (indices == wanted).any(-1).all()
    np.testing.assert_array_equal(indices, make(length, 2, selected, block, seed=3))


def test_replaced_fraction_is_as_asked():
    indices = picks.replaced_picks(8192, 2, 16, 64, fraction=0.05)
    assert 0.04 < picks.replaced_fraction(indices) < 0.06


def test_uniform_picks_agree_on_forced_blocks_only():
    indices = picks.uniform_picks(16384, 1, 16, 64)[:, -4096:]
    # 13 of 16 blocks are drawn from about 220: hardly any is drawn twice in a row.
    assert 0.7 < picks.replaced_fraction(indices) < 0.82


def test_union_ratio_counts_distinct_blocks():
    indices = np.full((1, 6, 1, 4), -1, np.int32)
    indices[0, :, 0, 0] = [0, 0, 0, 1, 1, 1]
    indices[0, :, 0, 1] = [3, 4, -1, 2, 2, 2]
    # Tiles of 3 tokens: {0, 3, 4} and {1, 2}, over P = 4.
    assert picks.union_ratio(indices, tile=3) == pytest.approx((3 + 2) / 2 / 4)
    # The last tile is filled up with rows that select nothing.
    assert picks.union_ratio(indices, tile=4) == pytest.approx((5 + 2) / 2 / 4)


def test_drifting_noise_keeps_its_spread():
    array = picks.drifting((1, 4096, 2, 4), memory=0.9, seed=0)
    assert array.std() == pytest.approx(1.0, abs=0.1)
    neighbours = (array[:, 1:] * array[:, :-1]).mean() / array.var()
    assert neighbours == pytest.approx(0.9, abs=0.03)


def test_tiny_run_writes_every_column(tmp_path):
    file = tmp_path / "out" / "rows.json"
    command = [sys.executable, SCRIPTS / "bench_attention.py", "--json", file]
    lengths = ["--lengths", "96", "--decode-lengths", "64", "--directions", "forward,decode"]
    sizes = ["--selection-block", "8", "--selected-blocks", "5", "--window", "16"]
    effort = ["--picks", "replaced", "--repetitions", "1", "--threads", "2"]
    peers = ["--peer", "--peer-python", "/nonexistent/python", "--peer-layer-lengths", "0"]
    run = subprocess.run(
        [*command, *lengths, *sizes, *effort, *peers],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    rows = json.loads(file.read_text())
    assert all(row.keys() >= COLUMNS for row in rows)
    found = {(row["op"], row["mechanism"], row["direction"], row["length"]) for row in rows}
    assert found == {
        ("module", "dense", "forward", 96),
        ("module", "nsa", "forward", 96),
        ("block_sparse", "nsa", "forward", 96),
        ("sdpa", "dense", "forward", 96),
        ("dense_decode", "dense", "decode", 64),
        ("module", "dense", "decode", 64),
        ("gather_decode", "nsa", "decode", 64),
        ("module", "nsa", "decode", 64),
    }
    for row in rows:
        if row["op"] == "sdpa":
            assert "/nonexistent/python cannot be started" in row["error"]
            assert row["seconds"] is None
        else:
            assert row["error"] is None
            assert row["seconds"] > 0
            assert row["cpu_seconds"] > 0
            assert row["temp_bytes"] >= 0
    sparse = [row for row in rows if row["op"] == "block_sparse"]
    assert all(0 < row["union_ratio"] <= 5 for row in sparse)
    # Of all dense decode steps, the module's included, the fastest is what the others are held to.
    dense = [row for row in rows if (row["mechanism"], row["direction"]) == ("dense", "decode")]
    assert {row["op"] for row in dense} == {"dense_decode", "module"}
    assert max(row["ratio_to_dense"] for row in dense) == pytest.approx(1.0)
    assert "ratios > 1 are faster" in run.stdout


@pytest.mark.parametrize(
    "arguments", [["--picks", "best"], ["--directions", "sideways"], ["--repetitions", "0"]]
)
def test_mistakes_are_refused(arguments):
    command = [sys.executable, SCRIPTS / "bench_attention.py", *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert arguments[1] in run.stderr


def test_device_benchmark_writes_rows_and_records_what_cannot_run(tmp_path):
    command = [sys.executable, SCRIPTS / "bench_device.py", "--json-folder", tmp_path]
    sizes = ["--query-heads", "4", "--kv-heads", "1", "--head-width", "16", "--dtype", "float32"]
    effort = ["--suites", "selected", "--lengths", "128", "--repetitions", "1", "--name", "chip"]
    run = subprocess.run([*command, *sizes, *effort], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "chip_selected.json").read_text())
    assert all(row.keys() >= {"device", "driver", "jax", "date"} for row in rows)
    triton = [row for row in rows if row["implementation"] == "flash-linear-attention"]
    ours = [row for row in rows if row["op"] == "block_sparse" and row not in triton]
    assert len(ours) == len(triton) == 4
    assert all("No module named" in row["error"] and row["seconds"] is None for row in triton)
    assert all(row["error"] is None and row["ratio_to_dense"] > 0 for row in ours)
    # 128 causal queries see 128 * 129 / 2 keys, all of them selected.
    flops = 2 * 128 * 129 / 2 * 4 * (16 + 16)
    assert [row["flops"] for row in ours if row["direction"] == "forward"] == [flops] * 2


def test_device_check_refuses_a_machine_without_an_accelerator(tmp_path):
    script = [SCRIPTS / "device_check.sh", tmp_path]
    environment = os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert run.returncode == 1
    assert "no accelerator" in run.stderr
