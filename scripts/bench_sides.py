"""What bench_attention.py and bench_device.py measure: a side is one compiled call, described.

A side of direction "decode" holds ``STEPS`` steps in one
call, so that the time to launch a call does not hide a step of a tenth of a millisecond.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_picks import drifting, replaced_fraction, union_ratio
from flax import nnx
from jaxtyping import Array

from kernels_pallas.block_sparse import block_sparse_attention
from kernels_pallas.gather_decode import gather_blocks
from kernels_pallas.ranged import ranged_attention
from models.rope import RopeConfig, make_rope
from sparse_attn import MECHANISMS, NSA, Dense, MechanismConfig
from sparse_attn.registry import build_mechanism
from sparse_attn.types import Heads, HeadShape

STEPS = 16
COLUMNS = (
    *("op", "mechanism", "picks", "union_ratio", "implementation", "direction", "length"),
    *("seconds", "cpu_seconds", "temp_bytes", "ratio_to_dense", "ratio_to_peer", "byte_ceiling"),
    *("peak_rss_bytes", "start_rss_bytes", "repetitions", "error", "device", "jax"),
)
# Slow frequencies only (see ``queries``), so that a query's picks drift instead of spinning.
ROPE = RopeConfig(theta=1e6)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What all sides of a run share; the default is a laptop's."""

    heads: HeadShape
    dtype: str = "float32"
    batch: int = 1


SMALL = Sizes(HeadShape(8, 2, 64, 64, 512))


@dataclasses.dataclass
class Side:
    """One contestant: the columns that describe it, and a call that takes its times once."""

    columns: dict[str, Any]
    repeat: Callable[[], dict[str, float]]
    close: Callable[[], None] = lambda: None


def columns(**known: Any) -> dict[str, Any]:
    """A row with every column that the JSON promises."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    return row | {"device": jax.devices()[0].device_kind, "jax": jax.__version__} | known


def timed(call: Callable[[], Any], steps: int = 1) -> dict[str, float]:
    """Wall and process CPU seconds of one call, a step."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return {
        "seconds": (time.perf_counter() - wall) / steps,
        "cpu_seconds": (time.process_time() - cpu) / steps,
    }


