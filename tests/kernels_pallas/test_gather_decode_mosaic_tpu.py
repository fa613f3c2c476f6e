"""Gathered decoding on TPUs: the kernel in the strict interpreter, lowered, and compiled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_proof import hold, strictly_interpreted

from kernels_pallas.ahead_of_time import TPU_CHIPS, compile_for_tpu, lower_for_tpu
from kernels_pallas.gather_decode import (
    gather_blocks,
    gather_decode,
    gather_tokens,
    mosaic_tpu,
)

LIMIT = {"float32": 1e-5, "bfloat16": 1e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    op: str
    J: int
    dtype: str = "float32"
    B: int = 2
    T: int = 2
    N: int = 4
    K: int = 2
    H: int = 24
    Hv: int = 40
    S: int = 45
    L: int = 8
    P: int = 4
    causal: bool = True


def example(case, seed=0):
    """q, k, v token-major, lists and positions; the first row of the last sequence is empty."""
    rng = np.random.default_rng(seed)
    B, T, S, L = case.B, case.T, case.S, case.L
    q = rng.normal(size=(B, T, case.N, case.H))
    k = rng.normal(size=(B, S, case.K, case.H))
    v = rng.normal(size=(B, S, case.K, case.Hv))
    blocks = -(-S // L)
    indices = np.full((B, T, case.J, case.P), -1, np.int32)
    for place in np.ndindex(B, T, case.J):
        count = int(rng.integers(0, min(case.P, blocks) + 1))
        indices[place][:count] = np.sort(rng.choice(blocks, count, replace=False))
    indices[-1, 0] = -1
    positions = rng.integers(-1, S, size=(B, T)).astype(np.int32)
    positions[0] = S - 1
    unread = ~seen_keys(case, indices, positions)
    return q, k, v, indices, positions, unread


def seen_keys(case, indices, positions):
    """[B, S, K]: keys that some query of the kv head sees."""
    seen = np.zeros((case.B, case.S, case.K), bool)
    for b, t, n in np.ndindex(case.B, case.T, case.N):
        j = n * case.J // case.N
        for block in indices[b, t, j]:
            if block >= 0:
                end = min((block + 1) * case.L, case.S)
                end = min(end, positions[b, t] + 1) if case.causal else end
                seen[b, block * case.L : end, n * case.K // case.N] = True
    return seen


def call(case, implementation, indices, positions, **tiles):
    """The op as a function of (q, k, v), with k and v token-major."""
    options = {"positions": jnp.asarray(positions), "implementation": implementation} | tiles
    indices = jnp.asarray(indices)
    if case.op == "tokens":
        return lambda q, k, v: gather_tokens(q, jnp.concatenate([k, v], 3), indices, **options)
    options["causal"] = case.causal
    if case.op == "decode":
        return lambda q, k, v: gather_decode(q, k, v, indices, block_size=case.L, **options)

    def blocks(q, k, v):
        shape = (case.B, case.S // case.L, case.L, case.K, -1)
        k = jnp.transpose(k.reshape(shape), (0, 3, 1, 4, 2))
        v = jnp.transpose(v.reshape(shape), (0, 3, 1, 2, 4))
        return gather_blocks(q, k, v, indices, **options)

    return blocks


def graded(function, seed):
    """Output and the gradients of a random linear function of out and lse."""

    def loss(q, k, v):
        output = function(q, k, v)
        rng = np.random.default_rng(seed)
        lse = jnp.where(jnp.isneginf(output.lse), 0.0, output.lse)
        outputs = (output.out, lse)
        weights = [jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in outputs]
        parts = (jnp.sum(w * x.astype(jnp.float32)) for w, x in zip(weights, outputs, strict=True))
        return sum(parts), output

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


def check(case, seed=0, gradients=True):
    *arrays, indices, positions, unread = example(case, seed)
    clean = [jnp.asarray(x, case.dtype) for x in arrays]
    # Only gather_decode promises not to look at what nobody sees.
    poison = np.nan if case.op == "decode" else 1e4
    poisoned = [clean[0], *(jnp.where(unread[..., None], poison, x) for x in clean[1:])]
    wanted_from = [x.astype(jnp.float32) for x in clean]
    kernel = call(case, "mosaic_tpu", indices, positions)
    reference = call(case, "reference", indices, positions)
    with strictly_interpreted("tpu"):
        if gradients:
            run = graded(kernel, seed)
            slopes, output = run(*poisoned)
            again, _ = run(*poisoned)
            for a, b in zip(slopes, again, strict=True):
                np.testing.assert_array_equal(a, b)
        else:
            slopes, output = (), jax.jit(kernel)(*poisoned)
        jax.block_until_ready(output)
    wanted_slopes, wanted = graded(reference, seed)(*wanted_from)
    assert output.out.dtype == jnp.dtype(case.dtype)
    assert output.lse.dtype == jnp.float32
    empty = np.isneginf(wanted.lse)
    np.testing.assert_array_equal(np.isneginf(output.lse), empty)
    assert not np.any(np.asarray(output.out, np.float32)[empty])
    lse, wanted_lse = (np.where(empty, 0, x) for x in (output.lse, wanted.lse))
    limit = LIMIT[case.dtype]
    hold(output.out.astype(jnp.float32), wanted.out, limit)
    hold(lse, wanted_lse, limit)
    for name, a, b in zip(
        "qkv"[: 3 * gradients], slopes, wanted_slopes[: 3 * gradients], strict=True
    ):
        hold(a.astype(jnp.float32), b, limit, name)


@pytest.mark.parametrize(
    "case",
    [
        Case("decode", J=4, S=45, L=7),
        Case("tokens", J=1, dtype="bfloat16", L=1, P=9, H=64, Hv=64),
        Case("blocks", J=2, S=48),
    ],
    ids=lambda case: f"{case.op}-{case.dtype}",
)
def test_kernel_matches_the_reference_in_the_strict_interpreter(case):
    check(case, gradients=case.op != "blocks")


@pytest.mark.full
@pytest.mark.parametrize(
    "case",
    [
        Case("decode", J=2, dtype="bfloat16", H=192, Hv=128),
        Case("decode", J=1, dtype="bfloat16", S=45, L=64),
        Case("decode", J=1, S=300, L=150, P=2, K=1, N=3, T=3),
        Case("decode", J=2, S=45, causal=False),
        Case("decode", J=16, S=300, L=1, P=140, N=16, K=1, B=1, T=1),
        Case("blocks", J=4, S=384, L=128, P=3, N=4, dtype="bfloat16", H=128, Hv=128),
        Case("blocks", J=1, S=60, L=20, P=3, dtype="bfloat16"),
        Case("blocks", J=2, S=64, L=16, P=3, dtype="bfloat16", causal=False, H=256, Hv=256),
        Case("tokens", J=2, S=300, L=1, P=290, B=1, T=1),
        Case("tokens", J=8, L=1, P=9, N=8, K=4, dtype="bfloat16", H=96, Hv=96),
    ],
    ids=lambda case: f"{case.op}-{case.dtype}-J{case.J}-L{case.L}-S{case.S}",
)
def test_shapes_at_the_edges(case):
    check(case)


@pytest.mark.full
@pytest.mark.parametrize("op", ["decode", "blocks", "tokens"])
def test_random_shapes(op):
    """A hundred shapes in all."""
    rng = np.random.default_rng(["decode", "blocks", "tokens"].index(op))
    for seed in range(34):
        K, G = int(rng.choice([1, 2, 3, 4])), int(rng.choice([1, 2, 4, 8, 16]))
        dtype = str(rng.choice(["float32", "bfloat16"]))
        if dtype == "bfloat16" and op != "blocks":
            K = max(2, K // 2 * 2)
        L = 1 if op == "tokens" else int(rng.choice([1, 4, 7, 16, 32, 64, 130]))
        S = L * int(rng.integers(1, 6)) if op == "blocks" else int(rng.integers(1, 200))
        H, Hv = (int(rng.choice([8, 64, 96, 128, 192, 256])) for _ in range(2))
        case = Case(
            op,
            J=int(rng.choice([1, K, K * G])),
            dtype=dtype,
            B=int(rng.integers(1, 3)),
            T=int(rng.integers(1, 4)),
            N=K * G,
            K=K,
            H=H,
            Hv=Hv,
            S=S,
            L=L,
            P=int(rng.integers(1, 8)),
            causal=op == "tokens" or bool(rng.integers(2)),
        )
        try:
            check(case, seed, gradients=seed % 4 == 0)
        except Exception as error:
            raise AssertionError(f"{case} seed {seed}") from error


@pytest.mark.parametrize("op", ["decode", pytest.param("tokens", marks=pytest.mark.full)])
def test_long_lists_go_in_steps_and_splits_over_two_cores(op):
    """Two cores share the items unevenly; parts of a list are merged."""
    if op == "decode":
        case = Case(op, J=1, B=1, T=3, N=1, K=1, S=300, L=32, P=9)
        tiles = mosaic_tpu.Tiles(keys=128, pieces=8, cores=2)
    else:
        case = Case(op, J=1, B=1, T=3, N=3, K=3, S=300, L=1, P=290)
        tiles = mosaic_tpu.Tiles(keys=128, pieces=128, cores=2)
    q, k, v, indices, positions, _ = example(case)
    indices[0, 0] = np.arange(case.P)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    common = {"positions": jnp.asarray(positions), "scale": 0.3}
    indices = jnp.asarray(indices)
    with strictly_interpreted("tpu"):
        if op == "tokens":
            both = jnp.concatenate([k, v], axis=3)
            output = mosaic_tpu.gather_tokens(q, both, indices, tiles=tiles, **common)
        else:
            output = mosaic_tpu.gather_decode(
                q, k, v, indices, block_size=32, causal=True, tiles=tiles, **common
            )
        jax.block_until_ready(output)
    options = {"block_size": case.L, "implementation": "reference", **common}
    wanted = jax.jit(functools.partial(gather_decode, **options))(q, k, v, indices)
    for a, b in zip(output, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def decode_call(op, *, J=4, P=16, L=64, B=8, S=131072, N=32, K=4, H=128, Hv=128, dtype="bfloat16"):
    """A decode step at a size that is used, its arguments, bytes of cache and of lists."""

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype)

    q, indices = shape(B, 1, N, H), shape(B, 1, J, P, dtype="int32")
    positions = shape(B, 1, dtype="int32")
    options = {"implementation": "mosaic_tpu"}
    if op == "tokens":

        def run(q, kv, indices, positions):
            return gather_tokens(q, kv, indices, positions=positions, **options)

        arguments, L = (q, shape(B, S, K, H + Hv), indices, positions), 1
    elif op == "blocks":

        def run(q, k, v, indices, positions):
            return gather_blocks(q, k, v, indices, positions=positions, **options)

        cache = (shape(B, K, S // L, H, L), shape(B, K, S // L, L, Hv))
        arguments = (q, *cache, indices, positions)
    else:

        def run(q, k, v, indices, positions):
            return gather_decode(q, k, v, indices, block_size=L, positions=positions, **options)

        arguments = (q, shape(B, S, K, H), shape(B, S, K, Hv), indices, positions)
    cache = B * S * K * (H + Hv) * jnp.dtype(dtype).itemsize
    return run, arguments, cache, B * max(J, K) * P * L * 4


def assert_memory(op, chip, **sizes):
    """Temporaries: an int32 per fetched key of a list and its slots, filled up to whole steps
    and registers (at most twice as many), made from booleans and numbers of the same size; queries
    and outputs in float32. Nothing of the cache's size."""
    run, arguments, cache, lists = decode_call(op, **sizes)
    compiled = compile_for_tpu(run, *arguments, chip=chip)
    used = compiled.memory_analysis().temp_size_in_bytes
    assert used <= 4 * lists + 2**21
    assert used < cache / 50


