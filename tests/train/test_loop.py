"""train.loop: what a run writes, how it stops, how it goes on."""

import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from train_cases import run

from sparse_attn import NSA
from train import loop
from train.checkpoint import Checkpoints
from train.config import ConfigError, LoggingConfig, OptimizerConfig, UserError, load_run_config
from train.loop import RunFolderError, TrainingDiverged
from train.reporting import read_metrics, without_timing


def in_folder(config, name):
    return dataclasses.replace(config, run_dir=str(Path(config.run_dir).parent / name))


def test_a_run_writes_its_folder(config):
    outcome, said = run(config)
    folder = Path(config.run_dir)
    assert (outcome.step, outcome.status) == (6, "finished")
    assert "new run" in said
    assert load_run_config(folder) == config
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    names = {"step", "loss", "aux_loss", "grad_norm", "learning_rate", "tokens"}
    timing = {"seconds", "tokens_per_second", "teraflops_per_second"}
    assert set(rows[0]) == names | timing | {"dense_equivalent_teraflops_per_second"}
    # A fresh model guesses evenly: ln 259 nats a token, as its small random logits allow.
    assert abs(rows[0]["loss"] - math.log(259)) < 1.0
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.steps == [3, 6]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "tokenizer" / "tokenizer.json").exists()


def test_a_signal_while_the_run_is_set_up_stops_it_before_a_step(config, monkeypatch):
    opened = loop.open_input

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return opened(*arguments, **options)

    monkeypatch.setattr(loop, "open_input", interrupted)
    outcome, said = run(config)
    assert (outcome.status, outcome.step) == ("interrupted", 0)
    assert "stopped by SIGINT before a step" in said.replace("\n", " ")
    monkeypatch.setattr(loop, "open_input", opened)
    assert run(config)[0].status == "finished"


def test_a_stopped_run_goes_on_bitwise_as_if_it_had_not(config, monkeypatch):
    whole = in_folder(config, "whole")
    run(whole)
    expected = without_timing(read_metrics(whole.run_dir))

    reported = loop.check_finite

    def stop_at_four(step, values, checkpoints):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        reported(step, values, checkpoints)

    monkeypatch.setattr(loop, "check_finite", stop_at_four)
    before = signal.getsignal(signal.SIGTERM)
    outcome, said = run(config)
    monkeypatch.setattr(loop, "check_finite", reported)
    assert outcome.status == "interrupted"
    assert outcome.step == 5  # step 4 is looked at while step 5 runs
    assert "SIGTERM" in said
    assert signal.getsignal(signal.SIGTERM) is before

    outcome, said = run(config)
    assert f"resuming {config.run_dir} from step 5 of 6" in said.replace("\n", "")
    assert without_timing(read_metrics(config.run_dir)) == expected

    shapes, _ = loop.plan(config)
    with Checkpoints(config.run_dir, read_only=True) as checkpoints:
        mine = checkpoints.restore(shapes)
    with Checkpoints(whole.run_dir, read_only=True) as checkpoints:
        other = checkpoints.restore(shapes)
    assert mine.input_state == other.input_state
    for a, b in zip(jax.tree.leaves(mine.state), jax.tree.leaves(other.state), strict=True):
        a, b = (jax.random.key_data(x) if x.dtype == mine.state.rng.dtype else x for x in (a, b))
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_lines_after_the_checkpoint_and_half_lines_are_written_again(config):
    run(config)
    expected = without_timing(read_metrics(config.run_dir))
    # As a killed process leaves it: lines beyond the checkpoint, the last one cut short.
    folder = Path(config.run_dir)
    for name in (folder / "checkpoints").iterdir():
        if name.name == "6":
            os.rename(name, folder / "elsewhere")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    outcome, said = run(config)
    assert "from step 3" in said
    assert outcome.step == 6
    assert without_timing(read_metrics(folder)) == expected


def test_a_finished_run_says_so(config):
    run(config)
    outcome, said = run(config)
    assert outcome.status == "finished"
    assert "nothing left to train" in said


def test_steps_and_reporting_may_change(config):
    run(config)
    longer = dataclasses.replace(
        config, steps=7, logging=dataclasses.replace(config.logging, every=7)
    )
    outcome, _ = run(longer)
    assert outcome.step == 7
    assert load_run_config(config.run_dir) == longer


def test_a_changed_configuration_is_refused_with_its_fields(config):
    run(config)
    changed = dataclasses.replace(
        config, steps=8, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.5)
    )
    with pytest.raises(ConfigError) as error:
        run(changed)
    message = str(error.value)
    assert "optimizer.learning_rate: 0.01 -> 0.5" in message
    assert "steps" not in message
    assert "--run-dir" in message
    assert "--resume-with-changes" in message
    outcome, _ = run(changed, resume_with_changes=True)
    assert outcome.step == 8


