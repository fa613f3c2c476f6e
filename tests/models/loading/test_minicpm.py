"""MiniCPM4 against a float64 forward written from its description, dense and sparse.

transformers 5.23 has no such model. The papers (arXiv 2506.07900, InfLLM-V2 in 2509.24663) and the
model's settings say: embeddings times ``scale_emb``, every branch times ``scale_depth /
sqrt(layers)``, the final hidden state over ``hidden_size / dim_model_base``, LongRoPE and attention
over blocks.
"""

import json
import math

import numpy as np
import pytest
from compiled import decoder_logits
from safetensors.numpy import save_file

import models
from sparse_attn.dense import Dense
from sparse_attn.infllm_v2 import InfLLMV2

V, D, F, N, K, H, LAYERS, T = 64, 32, 64, 4, 2, 8, 2, 64
TOKENS = np.random.default_rng(1).integers(0, V, T)
SPARSE = {
    "kernel_size": 4,
    "kernel_stride": 2,
    "init_blocks": 1,
    "block_size": 8,
    "window_size": 8,
    "topk": 3,
    "use_nope": False,
    "dense_len": -1,
}
SETTINGS = {
    "model_type": "minicpm",
    "architectures": ["MiniCPMForCausalLM"],
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.7, 3.0],
        "long_factor": [1.2, 2.0, 3.0, 6.0],
        "original_max_position_embeddings": 128,
    },
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 16,
    "tie_word_embeddings": False,
}


def random_tensors(seed=0):
    rng = np.random.default_rng(seed)

    def matrix(rows, columns, scale=1.0):
        return (scale * rng.normal(size=(rows, columns)) * columns**-0.5).astype(np.float32)

    def norm():
        return (1 + 0.2 * rng.normal(size=D)).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": matrix(V, D) / 2,
        "model.norm.weight": norm(),
        "lm_head.weight": matrix(V, D, 2.0),
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        tensors |= {
            name + "input_layernorm.weight": norm(),
            name + "post_attention_layernorm.weight": norm(),
            name + "self_attn.q_proj.weight": matrix(N * H, D, 1.5),
            name + "self_attn.k_proj.weight": matrix(K * H, D, 1.5),
            name + "self_attn.v_proj.weight": matrix(K * H, D),
            name + "self_attn.o_proj.weight": matrix(D, N * H),
            name + "mlp.gate_proj.weight": matrix(F, D),
            name + "mlp.up_proj.weight": matrix(F, D),
            name + "mlp.down_proj.weight": matrix(D, F),
        }
    return tensors


def write(folder, tensors, **changes):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SETTINGS | changes))
    return folder