def compile_call(function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Any:
    """The compiled function and its temporary bytes."""
    compiled = jax.jit(function, donate_argnums=donate).lower(*args).compile()
    return compiled, compiled.memory_analysis().temp_size_in_bytes


def normal(shape: tuple[int, ...], seed: int, dtype: str = "float32") -> Array:
    draw = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return jnp.asarray(draw, dtype)


def queries(length: int, memory: float, sizes: Sizes = SMALL, seed: int = 1) -> Array:
    """[B, T, N, H] in the slowly rotating half of the dims; ``memory`` as in ``drifting``."""
    heads, width = sizes.heads.query_heads, sizes.heads.head_width
    array = drifting((sizes.batch, length, heads, width), memory, seed)
    half = width // 2
    fast = np.arange(width) % half < half // 2
    return jnp.asarray(np.where(fast[None, None, None], 0.0, array * 2**0.5), sizes.dtype)


def qkv(length: int, sizes: Sizes = SMALL, rows: int | None = None) -> tuple[Array, Array, Array]:
    """Queries for ``rows`` tokens (all by default), keys and values for ``length``."""
    keys = (sizes.batch, length, sizes.heads.kv_heads, sizes.heads.head_width)
    q = queries(length if rows is None else rows, 0.0, sizes)
    return q, normal(keys, 2, sizes.dtype), normal(keys, 3, sizes.dtype)


# Training and prefill: the selected branch alone, and whole modules


def selected_branch_side(
    config: NSA,
    indices: np.ndarray,
    picks: str,
    direction: str,
    tile: int,
    sizes: Sizes = SMALL,
) -> Side:
    """``block_sparse_attention`` on given picks, the building of its lists included."""
    length = indices.shape[1]
    q, k, v = qkv(length, sizes)
    lists = jnp.asarray(indices)

    def attend(q: Array, k: Array, v: Array, lists: Array) -> Array:
        return block_sparse_attention(
            q, k, v, lists, block_size=config.selection_block, implementation=config.implementation
        ).out

    call, temp_bytes = directed(attend, direction, (q, k, v), (lists,))
    known = columns(
        op="block_sparse",
        mechanism="nsa",
        picks=picks,
        union_ratio=union_ratio(indices, tile),
        implementation=config.implementation,
        direction=direction,
        length=length,
        temp_bytes=temp_bytes,
    )
    return Side(known, lambda: timed(call))


def module_side(
    config: MechanismConfig,
    length: int,
    memory: float,
    picks: str | None,
    direction: str,
    tile: int,
    sizes: Sizes = SMALL,
) -> Side:
    """A whole mechanism from un-rotated heads to its output: rotation, selection, gates, all."""
    module = build_mechanism(config, sizes.heads, rngs=nnx.Rngs(0))
    graph, parameters, variables = nnx.split(module, nnx.Param, ...)
    inputs = module_inputs(config, length, memory, sizes)

    def attend(parameters: Any, q: Array, k: Array, v: Array, x: Array) -> Array:
        module = nnx.merge(graph, parameters, variables)
        rope = make_rope(ROPE, sizes.heads.head_width)
        return module(Heads(q=q, k=k, v=v, x=x, rope=rope))[0]

    call, temp_bytes = directed(attend, direction, (parameters, *inputs))
    found = None if picks is None else own_picks(config, length, memory, sizes)
    known = columns(
        op="module",
        mechanism=mechanism_name(config),
        picks=picks,
        union_ratio=None if found is None else union_ratio(found, tile),
        implementation=config.implementation,
        direction=direction,
        length=length,
        temp_bytes=temp_bytes,
    )
    return Side(known, lambda: timed(call))


def module_inputs(
    config: MechanismConfig, length: int, memory: float, sizes: Sizes = SMALL
) -> tuple[Array, ...]:
    """q, k, v (with the branch axis R) and the layer input."""
    heads, dtype = sizes.heads, sizes.dtype
    keys = (config.kv_branches, sizes.batch, length, heads.kv_heads, heads.head_width)
    x = normal((sizes.batch, length, heads.model_width), 4, dtype)
    return queries(length, memory, sizes), normal(keys, 2, dtype), normal(keys, 3, dtype), x


def own_picks(config: NSA, length: int, memory: float, sizes: Sizes = SMALL) -> np.ndarray:
    """The blocks that the module itself selects."""
    parameters, select = _selector(config, sizes)
    return np.asarray(select(parameters, *module_inputs(config, length, memory, sizes)))


@functools.lru_cache(maxsize=1)
def _selector(config: NSA, sizes: Sizes) -> tuple[Any, Callable[..., Array]]:
    graph, parameters = nnx.split(build_mechanism(config, sizes.heads, rngs=nnx.Rngs(0)))

    @jax.jit
    def select(parameters: Any, q: Array, k: Array, v: Array, x: Array) -> Array:
        heads = Heads(q=q, k=k, v=v, x=x, rope=make_rope(ROPE, sizes.heads.head_width))
        return nnx.merge(graph, parameters)(heads, inspect=True)[2].selection.indices

    return parameters, select


@functools.lru_cache(maxsize=8)
def memory_for(config: NSA, fraction: float, length: int = 4096, sizes: Sizes = SMALL) -> float:
    """How sluggish queries must be for the module to replace ``fraction`` of its picks a token."""
    low, high = 1.0, 12.0  # memory = 1 - exp(-x)
    for _ in range(6):
        middle = (low + high) / 2
        if (
            replaced_fraction(own_picks(config, length, 1 - float(np.exp(-middle)), sizes))
            > fraction
        ):
            low = middle
        else:
            high = middle
    return 1 - float(np.exp(-high))


def directed(
    attend: Callable[..., Array],
    direction: str,
    differentiable: tuple[Any, ...],
    constant: tuple[Any, ...] = (),
) -> tuple[Callable[[], Any], int]:
    """The call for ``direction``: the output, or all gradients for a fixed cotangent."""
    if direction == "forward":
        compiled, temp_bytes = compile_call(attend, *differentiable, *constant)
        return lambda: jax.block_until_ready(compiled(*differentiable, *constant)), temp_bytes
    shape = jax.eval_shape(attend, *differentiable, *constant)
    cotangent = normal(shape.shape, 5, shape.dtype)

    def gradients(differentiable: Any, constant: Any, cotangent: Array) -> Any:
        out, pull = jax.vjp(lambda *args: attend(*args, *constant), *differentiable)
        return out, pull(cotangent)

    compiled, temp_bytes = compile_call(gradients, differentiable, constant, cotangent)
    return (
        lambda: jax.block_until_ready(compiled(differentiable, constant, cotangent)),
        temp_bytes,
    )


# Decode


def _repeated(step: Callable[[Array, Array], Array], q: Array) -> Array:
    """``STEPS`` steps, each waiting for the one before, none of them alike."""

    def body(i: Array, q: Array) -> Array:
        return q + (1e-3 * step(i, q)).astype(q.dtype)

    return jax.lax.fori_loop(0, STEPS, body, q)


DENSE_DECODE = ("einsum", "einsum_head_major", "einsum_transposed", "jax_nn", "ranged")


def dense_decode_side(length: int, name: str, sizes: Sizes = SMALL) -> Side:
    """One query against a full cache, in one of XLA's ways; the fastest is the yardstick."""
    q, k, v = qkv(length, sizes, 1)
    B, K, H = sizes.batch, sizes.heads.kv_heads, sizes.heads.head_width
    group = sizes.heads.query_heads // K
    scale = H**-0.5

    def token_major(q: Array, k: Array, v: Array) -> Array:
        grouped = q.reshape(B, 1, K, group, H)
        logits = jnp.einsum("BTKGH,BSKH->BTKGS", grouped, k) * scale
        return jnp.einsum("BTKGS,BSKH->BTKGH", jax.nn.softmax(logits, -1), v).reshape(q.shape)

    def head_major(q: Array, k: Array, v: Array) -> Array:
        grouped = q.reshape(B, K, group, H)
        logits = jnp.einsum("BKGH,BKSH->BKGS", grouped, k) * scale
        return jnp.einsum("BKGS,BKSH->BKGH", jax.nn.softmax(logits, -1), v).reshape(q.shape)

    def transposed(q: Array, k: Array, v: Array) -> Array:
        grouped = q.reshape(B, K, group, H)
        logits = jnp.einsum("BKGH,BKHS->BKGS", grouped, k) * scale
        return jnp.einsum("BKGS,BKSH->BKGH", jax.nn.softmax(logits, -1), v).reshape(q.shape)

    def ranged(q: Array, k: Array, v: Array) -> Array:
        edge = jnp.zeros((B, 1), jnp.int32)
        return ranged_attention(q, k, v, edge, edge + length).out

    attend = {
        "einsum": token_major,
        "einsum_head_major": head_major,
        "einsum_transposed": transposed,
        "jax_nn": jax.nn.dot_product_attention,
        "ranged": ranged,
    }[name]
    if name.startswith("einsum_"):
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    if name == "einsum_transposed":
        k = k.swapaxes(2, 3)
    compiled, temp_bytes = compile_call(
        lambda q, k, v: _repeated(lambda i, q: attend(q, k, v), q), q, k, v
    )
    known = columns(
        op="dense_decode",
        mechanism="dense",
        implementation=name,
        direction="decode",
        length=length,
        temp_bytes=temp_bytes,
        byte_ceiling=1.0,
    )
    return Side(known, _steps(lambda: compiled(q, k, v)))


def gather_decode_side(
    config: NSA, length: int, indices: np.ndarray, picks: str, sizes: Sizes = SMALL
) -> Side:
    """``gather_blocks`` for the last query, with the picks of ``STEPS`` consecutive tokens."""
    q, k, v = qkv(length, sizes, 1)
    B, size = sizes.batch, config.selection_block
    k = k.reshape(B, -1, size, *k.shape[2:]).transpose(0, 3, 1, 4, 2)
    v = v.reshape(B, -1, size, *v.shape[2:]).transpose(0, 3, 1, 2, 4)
    lists = jnp.asarray(indices[:, -STEPS:].swapaxes(0, 1)[:, :, None])  # [STEPS, 1, 1, K, P]
    lists = jnp.broadcast_to(lists, (len(lists), B, *lists.shape[2:]))
    last = jnp.full((B, 1), length - 1, jnp.int32)

    def steps(q: Array, k: Array, v: Array, lists: Array) -> Array:
        def attend(i: Array, q: Array) -> Array:
            return gather_blocks(
                q,
                k,
                v,
                jax.lax.dynamic_index_in_dim(lists, i % len(lists), keepdims=False),
                positions=last,
                implementation=config.implementation,
            ).out

        return _repeated(attend, q)

    compiled, temp_bytes = compile_call(steps, q, k, v, lists)
    known = columns(
        op="gather_decode",
        mechanism="nsa",
        picks=picks,
        implementation=config.implementation,
        direction="decode",
        length=length,
        temp_bytes=temp_bytes,
        byte_ceiling=length / min(config.selected_blocks * config.selection_block, length),
    )
    return Side(known, _steps(lambda: compiled(q, k, v, lists)))


def module_decode_side(config: MechanismConfig, length: int, sizes: Sizes = SMALL) -> Side:
    """Whole steps of a mechanism on a cache that holds ``length`` tokens, the cache in place."""
    module = build_mechanism(config, sizes.heads, rngs=nnx.Rngs(0))
    graph, parameters = nnx.split(module)
    q, k, v, x = module_inputs(config, STEPS, 0.0, sizes)
    # Noise in place of a prefill, which would take longer than everything else together.
    empty = module.init_cache(sizes.batch, length + STEPS, jnp.dtype(sizes.dtype))
    cache = jax.tree.map(noise, empty)
    full = np.full((sizes.batch,), length, np.int32)

    def steps(parameters: Any, cache: Any, q: Array, k: Array, v: Array, x: Array) -> Any:
        module = nnx.merge(graph, parameters)

        def body(i: Array, carry: Any) -> Any:
            cache, out = carry

            def row(array: Array, axis: int) -> Array:
                return jax.lax.dynamic_slice_in_dim(array, i, 1, axis)

            heads = Heads(
                q=row(q, 1) + (1e-3 * out).astype(q.dtype),
                k=row(k, 2),
                v=row(v, 2),
                x=row(x, 1),
                rope=make_rope(ROPE, sizes.heads.head_width),
            )
            out, cache, _ = module(heads, cache)
            return cache, out

        return jax.lax.fori_loop(0, STEPS, body, (cache, jnp.zeros_like(q[:, :1])))

    def at_length(cache: Any) -> Any:
        return dataclasses.replace(cache, length=jnp.asarray(full))

    state = {"cache": at_length(cache)}
    compiled, temp_bytes = compile_call(steps, parameters, state["cache"], q, k, v, x, donate=(1,))

    def repeat() -> dict[str, float]:
        cache = jax.block_until_ready(state["cache"])

        def call() -> None:
            state["cache"], out = compiled(parameters, cache, q, k, v, x)
            jax.block_until_ready(out)

        times = timed(call, STEPS)
        state["cache"] = at_length(state["cache"])
        return times

    known = columns(
        op="module",
        mechanism=mechanism_name(config),
        picks=None if isinstance(config, Dense) else "own",
        implementation=config.implementation,
        direction="decode",
        length=length,
        temp_bytes=temp_bytes,
        byte_ceiling=length / tokens_read(config, length)
        if isinstance(config, NSA | Dense)
        else None,
    )
    return Side(known, repeat)


def noise(leaf: Array) -> Array:
    """Random numbers or codes in the leaf's shape; positions and lengths stay."""
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return normal(leaf.shape, 6, leaf.dtype)
    if leaf.dtype == jnp.uint32:
        return jax.random.bits(jax.random.key(6), leaf.shape, jnp.uint32)
    return leaf


def mechanism_name(config: MechanismConfig) -> str:
    """The name the config is registered by."""
    return next(name for name, kind in MECHANISMS.items() if kind is type(config))


def tokens_read(config: NSA | Dense, length: int) -> int:
    """Keys a decode step has to read at least, compressed ones counted like the others."""
    if isinstance(config, Dense):
        return length if config.window is None else min(config.window, length)
    compressed = max((length - config.compression_block) // config.compression_stride + 1, 0)
    selected = min(config.selected_blocks * config.selection_block, length)
    return compressed + selected + min(config.window, length)


def _steps(call: Callable[[], Any]) -> Callable[[], dict[str, float]]:
    return lambda: timed(lambda: jax.block_until_ready(call()), STEPS)


# A whole attention layer, as the PyTorch package offers it: norm, projections, NSA, projection


def layer_call(config: NSA, length: int, direction: str) -> tuple[Callable[[], Any], int]:
    """The layer on [1, T, D] and its temporary bytes."""
    shape = SMALL.heads
    heads, keys, width, D = shape.query_heads, shape.kv_heads, shape.head_width, shape.model_width
    branches = config.kv_branches
    graph, parameters = nnx.split(build_mechanism(config, shape, rngs=nnx.Rngs(0)))
    sizes = {
        "norm": (D,),
        "q": (D, heads, width),
        "k": (branches, D, keys, width),
        "v": (branches, D, keys, width),
        "out": (heads, width, D),
    }
    weights = {
        name: normal(size, 7 + seed) * D**-0.5 for seed, (name, size) in enumerate(sizes.items())
    }

    def layer(parameters: Any, weights: dict[str, Array], x: Array) -> Array:
        module = nnx.merge(graph, parameters)
        scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
        normed = x * scale * weights["norm"][None, None]
        projected = Heads(
            q=jnp.einsum("BTD,DNH->BTNH", normed, weights["q"]),
            k=jnp.einsum("BTD,RDKH->RBTKH", normed, weights["k"]),
            v=jnp.einsum("BTD,RDKH->RBTKH", normed, weights["v"]),
            x=normed,
            rope=make_rope(ROPE, width),
        )
        return jnp.einsum("BTNH,NHD->BTD", module(projected)[0], weights["out"])

    x = normal((1, length, D), 4)
    return directed(layer, direction, (parameters, weights, x))


def serve_layer(lines: Any, answer: Callable[[str], None], peak: Callable[[], int]) -> None:
    """The protocol of bench_peers.py for our own layer, so that its peak memory is its own."""
    call: Callable[[], Any] | None = None
    for line in lines:
        request = json.loads(line)
        if request["command"] == "prepare":
            start = peak()
            config = NSA(**request["config"])
            call, temp_bytes = layer_call(config, request["length"], request["direction"])
            reply: dict[str, Any] = {"temp_bytes": temp_bytes, "start_rss_bytes": start}
        else:
            assert call is not None
            reply = timed(call)
        answer(json.dumps(reply | {"peak_rss_bytes": peak()}))
