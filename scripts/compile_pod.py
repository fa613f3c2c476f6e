"""Whole training steps compiled for TPU pods that are not here: do they fit, and what do they move?

    python scripts/compile_pod.py --json benchmarks/results/pods.json
    python scripts/compile_pod.py --models 8B --mechanisms nsa,dense --topologies v5p-64 \\
        --lengths 1048576 --json benchmarks/results/pods.json

libtpu compiles the step of ``python -m train`` - forward, backward, AdamW, float32 master weights
and bfloat16 computation - for every chip of a pod slice, kernels included. Per chip, from the
compiler: ``bytes_per_chip`` (arguments and temporaries; what is donated counts once) and ``fits``
against the chip's memory; ``collective_bytes``, what a chip receives in a step, from the optimized
HLO by the rule of ``collective_bytes.py``. Counted by hand: ``flops`` of a step and chip
(``train/flops.py``), executed keys only. ``seconds_estimated`` is the larger of FLOPs at 50 % of
the chip's bfloat16 peak and collective bytes at the chip's interconnect bandwidth: a bound to plan
with, not a measurement; the compiler cannot see into kernels, and nothing ran.

``--optimization O1`` (the default) compiles in 40 % of the time of the compiler's own level ("")
and may move more; each row says which it was. A step that does not compile for lack of memory is a
row with the compiler's own need, where it states one. Finished rows are not compiled again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from page_tables import put_between
from readable_help import HelpFormatter


@dataclasses.dataclass(frozen=True)
class Chip:
    """Memory [bytes], bfloat16 peak [FLOP/s] and interconnect [bytes/s] of one chip; vendor's
    figures.
    """

    memory: float
    flops: float
    interconnect: float


CHIPS = {
    "v5e": Chip(16e9, 197e12, 200e9),
    "v5p": Chip(95e9, 459e12, 600e9),
    "v6e": Chip(32e9, 918e12, 448e9),
}
# Slices by their number of chips.
TOPOLOGIES = {
    "v5e-256": "v5e:16x16",
    "v5p-64": "v5p:4x4x4",
    "v5p-512": "v5p:8x8x8",
    "v6e-256": "v6e:16x16",
}
MODELS: dict[str, dict[str, Any]] = {
    "1B": {
        "layers": 16,
        "model_width": 2048,
        "query_heads": 32,
        "kv_heads": 8,
        "head_width": 64,
        "mlp_width": 8192,
        "tie_embeddings": True,
    },
    "8B": {
        "layers": 32,
        "model_width": 4096,
        "query_heads": 32,
        "kv_heads": 8,
        "head_width": 128,
        "mlp_width": 14336,
        "tie_embeddings": False,
    },
}
VOCABULARY = 128256
MECHANISMS = ("dense", "nsa", "infllm_v2", "moba", "hash", "routing")
LENGTHS = (131072, 1048576)
UTILISATION = 0.5
KEY = ("model", "mechanism", "topology", "length")
OUT_OF_MEMORY = re.compile(
    r"(?:(?:Used|needs?|requires?) |temporaries \()([\d.]+)([GM])(?:i?B? of |\) exceeds)"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile what is missing, write the table; 0 unless a step fails for another reason than
    memory.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="sizes of the model")
    parser.add_argument("--mechanisms", default=",".join(MECHANISMS), help="by name: NAME,NAME,...")
    parser.add_argument(
        "--topologies", default=",".join(TOPOLOGIES), help="pod slices: GENERATION-CHIPS"
    )
    parser.add_argument(
        "--lengths", default=",".join(map(str, LENGTHS)), help="tokens of a sequence: T,T,..."
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("benchmarks/results/pods.json"),
        help="table of rows; those that are there are kept",
    )
    parser.add_argument("--seconds", type=int, default=1800, help="of one compilation, at most")
    parser.add_argument(
        "--optimization", default="O1", help='compiler effort: O0 to O3, or "" for its own'
    )
    parser.add_argument("--markdown", type=Path, help="write the rows as a page's tables")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        model, mechanism, topology, length = options.worker
        level = options.optimization
        print(json.dumps(compile_step(model, mechanism, topology, int(length), level)))
        return 0
    rows = json.loads(options.json.read_text()) if options.json.exists() else []
    for topology in options.topologies.split(","):
        for length in map(int, options.lengths.split(",")):
            for model in options.models.split(","):
                for mechanism in options.mechanisms.split(","):
                    wanted = (model, mechanism, topology, length)
                    if any(tuple(row[name] for name in KEY) == wanted for row in rows):
                        continue
                    row = apart(wanted, options.seconds, options.optimization)
                    rows.append(row)
                    rows.sort(key=order)
                    write(options.json, rows)
                    print(describe(row), flush=True)
    if options.markdown:
        options.markdown.write_text(page(options.markdown.read_text(), rows))
    return 1 if any(row["error"] and row["fits"] is None for row in rows) else 0


def apart(
    wanted: tuple[str, str, str, int], seconds: int, optimization: str = "O1"
) -> dict[str, Any]:
    """The row of one step, compiled by a process of its own: libtpu serves one topology each."""
    command = [sys.executable, __file__, "--optimization", optimization]
    command += ["--worker", *map(str, wanted)]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        ),
    }
    begun = time.monotonic()
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds
        )
        lines, said = done.stdout.splitlines(), done.stderr
    except subprocess.TimeoutExpired:
        lines, said = [], f"not compiled in {seconds} s"
    if lines and lines[-1].startswith("{"):
        row = json.loads(lines[-1])
    else:
        row = failed(*wanted, said.strip().splitlines()[-1] if said.strip() else "no output")
    return row | {"compile_seconds": round(time.monotonic() - begun, 1)}


def compile_step(
    model: str, mechanism: str, topology: str, length: int, optimization: str = "O1"
) -> dict[str, Any]:
    """Compile one training step; see the module's docstring for the fields."""
    import jax

    if optimization:
        jax.config.update("jax_optimization_level", optimization)

    from kernels_pallas.ahead_of_time import tpu_topology
    from train.flops import token_flops
    from train.sharding import make_mesh
    from train.step import abstract_batch, make_train_step, place_state

    kind = topology.partition("-")[0]
    chip = CHIPS[kind]
    devices = tpu_topology(TOPOLOGIES[topology]).devices
    config = run_config(model, mechanism, length, len(devices))
    mesh = make_mesh(config.mesh, devices)
    shapes, placement = place_state(config, mesh)
    step = make_train_step(config, placement)
    flops = token_flops(config, shapes.params).executed * config.batch_size * length / len(devices)
    try:
        compiled = step.lower(shapes, abstract_batch(config, placement)).compile()
    except jax.errors.JaxRuntimeError as error:
        row = failed(model, mechanism, topology, length, str(error), chip)
        return row | {"flops": flops, "optimization": optimization, "jax": jax.__version__}
    from collective_bytes import collective_bytes

    memory: Any = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    used += memory.output_size_in_bytes - memory.alias_size_in_bytes
    moved = collective_bytes(compiled.as_text(), at_least=True)
    received = sum(moved.values())
    computing, moving = flops / (UTILISATION * chip.flops), received / chip.interconnect
    return {
        "model": model,
        "mechanism": mechanism,
        "topology": topology,
        "length": length,
        "sequences": config.batch_size,
        "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
        "bytes_per_chip": used,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "fits": used <= chip.memory,
        "flops": flops,
        "collective_bytes": received,
        "collectives": {name: size for name, size in moved.items() if size},
        "seconds_estimated": max(computing, moving),
        "bound_by": "FLOPs" if computing >= moving else "interconnect",
        "estimate_source": f"max(flops / ({UTILISATION} peak), collective_bytes / interconnect)",
        "error": "",
        "optimization": optimization,
        "jax": jax.__version__,
    }