@pytest.mark.parametrize("chip", TPU_CHIPS)
def test_compiles_for_decoding_at_128k_without_a_copy_of_the_cache(chip):
    assert_memory("tokens", chip, P=4176)
    assert_memory("blocks", chip, P=96)


@pytest.mark.full
@pytest.mark.parametrize("chip", TPU_CHIPS)
@pytest.mark.parametrize(
    ("op", "sizes"),
    [
        ("tokens", {"P": 4176, "J": 1}),
        ("tokens", {"P": 4176, "J": 32}),
        ("tokens", {"P": 4176, "dtype": "float32", "B": 4}),
        ("tokens", {"P": 4176, "H": 64, "Hv": 64}),
        ("tokens", {"P": 1024, "S": 32768, "H": 256, "Hv": 256}),
        ("blocks", {"P": 16}),
        ("blocks", {"P": 48, "L": 128}),
        ("blocks", {"P": 16, "J": 32, "dtype": "float32", "B": 4}),
        ("blocks", {"P": 16, "S": 32768, "B": 32}),
        ("decode", {"P": 16}),
        ("decode", {"P": 96, "J": 1}),
        ("decode", {"P": 16, "J": 8, "K": 8, "H": 256}),
        ("decode", {"P": 16, "L": 20, "H": 256, "S": 65501}),
        ("decode", {"P": 16, "L": 7, "dtype": "float32", "B": 4}),
        ("decode", {"P": 4, "L": 500, "H": 256, "Hv": 256, "B": 4}),
        ("decode", {"P": 1024, "L": 1, "B": 4}),
    ],
    ids=str,
)
def test_compiles_at_every_size_without_a_copy_of_the_cache(chip, op, sizes):
    assert_memory(op, chip, **sizes)


