"""Random inputs and small helpers for tests of mechanisms."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparse_attn import Heads, HeadShape, build_mechanism, registered

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "4"))
"""Drawn layouts and append patterns a config; shapes come from fixed buckets, compiled once."""

DRAWN_SHAPES = ["G2"] if EXAMPLES <= 4 else ["G1", "G2", "G4"]

SHAPES = {
    "G2": HeadShape(query_heads=4, kv_heads=2, head_width=8, value_width=8, model_width=16),
    "G1": HeadShape(query_heads=2, kv_heads=2, head_width=8, value_width=6, model_width=12),
    "G4": HeadShape(query_heads=4, kv_heads=1, head_width=8, value_width=8, model_width=16),
}


def configs():
    """Every tiny variant of every registered mechanism, with a readable id."""
    return [
        (f"{kind.__name__}-{number}", config)
        for kind in registered()
        for number, config in enumerate(kind.tiny())
    ]


@functools.partial(jax.jit, static_argnames="dims")
def rope(array, positions, dims=None):
    """Rotary embedding, rotate-half layout, in the array's own precision."""
    width = array.shape[-1] if dims is None else dims
    half = width // 2
    rate = 1.0 / 10000.0 ** (jnp.arange(half, dtype=array.dtype) / half)
    angle = positions[..., None].astype(array.dtype) * rate[None, None]
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    a, b = array[..., :half], array[..., half:width]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, array[..., width:]], axis=-1)


def mechanism(config, shape, dtype=jnp.float64, seed=0, **changes):
    """A mechanism with random parameters in ``dtype``, the same numbers in every dtype."""
    config = dataclasses.replace(config, **changes)
    module = build_mechanism(config, shape, rngs=nnx.Rngs(seed), param_dtype=jnp.float32)
    nnx.update(module, jax.tree.map(lambda x: x.astype(dtype), nnx.state(module)))
    return module


def arrays(shape, branches, batch, tokens, dtype=jnp.float64, seed=0, scale=1.0):
    """Random (q, k, v, x) for ``Heads``; values are the same in every dtype up to rounding."""
    rng = np.random.default_rng(seed)
    S = shape

    def draw(*sizes):
        return jnp.asarray(rng.standard_normal(sizes), dtype)

    return (
        scale * draw(batch, tokens, S.query_heads, S.head_width),
        draw(branches, batch, tokens, S.kv_heads, S.head_width),
        draw(branches, batch, tokens, S.kv_heads, S.value_width),
        draw(batch, tokens, S.model_width),
    )


def as_heads(q, k, v, x):
    """Wrap raw arrays."""
    return Heads(q=q, k=k, v=v, x=x, rope=rope)


def cut(parts, start, stop):
    """Tokens [start, stop) of (q, k, v, x)."""
    q, k, v, x = parts
    return q[:, start:stop], k[:, :, start:stop], v[:, :, start:stop], x[:, start:stop]


@functools.lru_cache(maxsize=4)
def compiled_forward(config, shape, batch, tokens):
    """``run(parts, segment_ids)`` in float64 for one shape, any layout."""
    del batch, tokens  # they tell the programs apart
    module = mechanism(config, shape)
    return jax.jit(lambda parts, ids: module(as_heads(*parts), segment_ids=ids)[0])


@functools.lru_cache(maxsize=4)
def compiled_step(config, shape, batch, capacity, chunk):
    """``(step(parts, cache, segment_ids) -> out, cache, an empty cache)`` in float64."""
    del chunk
    module = mechanism(config, shape)
    step = jax.jit(lambda parts, cache, ids: module(as_heads(*parts), cache, segment_ids=ids)[:2])
    return step, module.init_cache(batch, capacity, jnp.float64)


def call(module, parts, **options):
    """(output, aux) of the mechanism on a whole sequence, jitted; options stay concrete."""
    run = jax.jit(lambda parts: module(as_heads(*parts), **options)[::2])
    return run(parts)


def forward(module, parts, **options):
    """Output of the mechanism on a whole sequence, jitted."""
    run = jax.jit(lambda parts: module(as_heads(*parts), **options)[0])
    return run(parts)
