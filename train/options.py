"""The flags of ``python -m train`` that are no fields of a recipe; made without importing JAX."""

from __future__ import annotations

import dataclasses
from pathlib import Path

PROGRAM = "python -m train"


@dataclasses.dataclass(frozen=True)
class Processes:
    """How this process finds the others.

    Attributes:
      coordinator: HOST:PORT that process 0 listens on; empty lets JAX find it (Slurm, Open MPI,
        Cloud TPU, Kubernetes).
      count: processes of the run; needed with a coordinator.
      index: which of them this is, from 0; needed with a coordinator.

    Raises:
      ValueError: if a coordinator comes without a count and an index in range.
    """

    coordinator: str = ""
    count: int = 0
    index: int = -1

    def __post_init__(self) -> None:
        if not self.coordinator:
            if self.count or self.index != -1:
                raise ValueError(
                    f"count={self.count} and index={self.index} need a coordinator, HOST:PORT of "
                    "process 0; leave all three out to let JAX find the other processes"
                )
        elif self.count < 1 or not 0 <= self.index < self.count:
            raise ValueError(
                f"coordinator={self.coordinator} needs the count of processes and the index of "
                f"this one below it, not count={self.count} and index={self.index}"
            )


@dataclasses.dataclass(frozen=True)
class Options:
    """Train a recipe.

    Attributes:
      config: the recipe: the name of a packaged one, such as quickstart, or a Python file that
        defines `config = RunConfig(...)`.
      dry_run: print parameters, densities, memory and FLOPs of a step, and stop.
      resume_with_changes: resume a run although its configuration changed.
      distributed: join the other processes of this run; JAX finds them under Slurm, Open MPI,
        Cloud TPU and Kubernetes.
      processes: join processes that are named by hand.
    """

    config: Path
    dry_run: bool = False
    resume_with_changes: bool = False
    distributed: bool = False
    processes: Processes = dataclasses.field(default_factory=Processes)
