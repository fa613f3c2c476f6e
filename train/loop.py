"""The training run, read from top to bottom in :func:`train`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx
from rich.console import Console
from rich.markup import escape

from models.loading import load
from models.loading.sources import open_checkpoint
from models.transformer import count_parameters, split
from models.upcycle import upcycle
from train.checkpoint import Checkpoints, describe_arrays, is_run, load_decoder
from train.config import (
    CONFIG_FILE,
    TOKENIZER_FOLDER,
    RunConfig,
    UserError,
    check_resumable,
    load_run_config,
    recipe_of_run,
    save_run_config,
)
from train.data import TrainIterator, make_tokenizer, make_train_iterator
from train.distributed import Agreement, is_first, meet
from train.flops import peak_flops, token_flops
from train.interrupts import StopSignal
from train.optimizer import parameter_name
from train.profiling import Profile
from train.reporting import Log, draw_loss_curve, print_placement, show_library_messages
from train.sharding import Placement, check_divisible, make_mesh
from train.step import (
    Metrics,
    TrainState,
    make_inspection,
    make_state,
    make_train_step,
    place_state,
    trained,
)
from train.tokenizer import Tokenizer, load_tokenizer


class RunFolderError(UserError):
    """The run folder cannot be written or belongs to another run."""


class TrainingDiverged(UserError):  # noqa: N818 - the field's word
    """The loss or its gradient is not a number any more."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: after how many updates, and whether it did all of them."""

    step: int
    status: Literal["finished", "interrupted"]


def train(
    config: RunConfig,
    *,
    resume_with_changes: bool = False,
    console: Console | None = None,
    stop: StopSignal | None = None,
) -> Outcome:
    """Train until ``config.steps``, from the newest checkpoint of the run folder if there is one.

    Two runs of the same configuration write the same metrics, bit for bit apart from timing, also
    if one of them was stopped or killed on the way and started again. ``stop``: what hears signals
    already; without it the run begins to listen here.

    Raises:
      UserError: on anything the caller can mend: a configuration that does not fit the text, the
        devices or the run folder, a damaged checkpoint, a diverged run.
    """
    console = console or Console(stderr=True, quiet=not is_first())
    show_library_messages(console)
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(StopSignal())
        shapes, placement = plan(config)
        agreement = Agreement(placement.mesh)
        resumes = open_run_folder(config, resume_with_changes=resume_with_changes)
        batches = open_input(config, placement, resumes=resumes)
        stack.callback(batches.close)
        train_step = make_train_step(config, placement)
        inspect = make_inspection(config, placement)
        checkpoints = Checkpoints(config.run_dir, keep=config.checkpoint.keep)
        stack.callback(checkpoints.close)
        state, first = start_state(config, placement, shapes, checkpoints, batches, console)
        if is_first():
            save_run_config(config, config.run_dir)
        parameters, learning = (
            count_parameters(tree) for tree in (state.params, trained(config, state.params))
        )
        fixed = "" if learning == parameters else f", {learning:,} of them trained"
        console.print(f"{parameters:,} parameters{fixed}, {placement.mesh.size} device(s)")
        if placement.mesh.size > 1:
            print_placement(console, shapes.params)
        frozen = frozen_arrays(config, state)

        log = Log(
            config,
            first,
            console,
            flops=token_flops(config, shapes.params),
            peak=peak_flops(list(placement.mesh.devices.flat)),
            writes=is_first(),
        )
        stack.enter_context(log)
        profile = stack.enter_context(Profile(config))

        def report(step: int, metrics: Metrics, inspection: Metrics) -> None:
            values, seen = jax.device_get((metrics, inspection))
            values = {name: float(value) for name, value in (*values.items(), *seen.items())}
            check_finite(step, values, checkpoints)
            log.step(
                step, values, write=bool(seen) or due(step, config.logging.every, config.steps)
            )

        def save(step: int, state: TrainState) -> None:
            # A resumed run keeps the lines up to its checkpoint, so they must be there first.
            log.sync()
            checkpoints.save(step, state, batches.get_state(), config)

        step, pending, stopping = first, None, agreement.stops(stop.requested)
        while step < config.steps and not stopping:
            step += 1
            batch = placement.put_batch(next(batches))
            profile.before(step)
            with jax.transfer_guard("disallow"):
                state, metrics = train_step(state, batch)
                inspected = due(step, config.logging.inspect_every, config.steps)
                inspection = inspect(state, batch) if inspected else {}
            profile.after(step, metrics)
            # The devices work on this step while the one before it is reported.
            if pending is not None:
                report(*pending)
            pending = (step, metrics, inspection)
            if due(step, config.checkpoint.every, config.steps):
                report(*pending)
                pending = None
                save(step, state)
            stopping = agreement.stops(stop.requested)
        if pending is not None:
            report(*pending)
            save(step, state)
        if frozen_arrays(config, state) != frozen:
            raise RuntimeError("a weight of the frozen language model changed: this is a bug")
        checkpoints.wait()

    if step < config.steps:
        done = f"after step {step}; the checkpoint is saved," if step > first else "before a step;"
        console.print(
            f"stopped by {stop.name or 'a signal to another process'} {done} the same command goes "
            "on from here"
        )
        return Outcome(step, "interrupted")
    if is_first():
        curve = draw_loss_curve(config.run_dir)
        console.print(f"finished step {step}; loss curve in {curve}")
    return Outcome(step, "finished")


