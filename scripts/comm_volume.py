"""What sequence parallelism moves: bytes a layer, read from the compiled HLO of 8 CPU devices.

    python scripts/comm_volume.py --json benchmarks/results/comm_volume.json

Every row is one attention call (the mechanism without its projections, which move nothing when
tokens are split) of one sequence with the heads of an 8B model, compiled and never run. "both" is
forward and backward; gradients of the mechanism's own parameters, which data parallelism sums as
well, are in "both and parameters" only. The strategy "automatic" is the mechanism as it is, with
split inputs, left to the compiler: at least these bytes, since it puts collectives into loops
whose length depends on data, and these count once. The counting rule is that of
``collective_bytes.py``. Numbers are float32, because the CPU compiler widens collectives of
bfloat16 to it: with bfloat16 on an accelerator half of the bytes move.

The "union" row is measured by running NSA on random heads: the share of the blocks of earlier
devices that a device's queries select.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from collective_bytes import KINDS, collective_bytes
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from readable_help import HelpFormatter

from models.rope import RopeConfig, make_rope
from sparse_attn import (
    DSA,
    NSA,
    Dense,
    HashAttention,
    InfLLMV2,
    MechanismConfig,
    MoBA,
    Routing,
    Seer,
    build_mechanism,
)
from sparse_attn.parallel import SequenceParallel, cache_specs, call
from sparse_attn.shards import Shards
from sparse_attn.types import Heads, HeadShape

DEVICES = 8
SHAPE = HeadShape(query_heads=32, kv_heads=8, head_width=128, value_width=128, model_width=4096)
EACH_WAY: tuple[tuple[MechanismConfig, tuple[str, ...]], ...] = (
    (NSA(), ("halo", "gather")),
    (Dense(), ("gather", "ring", "ulysses")),
)
BOTH_WAYS: tuple[tuple[MechanismConfig, str], ...] = (
    (Dense(window=4096), "halo"),
    (MoBA(), "gather"),
    (InfLLMV2(), "gather"),
    (HashAttention(), "gather"),
    (Routing(), "gather"),
    (DSA(), "gather"),
    (Seer(), "gather"),
    (Routing(), "replicate"),
    (Dense(), "automatic"),
)
DECODING: tuple[MechanismConfig, ...] = (
    *(Dense(), NSA(), InfLLMV2(), MoBA(), HashAttention(), DSA(), Seer()),
)


def simulate_devices() -> None:
    """Let JAX start with the devices of a mesh on this machine's CPU; compile fast."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0"


def make_mesh(devices: int = DEVICES) -> Mesh:
    """The training loop's mesh with all devices along the sequence."""
    axes = ("data", "fsdp", "sequence", "tensor")
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh((1, 1, devices, 1), axes, kinds, devices=jax.devices()[:devices])


