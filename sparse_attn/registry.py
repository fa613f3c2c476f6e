"""From a mechanism's config to its module. A new mechanism registers itself here, in its own file.

``MECHANISMS`` and ``POLICIES`` map short names to config classes: mechanisms have something to
learn (or are the dense yardstick), policies are training-free selectors on a dense model's heads.
Both obey the same contract, and the property suite runs over both.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from sparse_attn.shards import Strategy
from sparse_attn.types import HeadShape

MECHANISMS: dict[str, type[MechanismConfig]] = {}
POLICIES: dict[str, type[MechanismConfig]] = {}

_modules: dict[type, Callable[..., Any]] = {}


class MechanismConfig:
    """Base of every mechanism's config, a frozen hashable dataclass validated when it is made.

    Subclasses override what differs from dense attention. They carry ``implementation``.
    """

    @property
    def alignment(self) -> int:
        """Packed documents start at multiples of this many tokens."""
        return 1

    @property
    def kv_branches(self) -> int:
        """R, the independent K/V sets the mechanism wants from the model."""
        return 1

    @property
    def causal(self) -> bool:
        """Whether no row ever depends on a later token; generation refuses others."""
        return True

    @property
    def sequence_strategies(self) -> tuple[Strategy, ...]:
        """How the module works on a part of the sequence, best first; see ``docs/parallel.md``.

        Without any, :mod:`sparse_attn.parallel` gathers the sequence on every device.
        """
        return ()

    @property
    def selector_parameters(self) -> tuple[str, ...] | None:
        """The module's attributes that ``attend="fit"`` teaches; None: every parameter it has."""
        return None

    def covering(self, length: int) -> Any:
        """The variant whose output equals dense attention for documents up to ``length`` tokens."""
        raise NotImplementedError(f"{type(self).__name__} does not say what covers {length} tokens")

    def density(self, length: int) -> float:
        """Attended over causal token pairs of one document of ``length`` tokens, at most."""
        raise NotImplementedError(f"{type(self).__name__} does not say its density at {length}")

    def auxiliary_bits(self, shape: HeadShape, element_bits: int = 16) -> float:
        """Bits a token that the selector keeps in a layer's cache beside that layer's K and V.

        Counted per cached token over all heads; ``element_bits`` is the width of a cached number.
        Rings and other buffers whose size does not follow the context are not counted.
        """
        del shape, element_bits
        return 0.0

    def selector_bytes(self, shape: HeadShape, length: Any, element_bits: int = 16) -> Any:
        """Bytes that the selector reads of one layer to choose for one token with ``length`` keys.

        Over all heads, beside the K and V that are then attended; ``length`` is a number or an
        array of them. By default everything that :meth:`auxiliary_bits` says is kept, once.
        """
        return self.auxiliary_bits(shape, element_bits) / 8 * length

    def selector_flops(self, shape: HeadShape, length: Any) -> Any:
        """Operations that the selector spends on one token with ``length`` keys, in one layer.

        By default every number that the selector reads meets the G query heads of a group in one
        multiplication and one addition.
        """
        numbers = self.selector_bytes(shape, length, element_bits=16) / 2
        return 2 * shape.group * numbers

    @staticmethod
    def tiny() -> tuple[Any, ...]:
        """Variants with small blocks, on which the property suite runs."""
        raise NotImplementedError("a registered config lists small variants for the property suite")


def register[M: nnx.Module](
    config: type[MechanismConfig], name: str, *, policy: bool = False
) -> Callable[[type[M]], type[M]]:
    """Class decorator: the module implements what ``config`` configures, known as ``name``.

    ``policy``: it goes to ``POLICIES`` instead of ``MECHANISMS``.

    Raises:
      ValueError: if the name is taken by another config.
    """
    table = POLICIES if policy else MECHANISMS
    taken = (MECHANISMS | POLICIES).get(name, config)
    if taken is not config:
        raise ValueError(f"{name!r} already names {taken.__name__}; choose another name")

    def add(module: type[M]) -> type[M]:
        table[name] = config
        _modules[config] = module
        return module

    return add


def registered() -> dict[type, Callable[..., Any]]:
    """All known config types, policies included, and their modules."""
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


def parse_mechanism(
    text: str, known: Mapping[str, type[MechanismConfig]] | None = None
) -> MechanismConfig:
    """The config that ``NAME`` or ``NAME:FIELD=VALUE,...`` describes, as on command lines.

    ``known`` are the names to choose from, by default all mechanisms and policies. Values are
    Python literals; a bare word is a string: ``quest:budget=64,share=query``.

    Raises:
      ValueError: if the name or a field is unknown, or a value does not fit.
    """
    known = MECHANISMS | POLICIES if known is None else known
    name, _, settings = text.partition(":")
    if name not in known:
        raise ValueError(f"{name!r} is none of the known: {listed(known, name)}")
    kind: Any = known[name]
    fields = [field.name for field in dataclasses.fields(kind)]
    wanted = ValueError(f"{text!r} must read NAME:FIELD=VALUE,... with FIELD of {fields}")
    try:
        call = ast.parse(f"config({settings})", mode="eval").body
        assert isinstance(call, ast.Call)
        values = {
            str(keyword.arg): keyword.value.id
            if isinstance(keyword.value, ast.Name)
            else ast.literal_eval(keyword.value)
            for keyword in call.keywords
        }
    except (ValueError, SyntaxError) as error:
        raise wanted from error
    if call.args or not set(values) <= set(fields):
        raise wanted
    given = [field for field in dataclasses.fields(kind) if field.name in values]
    try:
        for field in given:
            if field.type == "int" and not isinstance(values[field.name], int):
                raise TypeError(f"{field.name}={values[field.name]!r} is no int")
        return kind(**values)
    except TypeError as error:
        shown = ",".join(f"{field.name}={field.default!r}" for field in given)
        raise ValueError(f"{text!r}: a value has another type than in {name}:{shown}") from error
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from error


def listed(known: Iterable[str], mistaken: str) -> str:
    """The known names for an error message, and which of them was probably meant."""
    known = list(known)
    close = difflib.get_close_matches(mistaken.lower(), known, n=1, cutoff=0.4)
    return ", ".join(known) + "".join(f"; did you mean {name}?" for name in close)


def mechanism_text(config: MechanismConfig) -> str:
    """``NAME:FIELD=VALUE,...`` with every field: what :func:`parse_mechanism` reads back.

    Raises:
      ValueError: if the config's type is not registered.
    """
    for name, kind in (MECHANISMS | POLICIES).items():
        if kind is type(config):
            fields = dataclasses.fields(config)  # type: ignore[arg-type]
            settings = (f"{field.name}={getattr(config, field.name)!r}" for field in fields)
            return f"{name}:{','.join(settings)}"
    raise ValueError(f"{config!r} has no name: its type is not registered")
