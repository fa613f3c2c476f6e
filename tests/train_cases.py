"""Small helpers for tests of training runs."""

import io

from rich.console import Console

from train.loop import train


def run(config, **flags):
    """Train quietly; the outcome and what was said."""
    console = Console(file=io.StringIO(), width=200)
    outcome = train(config, console=console, **flags)
    return outcome, console.file.getvalue()
