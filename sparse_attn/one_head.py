"""Attention one kv head at a time, where what all of them hold together would be much.

Float32 copies of all keys and values, and their gradients, grow with the whole sequence, however
many devices split its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

TOGETHER_BYTES = 2**28
"""All kv heads are attended at once if their keys take so much in float32 at most."""


def apart(k: Float[Array, "B S K H"]) -> bool:
    """Whether the heads of these keys are attended one at a time."""
    return k.shape[2] > 1 and 4 * k.size > TOGETHER_BYTES


def by_kv_head(x: Shaped[Array, "..."], kv_heads: int, axis: int = 2) -> Shaped[Array, "K ..."]:
    """An array whose ``axis`` holds A heads or lists, by the K kv heads they belong to:
    [K, ..., A/K, ...].
    """
    x = x.reshape(*x.shape[:axis], kv_heads, -1, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def map_kv_heads(
    function: Callable[[Any], Float[Array, "B T G Hv"]], parts: Any
) -> Float[Array, "B T N Hv"]:
    """``function`` of each kv head's part of a pytree of [K, ...]; results are put together.

    Forward values of one head exist at a time, also in the backward pass, which calls ``function``
    again.
    """
    out = jnp.moveaxis(jax.lax.map(jax.checkpoint(function), parts), 0, 2)
    return out.reshape(*out.shape[:2], -1, out.shape[4])
