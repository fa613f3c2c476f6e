"""Scoring a run: the two paths agree, bytes are exact, mistakes are explained."""

import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from models.transformer import Decoder, split
from sparse_attn import Dense, Duo, OracleTopK, Quest
from train import evaluate as evaluation
from train.checkpoint import Checkpoints
from train.config import (
    TOKENIZER_FOLDER,
    ConfigError,
    UserError,
    load_recipe,
    load_run_config,
    save_run_config,
)
from train.data import DataConfig
from train.evaluation.bytes_model import ByteModel
from train.evaluation.config import EvaluationConfig
from train.evaluation.perplexity import bits_per_byte, decoded, make_windows, teacher_forced
from train.tokenizer import ByteTokenizer

WORDS = ["the", "of", "state", "union", "congress", "café", "people", "war", "peace", "law"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for i in range(20):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(WORDS, 30 + i)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def config(texts, tmp_path_factory):
    return dataclasses.replace(
        load_recipe("configs/tiny.py"),
        run_dir=str(tmp_path_factory.mktemp("runs") / "run"),
        data=DataConfig(
            source=str(texts),
            evaluation_fraction=0.3,
            validation_fraction=0.2,
            cache_dir=str(tmp_path_factory.mktemp("cache")),
        ),
        evaluation=EvaluationConfig(windows=3, window=40, batch_size=2, sample_tokens=5),
    )


@pytest.fixture(scope="module")
def decoder(config):
    decoder = Decoder(config.model, rngs=nnx.Rngs(0))
    # Logits of a fresh model are all alike; a test needs ones that depend on the text.
    decoder.embedding[...] = 8 * decoder.embedding[...]
    return decoder


@pytest.fixture(scope="module")
def run(config, decoder):
    return save_run(config, decoder)


def save_run(config, decoder):
    """A run folder as training leaves it, without having trained."""
    folder = Path(config.run_dir)
    folder.mkdir()
    _, params, state = split(decoder)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(7, {"params": params, "state": state}, {}, config)
    save_run_config(config, folder)
    ByteTokenizer().save(folder / TOKENIZER_FOLDER)
    return folder


@pytest.fixture(scope="module")
def windows():
    rng = np.random.default_rng(1)
    documents = [rng.integers(3, 259, size).astype(np.int32) for size in (40, 23)]
    for tokens in documents:
        tokens[0] = ByteTokenizer.bos_id
    documents[1][-1] = ByteTokenizer.eos_id
    return make_windows(documents, ByteTokenizer().token_bytes, multiple=8)


def test_windows_score_text_and_nothing_else(windows):
    assert windows.tokens.shape == (2, 40)
    assert windows.lengths.tolist() == [40, 23]
    assert windows.scored.sum(axis=1).tolist() == [39, 21]  # without bos, eos, padding
    assert windows.segment_ids.sum(axis=1).tolist() == [40, 23]
    groups = windows.batches(3)
    assert [group.tokens.shape for group in groups] == [(3, 40)]
    assert groups[0].lengths.tolist() == [40, 23, 0]
    with pytest.raises(ValueError, match="no document"):
        make_windows([], ByteTokenizer().token_bytes)


def test_decode_agrees_with_forward_and_with_plain_probabilities(decoder, windows):
    forward, metrics = teacher_forced(decoder, windows)
    stepwise = decoded(decoder, windows)
    assert forward.shape == windows.tokens.shape
    assert (forward[~windows.scored] == 0).all()
    assert (stepwise[~windows.scored] == 0).all()
    np.testing.assert_allclose(stepwise, forward, atol=2e-4)

    alone = jnp.asarray(windows.tokens[1:, :23])
    logits = nnx.jit(lambda decoder, tokens: decoder(tokens).logits)(decoder, alone)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    expected = -np.take_along_axis(np.asarray(log_p)[0, :-2], windows.tokens[1, 1:22, None], 1)
    np.testing.assert_allclose(forward[1, 1:22], expected[:, 0], atol=2e-4)
    assert 0 < metrics["density"] < 1


@pytest.mark.full
def test_scores_do_not_depend_on_the_batch(decoder, windows):
    for score in (decoded, lambda decoder, batch: teacher_forced(decoder, batch)[0]):
        together = score(decoder, windows)
        one_by_one = np.concatenate([score(decoder, one) for one in windows.batches(1)])
        (filled,) = (score(decoder, three) for three in windows.batches(3))
        np.testing.assert_allclose(one_by_one, together, atol=1e-5)
        np.testing.assert_allclose(filled[:2], together, atol=1e-5)
        assert (filled[2] == 0).all()


def test_decode_notices_another_context(decoder, windows):
    changed = dataclasses.replace(windows, tokens=windows.tokens.copy())
    changed.tokens[0, 5] = 3 + (changed.tokens[0, 5] + 17) % 256
    before, after = decoded(decoder, windows), decoded(decoder, changed)
    np.testing.assert_array_equal(before[0, :5], after[0, :5])
    assert (before[0, 6:] != after[0, 6:]).any()
    np.testing.assert_array_equal(before[1], after[1])


def test_bits_per_byte():
    assert bits_per_byte(80 * math.log(2), 40) == pytest.approx(2.0)


def test_report_of_a_run(config, run, decoder, texts, capsys):
    arguments = ["--checkpoint", str(run), "--evaluation.windows", "2"]
    assert evaluation.main(arguments) == 0
    found = json.loads((run / "evaluation.json").read_text())
    table = capsys.readouterr().out
    for key in ("bits_per_byte_teacher_forced", "bits_per_byte_decode", "bits_per_byte_order2"):
        assert f"{found[key]:.4f}" in table
    assert found["documents"] == 2
    assert found["step"] == 7
    assert found["mechanism"] == "NSA"
    assert found["device"]
    assert found["jax"] == jax.__version__
    assert abs(found["bits_per_byte_teacher_forced"] - found["bits_per_byte_decode"]) < 1e-3
    assert 0 < found["density"] < 1
    assert isinstance(found["sample"], str)

    from train.data import evaluation_documents, load_splits

    documents = evaluation_documents(config.data, ByteTokenizer(), documents=2, max_tokens=40)
    scored = [document.text.encode() for document in documents]
    assert found["bytes"] == found["tokens"] == sum(map(len, scored))
    model = ByteModel.fit(text.encode() for text in load_splits(config.data)["train"]["text"])
    expected = model.bits_per_byte([(text, 0) for text in scored])
    assert found["bits_per_byte_order2"] == pytest.approx(expected)
    windows = make_windows(
        [document.tokens for document in documents], ByteTokenizer().token_bytes, 8
    )
    nats = teacher_forced(decoder, windows)[0].sum()
    expected = nats / math.log(2) / found["bytes"]
    assert found["bits_per_byte_teacher_forced"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.full
def test_a_killed_evaluation_ends_in_the_same_report(config, tmp_path):
    """SIGKILL at three moments, in a process of its own; no sample runs twice."""
    model = dataclasses.replace(config.model, attention=Dense(), layers=1)
    texts = tmp_path / "texts"
    texts.mkdir()
    for n in range(9):
        (texts / f"{n}.txt").write_text(" ".join(WORDS[(n * i) % len(WORDS)] for i in range(90)))
    data = dataclasses.replace(config.data, source=str(texts))
    config = dataclasses.replace(config, model=model, data=data)
    asked = [
        *("--tasks", "passkey,perplexity,rolling_perplexity", "--lengths", "320"),
        *("--samples", "2", "--scored", "16", "--protocols", "A,B"),
        *("--policies", "dense", "oracle_topk:recent=4,sinks=2", "--budgets", "1/8,8"),
    ]
    folders = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        here = dataclasses.replace(config, run_dir=str(tmp_path / name / "run"))
        folders.append(save_run(here, Decoder(model, rngs=nnx.Rngs(0))))

    def start(folder):
        command = [sys.executable, "-m", "train.evaluate", "--checkpoint", str(folder), *asked]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    whole, killed = (folder / "evaluation" for folder in folders)

    def finish(folder):
        process = start(folder)
        _, told = process.communicate(timeout=600)
        assert process.returncode == 0, told.decode()

    finish(folders[0])
    for enough in (3, 10, 17):
        process, samples = start(folders[1]), killed / "samples.jsonl"
        while not samples.exists() or samples.read_bytes().count(b"\n") < enough:
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert not (killed / "results.json").exists()
    finish(folders[1])
    for name in ("results.json", "report.md", "report.html"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name

    def ran(folder):
        lines = (folder / "samples.jsonl").read_text().splitlines()[1:]
        names = ("task", "length", "policy", "budget", "protocol", "sample")
        return sorted(str([json.loads(line)[name] for name in names]) for line in lines)

    assert ran(killed) == ran(whole)
    assert len(set(ran(killed))) == len(ran(killed)) == 3 * 2 * (1 + 2 * 2)


def test_tasks_of_a_run_from_the_command_line(config, tmp_path, capsys):
    model = dataclasses.replace(config.model, attention=Dense(), layers=1)
    config = dataclasses.replace(config, model=model, run_dir=str(tmp_path / "dense"))
    folder = save_run(config, Decoder(model, rngs=nnx.Rngs(0)))
    asked = [
        *("--checkpoint", str(folder), "--tasks", "perplexity", "--lengths", "64"),
        *("--samples", "2", "--scored", "16", "--protocols", "C"),
        *("--policies", "dense", "random:recent=4", "--budgets", "1/8,8"),
    ]
    assert evaluation.main(asked) == 0
    found = json.loads((folder / "evaluation" / "results.json").read_text())["rows"]
    assert [(row["policy"], row["budget"]) for row in found] == [
        *(("dense", None), ("random:recent=4", 0.125), ("random:recent=4", 8))
    ]
    assert all(row["samples"] == 2 and row["protocol"] == "C" for row in found)
    assert "report.html" in capsys.readouterr().out
    for wrong, message in (
        (["--samples", "99"], "use at most as many --samples"),
        (["--budgets", "many"], "no number of keys"),
        (["--tasks", "niah"], "choose some of perplexity"),
        (["--scored", "8"], "made with other settings"),
    ):
        assert evaluation.main([*asked, *wrong]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_density_counts_every_layer(config):
    lengths = [40, 40]
    half = dataclasses.replace(config.model, dense_layers=(0,))
    mixed = dataclasses.replace(config, model=half)
    assert evaluation.mean_density(config, lengths, 0.25) == pytest.approx(0.25)
    assert evaluation.mean_density(mixed, lengths, 0.25) == pytest.approx(0.625)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate"),
        (["--checkpoint"], "needs a run folder"),
        (["--checkpoint", "runs/nowhere"], "no run folder"),
        (["--config", "configs/nothing.py"], "nothing.py"),
        (["--config", "configs/tiny.py", "--tasks", "perplexity"], "no run folder"),
        (["--config", "configs/tiny.py", "--sequence-length", "60"], "not a multiple of 8"),
    ],
)
def test_mistakes_exit_with_2(arguments, message, capsys):
    assert evaluation.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("tasks", [[], ["--tasks", "perplexity"]])
def test_an_interrupt_is_no_traceback(tasks, run, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for name in ("ask", "evaluate"):
        monkeypatch.setattr(evaluation, name, interrupted)
    assert evaluation.main(["--checkpoint", str(run), *tasks]) == 130
    said = capsys.readouterr().err
    assert "interrupted" in said
    assert ("finished samples are kept" in said) == bool(tasks)


def test_unknown_override_gets_a_suggestion(run, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluation.main(["--checkpoint", str(run), "--evaluation.window-count", "2"])
    assert stopped.value.code == 2
    assert "--evaluation.window" in capsys.readouterr().err


def test_another_configuration_is_refused(config, run):
    wider = dataclasses.replace(config.model, mlp_width=64)
    with pytest.raises(ConfigError, match=r"mlp_width: .* has 32, the recipe says 64"):
        evaluation.evaluate(dataclasses.replace(config, model=wider), run)


def test_run_without_checkpoint(config, tmp_path):
    save_run_config(config, tmp_path)
    with pytest.raises(UserError, match="no checkpoint"):
        evaluation.evaluate(config, tmp_path)


def test_unwritable_run_folder(config, run, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("train.evaluation.report.Path.write_text", refuse)
    with pytest.raises(UserError, match="Permission denied; make the folder writable"):
        evaluation.evaluate(config, run, console=Console(quiet=True))


@pytest.mark.parametrize(
    ("field", "value"), [("window", 7), ("windows", -1), ("batch_size", 0), ("temperature", -1.0)]
)
def test_config_refuses(field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        EvaluationConfig(**{field: value})


def test_policies_are_described_in_a_word_or_with_fields():
    assert evaluation.parse_policy("quest") == Quest()
    described = evaluation.parse_policy("duo:streaming_heads=(0, 1),recent=8,sinks=2")
    assert described == Duo(streaming_heads=(0, 1), recent=8, sinks=2)
    assert evaluation.parse_policy("oracle_topk:share=group") == OracleTopK(share="group")
    for text, message in (
        ("questt", "none of the known: .*quest"),
        ("quest:pages=4", "must read NAME:FIELD=VALUE"),
        ("quest:budget=", "must read NAME:FIELD=VALUE"),
        ("quest:4", "must read NAME:FIELD=VALUE"),
        ("quest:budget=-1", "budget=-1"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluation.parse_policy(text)


def test_a_policy_is_evaluated_on_a_dense_run(config, run, tmp_path):
    model = dataclasses.replace(config.model, attention=Dense(), layers=1)
    config = dataclasses.replace(config, model=model, run_dir=str(tmp_path / "dense"))
    folder = save_run(config, Decoder(model, rngs=nnx.Rngs(0)))
    policy = evaluation.evaluate(config, folder, policy="streaming_llm:sinks=1,recent=4")
    assert (folder / "evaluation-streaming_llm.json").exists()
    assert policy.mechanism == "streaming_llm:sinks=1,recent=4"
    assert 0 < policy.density < 1
    assert abs(policy.bits_per_byte_teacher_forced - policy.bits_per_byte_decode) < 1e-3
    with pytest.raises(UserError, match="K/V branches of NSA cannot become the 1"):
        evaluation.evaluate(load_run_config(run), run, policy="streaming_llm")
