"""A layer of routing attention beside the layer of the PyTorch package routing-transformer.

    python scripts/bench_routing.py --lengths 2048,8192 --json results.json
    python scripts/bench_routing.py --lengths 8192 --peer-python PATH_OF_A_PYTHON_3.11

Batch 1, width 512, 8 heads of 64, float32, one thread. Every side is a layer: projections of
x [1, T, 512] to queries, keys and values, attention, projection of the output; "forward_backward"
also takes gradients by x and all weights and returns what moves the centroids. All sides of a
length take turns, repetition by repetition, on one core; the peer has a process of its own.
Reported are medians of wall and process CPU seconds.

Sides: "routing" is ours, causal (see sparse_attn/routing.py), with rotary positions, for 8 and for
2 kv heads: clusters of 256, a local window of 256 and 4 sinks. "clusters" leaves window and sinks
out, 255 members of the cluster and the token itself: what the peer attends, except that no later
token decides it. "paper" is the published balanced clusters; "dense" causal attention with 2 kv
heads; "routing-transformer" the package in its causal, shared-query-key form, where clusters of 256
are chosen over the whole sequence (8 heads, no positions). ``keys``: the most that a query attends.
``ratio_to_peer``: the peer's CPU seconds / these CPU seconds, so above 1 is faster.
The peer's environment needs torch and routing-transformer (with product-key-memory and
mixture-of-experts, which it imports).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from readable_help import HelpFormatter

DIRECTIONS = ("forward", "forward_backward")
SIDES = ("routing", "clusters", "paper", "dense", "peer")
WIDTH, HEADS = 512, 8
WINDOW = 256

PEER = """
import json, sys, time
import torch
from routing_transformer.routing_transformer import SelfAttention

length, backward, threads, width, heads, window = json.loads(sys.argv[1])
torch.set_num_threads(threads)
torch.manual_seed(0)
layer = SelfAttention(
    dim=width, depth=1, max_seq_len=length, heads=heads, local_attn_heads=0,
    window_size=window, causal=True, shared_qk=True,
)
x = torch.randn(1, length, width, requires_grad=backward)
cotangent = torch.randn(1, length, width)
wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]

def run():
    if backward:
        out, loss = layer(x)
        torch.autograd.grad((out, loss), wanted, (cotangent, torch.ones_like(loss)),
                            allow_unused=True)
    else:
        with torch.no_grad():
            layer(x)

for line in sys.stdin:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    answer = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    print(json.dumps(answer), flush=True)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads == 1:  # before jax starts its threads, and inherited by the peer
        import one_core

        one_core.pin()
    rows: list[dict[str, Any]] = []
    for length in options.lengths:
        for direction in options.directions:
            rows += measure(options, length, direction)
            add_ratios(rows)
            if options.json:
                Path(options.json).parent.mkdir(parents=True, exist_ok=True)
                Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    show(rows)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def lengths(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(",") if part)

    def names(text: str) -> tuple[str, ...]:
        return tuple(part for part in text.split(",") if part)

    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add(
        "--lengths",
        type=lengths,
        default=(1024, 2048, 4096, 8192),
        help="tokens of a sequence: T,T,...",
    )
    add("--directions", type=names, default=DIRECTIONS, help="what is timed")
    add("--sides", type=names, default=SIDES, help="whose layers are timed")
    add(
        "--cluster-window",
        type=int,
        default=WINDOW,
        help="keys of its cluster that a query attends",
    )
    add("--local-window", type=int, default=WINDOW, help="latest keys that a local query attends")
    add("--repetitions", type=int, default=7, help="timed calls of a side")
    add("--threads", type=int, default=1, help="1 pins the whole run to one core")
    add("--peer-python", default="python3.11", help="interpreter of the peer's environment")
    add("--json", help="write the rows to this file")
    options = parser.parse_args(arguments)
    for given, known in (
        (options.directions, DIRECTIONS),
        (options.sides, SIDES),
    ):
        unknown = sorted(set(given) - set(known))
        if unknown:
            parser.error(f"{','.join(unknown)}: choose from {','.join(known)}")
    for length in options.lengths:
        if length % WINDOW:
            parser.error(f"--lengths {length}: the peer needs multiples of {WINDOW}")
    if options.repetitions < 1:
        parser.error(f"--repetitions {options.repetitions} must be at least 1")
    return options


