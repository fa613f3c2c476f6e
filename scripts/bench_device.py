"""Sparse attention against the dense kernels of the chip it runs on: one table, one JSON a suite.

    python scripts/bench_device.py --json-folder benchmarks/results --name h200
    python scripts/bench_device.py --suites modules --lengths 8192 --json-folder /tmp/x

Suites (bfloat16, 64 query heads, 4 kv heads, width 128, unless said):

* ``modules``: whole NSA (16 blocks of 64) and InfLLM-V2 (64 and 96 blocks) against causal dense
  attention, forward and forward_backward.
* ``selected``: ``block_sparse_attention`` on given picks at G=16 and G=4, beside the Triton NSA of
  flash-linear-attention where that is installed.
* ``decode``: one token on a full cache, batch 8: NSA, InfLLM-V2 and HashAttention (1/32 of the
  tokens), scoring and selection included, against dense steps.
* ``window``: ``ranged_attention`` in a sliding window of 4096 against causal dense attention, by
  FLOP/s.

Dense is what this machine has that is fastest: cuDNN through ``jax.nn.dot_product_attention`` on a
GPU, XLA elsewhere, and this project's own. All sides of a length take turns in one process;
medians of wall seconds are reported, and ratios are of medians. Picks are "replaced" (5 % of the
blocks change from a token to the next) and "uniform", as in docs/benchmarks.md. A side that cannot
run is a row with its ``error``. ``flops``: two a multiply-add, visible pairs only, backward 2.5
times the forward.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import bench_picks
import bench_sides as sides
import jax
import jax.numpy as jnp
import numpy as np
from bench_sides import Side, Sizes
from readable_help import HelpFormatter

from kernels_pallas.ranged import ranged_attention
from sparse_attn import NSA, Dense, HashAttention, InfLLMV2, MechanismConfig
from sparse_attn.types import HeadShape

DIRECTIONS = ("forward", "forward_backward")
SUITES = ("modules", "selected", "decode", "window")
LENGTHS = {
    "modules": (8192, 16384, 32768, 65536, 131072),
    "selected": (32768, 65536),
    "decode": (32768, 131072),
    "window": (16384, 32768),
}
BACKWARD_FACTOR = 3.5
TILE = 16
WINDOW = 4096
MECHANISMS: dict[str, MechanismConfig] = {
    "nsa": NSA(),
    "infllm_v2 64 blocks": InfLLMV2(selected_blocks=64, dense_len=0),
    "infllm_v2 96 blocks": InfLLMV2(selected_blocks=96, dense_len=0),
    "hash": HashAttention(budget=1 / 32),
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    machine = describe_machine()
    for suite in options.suites:
        rows: list[dict[str, Any]] = []
        for length in options.lengths or LENGTHS[suite]:
            for group in contests(suite, length, options):
                rows += compete(group, options.repetitions)
                add_ratios(rows)
                # Written after every length: a run that is stopped keeps what it measured.
                save(rows, machine, options, suite)
        show(suite, rows)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def names(text: str) -> tuple[str, ...]:
        return tuple(part for part in text.split(",") if part)

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in names(text))

    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--suites", type=names, default=SUITES, help="of " + ",".join(SUITES))
    add("--lengths", type=numbers, help="the same for every suite; default by suite")
    add("--implementation", default="auto", help="of this project's ops")
    add("--query-heads", type=int, default=64, help="of every op")
    add("--kv-heads", type=int, default=4, help="of every op")
    add("--head-width", type=int, default=128, help="of queries, keys and values")
    add("--batch", type=int, default=8, help="of decoding; everything else has batch 1")
    add("--dtype", default="bfloat16", help="of queries, keys and values")
    add("--repetitions", type=int, default=10, help="timed calls; their median counts")
    add("--json-folder", type=Path, help="writes NAME_SUITE.json there")
    add(
        "--name",
        default=jax.devices()[0].device_kind.lower().replace(" ", "_"),
        help="of the chip, in file names",
    )
    options = parser.parse_args(arguments)
    unknown = set(options.suites) - set(SUITES)
    if unknown:
        parser.error(f"--suites {','.join(sorted(unknown))}: choose from {','.join(SUITES)}")
    return options


def sizes_of(options: argparse.Namespace, batch: int = 1, query_heads: int = 0) -> Sizes:
    width = options.head_width
    heads = query_heads or options.query_heads
    shape = HeadShape(heads, options.kv_heads, width, width, 16 * width)
    return Sizes(shape, options.dtype, batch)


Makers = list[tuple[dict[str, Any], Callable[[], Side]]]


def contests(suite: str, length: int, options: argparse.Namespace) -> Iterator[Makers]:
    """Groups of sides that compete: what is known of each, and how to build it."""
    configs = {
        name: dataclasses.replace(config, implementation=options.implementation)  # type: ignore[type-var]
        for name, config in MECHANISMS.items()
    }
    if suite == "decode":
        yield decode_makers(configs, length, sizes_of(options, options.batch))
    elif suite == "window":
        yield window_makers(length, sizes_of(options), options)
    elif suite == "selected":
        for group in sorted({options.query_heads // options.kv_heads, 4}, reverse=True):
            sizes = sizes_of(options, query_heads=group * options.kv_heads)
            for direction in DIRECTIONS:
                yield selected_makers(configs["nsa"], length, direction, sizes)
    else:
        for direction in DIRECTIONS:
            yield module_makers(configs, length, direction, sizes_of(options))


def module_makers(
    configs: dict[str, MechanismConfig], length: int, direction: str, sizes: Sizes
) -> Makers:
    known = known_of(length, direction, sizes, "module")
    makers = dense_makers(length, direction, sizes)
    nsa = configs["nsa"]
    assert isinstance(nsa, NSA)
    for picks in ("replaced", "uniform"):
        # Calibrated once, at a length where every query has more blocks than it selects.
        memory = sides.memory_for(nsa, 0.05, 4096, sizes) if picks == "replaced" else 0.0
        for name in ("nsa", "infllm_v2 64 blocks", "infllm_v2 96 blocks"):
            makers.append(
                (
                    known | {"mechanism": name, "picks": picks},
                    lambda name=name, memory=memory: sides.module_side(
                        configs[name], length, memory, None, direction, TILE, sizes
                    ),
                )
            )
    return makers


def selected_makers(config: MechanismConfig, length: int, direction: str, sizes: Sizes) -> Makers:
    assert isinstance(config, NSA)
    known = known_of(length, direction, sizes, "block_sparse")
    makers = dense_makers(length, direction, sizes)
    make = {"replaced": bench_picks.replaced_picks, "uniform": bench_picks.uniform_picks}
    for picks, draw in make.items():
        indices = draw(length, sizes.heads.kv_heads, config.selected_blocks, config.selection_block)
        pairs = visible_pairs(indices, config.selection_block) / sizes.heads.kv_heads
        described = known | {"mechanism": "nsa", "picks": picks}
        described["flops"] = flops_of(pairs, direction, sizes)
        makers.append(
            (
                described,
                lambda indices=indices, picks=picks: sides.selected_branch_side(
                    config, indices, picks, direction, TILE, sizes
                ),
            )
        )
        makers.append(
            (
                described | {"implementation": "flash-linear-attention"},
                lambda indices=indices: triton_side(config, indices, direction, sizes),
            )
        )
    return makers


def decode_makers(configs: dict[str, MechanismConfig], length: int, sizes: Sizes) -> Makers:
    known = known_of(length, "decode", sizes, "module")
    makers: Makers = [
        (
            known | {"op": "dense_decode", "mechanism": "dense", "implementation": name},
            lambda name=name: sides.dense_decode_side(length, name, sizes),
        )
        for name in sides.DENSE_DECODE
    ]
    for name in ("nsa", "infllm_v2 96 blocks", "hash"):
        makers.append(
            (
                known | {"mechanism": name, "picks": "own"},
                lambda name=name: sides.module_decode_side(configs[name], length, sizes),
            )
        )
    return makers


def window_makers(length: int, sizes: Sizes, options: argparse.Namespace) -> Makers:
    makers: Makers = []
    row = jnp.arange(length, dtype=jnp.int32)[None]
    stop = row + 1
    start = jnp.maximum(stop - WINDOW, 0)
    pairs = float(jnp.sum((stop - start).astype(jnp.float32)))
    for direction in DIRECTIONS:
        makers += dense_makers(length, direction, sizes)

        def attend(q: Any, k: Any, v: Any) -> Any:
            implementation = options.implementation
            return ranged_attention(q, k, v, start, stop, implementation=implementation).out

        known = known_of(length, direction, sizes, "ranged")
        known |= {"mechanism": f"window {WINDOW}", "flops": flops_of(pairs, direction, sizes)}
        makers.append((known, lambda d=direction, f=attend: attention_side(f, length, d, sizes)))
    return makers


def dense_makers(length: int, direction: str, sizes: Sizes) -> Makers:
    known = known_of(length, direction, sizes, "dense") | {
        "mechanism": "dense",
        "flops": flops_of(length * (length + 1) / 2, direction, sizes),
    }

    def attend(name: str) -> Callable[..., Any]:
        return lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation=name
        )

    # XLA's materialises [N, T, T].
    named = "cudnn" if jax.default_backend() == "gpu" else "xla"
    return [
        (
            known | {"implementation": f"jax.nn {named}"},
            lambda: attention_side(attend(named), length, direction, sizes),
        ),
        (
            known | {"implementation": "sparse_attn"},
            lambda: sides.module_side(Dense(), length, 0.0, None, direction, TILE, sizes),
        ),
    ]


def attention_side(attend: Callable[..., Any], length: int, direction: str, sizes: Sizes) -> Side:
    """A function of q, k, v as a contestant."""
    call, temp_bytes = sides.directed(attend, direction, sides.qkv(length, sizes))
    return Side(sides.columns(temp_bytes=temp_bytes), lambda: sides.timed(call))


def triton_side(config: NSA, indices: np.ndarray, direction: str, sizes: Sizes) -> Side:
    """The selected branch of the package flash-linear-attention on the same picks."""
    import torch  # type: ignore[import-not-found]
    from fla.ops.nsa.parallel import parallel_nsa  # type: ignore[import-not-found]

    def tensor(array: Any, grad: bool = True) -> Any:
        values = torch.tensor(np.asarray(array, np.float32), device="cuda", dtype=torch.bfloat16)
        return values.requires_grad_(grad and direction != "forward")

    q, k, v = (tensor(x) for x in sides.qkv(indices.shape[1], sizes))
    gates = torch.ones(q.shape[:3], device="cuda", dtype=torch.bfloat16)
    # It takes unused slots as numbers past the end, in any place.
    blocks = np.where(indices < 0, indices.shape[1] // config.selection_block, indices)
    picks = torch.tensor(blocks, device="cuda")
    cotangent = tensor(sides.normal(q.shape, 5), grad=False)

    def call() -> None:
        out = parallel_nsa(
            q,
            k,
            v,
            g_slc=gates,
            block_indices=picks,
            block_counts=config.selected_blocks,
            block_size=config.selection_block,
            window_size=0,
        )
        if direction != "forward":
            torch.autograd.grad(out, (q, k, v), cotangent)
        torch.cuda.synchronize()

    return Side(sides.columns(implementation="flash-linear-attention"), lambda: sides.timed(call))


def known_of(length: int, direction: str, sizes: Sizes, op: str) -> dict[str, Any]:
    heads = sizes.heads
    return {
        **{"op": op, "mechanism": None, "implementation": "auto", "picks": None},
        **{"direction": direction, "length": length, "batch": sizes.batch},
        **{"query_heads": heads.query_heads, "kv_heads": heads.kv_heads},
        **{"head_width": heads.head_width, "dtype": sizes.dtype, "flops": None},
        **{"seconds": None, "temp_bytes": None, "ratio_to_dense": None, "ratio_to_peer": None},
        **{"repetitions": None, "error": None},
    }


def flops_of(pairs: float, direction: str, sizes: Sizes) -> float:
    """Of attention over ``pairs`` visible (query, key) pairs a head."""
    heads = sizes.heads
    forward = 2 * pairs * heads.query_heads * (heads.head_width + heads.value_width) * sizes.batch
    return forward * (1.0 if direction == "forward" else BACKWARD_FACTOR)


def visible_pairs(indices: np.ndarray, block_size: int) -> float:
    """(query, key) pairs of all lists of causal picks [1, T, K, P]."""
    position = np.arange(indices.shape[1])[None, :, None, None]
    keys = np.clip(position + 1 - indices * block_size, 0, block_size)
    return float(np.sum(np.where(indices >= 0, keys, 0), dtype=np.float64))


def compete(makers: Makers, repetitions: int) -> list[dict[str, Any]]:
    """Build and warm up all sides, then let them take turns."""
    rows, running = [], []
    for known, make in makers:
        rows.append(known)
        try:
            side = make()
            side.repeat()
        except Exception as failure:  # a library that is not there, a shape too large: a row too
            known["error"] = f"{type(failure).__name__}: {str(failure).splitlines()[0][:200]}"
            print(describe(known), file=sys.stderr, flush=True)
            continue
        known["temp_bytes"] = side.columns["temp_bytes"]
        running.append((known, side, []))
    for _ in range(repetitions):
        for _, side, times in running:
            times.append(side.repeat()["seconds"])
    for known, side, times in running:
        known["seconds"], known["repetitions"] = statistics.median(times), repetitions
        side.close()
        print(describe(known), file=sys.stderr, flush=True)
    return rows


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Seconds of the fastest dense side, and of the peer on the same picks, over the row's."""
    alike = ("direction", "length", "batch", "query_heads")
    for row in rows:
        if not row["seconds"]:
            continue
        others = [o for o in rows if o["seconds"] and all(o[key] == row[key] for key in alike)]
        dense = [o["seconds"] for o in others if o["mechanism"] == "dense"]
        peer = [
            o["seconds"]
            for o in others
            if o["implementation"] == "flash-linear-attention" and o["picks"] == row["picks"]
        ]
        row["ratio_to_dense"] = min(dense) / row["seconds"] if dense else None
        row["ratio_to_peer"] = min(peer) / row["seconds"] if peer else None


