"""Ranged attention: reference identities, and the XLA path against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.ranged import ranged_attention
from kernels_pallas.ranged.reference import ranged_attention_reference
from kernels_pallas.ranged.tiling import Tiles, covered
from kernels_pallas.ranged.xla import ranged_attention_xla

SMALL = Tiles(rows=8, keys=16)
# batch, rows, keys, query heads, kv heads, width, value width. Tests share these two shapes, so
# that each of them compiles once a dtype: many rows (tiles) and few rows (decode).
MANY, FEW = (2, 43, 61, 4, 2, 8, 4), (2, 5, 61, 4, 2, 8, 4)
NAMES = ("out", "lse", "dq", "dk", "dv")


def heads(shape, dtype, seed=0):
    batch, rows, keys, query_heads, kv_heads, width, value_width = shape
    draw = np.random.default_rng(seed)
    shapes = (rows, query_heads, width), (keys, kv_heads, width), (keys, kv_heads, value_width)
    return tuple(jnp.asarray(draw.normal(size=(batch, *tail)), dtype) for tail in shapes)


def ranges(kind, shape):
    """Named [start, stop) patterns as int32 [B, T], inside [0, S]."""
    batch, rows, keys = shape[:3]
    t = np.broadcast_to(np.arange(rows), (batch, rows)) + max(0, keys - rows)
    start, stop = np.zeros_like(t), t + 1
    if kind == "window":
        start = t + 1 - 7
    elif kind == "packed":
        start = t // 11 * 11
    elif kind == "random":  # some of them empty
        start, stop = np.random.default_rng(5).integers(-4, keys + 4, (2, batch, rows))
    else:
        assert kind == "causal"
    return tuple(jnp.asarray(np.clip(a, 0, keys), jnp.int32) for a in (start, stop))


@functools.cache
def functional(implementation, scale, tiles):
    """A jitted (out, lse), (dq, dk, dv) of a linear functional of out and of lse where finite."""

    def value(q, k, v, start, stop, on_out, on_lse):
        if implementation == "reference":
            out, lse = ranged_attention_reference(q, k, v, start, stop, scale=scale)
        else:
            out, lse = ranged_attention_xla(q, k, v, start, stop, scale=scale, tiles=tiles)
        finite = jnp.where(jnp.isneginf(lse), 0, lse)
        return jnp.sum(on_out * out.astype(lse.dtype)) + jnp.sum(on_lse * finite), (out, lse)

    gradient = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))

    def run(q, k, v, start, stop, on_out=None, on_lse=None):
        draw = np.random.default_rng(9)
        dtype = np.float64 if q.dtype == jnp.float64 else np.float32
        if on_out is None:
            on_out = draw.normal(size=(*q.shape[:3], v.shape[3])).astype(dtype)
            on_lse = draw.normal(size=q.shape[:3]).astype(dtype)
        (_, result), gradients = gradient(q, k, v, start, stop, on_out, on_lse)
        return result, gradients

    return run


def pairs(ours, reference):
    return zip(NAMES, jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True)


def compare(kind, shape, dtype, tolerance, tiles=SMALL, scale=0.3):
    arguments = (*heads(shape, dtype), *ranges(kind, shape))
    ours = functional("xla", scale, tiles)(*arguments)
    reference = functional("reference", scale, None)(*arguments)
    for name, got, want in pairs(ours, reference):
        assert got.dtype == want.dtype, name
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("kind", ["causal", "window", "packed", "random"])
@pytest.mark.parametrize("shape", [MANY, FEW])
def test_xla_equals_reference_float64(x64, kind, shape):
    compare(kind, shape, jnp.float64, 1e-11)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 37, 37, 2, 2, 8, 8),  # groups of one
        (1, 20, 9, 12, 3, 8, 4),  # groups of four, fewer keys than a step
        (1, 2, 40, 6, 3, 8, 4),  # few rows, three kv heads share a product
        (1, 2, 40, 5, 5, 8, 4),  # few rows, each kv head by itself
        (1, 1, 1100, 4, 2, 8, 8),  # decode in several steps
    ],
)
def test_xla_equals_reference_other_shapes_float64(x64, shape):
    compare("random" if shape[1] > 1 else "causal", shape, jnp.float64, 1e-11)


@pytest.mark.parametrize("shape", [MANY, FEW])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.bfloat16, 6e-2)])
def test_xla_equals_reference_narrow(shape, dtype, tolerance):
    compare("random", shape, dtype, tolerance)


def test_default_tiles_equal_reference():
    compare("causal", (1, 300, 300, 4, 2, 8, 8), jnp.float32, 2e-5, tiles=None)


@pytest.mark.full
@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("rows", [1, 127, 128, 129, 700])
def test_xla_equals_reference_real_sizes(group, rows):
    for kind in ("causal", "window", "packed", "random"):
        shape = (2, rows, rows, 2 * group, 2, 64, 64)
        compare(kind, shape, jnp.float32, 5e-5, tiles=None, scale=64**-0.5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("shape", [MANY, FEW])
def test_matches_plain_softmax(implementation, shape):
    q, k, v = heads(shape, jnp.float32)
    start, stop = ranges("window", shape)
    (out, lse), _ = functional(implementation, 0.3, SMALL)(q, k, v, start, stop)
    for t in range(shape[1]):
        for n in range(4):
            seen = slice(int(start[1, t]), int(stop[1, t]))
            logits = 0.3 * np.asarray(k[1, seen, n // 2], np.float64) @ np.asarray(q[1, t, n])
            weights = np.exp(logits - logits.max())
            want = weights @ np.asarray(v[1, seen, n // 2]) / weights.sum()
            np.testing.assert_allclose(out[1, t, n], want, rtol=1e-5, atol=1e-6)
            want = np.log(np.exp(logits).sum())
            np.testing.assert_allclose(lse[1, t, n], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("shape", [MANY, FEW])
def test_empty_rows_are_zero_with_zero_gradient(implementation, shape):
    start, stop = ranges("causal", shape)
    stop = stop.at[:, 1].set(0)
    arguments = (*heads(shape, jnp.float32), start, stop)
    run = functional(implementation, 0.3, SMALL)
    (out, lse), (dq, dk, dv) = run(*arguments)
    assert np.all(np.asarray(out[:, 1]) == 0)
    assert np.all(np.isneginf(lse[:, 1]))
    assert np.all(np.isfinite(lse[:, 0]))
    assert np.all(np.asarray(dq[:, 1]) == 0)
    assert np.all(np.asarray(dq[:, 0]) != 0)
    assert all(np.all(np.isfinite(g)) for g in (dk, dv))
    none = jnp.zeros_like(stop)
    (out, lse), gradients = run(*arguments[:3], none, none)
    assert np.all(np.isneginf(lse))
    for array in (out, *gradients):
        np.testing.assert_array_equal(array, 0)


@pytest.mark.parametrize(
    "implementation", [pytest.param("reference", marks=pytest.mark.full), "xla"]
)
@pytest.mark.parametrize("rows", [40, 6])
def test_ranges_are_clipped_and_there_may_be_no_keys(implementation, rows):
    q, k, v = heads((1, rows, 9, 2, 1, 8, 4), jnp.float32)
    low, high = jnp.full((1, rows), -5, jnp.int32), jnp.full((1, rows), 50, jnp.int32)
    clipped = ranged_attention(q, k, v, low, high, implementation=implementation)
    exact = ranged_attention(q, k, v, low + 5, high - 41, implementation=implementation)
    np.testing.assert_array_equal(clipped.out, exact.out)
    out, lse = ranged_attention(q, k[:, :0], v[:, :0], low, high, implementation=implementation)
    np.testing.assert_array_equal(out, np.zeros((1, rows, 2, 4)))
    assert np.all(np.isneginf(lse))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("shape", [MANY, FEW])
def test_poison_outside_all_ranges_does_not_leak(implementation, shape):
    """Keys in no range and queries of empty rows hold NaN; a gap inside a tile's span included."""
    q, k, v = heads(shape, jnp.float32)
    t = np.broadcast_to(np.arange(shape[1]), shape[:2])
    start = jnp.asarray(np.where(t % 2, 40, 3), jnp.int32)
    stop = jnp.asarray(np.where(t % 2, 55, 20), jnp.int32).at[:, 4].set(0)
    hole = np.ones(61, bool)
    hole[3:20] = hole[40:55] = False
    hole = jnp.asarray(hole)[None, :, None, None]
    run = functional(implementation, 0.3, SMALL)
    clean = run(q, k, v, start, stop)
    poisoned = run(
        q.at[:, 4].set(jnp.nan),
        jnp.where(hole, jnp.nan, k),
        jnp.where(hole, jnp.inf, v),
        start,
        stop,
    )
    for name, got, want in pairs(poisoned, clean):
        np.testing.assert_array_equal(got, want, err_msg=name)


