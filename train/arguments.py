"""The command line of ``python -m train`` with a recipe: every field of it is a typed flag."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from models.command_line import program
from sparse_attn.registry import MECHANISMS, POLICIES, listed
from train.config import ConfigError, RunConfig
from train.options import PROGRAM, Options

COMMAND = "sparse-attn-train"
"""What the program is called where the package is installed; shell completion goes by it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(Options):
    """Train a recipe, with the fields of its configuration."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]


def parse(arguments: Sequence[str], recipe: RunConfig, name: str = "RECIPE") -> Arguments:
    """The recipe with the overrides of the command line; ``name`` is what ``--config`` said.

    Raises:
      ConfigError: if ``--model.attention`` names no mechanism, or fields do not fit each other.
      SystemExit: on unknown flags (with a suggestion) or values that do not parse.
    """
    arguments, recipe = _replace_mechanism(list(arguments), recipe)
    try:
        return tyro.cli(
            Arguments,
            prog=program(f"{PROGRAM} --config {name}", COMMAND, arguments),
            description=(
                "Train a recipe. Every field of its configuration is a flag, with the recipe's "
                "value as its default.\n\n"
                "Another mechanism: --model.attention NAME puts it in the place of the recipe's, "
                "with its own defaults and its own flags (add --help to see them). NAME is one "
                f"of {', '.join(MECHANISMS | POLICIES)}."
            ),
            args=arguments,
            default=Arguments(config=Path(name), run=recipe),
            config=(tyro.conf.AvoidSubcommands,),
        )
    except ValueError as error:
        # Fields that fit one by one, but not each other.
        raise ConfigError(str(error)) from error


def _replace_mechanism(arguments: list[str], recipe: RunConfig) -> tuple[list[str], RunConfig]:
    """Take ``--model.attention NAME`` out of the arguments and put that mechanism in the recipe."""
    flag = "--model.attention"
    arguments = [part for argument in arguments for part in re.split(f"(?<=^{flag})=", argument)]
    if flag not in arguments:
        return arguments, recipe
    at = arguments.index(flag)
    name = arguments[at + 1] if at + 1 < len(arguments) else ""
    kinds = MECHANISMS | POLICIES
    kind = kinds.get(name.lower())
    if kind is None:
        raise ConfigError(f"{flag} {name!r} is no mechanism; known: {listed(kinds, name)}")
    try:
        model = dataclasses.replace(recipe.model, attention=kind())
        return arguments[:at] + arguments[at + 2 :], dataclasses.replace(recipe, model=model)
    except ValueError as error:
        raise ConfigError(f"{flag} {name}: {error}") from error
