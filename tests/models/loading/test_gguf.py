"""GGUF files written here from the parity checkpoints load as those do, quantised or not."""

import json
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from compiled import decoder_logits
from safetensors.numpy import load_file

import models
from models.loading.gguf_file import hugging_face_name, unpermuted
from models.loading.sources import SafetensorsFolder
from models.transformer import split

PARITY = Path(__file__).parents[2] / "fixtures" / "parity"
NAMES = {
    "model.embed_tokens.": "token_embd.",
    "model.norm.": "output_norm.",
    "lm_head.": "output.",
    "model.layers.": "blk.",
    "self_attn.q_proj.": "attn_q.",
    "self_attn.k_proj.": "attn_k.",
    "self_attn.v_proj.": "attn_v.",
    "self_attn.o_proj.": "attn_output.",
    "self_attn.q_norm.": "attn_q_norm.",
    "self_attn.k_norm.": "attn_k_norm.",
    "input_layernorm.": "attn_norm.",
    "post_attention_layernorm.": "ffn_norm.",
    "mlp.gate_proj.": "ffn_gate.",
    "mlp.up_proj.": "ffn_up.",
    "mlp.down_proj.": "ffn_down.",
}
F32 = gguf.GGMLQuantizationType.F32


def gguf_name(name):
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def permuted(rows, heads):
    """What llama.cpp's conversion does to q and k: row (i, i + H/2) becomes (2 i, 2 i + 1)."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write(path, family, *, architecture="llama", kinds=lambda name: F32, extra=()):
    """The checkpoint of ``family`` as a GGUF file; returns the tensors as they were quantised."""
    folder = SafetensorsFolder(PARITY / family)
    settings = folder.settings
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(settings["num_attention_heads"])
    writer.add_head_count_kv(settings["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_rope_freq_base(settings["rope_parameters"]["rope_theta"])
    if settings.get("head_dim"):
        writer.add_key_length(settings["head_dim"])
        writer.add_value_length(settings["head_dim"])
    stored = {}
    for name in folder.shapes:
        tensor = folder.read(name).astype(np.float32)
        rows = tensor
        if architecture == "llama" and ".q_proj." in name:
            rows = permuted(tensor, settings["num_attention_heads"])
        if architecture == "llama" and ".k_proj." in name:
            rows = permuted(tensor, settings["num_key_value_heads"])
        kind = F32 if tensor.ndim == 1 else kinds(name)
        data = gguf.quantize(np.ascontiguousarray(rows), kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
        values = gguf.dequantize(data, kind).reshape(tensor.shape)
        if rows is not tensor:
            heads = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
            values = unpermuted(values, settings[heads])
        stored[name] = values
    for name, values in extra:
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def llama3_factors(settings):
    """f_i / scaled f_i of every pair, which llama.cpp stores instead of the rule."""
    rope = settings["rope_parameters"]
    dims = settings["hidden_size"] // settings["num_attention_heads"]
    factors = []
    for pair in range(dims // 2):
        frequency = rope["rope_theta"] ** (-2 * pair / dims)
        turns = rope["original_max_position_embeddings"] * frequency / (2 * np.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = min(max((turns - low) / (high - low), 0), 1)
        factors.append(1 / (keep + (1 - keep) / rope["factor"]))
    return np.array(factors, np.float32)


def test_llama_with_stored_rope_factors_equals_transformers(tmp_path):
    path = tmp_path / "tiny.gguf"
    settings = json.loads((PARITY / "llama3" / "config.json").read_text())
    write(path, "llama3", extra=[("rope_freqs.weight", llama3_factors(settings))])
    loaded = models.load(tmp_path)
    assert loaded.config.tie_embeddings
    assert loaded.config.norm_epsilon == 1e-6
    assert loaded.tokenizer is None
    answers = load_file(PARITY / "llama3" / "expected.safetensors")
    logits = decoder_logits(loaded.decoder, answers["tokens"])
    np.testing.assert_allclose(logits, answers["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("family", "architecture"), [("qwen3", "qwen3"), ("qwen2_yarn", "qwen2")])
def test_qwen_is_not_permuted(tmp_path, family, architecture):
    write(tmp_path / "tiny.gguf", family, architecture=architecture)
    params = split(models.load(tmp_path / "tiny.gguf").decoder)[1]
    original = split(models.load(PARITY / family).decoder)[1]
    jax.tree.map(np.testing.assert_array_equal, params, original)


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_every_kind_of_quantisation_is_read(tmp_path, name):
    kind = gguf.GGMLQuantizationType[name]
    stored = write(tmp_path / "tiny.gguf", "llama2", kinds=lambda name: kind)
    loaded = models.load(tmp_path / "tiny.gguf")
    params = split(loaded.decoder)[1]
    layer = params["layers"]["1"]
    q = stored["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(layer["attention"]["q"], q.reshape(4, 8, 32).transpose(2, 0, 1))
    down = stored["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(layer["mlp"]["down"], down.T)
    np.testing.assert_array_equal(params["unembedding"], stored["lm_head.weight"].T)
    exact = SafetensorsFolder(PARITY / "llama2").read("model.layers.1.mlp.down_proj.weight")
    assert np.abs(down - exact).max() < 0.15 * np.abs(exact).max()


def test_permutation_is_undone():
    rows = np.arange(24).reshape(12, 2)
    np.testing.assert_array_equal(unpermuted(permuted(rows, 2), 2), rows)
    assert unpermuted(rows, 2)[:6, 0].tolist() == [0, 4, 8, 2, 6, 10]


def test_names():
    assert hugging_face_name("blk.12.ffn_down.weight") == "model.layers.12.mlp.down_proj.weight"
    assert hugging_face_name("blk.0.attn_q.bias") == "model.layers.0.self_attn.q_proj.bias"
    assert hugging_face_name("output.weight") == "lm_head.weight"
    assert hugging_face_name("blk.0.ssm_a.weight") == "blk.0.ssm_a.weight"


def test_missing_and_unknown_tensors_are_listed(tmp_path):
    write(tmp_path / "tiny.gguf", "llama2", extra=[("blk.0.ssm.weight", np.zeros(3, np.float32))])
    with pytest.raises(ValueError, match=r"unexpected blk.0.ssm.weight \(3,\)"):
        models.load(tmp_path / "tiny.gguf")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"nonsense" * 10)
    with pytest.raises(ValueError, match="no readable GGUF file"):
        models.load(tmp_path)
    write(tmp_path / "b.gguf", "llama2", architecture="falcon")
    with pytest.raises(ValueError, match="architecture 'falcon'"):
        models.load(tmp_path / "b.gguf")
    with pytest.raises(ValueError, match="holds several models"):
        models.load(tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "c.gguf", "llama")
    writer.add_embedding_length(32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"the metadata has no 'attention.head_count'"):
        models.load(tmp_path / "c.gguf")