def plan(config: RunConfig) -> tuple[TrainState, Placement]:
    """The shapes of the state and where everything lives; nothing is computed yet.

    Raises:
      UserError: if the configuration does not fit the devices.
    """
    with user_errors():
        mesh = make_mesh(config.mesh)
        check_divisible(
            mesh,
            batch_size=config.batch_size,
            microbatches=config.microbatches,
            sequence_length=config.sequence_length,
            order=config.mesh.order,
        )
        return place_state(config, mesh)


def start_state(
    config: RunConfig,
    placement: Placement,
    shapes: TrainState,
    checkpoints: Checkpoints,
    batches: TrainIterator,
    console: Console,
) -> tuple[TrainState, int]:
    """A fresh state, or the newest checkpoint's with the input put back to its place."""
    if checkpoints.latest is None and config.init_from:
        state, origin = continued_state(config, placement)
        console.print(f"new run in {config.run_dir}, from {origin}")
        return state, 0
    if checkpoints.latest is None:
        console.print(f"new run in {config.run_dir}")
        return make_state(config, placement), 0
    restored = checkpoints.restore_newest(
        shapes, warn=lambda text: console.print(f"[yellow]warning:[/] {escape(text)}")
    )
    with user_errors():
        batches.set_state(restored.input_state)
    console.print(f"resuming {config.run_dir} from step {restored.step} of {config.steps}")
    if restored.step >= config.steps:
        console.print("nothing left to train; raise --steps to go on")
    return restored.state, restored.step


def continued_state(config: RunConfig, placement: Placement) -> tuple[TrainState, str]:
    """A fresh state with the weights of ``config.init_from``, and where they come from, in words.

    Raises:
      UserError: if that run has no usable checkpoint, there is no such published model, or the
        model cannot become this one.
    """
    if is_run(config.init_from):
        decoder, source, step = load_decoder(config.init_from)
        model, origin = source.model, f"step {step} of {config.init_from}"
    else:
        with user_errors():
            decoder, model, _, _ = load(config.init_from, tokenizer=False)
        origin = f"the published model {config.init_from}"
    _, params, state = split(decoder)
    rngs = nnx.Rngs(jax.random.key(config.seed, impl="rbg"))
    with user_errors():
        continued = upcycle(params, model, config.model, rngs=rngs, state=state)
    _, params, state = split(continued)
    fresh = make_state(config, placement)
    return (
        dataclasses.replace(
            fresh,
            params=jax.device_put(jax.device_get(params), placement.state.params),
            state=jax.device_put(jax.device_get(state), placement.state.state),
        ),
        origin,
    )


def frozen_arrays(config: RunConfig, state: TrainState) -> dict[str, list[Any]]:
    """Shape, dtype and checksum of every parameter that the run leaves alone, by name."""
    if config.objective == "language_model" and not config.frozen:
        return {}
    arrays = describe_arrays(state.params)
    learning = jax.tree_util.tree_leaves_with_path(trained(config, state.params))
    for path, _ in learning:
        del arrays[parameter_name(path)]
    return arrays


