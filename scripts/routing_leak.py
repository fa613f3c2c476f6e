"""How much later tokens change earlier outputs under routing attention, in numbers.

    python scripts/routing_leak.py --length 1024 --clusters 8 --window 128

The published clusters take their most similar tokens of the whole sequence, so a later token can
evict an earlier one: what is measured with teacher forcing is then not what decoding would do.
Random queries, keys and values of one sequence, float64, 4 heads of 16. For both modes:

    suffix   the last tokens (one, and a quarter) are replaced; how many of the earlier rows attend
             other keys, how many have another output, and the largest change of an output
    prefix   for rows spread over the sequence: the same three when everything after the row is cut
             off, as it is when decoding

An output counts as changed above 1e-9; rounding is near 1e-15. Causal routing must show 0 rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from readable_help import HelpFormatter

from sparse_attn import Heads, HeadShape, Routing, build_mechanism
from sparse_attn.types import no_rope

SHAPE = HeadShape(query_heads=4, kv_heads=4, head_width=16, value_width=16, model_width=64)
CHANGED = 1e-9
PREFIXES = 32


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=HelpFormatter
    )
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--clusters", type=int, default=8, help="of a head")
    parser.add_argument("--window", type=int, default=128, help="tokens of a cluster")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens")
    parser.add_argument("--json", help="write the rows to this file")
    options = parser.parse_args(arguments)
    rows = [
        row
        for config in configs(options.clusters, options.window)
        for row in leak(config, options.length, options.seed)
    ]
    print(
        f"{'mode':>8} {'changed':>18} {'earlier rows':>12} {'other keys':>10} {'other output':>12}"
    )
    for row in rows:
        print(
            f"{row['mode']:>8} {row['changed']:>18} {row['rows']:>12} {row['other_keys']:>10} "
            f"{row['other_output']:>12}  largest change {row['largest_change']:.1e}"
        )
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def configs(clusters: int, window: int) -> tuple[Routing, Routing]:
    """Both modes with the same clusters; half of the causal budget is the local window."""
    return (
        Routing(clusters=clusters, cluster_window=window, mode="paper"),
        Routing(clusters=clusters, cluster_window=window // 2, local_window=window // 2),
    )


def leak(config: Routing, length: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of the table for one config: changed suffixes, then cut-off prefixes."""
    with jax.enable_x64(True):
        module = build_mechanism(config, SHAPE, rngs=nnx.Rngs(seed), param_dtype=jnp.float64)
        graph, state = nnx.split(module)

        @jax.jit
        def run(parts: tuple[Array, Array, Array], segment_ids: Array) -> tuple[Array, Array]:
            q, k, v = parts
            x = jnp.zeros((*q.shape[:2], SHAPE.model_width), q.dtype)
            heads = Heads(q=q, k=k[None], v=v[None], x=x, rope=no_rope)
            out, _, aux = nnx.merge(graph, state)(heads, segment_ids=segment_ids, inspect=True)
            assert aux.selection is not None
            return out[0], aux.selection.indices[0]

        parts, other = _inputs(length, seed), _inputs(length, seed + 1)
        everything = jnp.ones((1, length), jnp.int32)
        out, keys = (np.asarray(a) for a in run(parts, everything))

        rows = []
        for replaced in (1, length // 4):
            start = length - replaced
            mixed = tuple(
                jnp.concatenate([a[:, :start], b[:, start:]], axis=1)
                for a, b in zip(parts, other, strict=True)
            )
            changed = run(mixed, everything)
            rows.append(
                _row(config, f"last {replaced}", out, keys, changed, np.arange(start, dtype=int))
            )
        places = np.unique(np.linspace(0, length - 1, PREFIXES).astype(int))
        prefix_out, prefix_keys = out.copy(), keys.copy()
        for t in places:
            cut = (np.arange(length) <= t).astype(np.int32)[None]
            alone = run(parts, jnp.asarray(cut))
            prefix_out[t], prefix_keys[t] = (np.asarray(a)[t] for a in alone)
        rows.append(_row(config, "cut after the row", out, keys, (prefix_out, prefix_keys), places))
        return rows


def _inputs(length: int, seed: int) -> tuple[Array, Array, Array]:
    draw = np.random.default_rng(seed)
    q, k, v = (
        jnp.asarray(draw.standard_normal((1, length, SHAPE.kv_heads, SHAPE.head_width)))
        for _ in range(3)
    )
    return q, k, v


def _row(
    config: Routing,
    changed: str,
    out: np.ndarray,
    keys: np.ndarray,
    after: tuple[Any, Any],
    places: np.ndarray,
) -> dict[str, Any]:
    """Counts over the rows at ``places``."""
    difference = np.abs(np.asarray(after[0])[places] - out[places]).max(axis=(1, 2))
    other = (np.asarray(after[1])[places] != keys[places]).any(axis=(1, 2))
    return {
        "mode": config.mode,
        "changed": changed,
        "rows": len(places),
        "other_keys": int(other.sum()),
        "other_output": int((difference > CHANGED).sum()),
        "largest_change": float(difference.max()),
    }


if __name__ == "__main__":
    sys.exit(main())
