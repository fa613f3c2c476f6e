"""scripts/tune_tiles.py: the search, its table, and the refusal to time what is not here."""

import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import tuned
from kernels_pallas.gather_decode import mosaic_tpu
from kernels_pallas.gather_decode.mosaic_tpu import Tiles

SCRIPTS = Path(__file__).parents[2] / "scripts"
CHIP = "TPU v6 lite"


@pytest.fixture
def tune_tiles(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tiles")
    return importlib.import_module("tune_tiles")


def question(**sizes):
    return tuned.Question("gather_decode", "forward", 1024, (("group", 8),), Tiles(**sizes))


def test_the_search_walks_to_the_fastest_and_records_what_cannot_run(tune_tiles):
    def seconds(entry):
        keys = entry.tiles["keys"]
        if keys > 2048:
            raise NotImplementedError(f"keys={keys} do not fit\nsecond line")
        return abs(keys - 2000) + 100 * entry.tiles["cores"]

    trials = tune_tiles.search(question(keys=512), seconds)
    assert trials[0].tiles == {"keys": 512, "cores": 1}
    best = min((t for t in trials if t.seconds is not None), key=lambda t: t.seconds)
    assert best.tiles == {"keys": 2048, "cores": 1}
    (refused,) = (t for t in trials if t.error)
    assert refused.error == "NotImplementedError: keys=4096 do not fit"
    assert len({str(t.tiles) for t in trials}) == len(trials)
    assert all("pieces" not in t.tiles for t in trials)


def test_gains_within_the_noise_end_the_search(tune_tiles):
    trials = tune_tiles.search(question(keys=512), lambda entry: 1 - 1e-6 * entry.tiles["keys"])
    assert len(trials) == 4


def tiny_call(tune_tiles):
    options = tune_tiles.parse(["--ops", "gather_decode", "--lengths", "2048"])
    (call,) = tune_tiles.chosen_calls(options, "mosaic_tpu")
    return call


def test_winners_are_written_and_taken_by_the_op(tune_tiles, monkeypatch):
    call = tiny_call(tune_tiles)
    timed = []

    def measure(call, entry):
        timed.append(entry.tiles)
        return 1.0 / entry.tiles["keys"] if entry.tiles["keys"] <= 1024 else 1.0

    (entry,) = tune_tiles.tune(call, CHIP, measure)
    assert entry.tiles == {"keys": 1024, "cores": 1}
    table = json.loads((tuned.FOLDER / "tpu_v6_lite.json").read_text())
    (row,) = table["entries"]
    assert (row["seconds"], row["seconds_by_rule"]) == (1 / 1024, 1 / 512)
    assert row["jax"] == jax.__version__
    assert timed[0] == {"keys": 512, "cores": 1}

    def chosen():
        q, _, _, indices, _ = call.shapes
        return mosaic_tpu._choose_tiles("gather_decode", q, indices, 4, 128, 64)

    monkeypatch.setattr(mosaic_tpu, "chip_kind", lambda: CHIP)
    assert chosen() == Tiles(keys=1024)
    tuned.table_path(CHIP).unlink()
    tuned.read_table.cache_clear()
    assert chosen() == Tiles(keys=512)


def test_tiles_that_do_not_run_by_rule_write_nothing(tune_tiles, capsys):
    def measure(call, entry):
        raise NotImplementedError("no room")

    assert tune_tiles.tune(tiny_call(tune_tiles), CHIP, measure) == []
    assert not tuned.FOLDER.exists()
    assert "no room" in capsys.readouterr().err


def test_the_stopwatch_runs_each_candidate_anew(tune_tiles):
    traced = []

    def function(x):
        by_rule = Tiles(keys=128)
        tiles = tuned.choose("toy", "", by_rule, lambda tiles: None, length=8)
        traced.append(tiles.keys)
        return x * tiles.keys

    shape = jax.ShapeDtypeStruct((8,), jnp.float32)
    call = tune_tiles.Call(
        "toy", "forward", 8, function, (shape,), lambda: (jnp.ones(8),), ("toy",)
    )
    watch = tune_tiles.Stopwatch(repetitions=3)
    entries = [tuned.Entry("toy", "forward", 8, {}, {"keys": keys}) for keys in (128, 256)]
    assert all(watch(call, entry) > 0 for entry in entries)
    assert traced == [128, 256]


def test_without_the_chip_nothing_is_timed_and_the_way_out_is_named(tune_tiles, capsys):
    assert tune_tiles.main([]) == 2
    assert "--compile-only v5e|v5p|v6e|h100" in capsys.readouterr().err
    assert not tuned.FOLDER.exists()


def test_compile_only_says_what_fits_and_writes_no_table(tune_tiles, capsys):
    arguments = ["--ops", "gather_decode", "--lengths", "2048", "--compile-only"]
    assert tune_tiles.main([*arguments, "v6e"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("fits") == 4
    assert tune_tiles.main([*arguments, "h100"]) == 0
    assert "lowered" in capsys.readouterr().out
    assert not tuned.FOLDER.exists()


@pytest.mark.parametrize("arguments", [["--ops", "sort"], ["--repetitions", "0"]])
def test_mistakes_are_refused(tune_tiles, arguments, capsys):
    with pytest.raises(SystemExit):
        tune_tiles.main(arguments)
    assert arguments[1] in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize("implementation", ["mosaic_tpu", "mosaic_gpu"])
def test_every_kernel_asks_for_its_tiles(tune_tiles, implementation):
    options = tune_tiles.parse(["--lengths", "4096"])
    tunable = set()
    for call in tune_tiles.chosen_calls(options, implementation):
        for asked in tune_tiles.questions_of(call, jax.eval_shape):
            tunable.add((asked.op, asked.direction))
            (halved, *_) = tune_tiles.neighbours(tune_tiles.rule_of(asked))
            assert halved != tune_tiles.rule_of(asked)
    attention = {(op, d) for op in ("ranged_attention", "block_sparse_attention")
                 for d in tuned.DIRECTIONS}  # fmt: skip
    single = {"select_blocks", "hamming_select", "gather_decode", "gather_blocks", "gather_tokens"}
    single |= {"entry_lse"} if implementation == "mosaic_tpu" else set()
    assert tunable == attention | {(op, "forward") for op in single}
