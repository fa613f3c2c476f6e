"""The gradient of kernels that only decode: that of the XLA path, which gathers the list again."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jaxtyping import Array

from kernels_pallas.common import AttentionOutput


def with_gradient_of(
    path: Callable[..., AttentionOutput],
    kernel: Callable[..., tuple[Array, Array]],
    q: Array,
    cache: tuple[Array, ...],
    indices: Array,
    positions: Array,
) -> AttentionOutput:
    """``kernel(q, *cache, indices, positions)``, differentiated as ``path`` of the same arguments
    (``positions`` by name); decoding rarely differentiates, so nothing but the arguments is kept.
    """

    @jax.custom_vjp
    def attention(q, cache, indices, positions):
        return tuple(kernel(q, *cache, indices, positions))

    def save(q, cache, indices, positions):
        return attention(q, cache, indices, positions), (q, cache, indices, positions)

    def pull_back(residuals, cotangents):
        q, cache, indices, positions = residuals

        def again(q, cache):
            return tuple(path(q, *cache, indices, positions=positions))

        _, pull = jax.vjp(again, q, cache)
        return (*pull(cotangents), None, None)

    attention.defvjp(save, pull_back)
    return AttentionOutput(*attention(q, cache, indices, positions))
