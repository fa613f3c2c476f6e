"""``--dry-run``: what a training step will cost, without data and without running it."""

from __future__ import annotations

import math
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from train.config import RunConfig, UserError
from train.loop import plan
from train.reporting import print_placement
from train.step import abstract_batch, make_train_step


def dry_run(config: RunConfig, console: Console) -> dict[str, dict[str, Any]]:
    """Compile one training step and print parameters, densities, memory and FLOPs.

    Returns:
      The printed numbers: ``parameters`` (by group, and ``total``), ``density`` (attended over
      causal pairs, by kind of layer), ``bytes`` and ``flops`` of one compiled step on one device.

    Raises:
      UserError: if the configuration does not fit the devices.
    """
    shapes, placement = plan(config)
    groups = parameter_groups(shapes.params)
    densities = layer_densities(config)
    step = make_train_step(config, placement)
    compiled = step.lower(shapes, abstract_batch(config, placement)).compile()
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    if memory is None:
        raise UserError("this backend does not tell the memory of a compiled step")
    tokens = config.batch_size * config.sequence_length
    total = sum(groups.values())
    result: dict[str, dict[str, Any]] = {
        "parameters": {**groups, "total": total},
        "density": densities,
        "bytes": {
            "state and batch": memory.argument_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
        },
        "flops": {
            "model, 6 * parameters * tokens": 6.0 * total * tokens,
            "compiled, each loop counted once": float(costs.get("flops", math.nan)),
        },
    }
    console.print(_table("parameters", result["parameters"], "{:,}".format))
    if placement.mesh.size > 1:
        print_placement(console, shapes.params)
    title = f"attended / causal pairs at T={config.sequence_length}, at most"
    console.print(_table(title, densities, "{:.1%}".format))
    title = f"a step of {config.batch_size} x {config.sequence_length} tokens, each device"
    console.print(_table(title, result["bytes"], lambda size: f"{size / 2**20:,.1f} MiB"))
    console.print(_table("FLOPs of a step", result["flops"], "{:.3g}".format))
    return result


def parameter_groups(params: dict[str, Any]) -> dict[str, int]:
    """Trained numbers by group: ``embedding``, ``layers.<run>.attention``, ..."""
    groups: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [str(key.key) for key in path]
        group = ".".join(names[:3] if names[0] == "layers" else names[:1])
        groups[group] = groups.get(group, 0) + math.prod(leaf.shape)
    return groups


def layer_densities(config: RunConfig) -> dict[str, float]:
    """Attended over causal pairs of every run of alike layers, and their mean."""
    densities, weighted = {}, 0.0
    for run in config.model.alike_runs:
        density = run.attention.density(config.sequence_length)
        densities[f"layers {run.name}: {type(run.attention).__name__}"] = density
        weighted += run.count * density
    return {**densities, "mean": weighted / config.model.layers}


def _table(title: str, values: dict[str, Any], show: Any) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in values.items():
        table.add_row(name, show(value))
    return table
