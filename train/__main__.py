"""``python -m train``: train a recipe, with typed overrides.

python -m train --config quickstart --steps 50 --model.attention.selected-blocks 8
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence

import tyro
from rich.console import Console
from rich.markup import escape

from train.interrupts import StopSignal
from train.options import PROGRAM, Options
from train.recipes import ConfigError, UserError, flag_value, list_recipes


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
        recipe = flag_value(arguments, "--config", "the name or path of a recipe, e.g. quickstart")
        if recipe is None:
            if not arguments[:1] or arguments[0] in ("-h", "--help"):
                introduce(Console(), full=bool(arguments))
                return 0
            if not arguments[0].startswith("--tyro-"):
                names = ", ".join(recipe.name for recipe in list_recipes())
                raise ConfigError(f"--config is missing; give it a recipe: {names}, or a path")
            recipe = "quickstart"  # whose flags are completed

        with StopSignal() as stop:
            import jax

            from train.arguments import parse
            from train.config import load_recipe
            from train.distributed import is_first, join

            parsed = parse(arguments, load_recipe(recipe), recipe)
            if stop.requested:
                console.print(f"stopped by {stop.name} before anything was begun")
                return 0
            if parsed.distributed or parsed.processes.coordinator:
                join(parsed.processes)
                console.quiet = not is_first()
            if not parsed.dry_run:
                from train.loop import train

                outcome = train(
                    parsed.run,
                    resume_with_changes=parsed.resume_with_changes,
                    console=console,
                    stop=stop,
                )
        if parsed.dry_run:
            from train.dry_run import dry_run

            dry_run(parsed.run, Console())
            return 0
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
        console.print("interrupted")
        return 130
    return 0


def introduce(console: Console, *, full: bool = False) -> None:
    """Say how to start: the recipes with what they promise and, if ``full``, the flags of all."""
    if full:
        try:
            tyro.cli(Options, prog=PROGRAM, args=["--help"])
        except SystemExit:
            console.print()
    else:
        console.print(f"usage: {PROGRAM} --config RECIPE [--FIELD VALUE ...]\n", markup=False)
    console.print("RECIPE is the path of a Python file, or one of", markup=False)
    for recipe in list_recipes():
        console.print(f"\n  [bold]{escape(recipe.name)}[/]", highlight=False)
        for text in (recipe.summary, recipe.expected):
            if text:
                lines = textwrap.wrap(text, console.width - 6)
                console.print(
                    *(f"      {line}" for line in lines), sep="\n", markup=False, highlight=False
                )
    console.print(
        f"\nfirst steps:  {PROGRAM} --config quickstart\n"
        f"its flags:    {PROGRAM} --config quickstart --help\n"
        f"its costs:    {PROGRAM} --config quickstart --dry-run",
        markup=False,
        highlight=False,
    )


if __name__ == "__main__":
    sys.exit(main())
