"""Dense and sparse attention side by side: time, CPU time, compiled memory, ratios.

    python scripts/bench_attention.py --lengths 4096,16384 --json results.json
    python scripts/bench_attention.py --lengths 4096 --peer --peer-python PATH_OF_A_PYTHON_3.11

Sizes B=1, N=8, K=2, H=64, D=512, float32; NSA with 16 blocks of 64, w=512, l=32, d=16. All sides of
a length take turns, repetition by repetition, in one process on one core (PyTorch and the layers,
whose peak memory counts, each have a process of their own on the same core and take their turn).
Reported are medians of wall and process CPU seconds; ratios are of CPU seconds.

``picks``: "replaced" - 5 % of the blocks are replaced from a token to the next; "uniform" - drawn
anew for every token; "checkpoint" - taken from a trained model on its held-out text; "own" - what
the module selects by itself. For whole modules, "replaced" and "uniform" describe queries that
make the module's own selections behave like that. ``union_ratio`` is the mean, over tiles of 16
tokens, of |union of their blocks| / n. ``ratio_to_dense``: dense CPU seconds / these CPU seconds,
dense being the Dense module (forward, forward_backward) or the fastest dense step (decode).
``ratio_to_peer``: the same against PyTorch (op "sdpa", or the peer's layer for op "layer").
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from readable_help import HelpFormatter

if TYPE_CHECKING:
    from bench_sides import Side

DIRECTIONS = ("forward", "forward_backward")
TILE = 16
SLOW_SECONDS = 5.0
PEER_LAYER_LENGTHS = (1024, 2048, 4096)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    # Before jax or torch start their threads, and inherited by the peers.
    if options.threads == 1:
        import one_core

        one_core.pin()
    if options.layer_worker:
        from bench_sides import serve_layer

        serve_layer(sys.stdin, lambda line: print(line, flush=True), peak_rss_bytes)
        return 0
    rows = run(options)
    show(rows)
    if options.json:
        print(f"{len(rows)} rows in {options.json}")
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
        default=(1024, 2048, 4096, 8192, 16384, 32768),
        help="tokens of a sequence: T,T,...",
    )
    add("--decode-lengths", type=lengths, help="default: --lengths and 65536")
    add("--directions", type=names, default=(*DIRECTIONS, "decode"), help="what is timed")
    add("--picks", type=names, default=("replaced", "uniform"), help="of replaced,uniform")
    add("--mechanisms", type=names, default=("nsa",), help="whole modules: nsa,infllm_v2,hash,...")
    add("--checkpoint", help="run folder of a trained NSA model: adds picks=checkpoint")
    add("--implementation", default="auto", help="of the sparse side")
    add("--selected-blocks", type=int, default=16, help="blocks of a row")
    add("--selection-block", type=int, default=64, help="tokens of a block")
    add("--window", type=int, default=512, help="tokens of the window branch of NSA")
    add("--repetitions", type=int, default=7, help="at most 3 for calls over 5 s")
    add("--threads", type=int, default=1, help="1 pins the whole run to one core")
    add("--json", help="write the rows to this file")
    add("--peer", action="store_true", help="add PyTorch, see docs/benchmarks.md")
    add("--peer-python", default="python3.11", help="interpreter of the peers' environment")
    add(
        "--peer-layer-lengths",
        type=lengths,
        default=PEER_LAYER_LENGTHS,
        help="tokens at which whole layers of peers are timed",
    )
    add("--peer-memory-gib", type=float, default=16.0, help="address space of a peer")
    add("--layer-worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = set(options.picks) - {"replaced", "uniform"}
    if unknown:
        parser.error(f"--picks {','.join(sorted(unknown))}: choose from replaced,uniform")
    if not options.mechanisms:
        parser.error("--mechanisms names none")
    unknown = set(options.directions) - {*DIRECTIONS, "decode"}
    if unknown:
        parser.error(
            f"--directions {','.join(sorted(unknown))}: choose from {','.join(DIRECTIONS)},decode"
        )
    if options.repetitions < 1:
        parser.error(f"--repetitions {options.repetitions} must be at least 1")
    if options.decode_lengths is None:
        options.decode_lengths = (*options.lengths, 65536)
    return options


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows, ratios included; the file is written again after every length."""
    rows: list[dict[str, Any]] = []
    for length in options.lengths:
        for direction in DIRECTIONS:
            if direction in options.directions:
                rows += measure(training_sides(options, length, direction), options.repetitions)
                finish(options, rows)
    if "decode" in options.directions:
        for length in options.decode_lengths:
            rows += measure(decode_sides(options, length), options.repetitions)
            finish(options, rows)
    return rows