def measure(options: argparse.Namespace, length: int, direction: str) -> list[dict[str, Any]]:
    """Medians of all sides, which take turns."""
    from sparse_attn import Dense, Routing

    routing = Routing(
        clusters=length // WINDOW,
        cluster_window=options.cluster_window,
        local_window=options.local_window,
    )
    clusters = Routing(
        clusters=length // WINDOW, cluster_window=WINDOW - 1, local_window=1, sinks=0
    )
    paper = Routing(clusters=length // WINDOW, cluster_window=WINDOW, mode="paper")
    makers: dict[str, list[Callable[[], tuple[dict[str, Any], Any]]]] = {
        "routing": [
            lambda: our_layer("routing", routing, 8, length, direction),
            lambda: our_layer("routing", routing, 2, length, direction),
        ],
        "clusters": [
            lambda: our_layer("clusters", clusters, 8, length, direction),
            lambda: our_layer("clusters", clusters, 2, length, direction),
        ],
        "paper": [lambda: our_layer("paper", paper, 8, length, direction)],
        "dense": [lambda: our_layer("dense", Dense(), 2, length, direction)],
        "peer": [lambda: peer_layer(options, length, direction)],
    }
    rows: list[dict[str, Any]] = []
    running: list[tuple[dict[str, Any], Any, list[dict[str, float]]]] = []
    for side in options.sides:
        for make in makers[side]:
            row, repeat = make()
            rows.append(row)
            if repeat is not None:
                repeat()
                running.append((row, repeat, []))
    for _ in range(options.repetitions):
        for _, repeat, times in running:
            times.append(repeat())
    for row, _, times in running:
        for name in ("seconds", "cpu_seconds"):
            row[name] = statistics.median(time[name] for time in times)
        row["repetitions"] = len(times)
    for row in rows:
        print(
            f"{length} {direction} {row['side']} {row['kv_heads']}: "
            + (row["error"] or f"{1e3 * row['cpu_seconds']:.1f} ms"),
            file=sys.stderr,
            flush=True,
        )
    return rows


def described(side: str, kv_heads: int, length: int, direction: str, keys: int) -> dict[str, Any]:
    known = {"side": side, "kv_heads": kv_heads, "length": length, "direction": direction}
    empty = dict.fromkeys(
        ("seconds", "cpu_seconds", "temp_bytes", "ratio_to_peer", "repetitions", "error")
    )
    return known | {"keys": keys} | empty


def our_layer(
    side: str, config: Any, kv_heads: int, length: int, direction: str
) -> tuple[dict[str, Any], Callable[[], dict[str, float]]]:
    """A compiled layer of ours, and the call that times it once."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from models.rope import RopeConfig, make_rope
    from sparse_attn import Heads, HeadShape, build_mechanism

    width = WIDTH // HEADS
    shape = HeadShape(HEADS, kv_heads, width, width, WIDTH)
    graph, state = nnx.split(build_mechanism(config, shape, rngs=nnx.Rngs(0)))
    rope = make_rope(RopeConfig(), width)
    draw = np.random.default_rng(0)
    sizes = {"q": HEADS, "k": kv_heads, "v": kv_heads}
    weights = {
        name: jnp.asarray(draw.standard_normal((WIDTH, n, width)) * WIDTH**-0.5, jnp.float32)
        for name, n in sizes.items()
    }
    weights["o"] = jnp.asarray(draw.standard_normal((HEADS, width, WIDTH)) * WIDTH**-0.5)
    x, cotangent = (
        jnp.asarray(draw.standard_normal((1, length, WIDTH)), jnp.float32) for _ in range(2)
    )

    def layer(weights: Any, x: Any, state: Any) -> Any:
        q, k, v = (jnp.einsum("BTD,DNH->BTNH", x, weights[name]) for name in "qkv")
        heads = Heads(q=q, k=k[None], v=v[None], x=x, rope=rope)
        out, _, aux = nnx.merge(graph, state)(heads)
        return jnp.einsum("BTNH,NHD->BTD", out, weights["o"]), aux.loss, aux.statistics

    def forward(weights: Any, x: Any, state: Any, cotangent: Any) -> Any:
        del cotangent
        return layer(weights, x, state)[0]

    def gradients(weights: Any, x: Any, state: Any, cotangent: Any) -> Any:
        out, pull, statistics = jax.vjp(
            lambda w, x: (lambda out, loss, s: ((out, loss), s))(*layer(w, x, state)),
            weights,
            x,
            has_aux=True,
        )
        return out, pull((cotangent, jnp.ones((), jnp.float32))), statistics

    function = forward if direction == "forward" else gradients
    call = jax.jit(function).lower(weights, x, state, cotangent).compile()
    keys = length
    if side in ("routing", "clusters"):
        keys = min(length, config.cluster_window + config.local_window + config.sinks)
    row = described(side, kv_heads, length, direction, keys)
    row["temp_bytes"] = call.memory_analysis().temp_size_in_bytes

    def repeat() -> dict[str, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(call(weights, x, state, cotangent))
        return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}

    return row, repeat


def peer_layer(
    options: argparse.Namespace, length: int, direction: str
) -> tuple[dict[str, Any], Callable[[], dict[str, float]] | None]:
    """The package's layer in its own process; without it a row that says why."""
    row = described("routing-transformer", HEADS, length, direction, WINDOW)
    sizes = [length, direction == "forward_backward", options.threads, WIDTH, HEADS, WINDOW]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    try:
        process = subprocess.Popen(
            [options.peer_python, "-c", PEER, json.dumps(sizes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
    except OSError as error:
        row["error"] = f"{options.peer_python} cannot be started: {error.strerror}"
        return row, None
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None

    def repeat() -> dict[str, float]:
        stdin.write("\n")
        stdin.flush()
        return json.loads(stdout.readline())

    try:
        repeat()
    except (json.JSONDecodeError, OSError):
        row["error"] = f"the peer ended with {process.wait()}; see its message above"
        return row, None
    return row, repeat


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """``ratio_to_peer``: the peer's CPU seconds over the row's."""
    peers = {
        (row["length"], row["direction"]): row["cpu_seconds"]
        for row in rows
        if row["side"] == "routing-transformer" and row["cpu_seconds"]
    }
    for row in rows:
        peer = peers.get((row["length"], row["direction"]))
        if peer and row["cpu_seconds"]:
            row["ratio_to_peer"] = peer / row["cpu_seconds"]


def show(rows: list[dict[str, Any]]) -> None:
    """The table, on standard output."""
    columns = ("T", "direction", "side", "kv heads", "keys", "wall ms", "CPU ms", "temp MiB", "x")
    print("  ".join(f"{name:>19}" if name == "side" else f"{name:>16}" for name in columns))
    for row in rows:

        def number(name: str, factor: float, form: str, row: dict[str, Any] = row) -> str:
            return "" if row[name] is None else format(row[name] * factor, form)

        fields = (
            *(row["length"], row["direction"], row["side"], row["kv_heads"], row["keys"]),
            *(number("seconds", 1e3, ".1f"), number("cpu_seconds", 1e3, ".1f")),
            *(number("temp_bytes", 2**-20, ".0f"), number("ratio_to_peer", 1, ".2f")),
        )
        print("  ".join(f"{f!s:>19}" if i == 2 else f"{f!s:>16}" for i, f in enumerate(fields)))
    for row in rows:
        if row["error"]:
            print(f"{row['length']} {row['direction']} {row['side']}: {row['error']}")


if __name__ == "__main__":
    sys.exit(main())