def open_input(config: RunConfig, placement: Placement, *, resumes: bool) -> TrainIterator:
    """This process's part of the batches of the training split, encoded by the run's tokenizer.

    Raises:
      UserError: if the corpus is missing, or does not fit the configuration.
    """
    folder = Path(config.run_dir) / TOKENIZER_FOLDER
    with user_errors():
        if resumes and folder.is_dir():
            tokenizer = load_tokenizer(folder)
        elif config.init_from:
            tokenizer = inherited_tokenizer(config)
        else:
            tokenizer = make_tokenizer(config.data, config.tokenizer)
        if is_first() and not (resumes and folder.is_dir()):
            tokenizer.save(folder)
        share, parts = placement.row_share
        return make_train_iterator(
            config.data,
            tokenizer,
            config.sequence_length,
            config.batch_size,
            config.model.alignment,
            config.seed,
            process_index=share,
            process_count=parts,
        )


def inherited_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer that the weights of ``config.init_from`` were trained with.

    Raises:
      UserError: if there is no such run, or this run's configuration asks for another tokenizer.
    """
    if not is_run(config.init_from):
        if config.tokenizer.kind != "published":
            raise UserError(
                f"{config.init_from} comes with its own tokenizer, this run asks for "
                f"{config.tokenizer}; use TokenizerConfig(kind='published')"
            )
        with user_errors():
            tokenizer = open_checkpoint(config.init_from).tokenizer()
        if tokenizer is None:
            raise UserError(f"{config.init_from} comes without a tokenizer: add tokenizer.json")
        return tokenizer
    check_origin(config)
    theirs = load_run_config(config.init_from).tokenizer
    if theirs != config.tokenizer:
        raise UserError(
            f"{config.init_from} was trained with {theirs}, this run asks for {config.tokenizer}; "
            "its weights mean nothing under another tokenizer: use the same settings"
        )
    return load_tokenizer(Path(config.init_from) / TOKENIZER_FOLDER)


def check_origin(config: RunConfig) -> None:
    """Find the run that this one starts from, if it starts from a run.

    Raises:
      UserError: if it is not there; it says which recipe trains it.
    """
    source = config.init_from
    if not source or not is_run(source) or (Path(source) / CONFIG_FILE).exists():
        return
    recipe = recipe_of_run(source)
    trains = f" (python -m train --config {recipe})" if recipe else ""
    raise UserError(
        f"this run starts from the weights of {source}, which is no run folder: it has no "
        f"{CONFIG_FILE}. Train it first{trains}, or name another with --init-from"
    )


def open_run_folder(config: RunConfig, *, resume_with_changes: bool) -> bool:
    """Make the run folder, prove that it can be written, and that it belongs to this run.

    Returns:
      Whether there is a checkpoint to resume from.

    Raises:
      UserError: if a new run is to start from another that is not there.
      RunFolderError: if it cannot be made or written.
      ConfigError: if a run with another configuration is to be resumed in it.
    """
    folder = Path(config.run_dir)
    if not os.path.exists(folder):  # Path.exists raises where a folder above is closed to us
        check_origin(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"run folder {config.run_dir!r} cannot be written ({error.strerror or error}); "
            "choose another with --run-dir"
        ) from error
    with Checkpoints(folder, read_only=True) as checkpoints:
        begun = checkpoints.latest is not None
    if begun and (folder / CONFIG_FILE).exists():
        check_resumable(load_run_config(folder), config, allow_changes=resume_with_changes)
    # Until every process has looked, none may write.
    meet("opened the run folder")
    return begun


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every ``every`` steps, and after the last one, is done now."""
    return every > 0 and (step % every == 0 or step == last)


def check_finite(step: int, values: dict[str, float], checkpoints: Checkpoints) -> None:
    """Stop a run whose loss or gradient is not finite.

    Raises:
      TrainingDiverged: naming the step, the values and the last good checkpoint.
    """
    if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
        return
    checkpoints.wait()
    good = checkpoints.latest
    back = (
        f"the last good checkpoint is {checkpoints.path(good)}"
        if good is not None
        else "there is no checkpoint yet"
    )
    raise TrainingDiverged(
        f"step {step}: loss={values['loss']}, grad_norm={values['grad_norm']}; {back}. "
        "Try a lower --optimizer.learning-rate, a longer --optimizer.warmup-steps, or "
        "--optimizer.clip-norm 1"
    )


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Values that do not fit and files that do not exist are the caller's to mend."""
    try:
        yield
    except (ValueError, NotImplementedError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
