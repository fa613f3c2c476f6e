"""train.config: recipes, overrides, JSON, and which changes a resumed run accepts."""

import dataclasses
import json
from pathlib import Path

import pytest

from configs.tiny import config as tiny
from models.transformer import ModelConfig
from sparse_attn import NSA, Dense
from train.arguments import parse
from train.config import (
    CheckpointConfig,
    ConfigError,
    LoggingConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    check_resumable,
    flatten,
    from_json,
    load_recipe,
    load_run_config,
    save_run_config,
    to_json,
)

RECIPES = Path(__file__).parents[2] / "configs"


def replaced(config, **changes):
    return dataclasses.replace(config, **changes)


def test_overrides_are_typed_and_dotted():
    parsed = parse(
        [
            *("--config", "configs/tiny.py", "--steps", "50"),
            *("--model.attention.selected-blocks", "8", "--model.dense-layers", "0", "1"),
            *("--optimizer.learning-rate", "1e-2", "--no-evaluate-at-end", "--dry-run"),
        ],
        tiny,
    )
    attention = dataclasses.replace(tiny.model.attention, selected_blocks=8)
    model = dataclasses.replace(tiny.model, attention=attention, dense_layers=(0, 1))
    optimizer = dataclasses.replace(tiny.optimizer, learning_rate=0.01)
    assert parsed.run == replaced(
        tiny, steps=50, model=model, optimizer=optimizer, evaluate_at_end=False
    )
    assert parsed.dry_run
    assert not parsed.resume_with_changes


def test_the_mechanism_can_be_replaced():
    for arguments in (["--model.attention", "dense"], ["--model.attention=Dense"]):
        arguments += ["--model.attention.window", "16"]
        parsed = parse(["--config", "x.py", *arguments], tiny)
        assert parsed.run.model.attention == Dense(window=16)
    with pytest.raises(ConfigError, match=r"'lsh' is no mechanism; known: dense, .*nsa"):
        parse(["--config", "x.py", "--model.attention", "lsh"], tiny)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_survives_json(path, tmp_path):
    config = load_recipe(path)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    save_run_config(config, tmp_path)
    assert load_run_config(tmp_path) == config
    assert hash(load_run_config(tmp_path)) == hash(config)


def test_json_names_types():
    value = to_json(tiny)
    assert value["type"] == "train.config.RunConfig"
    assert value["model"]["attention"]["type"] == "sparse_attn.nsa.NSA"
    assert value["model"]["dense_layers"] == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"type": "train.config.Nothing"}, "cannot be imported"),
        ({"type": "no.such.module"}, "cannot be imported"),
        ({"type": "train.config.load_recipe"}, "not a dataclass"),
        ({"type": "train.config.MeshConfig", "rows": 1}, "rows"),
        ({"type": "train.config.MeshConfig", "data": 0}, "mesh.data=0"),
        ({"data": 1}, "None"),
    ],
)
def test_json_that_is_no_configuration(value, message):
    with pytest.raises(ConfigError, match=message):
        from_json(value)


def test_run_folders_without_a_configuration(tmp_path):
    with pytest.raises(ConfigError, match="no run folder"):
        load_run_config(tmp_path)
    (tmp_path / "config.json").write_text("{half")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(to_json(MeshConfig())))
    with pytest.raises(ConfigError, match="MeshConfig"):
        load_run_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"there is no such file and no packaged recipe of that name"),
        ("x = 1", r"must define `config = RunConfig\(...\)`; its `config` is NoneType"),
        ("config = 3", "its `config` is int"),
        ("config = (", "SyntaxError"),
        ("raise FileNotFoundError('nothing installed')", r"recipe\.py: nothing installed"),
        ("from train.config import MeshConfig\nMeshConfig(data=0)", "mesh.data=0"),
    ],
)
def test_recipes_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "recipe.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replaced(tiny, steps=0), "steps=0"),
        (lambda: replaced(tiny, seed=-1), "seed=-1"),
        (lambda: replaced(tiny, batch_size=3, microbatches=2), "batch_size=3 is not a multiple"),
        (lambda: replaced(tiny, sequence_length=1), "sequence_length=1"),
        (
            lambda: replaced(tiny, sequence_length=60),
            r"sequence_length=60 is not a multiple of 8.*use 56",
        ),
        (
            lambda: replaced(tiny, model=replaced(tiny.model, vocab_size=64)),
            "model.vocab_size=64 is smaller than the 259 tokens",
        ),
        (lambda: replaced(tiny.model, kv_heads=3), "kv_heads=3"),
        (lambda: OptimizerConfig(schedule="step"), "'step'"),
        (lambda: OptimizerConfig(learning_rate=0), "learning_rate=0"),
        (lambda: OptimizerConfig(beta2=1.0), "beta2=1.0"),
        (lambda: OptimizerConfig(decay_fraction=0), "decay_fraction=0"),
        (lambda: OptimizerConfig(weight_decay=-0.1), "weight_decay=-0.1"),
        (lambda: OptimizerConfig(epsilon=0), "epsilon=0"),
        (lambda: MeshConfig(data=-1, fsdp=-1), "data, fsdp are all -1"),
        (lambda: MeshConfig(tensor=0), "mesh.tensor=0"),
        (lambda: CheckpointConfig(every=0), "checkpoint.every=0"),
        (lambda: CheckpointConfig(keep=0), "checkpoint.keep=0"),
        (lambda: LoggingConfig(every=0), "logging.every=0"),
        (lambda: LoggingConfig(inspect_every=-1), "inspect_every=-1"),
        (lambda: LoggingConfig(wandb="on"), "wandb='on'"),
    ],
)
def test_values_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_flattened_fields_have_their_flag_names():
    values = flatten(tiny)
    assert values["steps"] == 10
    assert values["model.attention"] == "NSA"
    assert values["model.attention.window"] == 8


def test_free_fields_may_change_on_resume():
    changed = replaced(
        tiny,
        run_dir="elsewhere",
        steps=99,
        evaluate_at_end=False,
        checkpoint=CheckpointConfig(every=1),
        logging=LoggingConfig(every=7),
        mesh=MeshConfig(data=1),
        data=replaced(tiny.data, cache_dir="/tmp/cache", prefetch=0),
    )
    check_resumable(tiny, changed)


def test_another_mechanism_is_a_change():
    other = replaced(tiny, model=replaced(tiny.model, attention=Dense()))
    with pytest.raises(ConfigError) as error:
        check_resumable(tiny, other)
    changes = [line for line in str(error.value).splitlines() if line.startswith("  ")]
    assert changes == ["  model.attention: 'NSA' -> 'Dense'"], "its fields say nothing more"


def test_defaults_make_a_runnable_configuration():
    model = ModelConfig(
        vocab_size=4096,
        layers=1,
        model_width=8,
        query_heads=1,
        kv_heads=1,
        head_width=8,
        mlp_width=8,
        attention=NSA(),
    )
    assert RunConfig(model=model).mesh == MeshConfig(data=-1, fsdp=1, sequence=1, tensor=1)
