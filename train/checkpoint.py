"""Checkpoints: the whole training state, the input position and the configuration, in one step.

An Orbax ``CheckpointManager`` writes them in the background and keeps the newest ones. A step
becomes visible only when it is complete, so a killed process leaves at most a temporary folder.
Shape, dtype and a checksum of every array are kept beside them: restoring proves that it got what
was saved.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from models.transformer import Decoder, abstract, merge
from train.config import RunConfig, UserError, from_json, to_json
from train.distributed import is_first, meet
from train.optimizer import parameter_name

FOLDER = "checkpoints"
DAMAGED = "damaged-checkpoints"
_FORMAT = 1
_NEVER_AWAITED = r"coroutine '.*' was never awaited"


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or of another model."""


class DamagedCheckpoint(CheckpointError):  # noqa: N818 - what the user is told
    """A checkpoint cannot be read, or holds other values than were saved."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held: ``state`` as asked for, ``input_state`` of the data iterator."""

    step: int
    state: Any
    input_state: Any
    config: RunConfig


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
      run_dir: the run folder; they live in ``run_dir/checkpoints/<step>``.
      keep: newest ones to keep (None: all).
      read_only: never write, create or clean up.
    """

    def __init__(
        self, run_dir: str | Path, *, keep: int | None = None, read_only: bool = False
    ) -> None:
        self.folder = Path(run_dir).absolute() / FOLDER
        self._manager = None
        if read_only and not self.folder.is_dir():
            return
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def steps(self) -> list[int]:
        """Complete steps, oldest first."""
        return sorted(self._manager.all_steps()) if self._manager else []

    @property
    def latest(self) -> int | None:
        """The newest complete step."""
        return max(self.steps, default=None)

    def path(self, step: int) -> Path:
        """The folder of one step."""
        return self.folder / str(step)

    def save(self, step: int, state: Any, input_state: Any, config: RunConfig) -> None:
        """Copy the arrays now and write them in the background; ``wait`` makes sure of them.

        Args:
          step: finished updates.
          state: any pytree of arrays.
          input_state: the data iterator's position, JSON values.
          config: of the run, kept beside the state.

        Raises:
          CheckpointError: if the folder cannot be written.
        """
        metadata = {
            "format": _FORMAT,
            "step": step,
            "config": to_json(config),
            "arrays": describe_arrays(state),
        }
        try:
            assert self._manager is not None, "opened read-only"
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    input=ocp.args.JsonSave({"state": input_state}),
                    metadata=ocp.args.JsonSave(metadata),
                ),
                force=True,
            )
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {self.path(step)} cannot be written ({error}); free space or choose "
                "another --run-dir"
            ) from error

    def restore(self, shapes: Any, step: int | None = None) -> Restored:
        """Read one step (default: the newest).

        Args:
          shapes: the pytree that was saved, as ``ShapeDtypeStruct`` with shardings.
          step: which one.

        Raises:
          CheckpointError: if it is missing, damaged, or its arrays have other shapes.
        """
        step, metadata = self._metadata(step)
        self._compare(step, metadata["arrays"], _describe_shapes(shapes))
        read = self._read(
            step,
            ocp.args.Composite(
                state=ocp.args.StandardRestore(shapes), input=ocp.args.JsonRestore()
            ),
        )
        self._prove(step, metadata["arrays"], read.state)
        return Restored(step, read.state, read.input["state"], from_json(metadata["config"]))

    def restore_newest(self, shapes: Any, warn: Callable[[str], None] = warnings.warn) -> Restored:
        """The newest step that is whole. Damaged ones after it are told by ``warn`` and put aside,
        into ``damaged-checkpoints`` of the run, so that their numbers can be saved again.

        Raises:
          CheckpointError: if none is whole (the error of the oldest), or one is of another model.
        """
        damaged = []
        for step in reversed(self.steps):
            try:
                restored = self.restore(shapes, step)
            except DamagedCheckpoint as error:
                last, reason = error, str(error).partition("; delete")[0]
                damaged.append((step, reason))
                continue
            for other, reason in damaged:
                place = self._put_aside(other)
                warn(f"{reason}; going on from step {step}, the damaged one is in {place}")
            return restored
        if damaged:
            raise last
        return self.restore(shapes)

    def _put_aside(self, step: int) -> Path:
        """Move a step's folder to where no run looks for it."""
        assert self._manager is not None, "restore found no manager"
        place = self.folder.parent / DAMAGED / f"{step}"
        while place.exists():
            place = place.with_name(f"{place.name}-again")
        if is_first():
            place.parent.mkdir(exist_ok=True)
            self.path(step).rename(place)
        meet(f"put aside checkpoint {step}")
        self._manager.reload()
        return place

    def restore_part(self, shapes: dict[str, Any], step: int | None = None) -> dict[str, Any]:
        """Read only some fields of the saved state, e.g. ``{"params": ..., "state": ...}``.

        Raises:
          CheckpointError: as :meth:`restore`.
        """
        step, metadata = self._metadata(step)
        self._compare(step, metadata["arrays"], _describe_shapes(shapes), part=True)
        arguments = ocp.args.PyTreeRestore(
            shapes,
            restore_args=ocp.checkpoint_utils.construct_restore_args(shapes),
            partial_restore=True,
        )
        read = self._read(step, ocp.args.Composite(state=arguments))
        self._prove(step, metadata["arrays"], read.state)
        return read.state

    def wait(self) -> None:
        """Block until everything saved so far is complete on disk.

        Raises:
          CheckpointError: if writing failed.
        """
        if self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
        except OSError as error:
            raise CheckpointError(
                f"a checkpoint in {self.folder} could not be written ({error}); free space or "
                "choose another --run-dir"
            ) from error

    def close(self) -> None:
        """Finish writing and release the folder."""
        if self._manager is not None:
            self.wait()
            self._manager.close()
            self._manager = None

    def config(self, step: int | None = None) -> RunConfig:
        """The configuration that a step was saved under.

        Raises:
          CheckpointError: if the step is missing or damaged.
        """
        step, metadata = self._metadata(step)
        return from_json(metadata["config"])

    def _metadata(self, step: int | None) -> tuple[int, dict[str, Any]]:
        """The step to read, and what was noted beside it."""
        steps = self.steps
        if not steps:
            raise CheckpointError(
                f"{self.folder} holds no checkpoint; train first, or name another run folder"
            )
        step = steps[-1] if step is None else step
        if step not in steps:
            raise CheckpointError(f"{self.folder} holds no step {step}; it has {steps}")
        read = self._read(step, ocp.args.Composite(metadata=ocp.args.JsonRestore())).metadata
        missing = {"format", "config", "arrays"} - set(read or ())
        if missing:
            raise self._damaged(step, f"its metadata lacks {sorted(missing)}")
        if read["format"] != _FORMAT:
            raise CheckpointError(
                f"checkpoint {self.path(step)} has format {read['format']}, this version reads "
                f"{_FORMAT}; use the version that wrote it, or start again with --run-dir"
            )
        return step, read

    def _read(self, step: int, arguments: ocp.args.Composite) -> Any:
        options = ocp.CheckpointManagerOptions(read_only=True)
        hook = sys.unraisablehook
        sys.unraisablehook = functools.partial(_report_unraisable, hook)
        # A manager ties each item to the way it was first read, so each reading has its own.
        # Storage libraries raise all kinds of errors on damaged files.
        try:
            with ocp.CheckpointManager(self.folder, options=options) as manager:
                read = manager.restore(step, args=arguments)
            sys.unraisablehook = hook
            return read
        except Exception as error:
            warnings.filterwarnings("ignore", _NEVER_AWAITED, RuntimeWarning)
            first_line = (str(error).strip().splitlines() or [""])[0][:120]
            raise self._damaged(step, f"{type(error).__name__}: {first_line}") from error

    def _damaged(self, step: int, why: str) -> DamagedCheckpoint:
        earlier = [other for other in self.steps if other < step]
        back = f"to go on from step {earlier[-1]}" if earlier else "to train from the beginning"
        return DamagedCheckpoint(
            f"checkpoint {self.path(step)} is damaged or half-written ({why}); "
            f"delete that folder {back}, or start a new run with --run-dir"
        )

    def _compare(
        self, step: int, saved: dict[str, Any], wanted: dict[str, Any], *, part: bool = False
    ) -> None:
        names = [name for name in dict.fromkeys([*wanted, *saved]) if name in wanted or not part]
        different = [
            f"{name}: saved {_shape(saved.get(name))}, expected {_shape(wanted.get(name))}"
            for name in names
            if (saved.get(name) or [])[:2] != (wanted.get(name) or [])[:2]
        ]
        if different:
            more = f" and {len(different) - 3} more" if len(different) > 3 else ""
            raise CheckpointError(
                f"checkpoint {self.path(step)} is of another model: {'; '.join(different[:3])}"
                f"{more}; undo the change, or start a new run with --run-dir"
            )

    def _prove(self, step: int, saved: dict[str, Any], state: Any) -> None:
        for name, found in describe_arrays(state).items():
            if found != saved[name]:
                raise self._damaged(step, f"the values of {name} are not those that were saved")