@pytest.mark.parametrize("shape", [MANY, FEW])
def test_large_logits(shape):
    """Logits up to +-200 neither overflow nor lose the small side."""
    q, k, v = heads(shape, jnp.float32)
    q = q / jnp.linalg.norm(q, axis=-1, keepdims=True) * 67
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True) * 10
    arguments = (q, k, v, *ranges("causal", shape))
    ours = functional("xla", 0.3, SMALL)(*arguments)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a), jnp.float64) for a in arguments[:3]]
        want = functional("reference", 0.3, None)(*wide, *arguments[3:])
        want = jax.tree.map(np.asarray, want)
    assert np.abs(want[0][1]).max() > 150
    for name, got, exact in pairs(ours, want):
        atol = 1e-4 * np.abs(exact).max()
        np.testing.assert_allclose(got, exact, rtol=1e-3, atol=atol, err_msg=name)


def test_bitwise_repeatable():
    arguments = (*heads(MANY, jnp.float32), *ranges("random", MANY))
    run = functional("xla", 0.3, SMALL)
    for name, first, second in pairs(run(*arguments), run(*arguments)):
        np.testing.assert_array_equal(first, second, err_msg=name)


def test_gradient_by_invisible_keys_is_exactly_zero():
    """Of the functional of one row alone, by other queries and by keys outside its range."""
    start, stop = ranges("causal", MANY)
    on_out, on_lse = np.zeros((2, 43, 4, 4), np.float32), np.zeros((2, 43, 4), np.float32)
    on_out[:, 17], on_lse[:, 17] = 1, 1
    arguments = (*heads(MANY, jnp.float32), start, stop, on_out, on_lse)
    _, (dq, dk, dv) = functional("xla", 0.3, SMALL)(*arguments)
    last = int(stop[0, 17])
    assert np.all(np.asarray(dq[:, 17]) != 0)
    np.testing.assert_array_equal(jnp.delete(dq, 17, axis=1), 0)
    for gradient in (dk, dv):
        np.testing.assert_array_equal(gradient[:, last:], 0)
        assert np.all(np.asarray(gradient[:, :last]) != 0)