def failed(
    model: str, mechanism: str, topology: str, length: int, why: str, chip: Chip | None = None
) -> dict[str, Any]:
    """A row of a step that was not compiled; ``fits`` is False if memory was the reason."""
    need = OUT_OF_MEMORY.search(why)
    size = float(need[1]) * (2**30 if need[2] == "G" else 2**20) if need else None
    memory = size is not None or "RESOURCE_EXHAUSTED" in why
    return {
        "model": model,
        "mechanism": mechanism,
        "topology": topology,
        "length": length,
        "bytes_per_chip": size,
        "fits": False if memory else None,
        "flops": None,
        "collective_bytes": None,
        "seconds_estimated": None,
        "estimate_source": "",
        "error": re.sub(r" *(See )?https?:\S+.*", "", " ".join(why.split()))[:300],
    }


def run_config(model: str, mechanism: str, length: int, chips: int) -> Any:
    """The run: one sequence over all chips at 1M tokens, as many as make a million below."""
    from models.config import ModelConfig
    from sparse_attn import registry
    from train.config import MeshConfig, OptimizerConfig, RunConfig

    kind: Any = registry.MECHANISMS[mechanism]
    attention = kind(implementation="mosaic_tpu")
    sequences = max(LENGTHS[-1] // length, 1)
    # 1M tokens a step: every sequence over as many chips as give a chip one part.
    sequence = max(chips // sequences, 1)
    return RunConfig(
        model=ModelConfig(
            **MODELS[model],
            vocab_size=VOCABULARY,
            attention=attention,
            remat="full",
            compute_dtype="bfloat16",
            param_dtype="float32",
        ),
        batch_size=sequences,
        sequence_length=length,
        loss_chunk=1024,
        optimizer=OptimizerConfig(),
        mesh=MeshConfig(data=1, fsdp=chips // sequence, sequence=sequence),
        init_from="",
    )


def order(row: dict[str, Any]) -> tuple[int, ...]:
    """Place of a row in the table."""
    return (
        list(TOPOLOGIES).index(row["topology"]),
        row["length"],
        list(MODELS).index(row["model"]),
        MECHANISMS.index(row["mechanism"]),
    )


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace the file at once, so that a killed run leaves whole rows."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(rows, indent=1) + "\n")
    temporary.replace(path)


TABLE = ("<!-- table by scripts/compile_pod.py -->", "<!-- end of table -->")


def page(text: str, rows: Sequence[dict[str, Any]]) -> str:
    """``text`` with what is between the marks of :data:`TABLE` replaced by the rows.

    Raises:
      ValueError: if the marks are missing.
    """
    head = ("slice", "tokens", "model", "attention", "GB a chip", "fits", "TFLOP a chip")
    head = (*head, "GB moved", "seconds, at least")
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for row in sorted(rows, key=order):
        chip = CHIPS[row["topology"].partition("-")[0]]

        def number(name: str, scale: float, digits: int, row: dict[str, Any] = row) -> str:
            return "" if row[name] is None else f"{row[name] / scale:,.{digits}f}"

        fits = {True: "yes", False: f"no, of {chip.memory / 1e9:.0f}", None: "not compiled"}
        cells = (
            *(row["topology"], f"{row['length'] // 1024}k", row["model"], row["mechanism"]),
            *(number("bytes_per_chip", 1e9, 1), fits[row["fits"]], number("flops", 1e12, 0)),
            *(number("collective_bytes", 1e9, 1), number("seconds_estimated", 1, 1)),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return put_between(text, "\n".join(lines), TABLE)


def describe(row: dict[str, Any]) -> str:
    """One line for the terminal."""
    name = f"{row['model']} {row['mechanism']} {row['topology']} T={row['length']}"
    if row["error"]:
        return f"{name}: {row['error'][:200]}"
    return (
        f"{name}: {row['bytes_per_chip'] / 1e9:.1f} GB a chip"
        f"{'' if row['fits'] else ' (does not fit)'}, "
        f"{row['collective_bytes'] / 1e9:.2f} GB moved, "
        f"{row['flops'] / 1e12:.0f} TFLOP, about {row['seconds_estimated']:.1f} s, "
        f"compiled in {row['compile_seconds']:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
