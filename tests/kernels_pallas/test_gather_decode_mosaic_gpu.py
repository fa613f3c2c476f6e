"""The Mosaic GPU kernels of gathered decoding: interpreter, lowering, and on the device itself."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_proof import hold, strictly_interpreted

from kernels_pallas.ahead_of_time import lower_for_gpu
from kernels_pallas.common import AttentionOutput
from kernels_pallas.gather_decode import (
    api,
    gather_blocks,
    gather_decode,
    gather_tokens,
    mosaic_gpu,
    reference,
)
from kernels_pallas.gather_decode.mosaic_gpu_attend import Tiles, merge_splits, sizes_for

on_device = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")

BOUND = 1e-2
"""Relative error (RMS) of bfloat16 and float16."""


def example(
    seed, *, B=1, T=1, N=4, K=2, J=2, H=64, Hv=64, S=200, L=64, P=3, dtype=jnp.bfloat16, full=False
):
    """q, k, v, indices, positions; some lists are empty and some rows see nothing."""
    rng = np.random.default_rng(seed)
    q, k, v = (
        jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
        for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, Hv))
    )
    blocks = -(-S // L)
    indices = np.full((B, T, J, P), -1, np.int32)
    for place in np.ndindex(B, T, J):
        most = min(P, blocks)
        count = most if full else int(rng.integers(0, most + 1))
        indices[place][:count] = np.sort(rng.choice(blocks, count, replace=False))
    indices[0, 0, 0, 0] = max(indices[0, 0, 0, 0], 0)  # Somebody sees something.
    positions = rng.integers(S // 2, S, size=(B, T))
    if not full and B * T > 1:
        positions[-1, -1] = -1
    return q, k, v, jnp.asarray(indices), jnp.asarray(positions, jnp.int32)


def expected(q, k, v, indices, positions, *, block_size, causal=True, scale=None):
    """Outputs and gradients of the reference in float64."""
    scale = q.shape[3] ** -0.5 if scale is None else scale

    def total(q, k, v):
        output = reference.gather_decode(
            *(q, k, v, indices),
            block_size=block_size,
            positions=positions,
            causal=causal,
            scale=scale,
        )
        return weighted(output), output

    with jax.enable_x64(True):
        arrays = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v)]
        graded = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))
        gradients, output = graded(*arrays)
    return output, gradients


def weighted(output):
    """A loss that depends on every number of both outputs."""
    # Representable in bfloat16, or the cotangent of out would be rounded before it gets here.
    weight = jnp.cos(jnp.arange(output.out.size)).astype(jnp.bfloat16).reshape(output.out.shape)
    finite = jnp.where(jnp.isneginf(output.lse), 0.0, output.lse)
    weights = jnp.sin(1 + jnp.arange(finite.size)).reshape(finite.shape)
    return jnp.sum(output.out.astype(finite.dtype) * weight.astype(finite.dtype)) + jnp.sum(
        finite * weights
    )


def check(output, gradients, want, want_gradients, bound=BOUND):
    """Compare everything; rows that saw nothing must be exactly so."""
    dead = np.isneginf(np.asarray(want.lse))
    np.testing.assert_array_equal(np.isneginf(np.asarray(output.lse)), dead)
    assert np.all(np.asarray(output.out, np.float64)[dead] == 0)
    hold(output.out, want.out, bound)
    seen = [np.where(dead, 0, np.asarray(x.lse, np.float64)) for x in (output, want)]
    hold(*seen, 1e-5)
    for gradient, wanted in zip(gradients, want_gradients, strict=True):
        assert np.all(np.isfinite(np.asarray(gradient, np.float64)))
        hold(gradient, wanted, bound)
    assert np.all(np.asarray(gradients[0], np.float64)[dead] == 0)


def outputs_and_gradients(call, *arrays):
    """Under one jit: (AttentionOutput, gradients)."""

    def total(*arrays):
        output = call(*arrays)
        return weighted(output), output

    argnums = tuple(range(len(arrays)))
    gradients, output = jax.jit(jax.grad(total, argnums=argnums, has_aux=True))(*arrays)
    return jax.block_until_ready((AttentionOutput(*output), gradients))


def poisoned(cache, positions):
    """NaN in every row that no query of a sequence sees."""
    rows = jnp.arange(cache.shape[1])[None, :, None, None]
    unseen = rows > jnp.max(positions, axis=1)[:, None, None, None]
    return jnp.where(unseen, jnp.nan, cache)


def in_blocks(k, v, L):
    """The blocked cache of the same keys and values."""
    B, S, K, H = k.shape
    keys = k.reshape(B, S // L, L, K, H).transpose(0, 3, 1, 4, 2)
    return keys, v.reshape(B, S // L, L, K, v.shape[3]).transpose(0, 3, 1, 2, 4)


def out_of_blocks(k, v):
    """Gradients of a blocked cache, token by token."""
    B, K, M, H, L = k.shape
    keys = k.transpose(0, 2, 4, 1, 3).reshape(B, M * L, K, H)
    return keys, v.transpose(0, 2, 3, 1, 4).reshape(B, M * L, K, -1)


def backend(op, width, tiles):
    """The kernel through the api, or itself where it shall be cut in a certain way."""
    if tiles is None:
        return partial(getattr(api, op), implementation="mosaic_gpu")
    return partial(getattr(mosaic_gpu, op), tiles=tiles, scale=width**-0.5)


def run_decode(arguments, L, causal=True, tiles=None):
    q, k, v, indices, positions = arguments
    function = backend("gather_decode", q.shape[3], tiles)

    def call(q, k, v):
        return function(q, k, v, indices, block_size=L, positions=positions, causal=causal)

    return outputs_and_gradients(call, q, k, v)


def run_blocks(arguments, L, causal=True, tiles=None):
    q, k, v, indices, positions = arguments
    function = backend("gather_blocks", q.shape[3], tiles)

    def call(q, k, v):
        return function(q, k, v, indices, positions=positions, causal=causal)

    output, (dq, dk, dv) = outputs_and_gradients(call, q, *in_blocks(k, v, L))
    return output, (dq, *out_of_blocks(dk, dv))


def run_tokens(arguments, tiles=None):
    q, k, v, indices, positions = arguments
    width = q.shape[3]
    function = backend("gather_tokens", width, tiles)

    def call(q, kv):
        return function(q, kv, indices, positions=positions)

    output, (dq, dkv) = outputs_and_gradients(call, q, jnp.concatenate([k, v], axis=-1))
    return output, (dq, dkv[..., :width], dkv[..., width:])


def prove_decode(seed, L, causal=True, tiles=None, **sizes):
    q, k, v, indices, positions = example(seed, L=L, **sizes)
    want = expected(q, k, v, indices, positions, block_size=L, causal=causal)
    if causal:
        k, v = poisoned(k, positions), poisoned(v, positions)
    with strictly_interpreted("gpu"):
        result = run_decode((q, k, v, indices, positions), L, causal, tiles)
    check(*result, *want)
    return result, (q, k, v, indices, positions)


def prove_blocks(seed, L, causal=True, tiles=None, **sizes):
    arguments = example(seed, L=L, **sizes)
    want = expected(*arguments, block_size=L, causal=causal)
    with strictly_interpreted("gpu"):
        result = run_blocks(arguments, L, causal, tiles)
    check(*result, *want)


def prove_tokens(seed, tiles=None, **sizes):
    arguments = example(seed, L=1, **sizes)
    want = expected(*arguments, block_size=1)
    with strictly_interpreted("gpu"):
        result = run_tokens(arguments, tiles)
    check(*result, *want)


def test_decode_of_odd_sizes_matches_reference_whatever_unseen_rows_hold():
    """24-key blocks end past the 219 keys, widths differ, G = 2; gradients repeat bit by bit.

    One program walks a whole list, through a ring that is shorter.
    """
    tiles = Tiles(slots=2, programs=1)
    sizes = {"J": 1, "H": 192, "Hv": 128, "S": 219, "P": 6}
    result, arguments = prove_decode(0, 24, tiles=tiles, full=True, **sizes)
    with strictly_interpreted("gpu"):
        again = run_decode(arguments, 24, tiles=tiles)
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_blocks_match_reference():
    """Half-step blocks of width 96: one list for all of 2 x 8 heads."""
    prove_blocks(1, 32, N=16, J=1, H=96, Hv=96, S=160, P=4)


def test_tokens_match_reference():
    """Two steps of tokens through one slot, a list for every query head."""
    prove_tokens(2, tiles=Tiles(slots=1, programs=1), J=4, S=150, P=90, full=True)


@pytest.mark.full
def test_rows_that_see_nothing():
    """Empty lists, and a query before the first key; tokens one by one from two arrays."""
    prove_decode(5, 3, T=2, K=1, J=1, N=2, S=40, P=4)


SHAPES = {"B": 8, "T": 1, "N": 64, "K": 4, "S": 131072}


def shapes(H, Hv, J, P, dtype=jnp.bfloat16, **changes):
    """q, k, v, indices, positions of the decode benchmark, not their contents."""
    at = SHAPES | changes
    cache = (at["B"], at["S"], at["K"])
    return (
        jax.ShapeDtypeStruct((at["B"], at["T"], at["N"], H), dtype),
        jax.ShapeDtypeStruct((*cache, H), dtype),
        jax.ShapeDtypeStruct((*cache, Hv), dtype),
        jax.ShapeDtypeStruct((at["B"], at["T"], J, P), jnp.int32),
        jax.ShapeDtypeStruct((at["B"], at["T"]), jnp.int32),
    )


def lower(call, *arrays):
    """Forward, and forward with backward."""

    def total(*arrays):
        return weighted(call(*arrays))

    floats = tuple(n for n, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating))
    assert "mosaic_gpu" in lower_for_gpu(call, *arrays)
    assert "mosaic_gpu" in lower_for_gpu(jax.grad(total, argnums=floats), *arrays)


def lower_decode(L, *arrays):
    def call(q, k, v, indices, positions):
        return gather_decode(
            *(q, k, v, indices), block_size=L, positions=positions, implementation="mosaic_gpu"
        )

    lower(call, *arrays)


def lower_blocks(L, q, k, v, indices, positions):
    B, S, K, H = k.shape
    keys = jax.ShapeDtypeStruct((B, K, S // L, H, L), k.dtype)
    values = jax.ShapeDtypeStruct((B, K, S // L, L, v.shape[3]), v.dtype)

    def call(q, k, v, indices, positions):
        return gather_blocks(*(q, k, v, indices), positions=positions, implementation="mosaic_gpu")

    lower(call, q, keys, values, indices, positions)


def lower_tokens(q, k, v, indices, positions):
    both = jax.ShapeDtypeStruct((*k.shape[:3], k.shape[3] + v.shape[3]), k.dtype)

    def call(q, kv, indices, positions):
        return gather_tokens(q, kv, indices, positions=positions, implementation="mosaic_gpu")

    lower(call, q, both, indices, positions)


def test_decode_shapes_lower_for_hopper():
    lower_decode(64, *shapes(128, 128, 4, 16))
    lower_blocks(64, *shapes(128, 128, 4, 96))
    lower_tokens(*shapes(128, 128, 4, 4176))


@pytest.mark.full
@pytest.mark.parametrize(
    ("H", "Hv"), [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (80, 48), (320, 256)]
)
@pytest.mark.parametrize("J", [1, 4, 64])
def test_every_width_lowers(H, Hv, J):
    for dtype in (jnp.bfloat16, jnp.float16):
        for L in (1, 8, 16, 32, 64, 128, 200):
            if L % 8 == 0 or (H % 64 == Hv % 64 == 0 and H <= 256):
                lower_decode(L, *shapes(H, Hv, J, 16, dtype))
        for L in (16, 32, 64, 128):
            lower_blocks(L, *shapes(H, Hv, J, 16, dtype))
    if H <= 256:
        lower_tokens(*shapes(H, Hv, J, 300))


def test_splits_merge_by_lse_and_empty_ones_do_not_count():
    sizes = sizes_for("test", 2, 3, 64, 64, jnp.bfloat16)
    rng = np.random.default_rng(0)
    out, lse = rng.normal(size=(4, 64, 8)), rng.normal(size=(4, 8)) * 3
    lse[0, 0] = lse[2:, 1] = -np.inf
    out[0, :, 0] = 0
    out[2:, :, 1] = 0
    merged, total = merge_splits(
        jnp.asarray(out, jnp.float32), jnp.asarray(lse, jnp.float32), sizes
    )
    weight = np.exp(lse).reshape(2, 2, 8)
    with np.errstate(divide="ignore", invalid="ignore"):
        want = (
            np.einsum("isc,isvc->icv", weight, out.reshape(2, 2, 64, 8)) / weight.sum(1)[..., None]
        )
        want_total = np.log(weight.sum(1))
    np.testing.assert_allclose(merged, np.nan_to_num(want[:, :3]), atol=1e-5)
    np.testing.assert_allclose(total, want_total[:, :3], atol=1e-5)


def test_what_it_cannot_serve_it_refuses():
    q, k, v, indices, positions = example(3, dtype=jnp.float32)

    def decode(q, k, v, **options):
        return gather_decode(
            *(q, k, v, indices),
            positions=positions,
            implementation="mosaic_gpu",
            **({"block_size": 64} | options),
        )

    with pytest.raises(NotImplementedError, match="float32"):
        decode(q, k, v)
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    with pytest.raises(NotImplementedError, match="H=60"):
        decode(*(x[..., :60] for x in half))
    wide = [jnp.concatenate([x] * 8, axis=-1) for x in half]
    with pytest.raises(NotImplementedError, match="multiples of 64"):
        decode(*(x[..., :48] for x in half), block_size=1)
    with pytest.raises(NotImplementedError, match="shared memory"):
        decode(*wide, block_size=1)
    keys, values = in_blocks(half[1], half[2], 8)
    with pytest.raises(NotImplementedError, match="blocks of 8 keys"):
        gather_blocks(
            half[0], keys, values, indices, positions=positions, implementation="mosaic_gpu"
        )


def random_tiles(rng):
    """The heuristic, or few programs that go round a short ring."""
    if rng.random() < 0.3:
        return None
    return Tiles(slots=int(rng.integers(1, 4)), programs=int(rng.choice([1, 8])))


@pytest.mark.full
def test_random_decodes():
    for seed in range(40):
        rng = np.random.default_rng(1000 + seed)
        K, G = int(rng.choice([1, 2])), int(rng.choice([1, 2, 3, 4, 8, 16]))
        L = int(rng.choice([1, 3, 8, 16, 24, 32, 40, 64, 72, 128]))
        H, Hv = [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (80, 48)][
            int(rng.integers(6))
        ]
        if L < 8:  # Tokens are fetched in multiples of 64 numbers.
            H, Hv = -(-H // 64) * 64, -(-Hv // 64) * 64
        prove_decode(
            seed,
            L,
            causal=bool(rng.random() < 0.7),
            tiles=random_tiles(rng),
            **{"B": int(rng.integers(1, 3)), "T": int(rng.integers(1, 4)), "N": K * G, "K": K},
            J=int(rng.choice([1, K, K * G])),
            **{"H": H, "Hv": Hv, "S": int(rng.integers(130, 300))},
            P=int(rng.integers(1, 5) if L > 3 else rng.integers(1, 80)),
            dtype=jnp.bfloat16 if rng.random() < 0.8 else jnp.float16,
        )


@pytest.mark.full
def test_random_blocks():
    for seed in range(30):
        rng = np.random.default_rng(2000 + seed)
        K, G, L = (
            int(rng.choice([1, 2])),
            int(rng.choice([1, 2, 5, 16])),
            int(rng.choice([16, 32, 48, 64, 128])),
        )
        H, Hv = [(64, 64), (96, 96), (128, 128), (192, 128)][int(rng.integers(4))]
        prove_blocks(
            seed,
            L,
            causal=bool(rng.random() < 0.7),
            tiles=random_tiles(rng),
            **{"B": int(rng.integers(1, 3)), "T": int(rng.integers(1, 3)), "N": K * G, "K": K},
            J=int(rng.choice([1, K, K * G])),
            **{"H": H, "Hv": Hv, "S": L * int(rng.integers(2, 6)), "P": int(rng.integers(1, 5))},
        )


@pytest.mark.full
def test_random_tokens():
    for seed in range(30):
        rng = np.random.default_rng(3000 + seed)
        K, G = int(rng.choice([1, 2])), int(rng.choice([1, 2, 4, 16]))
        H, Hv = [(64, 64), (96, 96), (128, 128), (192, 128)][int(rng.integers(4))]
        prove_tokens(
            seed,
            tiles=random_tiles(rng),
            **{"B": int(rng.integers(1, 3)), "T": int(rng.integers(1, 3)), "N": K * G, "K": K},
            J=int(rng.choice([1, K, K * G])),
            **{"H": H, "Hv": Hv, "S": int(rng.integers(80, 200)), "P": int(rng.integers(1, 150))},
        )


@pytest.mark.full
def test_more_than_a_tile_of_heads_a_list():
    """130 heads read one list: three tiles of columns."""
    prove_decode(4, 16, N=130, K=1, J=1, P=7)


def device_reference(q, k, v, indices, positions, L):
    """Outputs and gradients of the reference on the device, float32 at full precision."""

    def total(q, k, v):
        output = reference.gather_decode(
            *(q, k, v, indices),
            block_size=L,
            positions=positions,
            causal=True,
            scale=q.shape[3] ** -0.5,
        )
        return weighted(output), output

    with jax.default_matmul_precision("highest"):
        arrays = [x.astype(jnp.float32) for x in (q, k, v)]
        gradients, output = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return output, gradients


DEVICE_CASES = [
    {"L": 64, "B": 2, "N": 64, "K": 4, "J": 4, "H": 128, "Hv": 128, "S": 16384, "P": 16},
    {"L": 64, "B": 1, "N": 16, "K": 4, "J": 4, "H": 64, "Hv": 64, "S": 8192, "P": 96},
    {"L": 32, "B": 2, "T": 3, "N": 8, "K": 2, "J": 8, "H": 96, "Hv": 96, "S": 2048, "P": 20},
    {"L": 128, "B": 2, "N": 32, "K": 2, "J": 1, "H": 192, "Hv": 128, "S": 4096, "P": 9},
    {"L": 16, "B": 3, "N": 16, "K": 1, "J": 1, "H": 256, "Hv": 256, "S": 4096, "P": 30},
]


@pytest.mark.device
@on_device
@pytest.mark.parametrize("case", DEVICE_CASES)
def test_device_decode_and_blocks_match_reference(case):
    L = case["L"]
    q, k, v, indices, positions = example(5, **case)
    want = device_reference(q, k, v, indices, positions, L)
    check(*run_blocks((q, k, v, indices, positions), L), *want)
    arguments = (q, poisoned(k, positions), poisoned(v, positions), indices, positions)
    result = run_decode(arguments, L)
    check(*result, *want)
    again = run_decode(arguments, L)
    np.testing.assert_array_equal(np.asarray(result[0].out), np.asarray(again[0].out))
    np.testing.assert_array_equal(np.asarray(result[0].lse), np.asarray(again[0].lse))


@pytest.mark.device
@on_device
@pytest.mark.parametrize("L", [1, 3, 24, 40, 72])
def test_device_decode_of_odd_blocks(L):
    case = {"B": 2, "T": 2, "H": 128, "Hv": 128, "S": 1003, "P": 12 if L > 1 else 300}
    q, k, v, indices, positions = example(6, L=L, **case)
    want = device_reference(q, k, v, indices, positions, L)
    arguments = (q, poisoned(k, positions), poisoned(v, positions), indices, positions)
    check(*run_decode(arguments, L), *want)


@pytest.mark.device
@on_device
@pytest.mark.parametrize(
    ("H", "Hv", "J"), [(64, 64, 1), (128, 128, 4), (192, 128, 4), (96, 96, 64)]
)
def test_device_tokens_match_reference(H, Hv, J):
    case = {"B": 2, "N": 64, "K": 4, "J": J, "H": H, "Hv": Hv, "S": 8192, "P": 1000}
    arguments = example(7, L=1, **case)
    check(*run_tokens(arguments), *device_reference(*arguments, 1))


@pytest.mark.device
@on_device
def test_device_benchmark_shapes_match_xla():
    """B=8, 128k keys, 64 heads: too large for the reference, so against XLA in float32."""
    for L, P in ((64, 16), (64, 96), (1, 4176)):
        q, k, v, indices, positions = example(
            8, **{"B": 8, "N": 64, "K": 4, "J": 4, "H": 128, "Hv": 128, "S": 131072}, L=L, P=P,
            full=True,
        )  # fmt: skip
        options = {"block_size": L, "positions": positions}
        got = jax.jit(
            lambda q, k, v, i=indices, o=options: gather_decode(
                q, k, v, i, implementation="mosaic_gpu", **o
            )
        )(q, k, v)
        with jax.default_matmul_precision("highest"):
            want = jax.jit(
                lambda q, k, v, i=indices, o=options: gather_decode(
                    q, k, v, i, implementation="xla", **o
                )
            )(*(x.astype(jnp.float32) for x in (q, k, v)))
        hold(got.out, want.out, BOUND)
        hold(got.lse, want.lse, 1e-5)
        if L == 1:
            both = jnp.concatenate([k, v], axis=-1)
            got = jax.jit(
                lambda q, kv, i=indices, p=positions: gather_tokens(
                    q, kv, i, positions=p, implementation="mosaic_gpu"
                )
            )(q, both)
        else:
            keys, values = in_blocks(k, v, L)
            got = jax.jit(
                lambda q, k, v, i=indices, p=positions: gather_blocks(
                    q, k, v, i, positions=p, implementation="mosaic_gpu"
                )
            )(q, keys, values)
        hold(got.out, want.out, BOUND)
        hold(got.lse, want.lse, 1e-5)
