"""Mapping files: what a run learnt to select by, on its own."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import models
from models.config import ModelConfig
from models.loading.mapping import MappingFile, read_mapping, save_mapping, with_mapping
from models.transformer import Decoder, split
from sparse_attn.dense import Dense
from sparse_attn.hash_attention import HashAttention
from sparse_attn.policies import Quest
from sparse_attn.registry import mechanism_text, parse_mechanism

HASH = dataclasses.replace(HashAttention.tiny()[0], budget=0.25)
CONFIG = ModelConfig(
    vocab_size=40,
    layers=3,
    model_width=16,
    query_heads=4,
    kv_heads=2,
    head_width=8,
    mlp_width=24,
    attention=HASH,
    dense_layers=(0,),
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 24)))


def made(config, seed):
    return Decoder(config, rngs=nnx.Rngs(jax.random.key(seed, impl="rbg")))


def mechanisms(decoder):
    """The selectors' parameters, one module a layer."""
    _, params, _ = split(decoder.unstacked())
    return [params["layers"][str(i)]["attention"].get("mechanism", {}) for i in range(3)]


@pytest.fixture(scope="module")
def fitted():
    return made(CONFIG, 1)


@pytest.fixture
def file(fitted, tmp_path):
    return save_mapping(fitted, tmp_path / "mapping.safetensors", base="a-model")


def test_a_mapping_comes_back_whatever_the_grouping_of_layers(fitted, file):
    for stacked in (True, False):
        config = dataclasses.replace(CONFIG, scan_layers=stacked)
        mapping = read_mapping(file)
        assert mapping.attention == HASH
        got = with_mapping(made(mapping.configured(config), 2), mapping)
        jax.tree.map(np.testing.assert_array_equal, mechanisms(got), mechanisms(fitted))
        # All but the selectors is the model's own.
        np.testing.assert_array_equal(got.embedding[...], made(config, 2).embedding[...])


def test_the_file_decides_what_is_attended(fitted, file):
    other = made(CONFIG, 2)
    mapping = read_mapping(file)
    layer, theirs = (decoder.layers["1-2"].attention for decoder in (other, fitted))
    for mine, learnt in ((layer.q, theirs.q), (layer.k, theirs.k)):
        mine[...] = learnt[...]
    before = other(TOKENS, inspect=True).selections[1].indices
    after = with_mapping(other, mapping)(TOKENS, inspect=True).selections[1].indices
    assert (before != after).any()


def test_budgets_and_dense_layers_may_change(fitted, file):
    mapping = read_mapping(file)
    wider = dataclasses.replace(HASH, budget=9)
    config = mapping.configured(dataclasses.replace(CONFIG, dense_layers=(2,)), wider)
    assert config.attention == wider
    assert config.dense_layers == (0, 2)
    got = mechanisms(with_mapping(made(config, 2), mapping))
    jax.tree.map(np.testing.assert_array_equal, got[1], mechanisms(fitted)[1])
    assert got[2] == {}


def test_what_does_not_fit_is_named(file, tmp_path):
    mapping = read_mapping(file)
    with pytest.raises(ValueError, match=r"fitted to a-model.*kv_heads: 2 there, 1 here"):
        mapping.configured(dataclasses.replace(CONFIG, kv_heads=1))
    with pytest.raises(ValueError, match="holds mappings of HashAttention, attention is Quest"):
        mapping.configured(CONFIG, Quest())
    wide = mapping.configured(CONFIG, dataclasses.replace(HASH, bits=24))
    message = r"layers\.1\.phi_k\.out_bias is \[2, 16\] there, \[2, 24\] here.* more; .*bits=16"
    with pytest.raises(ValueError, match=message):
        with_mapping(made(wide, 2), mapping)
    everywhere = dataclasses.replace(CONFIG, dense_layers=())
    with pytest.raises(ValueError, match=r"layers\.0\.phi_k\.\w+ is missing"):
        with_mapping(made(everywhere, 2), mapping)
    with pytest.raises(FileNotFoundError, match="export_mapping RUN --to"):
        read_mapping(tmp_path / "absent")


def test_other_files_are_refused(fitted, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": np.zeros(2, np.float32)}, path)
    with pytest.raises(ValueError, match="no mapping file: its metadata say format=None"):
        read_mapping(path)
    path.write_bytes(b"not a safetensors file at all")
    with pytest.raises(ValueError, match="no safetensors file"):
        read_mapping(path)
    dense = made(dataclasses.replace(CONFIG, attention=Dense()), 1)
    with pytest.raises(ValueError, match="Dense has learnt nothing"):
        save_mapping(dense, path, base="a-model")
    mixed = dataclasses.replace(
        CONFIG, attention_overrides=((2, dataclasses.replace(HASH, budget=3)),)
    )
    with pytest.raises(ValueError, match="attention_overrides"):
        save_mapping(made(mixed, 1), path, base="a-model")


def test_a_mechanism_as_text_is_read_back():
    for config in (HASH, Quest(budget=(1, 0.5)), HashAttention(budget=(0.25, 7))):
        assert parse_mechanism(mechanism_text(config)) == config
    with pytest.raises(ValueError, match="not registered"):
        mechanism_text("quest")


def test_mapping_files_hold_single_layers(file):
    mapping: MappingFile = read_mapping(file)
    assert sorted({name.split(".")[1] for name in mapping.arrays}) == ["1", "2"]
    assert mapping.arrays["layers.2.phi_q.w_out"].shape == (2, 8, 16)


def test_a_published_model_loads_with_a_mapping(tmp_path):
    folder = Path(__file__).parents[2] / "fixtures" / "parity" / "llama2"
    fitted = models.load(folder, attention=HASH, seed=3, tokenizer=False)
    path = save_mapping(fitted.decoder, tmp_path / "mapping.safetensors", base="llama2")
    loaded = models.load(folder, mapping=path, tokenizer=False)
    assert loaded.config.attention == HASH
    for got, want in zip(split(loaded.decoder)[1:], split(fitted.decoder)[1:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, want)
    wider = dataclasses.replace(HASH, budget=7)
    assert models.load(folder, attention=wider, mapping=path).config.attention == wider
