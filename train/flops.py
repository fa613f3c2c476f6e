"""How many FLOPs a token of training takes, counted by hand, and how fast a device could be.

The rule: a matrix parameter that a token is multiplied by costs 2 FLOPs forward and 4 backward; a
visible key costs 2 * (H + Hv) a query head forward and twice that backward. ``dense_equivalent``
counts every causal key, whatever the mechanism: by it, runs of one model compare. ``executed``
counts the keys that the mechanism attends; its selector's own scores, and what rematerialisation
computes again, are in neither. Rows count as one document each.
"""

from __future__ import annotations

import dataclasses
import math

import jax

from models.transformer import Tree
from train.config import RunConfig
from train.optimizer import decay_mask

# Dense bfloat16 products, FLOP/s of one device as the vendors state them (no sparsity), by the
# beginning of its ``device_kind``; the first match counts.
PEAKS = (
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("TPU v4", 275e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA A100", 312e12),
)


@dataclasses.dataclass(frozen=True)
class TokenFlops:
    """FLOPs that one trained token takes, see :mod:`train.flops`."""

    dense_equivalent: float
    executed: float


def token_flops(config: RunConfig, params: Tree) -> TokenFlops:
    """By the rule above; ``objective="selector"`` runs the language model forward only.

    ``params``: the model's parameters, or their shapes.
    """
    passes = 1 if config.objective == "selector" else 3
    multiplied = decay_mask(params)  # matrices, no tables
    if config.model.tie_embeddings:
        multiplied["embedding"] = True
    sizes = jax.tree.map(lambda leaf, counts: counts * math.prod(leaf.shape), params, multiplied)
    matrices = sum(jax.tree.leaves(sizes))
    shape, causal = config.model.head_shape, (config.sequence_length + 1) / 2
    key = 2 * shape.query_heads * (shape.head_width + shape.value_width)
    attended = sum(
        run.count * run.attention.density(config.sequence_length) for run in config.model.runs
    )
    return TokenFlops(
        dense_equivalent=passes * (2.0 * matrices + config.model.layers * key * causal),
        executed=passes * (2.0 * matrices + attended * key * causal),
    )


def peak_flops(devices: list[jax.Device]) -> float | None:
    """FLOP/s of all ``devices`` together in bfloat16; None where the kind has no entry (CPUs)."""
    peaks = [
        next((peak for kind, peak in PEAKS if device.device_kind.startswith(kind)), None)
        for device in devices
    ]
    known = [peak for peak in peaks if peak is not None]
    return sum(known) if len(known) == len(peaks) else None
