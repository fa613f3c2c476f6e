"""Runs that start from another run: other attention, or selectors fitted to a frozen model."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from train_cases import run

from models.loading import export, load_config
from models.transformer import split
from sparse_attn import NSA, Dense
from train.checkpoint import load_decoder
from train.config import TokenizerConfig, UserError
from train.reporting import read_metrics
from train.tokenizer import load_tokenizer

SPARSE = dataclasses.replace(NSA.tiny()[0], window=8, implementation="reference")


@pytest.fixture
def dense(config):
    """A finished dense run."""
    config = dataclasses.replace(config, steps=3)
    run(config)
    return config


def continuing(dense, attention, name="next", **changes):
    return dataclasses.replace(
        dense,
        run_dir=str(Path(dense.run_dir).parent / name),
        init_from=dense.run_dir,
        model=dataclasses.replace(dense.model, attention=attention),
        **changes,
    )


def params_of(config):
    return split(load_decoder(config.run_dir)[0])[1]


def leaves(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_a_run_goes_on_from_the_weights_of_another(dense):
    last = read_metrics(dense.run_dir)[-1]["loss"]
    same = continuing(dense, Dense(), steps=1)
    _, said = run(same)
    assert f"from step 3 of {dense.run_dir}" in said
    # Trained weights, a fresh optimizer, the input from its beginning.
    assert read_metrics(same.run_dir)[0]["loss"] < last
    outcome, said = run(same)
    assert "nothing left to train" in said
    assert outcome.step == 1


def test_selectors_are_fitted_and_no_weight_of_the_model_moves(dense):
    before = leaves(params_of(dense))
    fit = continuing(dense, SPARSE, objective="selector", steps=8)
    # NSA has three K/V branches, so the frozen model is the upcycled one.
    start = continuing(dense, SPARSE, "start", objective="selector", steps=1)
    _, said = run(start)
    assert "of them trained" in said
    run(fit)
    first, after = leaves(params_of(start)), leaves(params_of(fit))
    moved = {name for name in after if (first[name] != after[name]).any()}
    assert moved
    assert all("/mechanism/compress_k/" in name for name in moved)
    for name, values in before.items():
        if "/attention/k" not in name and "/attention/v" not in name:
            np.testing.assert_array_equal(after[name], values)
    losses = [row["loss"] for row in read_metrics(fit.run_dir)]
    assert losses[-1] < losses[0]


def test_a_model_without_selectors_has_nothing_to_fit(dense):
    with pytest.raises(UserError, match="nothing to train: Dense has no parameters"):
        run(continuing(dense, Dense(), objective="selector"))


def test_a_source_that_does_not_fit_is_refused(dense):
    wider = continuing(dense, Dense())
    wider = dataclasses.replace(wider, model=dataclasses.replace(wider.model, mlp_width=48))
    with pytest.raises(UserError, match="mlp_width: 32 -> 48"):
        run(wider)
    lost = dataclasses.replace(continuing(dense, Dense(), "other"), init_from="runs/nowhere")
    with pytest.raises(UserError, match=r"runs/nowhere, which is no run folder.*--init-from"):
        run(lost)
    assert not Path(lost.run_dir).exists(), "what cannot begin leaves nothing behind"
    lost = dataclasses.replace(lost, init_from="runs/quickstart-dense")
    with pytest.raises(UserError, match=r"Train it first \(python -m train --config quickstart_d"):
        run(lost)
    other = continuing(
        dense, Dense(), "third", tokenizer=TokenizerConfig(kind="bytes", algorithm="bpe")
    )
    with pytest.raises(UserError, match="its weights mean nothing under another tokenizer"):
        run(other)
    with pytest.raises(ValueError, match="--init-from"):
        dataclasses.replace(dense, objective="selector")


def test_a_run_starts_from_a_published_model(dense, tmp_path):
    """An exported model stands in for one from elsewhere: a folder with settings and tensors."""
    decoder, _, _ = load_decoder(dense.run_dir)
    folder = tmp_path / "published"
    tokenizer = load_tokenizer(Path(dense.run_dir) / "tokenizer")
    export(decoder, folder, context_length=64, tokenizer=tokenizer)
    model = dataclasses.replace(load_config(folder), attention=Dense(), scan_layers=True)
    begin = dataclasses.replace(
        dense,
        run_dir=str(tmp_path / "started"),
        init_from=str(folder),
        model=model,
        tokenizer=TokenizerConfig(kind="published"),
        steps=1,
    )
    _, said = run(begin)
    assert f"from the published model {folder}" in said
    first = read_metrics(begin.run_dir)[0]["loss"]
    # The same weights on the same text as a run that goes on from the run itself.
    again = continuing(dense, Dense(), "again", steps=1)
    run(again)
    assert first == pytest.approx(read_metrics(again.run_dir)[0]["loss"], rel=1e-5)
    other = dataclasses.replace(begin, tokenizer=dense.tokenizer, run_dir=str(tmp_path / "b"))
    with pytest.raises(UserError, match="use TokenizerConfig"):
        run(other)
    with pytest.raises(ValueError, match="name it with --init-from"):
        dataclasses.replace(begin, init_from="")
    with pytest.raises(UserError, match="neither a path nor an installed package"):
        run(dataclasses.replace(begin, init_from="no-such-model", run_dir=str(tmp_path / "c")))
