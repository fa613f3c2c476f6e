"""python -m train: what it prints, and its exit status."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import train.evaluate
from train import config
from train.__main__ import main
from train.recipes import list_recipes

ROOT = Path(__file__).parents[2]
TINY = ["--config", str(ROOT / "configs" / "tiny.py")]
HEAVY = (
    "jax",
    "flax",
    "numpy",
    "optax",
    "orbax",
    "grain",
    "datasets",
    "matplotlib",
    "transformers",
)
DENSE = ["--model.attention", "dense", "--model.layers", "1"]


def test_an_interrupt_before_the_run_begins_is_heard(tmp_path, monkeypatch, capsys):
    load = config.load_recipe

    def interrupted(name):
        os.kill(os.getpid(), signal.SIGINT)
        return load(name)

    monkeypatch.setattr(config, "load_recipe", interrupted)
    assert main([*TINY, "--run-dir", str(tmp_path / "run")]) == 0
    assert "stopped by SIGINT before anything was begun" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def run_flags(texts, tmp_path, compilations):
    return [
        *TINY,
        *DENSE,
        *("--steps", "2", "--run-dir", str(tmp_path / "run")),
        *("--data.source", str(texts), "--data.cache-dir", str(tmp_path / "cache")),
        *("--data.validation-fraction", "0.2", "--data.evaluation-fraction", "0.2"),
        *("--logging.inspect-every", "0"),
    ]


def failure(arguments, capsys):
    """The message of a command that must fail."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return " ".join(captured.err.split())


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_without_a_recipe_it_lists_them_with_their_promises(
    capsys, monkeypatch, tmp_path, arguments
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    for recipe in list_recipes():
        assert recipe.expected.startswith("Expected on "), recipe.path
        assert f"{recipe.name} {recipe.summary} {recipe.expected}" in said
    assert "--config quickstart --help" in said
    assert ("--resume-with-changes" in said) == bool(arguments)


def test_without_a_recipe_flags_are_refused(capsys):
    assert "--config is missing; give it a recipe: hash_smollm2" in failure(
        ["--steps", "3"], capsys
    )


def test_listing_the_recipes_and_help_import_neither_jax_nor_data_libraries():
    code = (
        "import sys; from train.__main__ import main; main(sys.argv[1:]); "
        f"print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("flag", ["--tyro-print-completion", "--tyro-write-completion"])
def test_completion_of_the_installed_command(flag, capsys, tmp_path):
    """The script is sourced by bash, which then completes a flag and its choices."""
    target = [str(tmp_path / "script")] if flag == "--tyro-write-completion" else []
    with pytest.raises(SystemExit) as stop:
        main([flag, "bash", *target])
    assert not stop.value.code
    if not target:
        (tmp_path / "script").write_text(capsys.readouterr().out)
    for typed, completed in (
        ("--model.attention.selected-b", "--model.attention.selected-blocks"),
        ("--optimizer.schedule ws", "wsd"),
    ):
        words = ["sparse-attn-train", *typed.split()]
        done = subprocess.run(
            [
                *("bash", "-c"),
                f"source {tmp_path}/script; COMP_WORDS=({' '.join(words)}); "
                f"COMP_CWORD={len(words) - 1}; _tyro_sparse_attn_train; echo ${{COMPREPLY[@]}}; "
                "complete -p sparse-attn-train",
            ],
            env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )
        assert done.stdout.splitlines() == [
            completed,
            "complete -F _tyro_sparse_attn_train sparse-attn-train",
        ], done.stderr


def test_help_shows_fields_and_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        main([*TINY, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for flag in ("--steps", "--model.attention.selected-blocks", "--dry-run", "--mesh.fsdp"):
        assert flag in said
    assert "{nsa" not in said  # no subcommands


def test_an_unknown_override_gets_a_suggestion(capsys):
    with pytest.raises(SystemExit) as stop:
        main([*TINY, "--model.atention.selected-blocks", "8"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "Unrecognized options: --model.atention.selected-blocks" in said
    assert "--model.attention.selected-blocks" in said.split("Perhaps you meant")[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "many"], "invalid literal for int"),
        (["--model.attention.selected-blocks", "0"], "selected_blocks=0 must be at least 1"),
        (["--model.kv-heads", "3"], "query_heads=2 is not a multiple of kv_heads=3"),
    ],
)
def test_values_that_do_not_fit(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        main([*TINY, *flags])
    assert stop.value.code == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in said
    assert "Traceback" not in said


def test_mistakes_are_told_without_a_traceback(capsys, tmp_path):
    message = failure([*TINY, "--sequence-length", "60"], capsys)
    assert "sequence_length=60 is not a multiple of 8" in message
    message = failure([*TINY, "--model.vocab-size", "9"], capsys)
    assert "model.vocab_size=9 is smaller than the 259 tokens" in message
    message = failure(["--config", "configs/quikstart.py"], capsys)
    assert "--config configs/quikstart.py: there is no such file" in message
    assert "did you mean --config quickstart?" in message
    assert "needs the name or path of a recipe" in failure(["--config"], capsys)
    assert "known: dense, " in failure([*TINY, "--model.attention", "lsh"], capsys)
    message = failure([*TINY, "--model.attention", "hash_attention"], capsys)
    assert message.rstrip().endswith("did you mean hash?")
    missing = [*TINY, "--data.source", str(tmp_path / "none"), "--run-dir", str(tmp_path / "run")]
    assert "matches no .txt, .jsonl or .parquet file" in failure(missing, capsys)
    (tmp_path / "file").write_text("")
    unwritable = [*TINY, "--run-dir", str(tmp_path / "file" / "run")]
    assert "cannot be written" in failure(unwritable, capsys)
    assert "tensor=5" in failure([*TINY, "--mesh.tensor", "5"], capsys)


def test_dry_run_prints_the_costs_of_a_step(capsys, compilations, tmp_path):
    assert main([*TINY, *DENSE, "--dry-run", "--run-dir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    for part in ("parameters", "layers.0.attention", "Dense", "100.0%", "temporary", "FLOPs"):
        assert part in said
    assert not (tmp_path / "run").exists()


def test_a_run_ends_with_its_evaluation(capsys, run_flags, monkeypatch, tmp_path):
    evaluated = []
    monkeypatch.setattr(
        train.evaluate, "evaluate", lambda config, console: evaluated.append(config.run_dir)
    )
    assert main(run_flags) == 0
    assert evaluated == [str(tmp_path / "run")]
    assert main([*run_flags, "--no-evaluate-at-end"]) == 0
    assert len(evaluated) == 1
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["model"]["attention"]["type"] == "sparse_attn.dense.Dense"


def test_a_changed_run_and_a_damaged_checkpoint(capsys, run_flags, tmp_path):
    assert main([*run_flags, "--no-evaluate-at-end"]) == 0
    capsys.readouterr()
    message = failure([*run_flags, "--optimizer.learning-rate", "1"], capsys)
    assert "optimizer.learning_rate: 0.01 -> 1.0" in message
    checkpoint = tmp_path / "run" / "checkpoints" / "2"
    for file in (checkpoint / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])
    message = failure(run_flags, capsys)
    assert f"checkpoint {checkpoint} is damaged" in message
    assert "delete that folder" in message


def test_the_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "train", *TINY, "--stepz", "3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "--steps" in done.stderr
    assert "Traceback" not in done.stderr
