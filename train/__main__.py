"""``python -m train``: train a recipe, with typed overrides.

python -m train --config configs/quickstart.py --steps 50 --model.attention.selected-blocks 8
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import tyro
from rich.console import Console
from rich.markup import escape

from train.config import ConfigError, RunConfig, UserError, list_recipes, load_recipe
from train.distributed import Processes, is_first, join

PROGRAM = "python -m train"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train a recipe. Any field of its configuration can be changed by a flag.

    ``--model.attention NAME`` first replaces the attention mechanism by another one with its
    default settings.
    """

    config: Path
    """The recipe: a Python file that defines `config = RunConfig(...)`."""
    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    dry_run: bool = False
    """Print parameters, densities, memory and FLOPs of a step, and stop."""
    resume_with_changes: bool = False
    """Resume a run although its configuration changed."""
    distributed: bool = False
    """Join the other processes of this run; JAX finds them under Slurm, Open MPI, Cloud TPU and
    Kubernetes."""
    processes: Processes = dataclasses.field(default_factory=Processes)
    """Join processes that are named by hand."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0: finished, or stopped by a signal with everything saved; 2: a mistake of the caller; 130: a
    second interrupt, which does not wait for anything.

    Raises:
      SystemExit: by the parser, with status 2 for an unknown flag or value and 0 for ``--help``.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(stderr=True)
    try:
        recipe = recipe_path(arguments)
        if recipe is None:
            print_recipes(console)
            return 2 if set(arguments) - {"-h", "--help"} else 0
        parsed = parse(arguments, load_recipe(recipe))
        if parsed.distributed or parsed.processes.coordinator:
            join(parsed.processes)
            console.quiet = not is_first()
        if parsed.dry_run:
            from train.dry_run import dry_run

            dry_run(parsed.run, Console())
            return 0
        from train.loop import train

        outcome = train(parsed.run, resume_with_changes=parsed.resume_with_changes, console=console)
        if outcome.status == "finished" and parsed.run.evaluate_at_end:
            from train import evaluate

            if jax.process_count() > 1:
                run_dir = parsed.run.run_dir
                console.print(f"score it with {evaluate.PROGRAM} --checkpoint {run_dir}")
                return 0
            evaluate.evaluate(parsed.run, console=Console())
    except UserError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def recipe_path(arguments: Sequence[str]) -> Path | None:
    """The value of ``--config``, which decides what the other flags are."""
    for index, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return Path(argument.removeprefix("--config="))
        if argument == "--config":
            if index + 1 == len(arguments):
                raise ConfigError("--config needs the path of a recipe, e.g. configs/quickstart.py")
            return Path(arguments[index + 1])
    return None


def parse(arguments: Sequence[str], recipe: RunConfig) -> Arguments:
    """The recipe with the overrides of the command line.

    Raises:
      ConfigError: if ``--model.attention`` names no mechanism, or fields do not fit each other.
      SystemExit: on unknown flags (with a suggestion) or values that do not parse.
    """
    arguments, recipe = _replace_mechanism(list(arguments), recipe)
    try:
        return tyro.cli(
            Arguments,
            prog=PROGRAM,
            args=arguments,
            default=Arguments(config=tyro.MISSING, run=recipe),
            config=(tyro.conf.AvoidSubcommands,),
        )
    except ValueError as error:
        # Fields that fit one by one, but not each other.
        raise ConfigError(str(error)) from error


def print_recipes(console: Console) -> None:
    """Say how to start, with the recipes of ``configs/``."""
    console.print(f"usage: {PROGRAM} --config RECIPE [--FIELD VALUE ...]", markup=False)
    recipes = list_recipes()
    if not recipes:
        console.print("there are no recipes in configs/; run it in the repository's folder")
    for path, summary in recipes:
        console.print(f"  {path}  {summary}", markup=False, highlight=False)
    console.print(f"flags of a recipe: {PROGRAM} --config RECIPE --help", markup=False)


def _replace_mechanism(arguments: list[str], recipe: RunConfig) -> tuple[list[str], RunConfig]:
    """Take ``--model.attention NAME`` out of the arguments and put that mechanism in the recipe."""
    from sparse_attn.registry import MECHANISMS, POLICIES

    flag = "--model.attention"
    arguments = [part for argument in arguments for part in re.split(f"(?<=^{flag})=", argument)]
    if flag not in arguments:
        return arguments, recipe
    at = arguments.index(flag)
    name = arguments[at + 1] if at + 1 < len(arguments) else ""
    kinds = MECHANISMS | POLICIES
    kind = kinds.get(name.lower())
    if kind is None:
        raise ConfigError(f"{flag} {name!r} is no mechanism; known: {', '.join(kinds)}")
    try:
        model = dataclasses.replace(recipe.model, attention=kind())
        return arguments[:at] + arguments[at + 2 :], dataclasses.replace(recipe, model=model)
    except ValueError as error:
        raise ConfigError(f"{flag} {name}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
