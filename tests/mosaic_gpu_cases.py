"""What the tests of the GPU attention kernels share: outputs and gradients, and their errors."""

import jax
import jax.numpy as jnp
import numpy as np
from kernel_proof import hold, strictly_interpreted

NAMES = ("out", "lse", "dq", "dk", "dv")
BOUND = 1e-2
"""RMS relative error of 16-bit inputs."""


def draw_heads(rng, shape, dtype=jnp.bfloat16):
    """q, k and v of (batch, rows, keys, query heads, kv heads, width, value width)."""
    batch, rows, keys, query_heads, kv_heads, width, value_width = shape
    tails = (rows, query_heads, width), (keys, kv_heads, width), (keys, kv_heads, value_width)
    return tuple(jnp.asarray(rng.normal(size=(batch, *tail)), dtype) for tail in tails)


def functional(attend):
    """``run(q, k, v, *numbers)`` -> out, lse and the gradients of a random function of both.

    ``attend`` takes the same arguments; rows that see nothing count with their out alone.
    """

    def loss(arrays, numbers):
        out, lse = attend(*arrays, *numbers)
        rng = np.random.default_rng(7)
        on_out = jnp.asarray(rng.normal(size=out.shape), jnp.float32)
        on_lse = jnp.asarray(rng.normal(size=lse.shape), jnp.float32)
        finite = jnp.where(jnp.isneginf(lse), 0.0, lse)
        return jnp.sum(out.astype(jnp.float32) * on_out) + jnp.sum(finite * on_lse), (out, lse)

    gradient = jax.jit(jax.grad(loss, has_aux=True))

    def run(q, k, v, *numbers):
        gradients, outputs = gradient((q, k, v), numbers)
        return dict(zip(NAMES, (*outputs, *gradients), strict=True))

    return run


def expected(reference, *arguments):
    """The reference on the same numbers in float32, products in full precision."""
    wide = [
        x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x for x in arguments
    ]
    with jax.default_matmul_precision("highest"):
        return jax.tree.map(np.asarray, functional(reference)(*wide))


def interpreted_result(attend, *arguments, twice=False):
    """The kernels' outputs and gradients, interpreted; ``twice`` also holds two runs equal."""
    run = functional(attend)
    with strictly_interpreted("gpu"):
        result = jax.tree.map(np.asarray, run(*arguments))
        again = jax.tree.map(np.asarray, run(*arguments)) if twice else result
    for name in NAMES:
        np.testing.assert_array_equal(result[name], again[name], err_msg=name)
    return result


def check(result, want, bound=BOUND):
    """Every output and gradient within ``bound``; rows that see nothing exactly so."""
    nothing = np.isneginf(want["lse"])
    np.testing.assert_array_equal(np.isneginf(result["lse"]), nothing)
    for name in ("out", "dq"):
        assert not np.any(np.asarray(result[name], np.float32)[nothing]), name
    for name in NAMES:
        got, exact = (np.asarray(x[name], np.float64) for x in (result, want))
        if name == "lse":
            got, exact = (np.where(nothing, 0.0, x) for x in (got, exact))
        assert got.shape == exact.shape, name
        hold(got, exact, bound, name)