def test_temporary_memory_is_linear():
    def temporary(length):
        shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        rows = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(q, k, v, start, stop):
            out, lse = ranged_attention(q, k, v, start, stop)
            return jnp.sum(out) + jnp.sum(lse)

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape, rows, rows)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 4.4 * temporary(1024)
    assert temporary(4096) < 4096 * 4096 // 4


def test_covered_marks_the_union_of_ranges():
    start = jnp.asarray([[0, 5, 9, 3], [2, 2, 2, 2]], jnp.int32)
    stop = jnp.asarray([[2, 7, 9, 1], [2, 1, 10, 0]], jnp.int32)
    want = np.zeros((2, 10), bool)
    want[0, [0, 1, 5, 6]] = True
    want[1, 2:] = True
    np.testing.assert_array_equal(covered(start, stop, 10), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 4, 3, 8)}, "query heads 3 are not a multiple of kv heads 2"),
        ({"k": (2, 6, 2, 7)}, "must agree in batch and head width"),
        ({"v": (2, 5, 2, 8)}, "must agree in batch, length and kv heads"),
        ({"q": (4, 4, 8)}, "must have four axes"),
        ({"q": (2, 0, 4, 8)}, "holds no query row"),
        ({"start": (2, 5)}, r"start \(2, 5\) must be \[B, T\] = \(2, 4\)"),
    ],
)
def test_errors_name_the_values(change, message):
    shapes = {"q": (2, 4, 4, 8), "k": (2, 6, 2, 8), "v": (2, 6, 2, 8)} | change
    q, k, v = (jnp.zeros(shapes[name]) for name in "qkv")
    start = jnp.zeros(shapes.get("start", (2, 4)), jnp.int32)
    with pytest.raises(ValueError, match=message):
        ranged_attention(q, k, v, start, jnp.zeros((2, 4), jnp.int32))


def test_dtype_errors():
    q, k, v = heads((1, 4, 4, 2, 2, 8, 8), jnp.float32)
    rows = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="must share one floating dtype"):
        ranged_attention(q, k.astype(jnp.bfloat16), v, rows, rows)
    with pytest.raises(ValueError, match="stop has dtype float32"):
        ranged_attention(q, k, v, rows, rows.astype(jnp.float32))
