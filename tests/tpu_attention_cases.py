"""What the tests of the attention kernels on TPUs share: runs, comparisons and memory bounds."""

import jax
import jax.numpy as jnp
import numpy as np
from kernel_proof import hold, strictly_interpreted

NAMES = ("out", "lse", "dq", "dk", "dv")
LIMIT = {"float32": 1e-5, "bfloat16": 1e-2}


def functional(attend):
    """``attend(q, k, v, *rest)`` -> jitted (out, lse, dq, dk, dv) for given cotangents."""

    @jax.jit
    def run(arrays, cotangents, *rest):
        outputs, pull = jax.vjp(lambda *x: tuple(attend(*x, *rest)), *arrays)
        d_out, d_lse = cotangents
        gradients = pull((d_out.astype(outputs[0].dtype), d_lse))
        return [x.astype(jnp.float32) for x in (*outputs, *gradients)]

    return lambda *arguments: [np.asarray(x) for x in run(*arguments)]


def draw_cotangents(q, v):
    """Random cotangents of out and lse."""
    draw = np.random.default_rng(9)
    d_out = jnp.asarray(draw.normal(size=(*q.shape[:3], v.shape[3])), q.dtype)
    return d_out, jnp.asarray(draw.normal(size=q.shape[:3]), jnp.float32)


def draw_heads(rng, batch, rows, keys, heads, kv_heads, width, value_width, dtype):
    """Random q, k, v."""
    shapes = (rows, heads, width), (keys, kv_heads, width), (keys, kv_heads, value_width)
    return [jnp.asarray(rng.normal(size=(batch, *shape)), dtype) for shape in shapes]


def poison(x, unread):
    """NaN in the [B, rows] of x [B, rows, heads, width] that are ``unread``."""
    return jnp.where(jnp.asarray(unread)[:, :, None, None], jnp.nan, x)


def check(attend, reference, arrays, rest, unread):
    """Hold ``attend`` in the strict interpreter to ``reference`` (float32, unpoisoned): outputs,
    each gradient, dead rows, and a second run bit by bit. ``unread`` flags rows of q (and of the
    cotangents) and of k and v that nothing reads: there is NaN.
    """
    cotangents = draw_cotangents(arrays[0], arrays[2])
    expected = functional(reference)([x.astype(jnp.float32) for x in arrays], cotangents, *rest)
    dead, unread_keys = unread
    flags = dead, unread_keys, unread_keys
    poisoned = [poison(x, f) for x, f in zip(arrays, flags, strict=True)]
    d_out, d_lse = cotangents
    cotangents = poison(d_out, dead), poison(d_lse[..., None], dead)[..., 0]
    run = functional(attend)
    with strictly_interpreted("tpu"):
        first = run(poisoned, cotangents, *rest)
        second = run(poisoned, cotangents, *rest)
    limit = LIMIT[str(arrays[0].dtype)]
    for name, got, again, want in zip(NAMES, first, second, expected, strict=True):
        np.testing.assert_array_equal(got, again, err_msg=name)
        if name == "lse":
            np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
            got, want = (np.where(np.isneginf(x), 0, x) for x in (got, want))
        hold(got, want, limit, name)


def random_shape(rng):
    """Sizes of a small random problem, and its dtype."""
    group = int(rng.choice([1, 2, 3, 4, 8, 16]))
    kv_heads = int(rng.integers(1, 3)) if group < 8 else 1
    width, value_width = rng.choice([[64, 64], [96, 96], [128, 128], [192, 128], [24, 40]])
    rows, keys = (int(x) for x in rng.integers(1, 80, 2))
    sizes = (int(rng.integers(1, 3)), rows, keys, group * kv_heads, kv_heads)
    return (*sizes, int(width), int(value_width)), rng.choice([jnp.float32, jnp.bfloat16])


def both_ways(attend):
    """``attend`` and a function of the same arguments and cotangents that runs its gradients."""

    def backward(q, k, v, *rest):
        *rest, d_out, d_lse = rest
        _, pull = jax.vjp(lambda q, k, v: tuple(attend(q, k, v, *rest)), q, k, v)
        return pull((d_out, d_lse))

    return attend, backward


def shape_structs(batch, rows, keys, heads, kv_heads, width, value_width, dtype, *rest):
    """Arguments of :func:`both_ways`: q, k, v, ``rest``, then the cotangents of out and lse."""
    struct = jax.ShapeDtypeStruct
    return (
        struct((batch, rows, heads, width), dtype),
        struct((batch, keys, kv_heads, width), dtype),
        struct((batch, keys, kv_heads, value_width), dtype),
        *rest,
        struct((batch, rows, heads, value_width), dtype),
        struct((batch, rows, heads), jnp.float32),
    )


def temporary_bound(batch, rows, keys, heads, kv_heads, width, value_width, itemsize, backward):
    """Bytes of temporary memory that an attention call may take, O(T + S): one packed copy (head
    widths in whole lanes) of each large array - q, out, k, v; backward also d_out, dq, dk, dv -,
    16 numbers a row that kernels see (statistics 8 high, lse and its cotangent twice over, with
    up to 128 lanes a token), and a tenth for alignment.
    """
    lanes, value_lanes = (-(-x // 128) * 128 for x in (width, value_width))
    packed = batch * (rows * heads + keys * kv_heads) * (lanes + value_lanes) * itemsize
    numbers = batch * rows * 4 * (16 * heads + 4 * 128)
    return int(1.1 * ((2 if backward else 1) * packed + numbers)) + 2**23