def test_lowers_with_its_gradient():
    run, arguments, *_ = decode_call("decode", S=1000, B=2)

    def loss(q, k, v, indices, positions):
        output = run(q, k, v, indices, positions)
        return jnp.sum(output.out.astype(jnp.float32)) + jnp.sum(output.lse)

    graded = jax.value_and_grad(loss, argnums=(0, 1, 2))
    assert "tpu_custom_call" in lower_for_tpu(graded, *arguments)


@pytest.mark.full
@pytest.mark.parametrize("chip", TPU_CHIPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("widths", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_every_width_lowers(chip, dtype, widths):
    for op in ("decode", "blocks", "tokens"):
        for J in (1, 4, 32):
            sizes = {"J": J, "S": 1024, "B": 2, "H": widths[0], "Hv": widths[1], "dtype": dtype}
            run, arguments, *_ = decode_call(op, **sizes)
            assert "tpu_custom_call" in lower_for_tpu(run, *arguments, chip=chip)


def test_what_is_not_served_names_the_way_out():
    case = Case("decode", J=1, K=1, N=2, dtype="bfloat16")
    *arrays, indices, positions, _ = example(case)
    odd = [jnp.asarray(x, "bfloat16") for x in arrays]
    with pytest.raises(NotImplementedError, match=r"kv heads in pairs.*K=1; use"):
        call(case, "mosaic_tpu", indices, positions)(*odd)
    mixed = [odd[0], *(jnp.asarray(x, "float32") for x in arrays[1:])]
    with pytest.raises(NotImplementedError, match="float32 or bfloat16, one for all"):
        call(case, "mosaic_tpu", indices, positions)(*mixed)
    with pytest.raises(ValueError, match="keys=100"):
        mosaic_tpu.Tiles(keys=100)
    with pytest.raises(ValueError, match="pieces=0"):
        mosaic_tpu.Tiles(pieces=0)
    with pytest.raises(ValueError, match="cores=3"):
        mosaic_tpu.Tiles(cores=3)