def is_run(source: str | Path) -> bool:
    """Whether ``source`` names a run folder, and not a published model.

    Published are a file, a folder with settings but no checkpoints, and the name of a package. A
    path that does not exist counts as a run, so that the error speaks of training it first.
    """
    path = Path(source)
    published = (path / "config.json").exists() and not (path / FOLDER).exists()
    package = not path.exists() and not {"/", "\\"} & set(str(source))
    return not (path.is_file() or published or package)


def load_decoder(run_dir: str | Path, step: int | None = None) -> tuple[Decoder, RunConfig, int]:
    """The trained model of a run, on one device, without its optimizer.

    Args:
      run_dir: the run folder.
      step: which checkpoint; the newest by default.

    Returns:
      The decoder, the configuration it was trained with, and the checkpoint's step.

    Raises:
      CheckpointError: if there is no such checkpoint or it is damaged.
    """
    with Checkpoints(run_dir, read_only=True) as checkpoints:
        config = checkpoints.config(step)
        graphdef, params, state = abstract(config.model)
        device = SingleDeviceSharding(jax.local_devices()[0])
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
            {"params": params, "state": state},
        )
        read = checkpoints.restore_part(shapes, step)
        found = checkpoints.latest if step is None else step
    assert found is not None
    return merge(graphdef, read["params"], read["state"]), config, found