def finish(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    add_ratios(rows)
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def nsa_config(options: argparse.Namespace) -> Any:
    from sparse_attn import NSA

    return NSA(
        selected_blocks=options.selected_blocks,
        selection_block=options.selection_block,
        compression_block=options.selection_block // 2,
        compression_stride=options.selection_block // 4,
        window=options.window,
        implementation=options.implementation,
    )


def mechanism_config(name: str, options: argparse.Namespace) -> Any:
    """NSA with the sizes of the command line; the others as their papers have them."""
    from sparse_attn import MECHANISMS

    if name == "nsa":
        return nsa_config(options)
    return dataclasses.replace(MECHANISMS[name](), implementation=options.implementation)


def training_sides(
    options: argparse.Namespace, length: int, direction: str
) -> Iterable[Callable[[], Side]]:
    """What competes over a whole sequence, as constructors: one that fails becomes a row."""
    import bench_sides as sides

    from sparse_attn import Dense

    config = nsa_config(options)
    yield lambda: sides.module_side(Dense(), length, 0.0, None, direction, TILE)
    for name in options.mechanisms:
        if name != "nsa":
            yield lambda name=name: sides.module_side(
                mechanism_config(name, options), length, 0.0, None, direction, TILE
            )
    for picks in options.picks if "nsa" in options.mechanisms else ():
        memory = sides.memory_for(config, 0.05, min(length, 4096)) if picks == "replaced" else 0.0
        yield lambda picks=picks, memory=memory: sides.module_side(
            config, length, memory, picks, direction, TILE
        )
        yield lambda picks=picks: sides.selected_branch_side(
            config, make_picks(options, picks, length), picks, direction, TILE
        )
    if options.checkpoint:
        yield lambda: sides.selected_branch_side(
            config, make_picks(options, "checkpoint", length), "checkpoint", direction, TILE
        )
    if options.peer:
        yield lambda: peer_side(options, "sdpa", length, direction)
        if length in options.peer_layer_lengths:
            yield lambda: peer_side(options, "nsa_layer", length, direction)
            yield lambda: peer_side(options, "layer", length, direction)


def decode_sides(options: argparse.Namespace, length: int) -> Iterable[Callable[[], Side]]:
    """What competes over one new token on a cache of ``length`` tokens."""
    import bench_sides as sides

    from sparse_attn import Dense

    config = nsa_config(options)
    for name in sides.DENSE_DECODE:
        yield lambda name=name: sides.dense_decode_side(length, name)
    yield lambda: sides.module_decode_side(Dense(), length)
    for picks in options.picks if "nsa" in options.mechanisms else ():
        yield lambda picks=picks: sides.gather_decode_side(
            config, length, make_picks(options, picks, length), picks
        )
    for name in options.mechanisms:
        yield lambda name=name: sides.module_decode_side(mechanism_config(name, options), length)


def make_picks(options: argparse.Namespace, picks: str, length: int) -> Any:
    import bench_picks
    import bench_sides

    config = nsa_config(options)
    if picks == "checkpoint":
        from bench_checkpoint import checkpoint_picks

        return checkpoint_picks(
            options.checkpoint, config, length, bench_sides.SMALL.heads.kv_heads
        )
    make = {"replaced": bench_picks.replaced_picks, "uniform": bench_picks.uniform_picks}[picks]
    return make(
        length,
        bench_sides.SMALL.heads.kv_heads,
        config.selected_blocks,
        config.selection_block,
        initial=config.initial_blocks,
        recent=config.recent_blocks,
    )


def measure(makers: Iterable[Callable[[], Side]], repetitions: int) -> list[dict[str, Any]]:
    """Make all sides, warm each up once, then let them take turns; their rows with medians."""
    from bench_sides import columns

    rows, running = [], []
    for make in makers:
        try:
            side = make()
        except PeerError as failure:
            rows.append(columns(**failure.columns, error=str(failure)))
            continue
        try:
            warm = side.repeat()
        except PeerError as failure:
            rows.append(side.columns | {"error": str(failure)})
            side.close()
            continue
        turns = repetitions if warm["cpu_seconds"] < SLOW_SECONDS else min(repetitions, 3)
        running.append((side, turns, []))
    for turn in range(repetitions):
        for side, turns, times in running:
            if turn < turns:
                times.append(side.repeat())
    for side, turns, times in running:
        for name in ("seconds", "cpu_seconds"):
            side.columns[name] = statistics.median(time[name] for time in times)
        side.columns["repetitions"] = turns
        if "peak_rss_bytes" in times[-1]:
            side.columns["peak_rss_bytes"] = times[-1]["peak_rss_bytes"]
        side.close()
        rows.append(side.columns)
        print(describe(side.columns), file=sys.stderr, flush=True)
    return rows


class PeerError(Exception):
    """A peer that could not serve: recorded in its row, the others go on."""

    def __init__(self, reason: str, known: dict[str, Any]):
        super().__init__(reason)
        self.columns = known


def peer_side(options: argparse.Namespace, name: str, length: int, direction: str) -> Side:
    """A process of its own that measures on request: PyTorch, or our layer beside its layer."""
    from bench_sides import SMALL, Side, columns

    config = nsa_config(options)
    known: dict[str, Any] = {"direction": direction, "length": length}
    folder = Path(__file__).parent
    if name == "layer":
        worker = [sys.executable, str(folder / "bench_attention.py"), "--layer-worker"]
        worker += ["--threads", str(options.threads)]
        known |= {
            "op": "layer",
            "mechanism": "nsa",
            "picks": "own",
            "implementation": config.implementation,
        }
    else:
        worker = [options.peer_python, str(folder / "bench_peers.py")]
        known |= (
            {"op": "sdpa", "mechanism": "dense", "implementation": "torch"}
            if name == "sdpa"
            else {
                "op": "layer",
                "mechanism": "nsa",
                "picks": "own",
                "implementation": "native_sparse_attention_pytorch",
            }
        )
    request = {
        **{"command": "prepare", "side": name, "direction": direction, "length": length},
        **{"threads": options.threads, "config": dataclasses.asdict(config)},
        **{"memory_limit_bytes": int(options.peer_memory_gib * 2**30)},
        **dataclasses.asdict(SMALL.heads),
        **{
            key: getattr(config, key)
            for key in (
                "window",
                "compression_block",
                "compression_stride",
                "selection_block",
                "selected_blocks",
            )
        },
    }
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["MALLOC_ARENA_MAX"] = "1"
    try:
        process = subprocess.Popen(
            worker, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
    except OSError as error:
        raise PeerError(f"{worker[0]} cannot be started: {error.strerror}", known) from error

    def close() -> None:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # its end shows in the missing answer
        line = process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"ended with {process.wait()}"}
        if "error" in answer:
            raise PeerError(answer["error"], known)
        return answer

    try:
        ready = ask(request)
    except PeerError:
        close()
        raise
    known |= {name: ready.get(name) for name in ("temp_bytes", "start_rss_bytes")}
    return Side(columns(**known), lambda: ask({"command": "repeat"}), close)


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Fill in ``ratio_to_dense`` and ``ratio_to_peer``: their CPU seconds over the row's."""

    def fastest(keep: Callable[[dict[str, Any]], bool]) -> float | None:
        times = [row["cpu_seconds"] for row in rows if row["cpu_seconds"] and keep(row)]
        return min(times, default=None)

    for row in rows:
        if not row["cpu_seconds"]:
            continue
        same = ("direction", "length")
        alike = [other for other in rows if all(other[key] == row[key] for key in same)]
        dense = fastest(
            lambda other, alike=alike: (
                any(other is a for a in alike)
                and other["mechanism"] == "dense"
                and other["op"] in ("module", "dense_decode")
            )
        )
        theirs = "native_sparse_attention_pytorch" if row["op"] == "layer" else "torch"
        peer = fastest(
            lambda other, alike=alike, theirs=theirs: (
                any(other is a for a in alike) and other["implementation"] == theirs
            )
        )
        if dense and row["op"] != "layer":
            row["ratio_to_dense"] = dense / row["cpu_seconds"]
        if peer:
            row["ratio_to_peer"] = peer / row["cpu_seconds"]


def describe(row: dict[str, Any]) -> str:
    names = ("length", "direction", "op", "mechanism", "picks", "implementation")
    return " ".join(str(row[name]) for name in names) + f" {1e3 * row['cpu_seconds']:.3f} ms"


def show(rows: list[dict[str, Any]]) -> None:
    """The table, on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="medians; ms of wall and CPU time; ratios > 1 are faster")
    headings = "T direction op mechanism picks union/n implementation wall CPU temp peak"
    for name in (*headings.split(), "x dense", "x torch", "ceiling"):
        table.add_column(name, justify="right" if name not in headings.split()[1:5] else "left")

    def number(value: float | None, form: str, factor: float = 1.0) -> str:
        return "" if value is None else format(value * factor, form)

    for row in rows:
        mib = 1 / 2**20
        table.add_row(
            str(row["length"]),
            *(row[name] or "" for name in ("direction", "op", "mechanism", "picks")),
            number(row["union_ratio"], ".2f"),
            (row["implementation"] or "").removesuffix("_pytorch"),
            *(number(row[name], ".2f", 1e3) for name in ("seconds", "cpu_seconds")),
            *(number(row[name], ".0f", mib) for name in ("temp_bytes", "peak_rss_bytes")),
            *(number(row[name], ".2f") for name in ("ratio_to_dense", "ratio_to_peer")),
            number(row["byte_ceiling"], ".1f"),
        )
    wide = None if sys.stdout.isatty() else 180
    console = Console(width=wide)
    console.print(table)
    for row in rows:
        if row["error"]:
            known = " ".join(str(row[key]) for key in ("length", "direction", "implementation"))
            console.print(f"{known}: {row['error']}", highlight=False, markup=False)


def peak_rss_bytes() -> int:
    """Of this process alone: getrusage would also count what its parent had before the exec."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return 1024 * int(status.read().split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    if "GLIBC_TUNABLES" not in os.environ:
        # Large pages for every side: a decode step touches blocks all over its cache.
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    sys.exit(main())
