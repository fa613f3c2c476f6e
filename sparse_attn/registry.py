"""From a mechanism's config to its module. A new mechanism registers itself here, in its own file.

A config is a frozen, hashable dataclass with

* ``alignment`` - document starts are multiples of it; ``kv_branches`` - R; ``causal``;
* ``covering(length)`` - the variant whose output equals dense attention up to that length;
* ``density(length)`` - attended over causal token pairs;
* ``tiny()`` (static) - variants with small blocks, on which the property suite runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import nnx

from sparse_attn.types import HeadShape


@runtime_checkable
class MechanismConfig(Protocol):
    """What every mechanism's config offers; see the module docstring."""

    @property
    def alignment(self) -> int: ...

    @property
    def kv_branches(self) -> int: ...

    @property
    def causal(self) -> bool: ...

    def covering(self, length: int) -> Any: ...

    def density(self, length: int) -> float: ...


_modules: dict[type, Callable[..., Any]] = {}


def register[M: nnx.Module](config: type) -> Callable[[type[M]], type[M]]:
    """Class decorator: the decorated module implements mechanisms configured by ``config``."""

    def add(module: type[M]) -> type[M]:
        _modules[config] = module
        return module

    return add


def registered() -> dict[type, Callable[..., Any]]:
    """All known config types and their modules."""
    return dict(_modules)


def build_mechanism(
    config: Any, shape: HeadShape, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32
) -> Any:
    """Make the module for ``config``.

    Raises:
      TypeError: if no mechanism is registered for the config's type.
    """
    module = _modules.get(type(config))
    if module is None:
        known = sorted(kind.__name__ for kind in _modules)
        raise TypeError(f"no mechanism is registered for {config!r}; known: {known}")
    return module(config, shape, rngs=rngs, param_dtype=param_dtype)
