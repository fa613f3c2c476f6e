"""scripts/bench_smollm2_decode.py: rows, ratios, and peers that are missing."""

import json

import pytest
from evaluation_cases import load_script


@pytest.fixture(scope="module")
def bench():
    return load_script("bench_smollm2_decode")


def test_ratios_are_those_of_the_same_length(bench):
    rows = [
        {"side": side, "length": length, "tokens_per_second": speed}
        for side, length, speed in (
            *(("dense", 64, 6.0), ("transformers", 64, 3.0)),
            *(("dense", 128, 4.0), ("transformers", 128, None)),
        )
    ]
    bench.add_ratios(rows)
    assert [row["ratio_to_transformers"] for row in rows] == [2.0, 1.0, None, None]
    assert all(row["ratio_to_llama_cpp"] is None for row in rows)


def test_a_peer_answers_line_by_line_and_one_that_cannot_run_is_a_row(bench):
    import sys

    code = "import json\nprint('hello')\nwhile True: print(json.dumps({'seconds': len(input())}))"
    peer = bench.Peer(sys.executable, code, [1])
    assert peer.first == {"seconds": 3}
    assert peer(1000) == {"seconds": 4}
    peer.close()
    for python in ("/nonexistent/python", sys.executable):
        side = bench.Side("peer", 64, lambda p=python: (None, bench.Peer(p, "1 / 0", [])))
        assert side.turn is None
        assert "No such file" in side.row["error"] or "status 1" in side.row["error"]


def test_mistakes_are_refused(bench, capsys):
    for wrong in (["--lengths", "8"], ["--turns", "0"]):
        with pytest.raises(SystemExit):
            bench.parse(wrong)
    assert "at least 64 tokens" in capsys.readouterr().err


@pytest.mark.full
def test_a_short_run_writes_its_rows(bench, tmp_path, capsys):
    file = tmp_path / "rows.json"
    asked = ["--lengths", "64", "--steps", "2", "--turns", "2", "--threads", "2"]
    assert bench.main([*asked, "--json", str(file), "--peer-python", "/nonexistent/python"]) == 0
    rows = json.loads(file.read_text())
    assert [row["side"].partition(":")[0] for row in rows] == [
        *("dense", "hash", "transformers", "llama.cpp")
    ]
    assert all(row["tokens_per_second"] > 0 and row["prefill_seconds"] > 0 for row in rows[:2])
    assert all("nonexistent" in row["error"] for row in rows[2:])
    assert "tokens/s" in capsys.readouterr().out