def forward(tensors, tokens, sparse, factors):
    """Logits [T, V] of one sequence in float64."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    x = w["model.embed_tokens.weight"][tokens] * SETTINGS["scale_emb"]
    depth = SETTINGS["scale_depth"] / math.sqrt(LAYERS)
    for layer in range(LAYERS):
        of = {
            name.removeprefix(f"model.layers.{layer}.").removesuffix(".weight"): tensor
            for name, tensor in w.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        normed = rms_norm(x, of["input_layernorm"])
        q = rotate((normed @ of["self_attn.q_proj"].T).reshape(T, N, H), factors)
        k = rotate((normed @ of["self_attn.k_proj"].T).reshape(T, K, H), factors)
        v = (normed @ of["self_attn.v_proj"].T).reshape(T, K, H)
        out = np.zeros((T, N, H))
        for kv in range(K):
            group = range(kv * N // K, (kv + 1) * N // K)
            for t in range(T):
                seen = visible(q[t, list(group)], k[: t + 1, kv], t, sparse)
                for head in group:
                    scores = k[seen, kv] @ q[t, head] / math.sqrt(H)
                    weights = np.exp(scores - scores.max())
                    out[t, head] = weights @ v[seen, kv] / weights.sum()
        x = x + depth * (out.reshape(T, N * H) @ of["self_attn.o_proj"].T)
        normed = rms_norm(x, of["post_attention_layernorm"])
        gate = normed @ of["mlp.gate_proj"].T
        hidden = gate / (1 + np.exp(-gate)) * (normed @ of["mlp.up_proj"].T)
        x = x + depth * (hidden @ of["mlp.down_proj"].T)
    hidden = rms_norm(x, w["model.norm.weight"]) / (D / SETTINGS["dim_model_base"])
    return hidden @ w["lm_head.weight"].T


def rms_norm(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + SETTINGS["rms_norm_eps"]) * weight


def rotate(heads, factors):
    """LongRoPE: every pair slower by its factor, vectors longer by the temperature."""
    trained = SETTINGS["rope_scaling"]["original_max_position_embeddings"]
    scale = SETTINGS["max_position_embeddings"] / trained
    length = math.sqrt(1 + math.log(scale) / math.log(trained))
    out = np.empty_like(heads)
    for pair in range(H // 2):
        angle = np.arange(T)[:, None] / 10000.0 ** (2 * pair / H) / factors[pair]
        a, b = heads[:, :, pair], heads[:, :, pair + H // 2]
        out[:, :, pair] = length * (a * np.cos(angle) - b * np.sin(angle))
        out[:, :, pair + H // 2] = length * (b * np.cos(angle) + a * np.sin(angle))
    return out


def visible(q, k, t, sparse):
    """The tokens that a group of queries [G, H] at t attends, by InfLLM-V2's six steps."""
    if sparse is None:
        return list(range(t + 1))
    size, stride, block = (sparse[n] for n in ("kernel_size", "kernel_stride", "block_size"))

    def entries(size, stride):
        count = max((t + 1 - size) // stride + 1, 0)
        return [k[i * stride : i * stride + size].mean(0) for i in range(count)]

    fine, coarse = entries(size, stride), entries(4 * size, 4 * stride)
    shared = np.zeros(len(fine))
    for query in q:
        normalizer = sum(math.exp(entry @ query / math.sqrt(H)) for entry in coarse or fine)
        for i, entry in enumerate(fine):
            shared[i] += math.exp(entry @ query / math.sqrt(H)) / normalizer
    current = t // block
    local = sparse["window_size"] // block + 1
    forced = {*range(sparse["init_blocks"]), *range(max(current - local + 1, 0), current + 1)}
    scored = []
    for j in set(range(current + 1)) - forced:
        overlapping = [
            shared[i]
            for i in range(len(fine))
            if i * stride < (j + 1) * block and i * stride + size > j * block
        ]
        scored.append((max(overlapping), j))
    budget = sparse["topk"] + sparse["window_size"] // block
    best = [j for _, j in sorted(scored, reverse=True)[: max(budget - len(forced), 0)]]
    chosen = sorted(forced | set(best))
    return [s for j in chosen for s in range(j * block, (j + 1) * block) if s <= t]


def logits_of(folder, context=None, dtype=None):
    loaded = models.load(folder, context=context, dtype=dtype)
    return np.asarray(decoder_logits(loaded.decoder, TOKENS[None]))[0]


def described(tensors, sparse, which="short_factor"):
    logits = forward(tensors, TOKENS, sparse, SETTINGS["rope_scaling"][which])
    assert logits.std() > 0.5
    return logits


def test_dense_model_equals_the_description(tmp_path):
    tensors = random_tensors()
    folder = write(tmp_path / "dense", tensors)
    assert models.load_config(folder).attention == Dense()
    expected = described(tensors, None)
    np.testing.assert_allclose(logits_of(folder), expected, rtol=0, atol=1e-4)


def test_sparse_model_equals_the_description(tmp_path):
    tensors = random_tensors()
    folder = write(tmp_path / "sparse", tensors, sparse_config=SPARSE)
    assert models.load_config(folder).attention.dense_len == 0
    logits, expected = logits_of(folder), described(tensors, SPARSE)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    # The blocks that are chosen matter here: dense attention is another model.
    assert np.abs(logits - described(tensors, None)).max() > 0.1


@pytest.mark.full
def test_sparse_model_in_float64_with_the_long_factors(tmp_path, x64):
    tensors = random_tensors(2)
    folder = write(tmp_path / "sparse", tensors, sparse_config=SPARSE)
    expected = described(tensors, SPARSE, "long_factor")
    got = logits_of(folder, context=129, dtype="float64")
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9)


def test_short_documents_are_dense_and_long_contexts_have_the_long_factors(tmp_path):
    tensors = random_tensors()
    folder = write(tmp_path / "switch", tensors, sparse_config=SPARSE | {"dense_len": T + 1})
    expected = described(tensors, None, "long_factor")
    np.testing.assert_allclose(logits_of(folder, context=129), expected, rtol=0, atol=1e-4)


def test_default_settings_are_those_of_the_published_code():
    config = models.loading.families.read_sparse_config({"topk": 64, "dense_len": 8192})
    assert config == InfLLMV2(cover_window=True, switch="sequence")
    assert config.selected_blocks == 96


def test_export_keeps_settings_and_tensors(tmp_path):
    tensors = random_tensors()
    folder = write(tmp_path / "sparse", tensors, sparse_config=SPARSE)
    loaded = models.load(folder)
    models.export(loaded.decoder, tmp_path / "out", context_length=256)
    again = models.load(tmp_path / "out")
    assert again.config == loaded.config
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    for name in ("model_type", "scale_emb", "scale_depth", "dim_model_base"):
        assert settings[name] == SETTINGS[name]
    assert settings["sparse_config"] == SPARSE
    saved = models.loading.sources.SafetensorsFolder(tmp_path / "out")
    assert saved.shapes.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(saved.read(name), tensor)


def test_unrotated_compression_is_refused(tmp_path):
    folder = write(tmp_path / "nope", random_tensors(), sparse_config={"use_nope": True})
    with pytest.raises(ValueError, match="use_nope=true compresses unrotated keys"):
        models.load_config(folder)
