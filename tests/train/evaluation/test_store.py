import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.evaluation.store import Cell, Measurement, SampleStore

ROOT = Path(__file__).parents[3]
CELL = Cell("vt", 1024, "quest", 128, "B")
SETTINGS = {"model": "small", "seed": 0}


def measured(sample, cell=CELL, **fields):
    return Measurement(cell, sample, 0.5, {"recall": 0.25, "none": None}, **fields)


def test_finished_samples_come_back(tmp_path):
    written = [
        measured(0, layers={"recall": [0.5, None, 1.0]}, depth=0.3, prediction="ünï\n"),
        measured(1, seconds=1.5),
        measured(0, CELL._replace(budget=None, policy="dense")),
        measured(0, CELL._replace(budget=0.125)),
        measured(0, CELL._replace(budget="1/8")),
    ]
    with SampleStore(tmp_path / "run", SETTINGS) as store:
        for measurement in written:
            assert measurement.key not in store
            store.add(measurement)
            assert measurement.key in store
    with SampleStore(tmp_path / "run", SETTINGS) as store:
        assert list(store) == written
        assert len(store) == 5
        assert (CELL, 1) in store
        assert (CELL, 2) not in store


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_unfinished_last_line_is_dropped(tmp_path, cut):
    with SampleStore(tmp_path, SETTINGS) as store:
        store.add(measured(0))
        store.add(measured(1))
        path = store.path
    os.truncate(path, path.stat().st_size - cut)
    with SampleStore(tmp_path, SETTINGS) as store:
        assert [m.sample for m in store] == [0]
        store.add(measured(1))
    with SampleStore(tmp_path, SETTINGS) as store:
        assert list(store) == [measured(0), measured(1)]


def test_unfinished_first_line_is_an_empty_store(tmp_path):
    with SampleStore(tmp_path, SETTINGS) as store:
        path = store.path
    os.truncate(path, 7)
    with SampleStore(tmp_path, {"model": "other"}) as store:
        assert len(store) == 0


def test_a_sample_is_never_stored_twice(tmp_path):
    with SampleStore(tmp_path, SETTINGS) as store:
        store.add(measured(0))
        with pytest.raises(ValueError, match=r"holds .*vt.* already"):
            store.add(measured(0))


def test_other_settings_are_refused(tmp_path):
    SampleStore(tmp_path, SETTINGS).close()
    with pytest.raises(ValueError, match=r"'seed': \(0, 1\)"):
        SampleStore(tmp_path, {**SETTINGS, "seed": 1})
    with pytest.raises(ValueError, match=r"'model': \('small', None\)"):
        SampleStore(tmp_path, {"seed": 0})
    SampleStore(tmp_path, SETTINGS).close()


def test_settings_are_compared_as_json(tmp_path):
    SampleStore(tmp_path, {"lengths": (1, 2)}).close()
    SampleStore(tmp_path, {"lengths": [1, 2]}).close()


@pytest.mark.parametrize("line", ["{", "[1]", '{"task": "vt"}'])
def test_damage_before_the_end_is_named(tmp_path, line):
    with SampleStore(tmp_path, SETTINGS) as store:
        store.add(measured(0))
        path = store.path
    path.write_text(path.read_text() + line + "\n" + json.dumps(measured(1).to_json()) + "\n")
    with pytest.raises(ValueError, match=r"line 3 of .*samples\.jsonl is damaged"):
        SampleStore(tmp_path, SETTINGS)


def test_only_one_process_writes(tmp_path):
    with (
        SampleStore(tmp_path, SETTINGS),
        pytest.raises(BlockingIOError, match="written by another process"),
    ):
        SampleStore(tmp_path, SETTINGS)
    SampleStore(tmp_path, SETTINGS).close()


def test_numbers_must_be_finite(tmp_path):
    with SampleStore(tmp_path, SETTINGS) as store:
        with pytest.raises(ValueError, match="not JSON compliant"):
            store.add(Measurement(CELL, 0, float("nan")))
        store.add(measured(0))
    with SampleStore(tmp_path, SETTINGS) as store:
        assert list(store) == [measured(0)]


WRITER = """
import sys
from train.evaluation.store import Cell, Measurement, SampleStore
cell = Cell("vt", 1024, "quest", 128, "B")
with SampleStore(sys.argv[1], {}) as store:
    for sample in range(10**6):
        if (cell, sample) not in store:
            print(sample, flush=True)
            store.add(Measurement(cell, sample, 1.0, prediction="x" * 5000))
"""


def test_nothing_is_lost_or_run_twice_when_the_writer_is_killed(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    begun = []
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path], env=environment, stdout=subprocess.PIPE
        )
        first = writer.stdout.readline()
        time.sleep(0.1)
        writer.send_signal(signal.SIGKILL)
        begun.append([int(line) for line in (first + writer.communicate()[0]).split()])
        with SampleStore(tmp_path, {}) as store:
            kept = [measurement.sample for measurement in store]
        # Only the sample that was being written when the process died may be missing.
        assert kept[-1] >= begun[-1][-1] - 1
        assert kept == list(range(len(kept)))
    for before, after in itertools.pairwise(begun):
        assert after[0] in (before[-1], before[-1] + 1)
