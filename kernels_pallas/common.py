"""What every op shares: the result type, dtypes, and the choice of an implementation.

Axis alphabet: see :mod:`sparse_attn.types`.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Implementation = Literal["auto", "reference", "xla", "mosaic_tpu", "mosaic_gpu"]

_PREFERENCE = {
    "tpu": ("mosaic_tpu", "xla"),
    "gpu": ("mosaic_gpu", "xla"),
    "cpu": ("xla",),
}
_logger = logging.getLogger("sparse_attn")
_logged: set[tuple[str, str, str]] = set()


class AttentionOutput(NamedTuple):
    """Attention over some set of keys, in the form that merges with other *disjoint* sets.

    ``out`` is normalised over the keys that were seen; ``lse`` is the natural logarithm of the sum
    of exponentiated logits, at least float32. A row that saw nothing has ``out = 0``,
    ``lse = -inf`` and contributes zero gradient.
    """

    out: Float[Array, "B T N Hv"]
    lse: Float[Array, "B T N"]


def accumulation_dtype(dtype: Any) -> Any:
    """The dtype of softmax statistics and sums: float32, or float64 for float64 inputs."""
    return jnp.promote_types(dtype, jnp.float32)


def merge(*parts: AttentionOutput) -> AttentionOutput:
    """Combine attention over disjoint key sets: out = sum_i exp(lse_i - lse) out_i.

    Shapes as in :class:`AttentionOutput`. Differentiable. Rows that saw nothing anywhere stay
    ``(0, -inf)`` with zero gradient.
    """
    lses = jnp.stack([part.lse for part in parts])
    top = jax.lax.stop_gradient(jnp.max(lses, axis=0))
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    visible = ~jnp.isneginf(lses)
    shifted = jnp.where(visible, lses, 0.0) - top[None]
    weights = jnp.where(visible, jnp.exp(shifted), 0.0)
    total = jnp.sum(weights, axis=0)
    seen = total > 0
    safe_total = jnp.where(seen, total, 1.0)
    outs = jnp.stack([part.out for part in parts]).astype(lses.dtype)
    out = jnp.sum(weights[..., None] * outs, axis=0) / safe_total[..., None]
    lse = jnp.where(seen, jnp.log(safe_total) + top, -jnp.inf)
    return AttentionOutput(out.astype(parts[0].out.dtype), lse)


def kernels(op: str, function: str) -> dict[str, Callable[..., Any]]:
    """The Pallas backends of a call: ``function`` of ``kernels_pallas/<op>/mosaic_{tpu,gpu}.py``.

    Their modules are imported by the first call, so that other platforms never load Mosaic.
    """

    def backend(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            module = importlib.import_module(f"kernels_pallas.{op}.{name}")
            return getattr(module, function)(*args, **kwargs)

        return call

    return {name: backend(name) for name in ("mosaic_tpu", "mosaic_gpu")}


def dispatch(
    op: str,
    implementation: Implementation,
    backends: Mapping[str, Callable[..., Any]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run ``op`` with the named backend, or with the first one that serves under ``"auto"``.

    A backend raises ``NotImplementedError`` for a shape it cannot serve: ``auto`` then tries the
    next, a named backend lets the error through. ``ValueError`` (nonsense from the caller) is never
    caught. What was chosen is logged once per op and platform.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(f"{implementation=} is unknown; use one of {get_args(Implementation)}")
    if implementation != "auto":
        if implementation not in backends:
            raise NotImplementedError(
                f"{op} has no {implementation!r} backend; it has {sorted(backends)}"
            )
        return backends[implementation](*args, **kwargs)
    platform = jax.default_backend()
    refusals = []
    for name in _PREFERENCE.get(platform, ("xla",)):
        if name not in backends:
            continue
        try:
            result = backends[name](*args, **kwargs)
        except NotImplementedError as error:
            refusals.append(f"{name}: {error}")
            continue
        if (op, platform, name) not in _logged:
            _logged.add((op, platform, name))
            because = f" ({'; '.join(refusals)})" if refusals else ""
            _logger.info("%s on %s runs as %s%s", op, platform, name, because)
        return result
    raise NotImplementedError(f"no backend of {op} serves this call: {'; '.join(refusals)}")