def test_no_flag_lets_other_data_through(config):
    run(config)
    changed = dataclasses.replace(config, batch_size=4)
    with pytest.raises(ConfigError, match="batch_size: 2 -> 4") as error:
        run(changed, resume_with_changes=True)
    assert "--resume-with-changes" not in str(error.value)


def test_changed_sizes_do_not_fit_the_checkpoint(config):
    run(config)
    model = dataclasses.replace(config.model, mlp_width=16)
    changed = dataclasses.replace(config, model=model, steps=8)
    with pytest.raises(UserError, match=r"float32\[16, 32\].*float32\[16, 16\]"):
        run(changed, resume_with_changes=True)


def test_a_diverged_run_stops_with_the_way_back(config, monkeypatch):
    reported = loop.check_finite

    def poisoned(step, values, checkpoints):
        reported(step, {**values, "loss": math.nan} if step == 5 else values, checkpoints)

    monkeypatch.setattr(loop, "check_finite", poisoned)
    with pytest.raises(TrainingDiverged) as error:
        run(config)
    message = str(error.value)
    assert "step 5: loss=nan" in message
    assert str(Path(config.run_dir) / "checkpoints" / "3") in message
    assert "learning-rate" in message
    with Checkpoints(config.run_dir, read_only=True) as checkpoints:
        assert checkpoints.steps == [3]


def test_divergence_is_seen_in_a_real_step(config):
    hot = dataclasses.replace(
        config,
        optimizer=OptimizerConfig(learning_rate=1e30, warmup_steps=0, clip_norm=0),
    )
    with pytest.raises(TrainingDiverged, match=r"step \d: loss=.*no checkpoint yet"):
        run(hot)


def test_a_folder_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("")
    below_a_file = dataclasses.replace(config, run_dir=str(tmp_path / "file" / "run"))
    with pytest.raises(RunFolderError, match=r"file/run' cannot be written.*--run-dir"):
        run(below_a_file)


def test_a_read_only_folder(config, monkeypatch):
    def refuse(self, data):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(RunFolderError, match=r"Permission denied.*--run-dir"):
        run(config)


def test_a_missing_corpus(config):
    missing = dataclasses.replace(
        config, data=dataclasses.replace(config.data, source="/nowhere/at/all")
    )
    with pytest.raises(UserError, match="/nowhere/at/all"):
        run(missing)


def test_wandb_is_asked_for_but_missing(config, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    asked = dataclasses.replace(
        config, logging=dataclasses.replace(config.logging, wandb="offline")
    )
    with pytest.raises(UserError, match=r"sparse-attn\[wandb\]"):
        run(asked)


@pytest.mark.full
def test_inspection_compares_selections_with_dense(config):
    attention = NSA(
        compression_block=4,
        compression_stride=2,
        selection_block=8,
        selected_blocks=4,
        window=8,
    )
    sparse = dataclasses.replace(
        config,
        steps=2,
        model=dataclasses.replace(config.model, attention=attention),
        logging=LoggingConfig(inspect_every=2, progress=False),
    )
    run(sparse)
    first, second = read_metrics(sparse.run_dir)
    assert "recall_top32" not in first
    assert 0 < second["recall_top32"] <= 1
    assert 0 < second["density"] <= 1


def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_used(config):
    run(config)
    folder = Path(config.run_dir)
    expected = without_timing(read_metrics(folder))
    shutil.rmtree(folder / "checkpoints" / "6" / "state")
    (folder / "checkpoints" / "6" / "state").mkdir()
    outcome, said = run(config)
    assert outcome.status == "finished"
    text = " ".join(said.split())
    assert f"checkpoint {folder / 'checkpoints' / '6'} is damaged" in text
    assert (
        f"going on from step 3, the damaged one is in {folder / 'damaged-checkpoints' / '6'}"
        in text
    )
    assert (folder / "damaged-checkpoints" / "6").is_dir()
    assert without_timing(read_metrics(folder)) == expected
    assert "nothing left to train" in run(config)[1], "step 6 was saved again"


def test_a_window_of_steps_is_profiled(config):
    logging = dataclasses.replace(config.logging, profile=(2, 3))
    run(dataclasses.replace(config, logging=logging))
    assert list((Path(config.run_dir) / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("window", [(0, 3), (3, 2), (-1, -1)])
def test_a_window_that_is_none(config, window):
    with pytest.raises(ValueError, match=r"profile=.*a first and a last step"):
        dataclasses.replace(config.logging, profile=window)