def module_of(config: MechanismConfig, shape: HeadShape) -> tuple[Any, Any]:
    """graphdef and shapes of the state: nothing is allocated."""
    module = nnx.eval_shape(lambda: build_mechanism(config, shape, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def head_shapes(
    config: MechanismConfig, shape: HeadShape, tokens: int, dtype: str, parts: tuple[Any, Any]
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """q, k, v, x of one sequence, placed by ``parts`` (of q and x, of k and v)."""
    R, S = config.kv_branches, shape
    sizes = (
        ((1, tokens, S.query_heads, S.head_width), parts[0]),
        ((R, 1, tokens, S.kv_heads, S.head_width), parts[1]),
        ((R, 1, tokens, S.kv_heads, S.value_width), parts[1]),
        ((1, tokens, S.model_width), parts[0]),
    )
    return tuple(
        jax.ShapeDtypeStruct(size, jnp.dtype(dtype), sharding=part) for size, part in sizes
    )


def training_bytes(
    config: MechanismConfig,
    strategy: str,
    *,
    tokens: int,
    dtype: str,
    backward: bool,
    parameters: bool = False,
    shape: HeadShape = SHAPE,
) -> dict[str, int]:
    """Bytes by kind of one call on a split sequence; "automatic": without ``shard_map``."""
    mesh = make_mesh()
    by_row = NamedSharding(mesh, PartitionSpec(None, "sequence"))
    by_branch = NamedSharding(mesh, PartitionSpec(None, None, "sequence"))
    graphdef, state = module_of(config, shape)
    rope = make_rope(RopeConfig(), shape.head_width)

    def forward(arrays: Any, state: Any) -> Any:
        q, k, v, x = arrays
        module, heads = nnx.merge(graphdef, state), Heads(q, k, v, x, rope)
        if strategy == "automatic":
            out, _, aux = module(heads)
        else:
            parallel = SequenceParallel(mesh, strategy)  # type: ignore[arg-type]
            out, _, aux = call(module, heads, parallel=parallel)
        return out, aux.loss

    def gradients(arrays: Any, state: Any, cotangent: Any) -> Any:
        if parameters:
            (out, _), pull = jax.vjp(forward, arrays, state)
        else:
            (out, _), pull = jax.vjp(lambda arrays: forward(arrays, state), arrays)
        # The output is asked for too: otherwise what moves for it alone would be left out.
        return out, pull((cotangent, jnp.ones((), jnp.float32)))

    arrays = head_shapes(config, shape, tokens, dtype, (by_row, by_branch))
    whole = NamedSharding(mesh, PartitionSpec())
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), state)
    if not backward:
        compiled = jax.jit(lambda a, s: forward(a, s)[0], out_shardings=by_row)
        text = compiled.lower(arrays, state).compile().as_text()
        return collective_bytes(text, at_least=strategy == "automatic")
    placed = (by_row, by_branch, by_branch, by_row)
    places = (placed, whole) if parameters else (placed,)
    out = jax.ShapeDtypeStruct((*arrays[0].shape[:3], shape.value_width), arrays[0].dtype)
    out = jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=by_row)
    wanted = jax.jit(gradients, out_shardings=(by_row, places))
    text = wanted.lower(arrays, state, out).compile().as_text()
    return collective_bytes(text, at_least=strategy == "automatic")


def decoding_bytes(
    config: MechanismConfig, *, tokens: int, dtype: str, gather: bool, shape: HeadShape = SHAPE
) -> dict[str, int]:
    """Bytes by kind of one decode step; ``gather``: the split cache is gathered first."""
    mesh = make_mesh()
    parallel = SequenceParallel(mesh)
    graphdef, state = module_of(config, shape)
    rope = make_rope(RopeConfig(), shape.head_width)
    cache = jax.eval_shape(
        lambda s: nnx.merge(graphdef, s).init_cache(1, tokens, jnp.dtype(dtype)), state
    )
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), cache_specs(cache, parallel))
    whole = NamedSharding(mesh, PartitionSpec())

    axes = type(cache).token_axes

    def exchanged(cache: Any, exchange: Any) -> Any:
        return dataclasses.replace(
            cache, **{name: exchange(getattr(cache, name), axis) for name, axis in axes.items()}
        )

    def gathered(state: Any, arrays: Any, cache: Any) -> Any:
        q, k, v, x = arrays
        cache = exchanged(
            cache, lambda x, axis: jax.lax.all_gather(x, "sequence", axis=axis, tiled=True)
        )
        out, cache, _ = nnx.merge(graphdef, state)(Heads(q, k, v, x, rope), cache)
        mine = Shards("sequence", DEVICES)
        return out, exchanged(cache, mine.mine)

    def step(arrays: Any, state: Any, cache: Any) -> Any:
        q, k, v, x = arrays
        if not gather:
            module = nnx.merge(graphdef, state)
            return call(module, Heads(q, k, v, x, rope), cache, parallel=parallel)[:2]
        none, specs = PartitionSpec(), cache_specs(cache, parallel)
        run = jax.shard_map(
            gathered,
            mesh=mesh,
            in_specs=(none, none, specs),
            out_specs=(none, specs),
            check_vma=False,
        )
        return run(state, arrays, cache)

    def placed(tree: Any, place: Any) -> Any:
        return jax.tree.map(
            lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p), tree, place
        )

    arrays = head_shapes(config, shape, 1, dtype, (whole, whole))
    state = placed(state, jax.tree.map(lambda _: whole, state))
    lowered = jax.jit(step, out_shardings=(whole, places), donate_argnums=2).lower(
        arrays, state, placed(cache, places)
    )
    return collective_bytes(lowered.compile().as_text())


