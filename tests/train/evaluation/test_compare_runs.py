"""scripts/compare_runs.py on runs whose differences are known."""

import json

import pytest
from evaluation_cases import load_script

from train.evaluation.results import Results
from train.evaluation.rows import Conditions
from train.evaluation.store import Cell, Measurement

VT = Cell("vt", 1024, "quest", 128, "B")
TEXT = Cell("perplexity", 1024, "dense", None, "A")


@pytest.fixture(scope="module")
def script():
    return load_script("compare_runs")


def run(title, values, metric="score", **settings):
    made = [
        Measurement(cell, number, value)
        for cell, found in values.items()
        for number, value in found.items()
    ]
    return Results.of(
        title, made, lambda cell: Conditions(metric=metric), settings=settings, environment={}
    )


def test_cells_are_compared_on_common_samples(script):
    first = run("a", {VT: {0: 0.5, 1: 0.25, 2: 1.0}, TEXT: {0: 2.0}})
    second = run("b", {VT: {1: 0.5, 2: 1.0, 7: 0.0}, TEXT: {0: 2.5}})
    text, vt = script.compare(first, second)
    assert (text.cell, text.samples, text.difference.mean) == (TEXT, 1, 0.5)
    assert not text.changed
    assert (vt.cell, vt.samples, vt.first, vt.second) == (VT, 2, 0.625, 0.75)
    assert vt.difference == pytest.approx((0.125, 0.0, 0.25))
    assert not vt.changed


@pytest.mark.parametrize("sign", [1, -1])
def test_differences_beyond_their_interval_count(script, sign):
    first = run("a", {VT: dict.fromkeys(range(10), 0.5)})
    second = run("b", {VT: {n: 0.5 + sign * (0.1 + 0.01 * n) for n in range(10)}})
    (one,) = script.compare(first, second)
    assert one.changed
    assert one.difference.mean == pytest.approx(sign * 0.145)


def test_runs_without_common_samples_are_refused(script):
    with pytest.raises(ValueError, match="'a' and 'b' have no sample in common"):
        script.compare(run("a", {VT: {0: 1.0}}), run("b", {VT: {1: 1.0}}))
    with pytest.raises(ValueError, match="'score' in one run and 'bits' in the other"):
        script.compare(run("a", {VT: {0: 1.0}}), run("b", {VT: {0: 1.0}}, metric="bits"))


def test_differing_settings_are_named(script):
    first = run("a", {VT: {0: 1.0}}, model="small", seed=0)
    second = run("b", {VT: {0: 1.0}}, model="large", seed=0)
    assert script.different(first, second) == {"model": ("small", "large")}


def test_command(script, results, tmp_path, capsys):
    results.save(tmp_path / "a")
    changed = {
        one.cell: dict(zip(one.samples, (0.5 * v for v in one.values), strict=True))
        for one in results.scores
    }
    run("half as good", changed, model="other").save(tmp_path / "b")
    arguments = script.Arguments(
        tmp_path / "a", tmp_path / "b" / "results.json", json=tmp_path / "compared.json"
    )
    script.main(arguments)
    shown = capsys.readouterr().out
    assert "model: small <&> model | other" in shown
    rows = json.loads((tmp_path / "compared.json").read_text())
    assert len(rows) == len(results.rows)
    assert f"{sum(row['changed'] for row in rows)} of {len(rows)} cells differ" in shown
    for row, result in zip(rows, results.rows, strict=True):
        assert (row["policy"], row["first"]) == (result.cell.policy, result.value)
        assert row["difference"] == pytest.approx(-0.5 * result.value)