def _report_unraisable(hook: Callable[[Any], None], unraisable: Any) -> None:
    """Pass on what ``hook`` would report, but for the end of reads that a failed one left behind.

    Reads that are under way when the first one fails are dropped or find their event loop closed,
    and would each print a traceback, some of them after the error has been told.
    """
    error = unraisable.exc_value
    closed = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
    dropped = isinstance(getattr(error, "__cause__", None), GeneratorExit)
    unbegun = isinstance(error, RuntimeWarning) and re.match(_NEVER_AWAITED, str(error))
    if not (closed or dropped or unbegun):
        hook(unraisable)


def _describe_shapes(tree: Any) -> dict[str, list[Any]]:
    return {
        parameter_name(path): [list(leaf.shape), str(leaf.dtype)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def describe_arrays(tree: Any) -> dict[str, list[Any]]:
    """Shape, dtype and checksum of every array, by name."""
    sums = jax.device_get(_checksums(jax.tree.leaves(tree)))
    shapes = _describe_shapes(tree)
    return {name: [*shapes[name], int(total)] for name, total in zip(shapes, sums, strict=True)}


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    """The bits of each array added up modulo 2**32: exact, whatever the order and the sharding."""

    def add(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if leaf.dtype == jnp.bool_:
            leaf = leaf.astype(jnp.uint8)
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * min(leaf.itemsize, 4)}"))
        return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

    return [add(leaf) for leaf in leaves]


def _shape(entry: list[Any] | None) -> str:
    return "nothing" if entry is None else f"{entry[1]}{entry[0]}"
