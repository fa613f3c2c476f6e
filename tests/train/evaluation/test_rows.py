import json
import random

import pytest

from train.evaluation.results import Results
from train.evaluation.rows import Conditions, row_metrics, summarise
from train.evaluation.statistics import bootstrap, paired_difference, wilson
from train.evaluation.store import Cell, Measurement

DENSE = Cell("vt", 1024, "dense", None, "A")
QUEST = Cell("vt", 1024, "quest", 128, "B")


def measured(cell, values, first=0, **metrics):
    return [
        Measurement(cell, first + number, value, {k: v[number] for k, v in metrics.items()})
        for number, value in enumerate(values)
    ]


def rows_of(measurements, **fields):
    found = summarise(measurements, lambda cell: Conditions(**fields))
    return {row.cell: row for row in found}


def test_values_and_their_intervals():
    rows = rows_of(measured(DENSE, [1, 0, 1]) + measured(QUEST, [0.5, 0.25, 1.0]))
    dense, quest = rows[DENSE], rows[QUEST]
    assert (dense.value, dense.low, dense.high) == wilson(2, 3)
    assert (quest.value, quest.low, quest.high) == bootstrap([0.5, 0.25, 1.0])
    assert (dense.samples, quest.samples) == (3, 3)
    assert dense.difference is None


def test_difference_is_over_the_samples_that_both_have():
    rows = rows_of(measured(DENSE, [1, 0.5, 1, 0]) + measured(QUEST, [0.5, 0.5, 0.0], first=1))
    row = rows[QUEST]
    expected = paired_difference([0.5, 0.5, 0.0], [0.5, 1, 0])
    assert (row.difference, row.difference_low, row.difference_high) == expected
    assert rows_of(measured(QUEST, [1.0]))[QUEST].difference is None
    assert rows_of(measured(DENSE, [1.0]) + measured(QUEST, [1.0], first=5))[QUEST].samples == 1


def test_dense_of_the_same_protocol_comes_first():
    own = DENSE._replace(protocol="B")
    for cells in ((DENSE, own), (own, DENSE)):
        values = {DENSE: [0.0, 0.0], own: [1.0, 1.0]}
        made = [m for cell in cells for m in measured(cell, values[cell])]
        assert rows_of(made + measured(QUEST, [1.0, 1.0]))[QUEST].difference == 0


def test_dense_of_another_length_is_no_reference():
    longer = DENSE._replace(length=2048)
    assert rows_of(measured(longer, [1.0]) + measured(QUEST, [1.0]))[QUEST].difference is None


@pytest.mark.parametrize(("better", "flagged"), [("higher", True), ("lower", False)])
def test_better_than_dense_is_flagged(better, flagged):
    made = measured(DENSE, [0.1, 0.2, 0.1, 0.3]) + measured(QUEST, [0.9, 0.8, 0.9, 0.9])
    rows = rows_of(made, better=better)
    assert rows[QUEST].suspicious is flagged
    assert rows[DENSE].suspicious is False


def test_unknown_metrics_stay_out_of_means():
    made = measured(QUEST, [1, 1, 1], recall=[0.25, None, 0.75], evidence_recall=[None] * 3)
    row = rows_of(made)[QUEST]
    assert row.metrics == {"recall": 0.5}
    flat = row.to_json()
    assert (flat["recall"], flat["evidence_recall"], flat["density_bytes"]) == (0.5, None, None)


def test_one_sample_that_is_no_share_has_no_interval():
    row = rows_of(measured(QUEST, [2.5]))[QUEST]
    assert (row.value, row.low, row.high) == (2.5, None, None)


def test_inspections_become_metrics():
    layers = [{}, {"recall_top32": 0.5, "bytes_density": 0.1}, {"recall_top32": 1.0}]
    means, by_layer = row_metrics([*layers, {"recall_top32": float("nan"), "bytes_density": 0.3}])
    assert means == {"density_bytes": pytest.approx(0.2), "recall": 0.75}
    assert by_layer == {"recall": [None, 0.5, 1.0, None]}
    assert row_metrics([{}, {}]) == ({}, {})


def test_cells_are_in_order(results):
    assert [row.cell[:4] for row in results.rows[:6]] == [
        ("niah_single_1", 1024, "dense", None),
        ("niah_single_1", 1024, "oracle_topk", 64),
        ("niah_single_1", 1024, "oracle_topk", 256),
        ("niah_single_1", 1024, "quest", 0.5),
        ("niah_single_1", 1024, "quest", 64),
        ("niah_single_1", 1024, "quest", 256),
    ]


def test_results_come_back(results, tmp_path):
    path = results.save(tmp_path / "run")
    assert Results.load(path).rows[0] == results.rows[0]
    loaded = Results.load(tmp_path / "run")
    assert loaded.save(tmp_path / "again").read_bytes() == path.read_bytes()
    assert (loaded.scores, loaded.layers, loaded.pictures) == (
        results.scores,
        results.layers,
        results.pictures,
    )


def test_rows_have_the_names_that_others_rely_on(results, tmp_path):
    rows = json.loads(results.save(tmp_path).read_text())["rows"]
    names = (
        "policy budget protocol task length value low high samples density_bytes recall "
        "evidence_recall implementation device seed dense_layers sinks recent suspicious"
    )
    for row in rows:
        assert set(names.split()) <= row.keys()
    flagged = [(row["task"], row["length"], row["policy"]) for row in rows if row["suspicious"]]
    assert flagged == [("vt", 2048, "quest")]


def test_order_of_samples_does_not_matter(results, tmp_path):
    made = [
        Measurement(scores.cell, sample, value, depth=depth)
        for scores in results.scores
        for sample, value, depth in zip(scores.samples, scores.values, scores.depths, strict=True)
    ]
    texts = set()
    for seed in range(3):
        random.Random(seed).shuffle(made)
        again = Results.of("t", made, lambda cell: Conditions(), settings={}, environment={})
        texts.add(again.save(tmp_path).read_text())
    assert len(texts) == 1


def test_layers_are_means_over_samples(results):
    found = {(layers.cell, layers.metric): layers.values for layers in results.layers}
    assert len(found) == 2 * 2 * 5
    values = found[Cell("vt", 1024, "quest", 64, "B"), "recall"]
    assert values[0] is None
    assert values[1:4] == pytest.approx((0.3, 0.4, 0.5))


def test_other_files_are_refused(tmp_path):
    (tmp_path / "results.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="no results file of format 1"):
        Results.load(tmp_path)
