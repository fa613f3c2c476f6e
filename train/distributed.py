"""Several processes, one run: joining them, and what only one of them does.

Every process runs the same program; JAX joins their devices to one mesh. The first process (index
0) writes the run folder, metrics and messages, the others compute; checkpoints are written by all.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.config import UserError
from train.options import Processes


def join(processes: Processes) -> None:
    """Wait for the other processes and share their devices; before anything else uses JAX.

    Raises:
      UserError: if they cannot be found or do not come.
    """
    # Collectives between processes on CPUs; other platforms have their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    known: dict[str, Any] = {}
    if processes.coordinator:
        known = {
            "coordinator_address": processes.coordinator,
            "num_processes": processes.count,
            "process_id": processes.index,
        }
    try:
        jax.distributed.initialize(**known)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of this run did not find each other ({str(error).splitlines()[0]}); "
            "start every one of them with --processes.coordinator HOST:PORT --processes.count N "
            "--processes.index I, or under Slurm, Open MPI, Cloud TPU or Kubernetes with "
            "--distributed alone"
        ) from error


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def meet(why: str) -> None:
    """Wait until every process is here; at once if there is only one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(why)


class Agreement:
    """Whether any process wants to stop, known to all of them after the same step.

    A signal reaches processes at different steps, and one that stops alone would leave the others
    waiting. Wishes are handed in after every step and read one step later.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._size = mesh.size
        self._alone = jax.process_count() == 1
        self._asked: jax.Array | None = None
        self._any = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def stops(self, wanted: bool) -> bool:
        """Hand in this process's wish after a step; whether all of them stop now.

        Alone that is the wish itself. Among several it is what they handed in one step ago, when
        the answer is there without waiting for the step at work.
        """
        if self._alone:
            return wanted
        wish = np.full((1,), wanted, np.int32)
        flags = jax.make_array_from_callback((self._size,), self._sharding, lambda _: wish)
        asked, self._asked = self._asked, self._any(flags)
        return asked is not None and bool(asked)