def wanted_share(tokens: int, shape: HeadShape, devices: int = DEVICES) -> tuple[float, float]:
    """NSA on random heads: of the blocks before a device's own, how many its queries select.

    For one kv head, and for all of them together; mean over the devices but the first.
    """
    config = NSA()
    module = build_mechanism(config, shape, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    q, k, v, x = [
        jnp.asarray(rng.standard_normal(s.shape), jnp.float32)
        for s in head_shapes(config, shape, tokens, "float32", (None, None))
    ]
    rope = make_rope(RopeConfig(), shape.head_width)

    @jax.jit
    def run(q: Any, k: Any, v: Any, x: Any) -> Any:
        return module(Heads(q, k, v, x, rope), inspect=True)[2].selection.indices

    picks = np.asarray(run(q, k, v, x))[0].reshape(
        devices, -1, shape.kv_heads, config.selected_blocks
    )
    blocks = tokens // devices // config.selection_block
    each, together = [], []
    for device in range(1, devices):
        of_heads = picks[device].swapaxes(0, 1)
        earlier = [set(p[(p >= 0) & (p < device * blocks)].tolist()) for p in of_heads]
        each.append(np.mean([len(found) for found in earlier]) / (device * blocks))
        together.append(len(set.union(*earlier)) / (device * blocks))
    return float(np.mean(each)), float(np.mean(together))


def row(config: MechanismConfig, strategy: str, direction: str, **more: Any) -> dict[str, Any]:
    """What all rows have: what was compiled, and with what."""
    return {
        "mechanism": described(config),
        "strategy": strategy,
        "direction": direction,
        "devices": DEVICES,
        **more,
        "jax": jax.__version__,
    }


def described(config: MechanismConfig) -> str:
    """The config's name and what differs from its defaults."""
    base = type(config)()
    changes = [
        f"{field.name}={getattr(config, field.name)}"
        for field in dataclasses.fields(config)  # type: ignore[arg-type]
        if getattr(config, field.name) != getattr(base, field.name)
    ]
    return type(config).__name__ + (f"({', '.join(changes)})" if changes else "")


def volume(found: dict[str, int]) -> dict[str, Any]:
    """Columns of a compiled program."""
    return {"bytes": sum(found.values()), **found}


def rows(tokens: int, dtype: str, union: int) -> Iterator[dict[str, Any]]:
    """Every row, as it is found."""
    sizes: dict[str, Any] = {"tokens": tokens, "dtype": dtype}

    def trained(config: MechanismConfig, strategy: str, direction: str) -> dict[str, Any]:
        got = training_bytes(
            config,
            strategy,
            backward=direction != "forward",
            parameters=direction == "both and parameters",
            **sizes,
        )
        return row(config, strategy, direction, **sizes, **volume(got))

    for config, strategies in EACH_WAY:
        for strategy in strategies:
            yield trained(config, strategy, "forward")
            yield trained(config, strategy, "both")
            if isinstance(config, NSA):
                yield trained(config, strategy, "both and parameters")
    for config in DECODING[:2]:
        for gather in (False, True):
            got = decoding_bytes(config, gather=gather, **sizes)
            strategy = "gather" if gather else "in place"
            yield row(config, strategy, "decode", **sizes, **volume(got))
    if union:
        each, together = wanted_share(union, HeadShape(16, 4, 64, 64, 128))
        columns = {"wanted_blocks": each, "wanted_blocks_any_head": together}
        yield row(NSA(), "halo", "union", tokens=union, dtype="float32", **columns)
    for config, strategy in BOTH_WAYS:
        yield trained(config, strategy, "both")
    for config in DECODING[2:]:
        got = decoding_bytes(config, gather=False, **sizes)
        yield row(config, "in place", "decode", **sizes, **volume(got))


def show(one: dict[str, Any]) -> None:
    """A line of the table."""
    moved = {kind: f"{one[kind] / 2**20:.3f}" for kind in KINDS if one.get(kind)}
    wanted = f"wanted {one['wanted_blocks']:.3f}" if "wanted_blocks" in one else ""
    print(
        f"{one['mechanism']:20} {one['strategy']:10} {one['direction']:20} "
        f"{one.get('bytes', 0) / 2**20:10.3f} MiB  {wanted or moved}",
        flush=True,
    )


def main() -> None:
    """Parse the command line, compile, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=HelpFormatter
    )
    parser.add_argument("--length", type=int, default=131072, help="tokens of the sequence")
    parser.add_argument("--dtype", default="float32", help="of q, k, v and caches")
    parser.add_argument("--union", type=int, default=16384, help="tokens for it; 0: leave it out")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    arguments = parser.parse_args()
    simulate_devices()
    found = []
    for one in rows(arguments.length, arguments.dtype, arguments.union):
        show(one)
        found.append(one)
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
