"""Ranged attention on Hopper: the kernels interpreted against the reference, and their lowering."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic_gpu_cases import check, draw_heads, expected, functional, interpreted_result

from kernels_pallas.ahead_of_time import lower_for_gpu
from kernels_pallas.gpu_tiles import Tiles, tiles_for
from kernels_pallas.ranged import ranged_attention
from kernels_pallas.ranged.mosaic_gpu import ranged_attention as ranged_attention_mosaic_gpu
from kernels_pallas.ranged.reference import ranged_attention_reference

ON_GPU = jax.default_backend() == "gpu"
KINDS = ("causal", "window", "packed", "random", "clusters")


def draw_ranges(rng, kind, shape):
    """[start, stop) of every row, int32 [B, T]; ``random`` has empty rows and gaps."""
    batch, rows, keys = shape[:3]
    row = np.broadcast_to(np.arange(rows), (batch, rows)) + max(0, keys - rows)
    start, stop = np.zeros_like(row), row + 1
    if kind == "window":
        start = row + 1 - max(1, keys // 3)
    elif kind == "packed":
        start = row // 37 * 37
    elif kind == "random":
        start, stop = rng.integers(-4, keys + 4, (2, batch, rows))
    elif kind == "clusters":
        cuts = np.sort(rng.integers(0, keys + 1, (batch, 6)), axis=1)
        cluster = np.sort(rng.integers(0, 5, (batch, rows)), axis=1)
        start, stop = (np.take_along_axis(cuts, cluster + i, axis=1) for i in (0, 1))
    return tuple(jnp.asarray(np.clip(x, 0, keys), jnp.int32) for x in (start, stop))


def kernel(scale, tiles=None):
    return functools.partial(ranged_attention_mosaic_gpu, scale=scale, tiles=tiles)


def poison(q, k, v, start, stop):
    """NaN and infinity in rows and keys that no range touches."""
    s = jnp.arange(k.shape[1])[None, None, :]
    read = jnp.any((s >= start[..., None]) & (s < stop[..., None]), axis=1)[:, :, None, None]
    q = jnp.where((stop > start)[:, :, None, None], q, jnp.nan)
    return q, jnp.where(read, k, jnp.nan), jnp.where(read, v, jnp.inf)


def compare(seed, shape, kind, *, dtype=jnp.bfloat16, scale=None, tiles=None, twice=False):
    rng = np.random.default_rng(seed)
    scale = shape[5] ** -0.5 if scale is None else scale
    arrays, ranges = draw_heads(rng, shape, dtype), draw_ranges(rng, kind, shape)
    reference = functools.partial(ranged_attention_reference, scale=scale)
    want = expected(reference, *arrays, *ranges)
    attend = kernel(scale, tiles)
    result = interpreted_result(attend, *poison(*arrays, *ranges), *ranges, twice=twice)
    assert all(result[name].dtype == dtype for name in ("out", "dq", "dk", "dv"))
    check(result, want)


def test_interpreted_equals_reference_odd_sizes_poisoned_repeatable():
    compare(0, (2, 45, 150, 3, 1, 96, 64), "random", twice=True)


@pytest.mark.full
def test_interpreted_equals_reference_unmasked_runs():
    """Whole runs that every row sees take the loop without a mask; G = 1; float16."""
    compare(1, (1, 70, 300, 1, 1, 64, 64), "causal", dtype=jnp.float16)


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [1, 2, 4, 8, 16])
def test_interpreted_equals_reference_groups(kind, group):
    compare(group, (2, 43, 131, 2 * group, 2, 64, 64), kind)


@pytest.mark.full
@pytest.mark.parametrize("widths", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("kind", ["causal", "random"])
def test_interpreted_equals_reference_widths(widths, kind):
    compare(3, (1, 70, 200, 4, 2, *widths), kind)


@pytest.mark.full
@pytest.mark.parametrize("scale", [0.3, -0.2, 0.0])
def test_interpreted_equals_reference_scales(scale):
    compare(4, (1, 70, 100, 2, 1, 64, 64), "causal", scale=scale)


@pytest.mark.full
@pytest.mark.parametrize("warpgroups", [1, 2])
@pytest.mark.parametrize("keys", [64, 128])
@pytest.mark.parametrize("steps", [1, 3])
def test_interpreted_equals_reference_tiles(warpgroups, keys, steps):
    compare(5, (1, 150, 150, 2, 2, 64, 64), "window", tiles=Tiles(warpgroups, keys, *[steps] * 3))


@pytest.mark.full
def test_interpreted_equals_reference_group_larger_than_a_tile():
    compare(6, (1, 3, 70, 192, 1, 64, 64), "random")


@pytest.mark.full
def test_interpreted_nothing_visible():
    shape = (1, 20, 70, 2, 1, 64, 64)
    q, k, v = draw_heads(np.random.default_rng(0), shape)
    zero = jnp.zeros((1, 20), jnp.int32)
    result = interpreted_result(kernel(1.0), *(x * jnp.nan for x in (q, k, v)), zero, zero)
    assert np.all(np.isneginf(result["lse"]))
    for name in ("out", "dq", "dk", "dv"):
        assert not np.any(result[name].astype(np.float32)), name


@pytest.mark.full
@pytest.mark.parametrize("seed", range(100))
def test_interpreted_equals_reference_random_shapes(seed):
    rng = np.random.default_rng(1000 + seed)
    kv_heads, group = int(rng.integers(1, 3)), int(rng.integers(1, 6))
    width = int(rng.choice([32, 64, 80, 128]))
    shape = (int(rng.integers(1, 3)), int(rng.integers(1, 90)), int(rng.integers(1, 200)))
    shape = (*shape, kv_heads * group, kv_heads, width, int(rng.choice([width, 64])))
    compare(seed, shape, str(rng.choice(KINDS)))
    jax.clear_caches()


def shapes_of(rows, query_heads, kv_heads, width, value_width, batch=1, keys=None):
    keys = keys or rows
    return (
        jax.ShapeDtypeStruct((batch, rows, query_heads, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((batch, keys, kv_heads, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((batch, keys, kv_heads, value_width), jnp.bfloat16),
        *[jax.ShapeDtypeStruct((batch, rows), jnp.int32)] * 2,
    )


def forward_and_backward(scale=0.1):
    def run(q, k, v, start, stop):
        def loss(*arrays):
            out, lse = ranged_attention_mosaic_gpu(*arrays, start, stop, scale=scale)
            return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse), (out, lse)

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    return run


@pytest.mark.parametrize(
    "case",
    [
        (32768, 32, 4, 128, 128),
        pytest.param((131072, 32, 4, 128, 128), marks=pytest.mark.full),
        pytest.param((32768, 64, 4, 64, 64), marks=pytest.mark.full),
        pytest.param((32768, 8, 8, 96, 96), marks=pytest.mark.full),
        pytest.param((32768, 16, 1, 192, 128), marks=pytest.mark.full),
        (32768, 16, 4, 256, 256),
        pytest.param((1000, 12, 4, 256, 128), marks=pytest.mark.full),
    ],
)
def test_lowers_for_hopper(case):
    module = lower_for_gpu(forward_and_backward(), *shapes_of(*case))
    assert module.count("mosaic_gpu") >= 3


@pytest.mark.parametrize("width", [64, 128, 192, 256])
@pytest.mark.parametrize("value_width", [64, 128, 192, 256])
@pytest.mark.parametrize("rows", [10, 1000])
def test_default_tiles_fit_in_shared_memory(width, value_width, rows):
    tiles_for(width, value_width, rows).check(width, value_width)


def test_tiles_that_do_not_fit_are_refused():
    arrays = draw_heads(np.random.default_rng(0), (1, 8, 8, 1, 1, 128, 128))
    rows = jnp.zeros((1, 8), jnp.int32)
    with pytest.raises(ValueError, match="bytes of shared memory"):
        ranged_attention_mosaic_gpu(*arrays, rows, rows, scale=1.0, tiles=Tiles(2, 128, 8, 2, 2))


@pytest.mark.parametrize(
    ("dtype", "width", "message"),
    [(jnp.float32, 64, "bfloat16 or float16"), (jnp.bfloat16, 320, "width 320 is above 256")],
)
def test_refusals_name_the_values(dtype, width, message):
    arrays = draw_heads(np.random.default_rng(0), (1, 8, 8, 1, 1, width, width), dtype)
    rows = jnp.zeros((1, 8), jnp.int32)
    with pytest.raises(NotImplementedError, match=message):
        ranged_attention(*arrays, rows, rows, implementation="mosaic_gpu")


@pytest.mark.device
@pytest.mark.skipif(not ON_GPU, reason="needs a Hopper GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 45, 150, 3, 1, 96, 64),
        (2, 700, 1100, 16, 2, 64, 64),
        (1, 2048, 2048, 16, 4, 128, 128),
        (1, 1000, 1500, 8, 8, 192, 128),
        (1, 1024, 2048, 8, 2, 256, 256),
    ],
)
def test_device_equals_reference(shape, kind):
    rng = np.random.default_rng(11)
    arrays, ranges = draw_heads(rng, shape), draw_ranges(rng, kind, shape)
    scale = shape[5] ** -0.5
    want = expected(functools.partial(ranged_attention_reference, scale=scale), *arrays, *ranges)
    run = functional(kernel(scale))
    poisoned = poison(*arrays, *ranges)
    result, again = (jax.tree.map(np.asarray, run(*poisoned, *ranges)) for _ in range(2))
    check(result, want)
    for name, array in result.items():
        np.testing.assert_array_equal(array, again[name], err_msg=name)


@pytest.mark.device
@pytest.mark.skipif(not ON_GPU, reason="needs a Hopper GPU")
@pytest.mark.parametrize("kind", ["causal", "window"])
def test_device_equals_xla_at_length(kind):
    """32k tokens: the reference would need T * S memory."""
    shape = (1, 32768, 32768, 8, 2, 128, 128)
    rng = np.random.default_rng(12)
    arrays, ranges = draw_heads(rng, shape), draw_ranges(rng, kind, shape)
    attend = functools.partial(ranged_attention, implementation="xla")
    want = expected(attend, *arrays, *ranges)
    check(jax.tree.map(np.asarray, functional(kernel(128**-0.5))(*arrays, *ranges)), want)