def describe_machine() -> dict[str, Any]:
    """Device, driver, versions and date: what every figure has to name."""
    driver = None
    try:
        asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return {
        "device": jax.devices()[0].device_kind,
        "driver": driver,
        "backend": jax.devices()[0].client.platform_version.replace("\n", " "),
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def save(
    rows: list[dict[str, Any]], machine: dict[str, Any], options: argparse.Namespace, suite: str
) -> None:
    if not options.json_folder:
        return
    options.json_folder.mkdir(parents=True, exist_ok=True)
    path = options.json_folder / f"{options.name}_{suite}.json"
    path.write_text(json.dumps([row | machine for row in rows], indent=1) + "\n", encoding="utf-8")


def describe(row: dict[str, Any]) -> str:
    names = ("length", "direction", "op", "mechanism", "picks", "implementation")
    outcome = f"{1e3 * row['seconds']:.3f} ms" if row["seconds"] else row["error"]
    return " ".join(str(row[name]) for name in names) + f" {outcome}"


def show(suite: str, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{suite}: medians; ratios > 1 are faster")
    texts = ("direction", "op", "mechanism", "picks", "implementation")
    for name in ("T", "N", *texts, "ms", "TFLOP/s", "x dense", "x triton"):
        table.add_column(name, justify="left" if name in texts else "right")
    for row in rows:
        seconds, flops = row["seconds"], row["flops"]
        table.add_row(
            str(row["length"]),
            str(row["query_heads"]),
            *(row[name] or "" for name in texts),
            f"{1e3 * seconds:.3f}" if seconds else row["error"],
            f"{flops / seconds / 1e12:.1f}" if seconds and flops else "",
            *(
                f"{row[name]:.2f}" if row[name] else ""
                for name in ("ratio_to_dense", "ratio_to_peer")
            ),
        )
    Console(width=None if sys.stdout.isatty() else 180).print(table)


if __name__ == "__main__":
    sys.exit(main())
