"""The configuration of a run: one frozen dataclass, made by a Python recipe, overridden by flags.

A recipe is a Python file that defines ``config = RunConfig(...)``. The command line changes single
fields by their dotted name (``--model.attention.selected-blocks 8``), and the resolved result is
written to the run folder as ``config.json``, from which it can be rebuilt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any, Literal, get_args

from models.transformer import ModelConfig
from sparse_attn.shards import Order, Strategy
from train.data import DataConfig
from train.evaluation.config import EvaluationConfig
from train.recipes import ConfigError, find_recipe, list_recipes
from train.recipes import UserError as UserError
from train.tokenizer import TokenizerConfig

CONFIG_FILE = "config.json"
TOKENIZER_FOLDER = "tokenizer"

# Fields that may change when a run is resumed: they say how long, how often and where, not what
# is computed.
FREE_FIELDS = (
    "run_dir",
    "steps",
    "checkpoint.",
    "logging.",
    "evaluation.",
    "evaluate_at_end",
    "mesh.",
    "data.cache_dir",
    "data.prefetch",
)
# Fields that no flag lets through: the saved input position or the weights would mean something
# else under the new value.
BOUND_FIELDS = ("tokenizer.", "data.", "seed", "batch_size", "sequence_length")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule.

    Attributes:
      learning_rate: at the top of the schedule, after warm-up.
      schedule: "cosine" decays over all steps; "wsd" (warm-up, stable, decay) stays at the top and
        falls linearly over the last ``decay_fraction`` of the steps; "constant" stays.
      warmup_steps: of linear rise from 0.
      decay_fraction: share of all steps that "wsd" decays over.
      final_fraction: last learning rate over ``learning_rate``.
      beta1: decay of the mean of gradients.
      beta2: decay of the mean of squared gradients.
      epsilon: added to the root of the second mean.
      weight_decay: decoupled; matrices only, never norms, biases, embeddings or positions.
      clip_norm: gradients are scaled down to this global norm; 0 turns clipping off.
      z_loss: weight of the squared logarithm of the softmax's denominator; 0 leaves it out.

    Raises:
      ValueError: if a value is out of range.
    """

    learning_rate: float = 1e-3
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "wsd", "constant"):
            raise ValueError(
                f"optimizer.schedule={self.schedule!r} is unknown; use cosine, wsd or constant"
            )
        if not self.learning_rate > 0:
            raise ValueError(f"optimizer.learning_rate={self.learning_rate} must be positive")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"optimizer.decay_fraction={self.decay_fraction} must be in (0, 1]")
        for name in ("beta1", "beta2", "final_fraction"):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (value == 1 and name != "final_fraction"):
                raise ValueError(f"optimizer.{name}={value} is out of range 0 to 1")
        for name in ("warmup_steps", "weight_decay", "clip_norm", "z_loss"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must not be negative")
        if not self.epsilon > 0:
            raise ValueError(f"optimizer.epsilon={self.epsilon} must be positive")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh; one axis may be -1, which takes the devices that are left.

    Attributes:
      data: copies of the model, each with its part of the batch.
      fsdp: parts of the batch that also share one copy of the weights.
      sequence: parts of every sequence.
      tensor: parts of every weight matrix and of the heads.
      strategy: how attention works on split sequences (docs/parallel.md): "auto" is the mechanism's
        own choice, "replicate" serves all.
      order: "natural" gives every device one stretch of a row, "zigzag" an early and a late one,
        which balances causal attention.

    Raises:
      ValueError: if a size is 0 or below -1, several are -1, or a name is unknown.
    """

    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1
    strategy: Strategy | Literal["auto"] = "auto"
    order: Order = "natural"

    def __post_init__(self) -> None:
        for field, kinds in (
            ("strategy", ("auto", *get_args(Strategy))),
            ("order", get_args(Order)),
        ):
            if getattr(self, field) not in kinds:
                raise ValueError(
                    f"mesh.{field}={getattr(self, field)!r} is unknown; use {', '.join(kinds)}"
                )
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "sequence", "tensor")}
        for name, size in sizes.items():
            if size == 0 or size < -1:
                raise ValueError(
                    f"mesh.{name}={size}; use a size of at least 1, or -1 for the rest"
                )
        rest = [name for name, size in sizes.items() if size == -1]
        if len(rest) > 1:
            raise ValueError(f"mesh sizes {', '.join(rest)} are all -1; only one can take the rest")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state of a run is saved.

    Attributes:
      every: steps between checkpoints; the last step is always saved.
      keep: newest checkpoints that are kept.

    Raises:
      ValueError: if a value is below 1.
    """

    every: int = 200
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"checkpoint.{name}={getattr(self, name)} must be at least 1")


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """What a run reports while it trains.

    Attributes:
      every: steps between lines of metrics.jsonl.
      inspect_every: steps between comparisons of the selection with dense attention; 0 for never.
      progress: draw a progress line in the terminal.
      profile: first and last step that JAX's profiler traces into the run folder's ``profile``;
        none with 0 0.
      wandb: also report to Weights & Biases, into a local folder ("offline") or to its
        service ("online"); needs the ``wandb`` extra.
      wandb_project: the project there.

    Raises:
      ValueError: if a value is out of range.
    """

    every: int = 1
    inspect_every: int = 100
    progress: bool = True
    profile: tuple[int, int] = (0, 0)
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "sparse-attn"

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"logging.every={self.every} must be at least 1")
        if self.inspect_every < 0:
            raise ValueError(f"logging.inspect_every={self.inspect_every} must not be negative")
        if self.profile != (0, 0) and not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(
                f"logging.profile={self.profile} must be a first and a last step from 1 on, or 0 0"
            )
        if self.wandb not in ("off", "offline", "online"):
            raise ValueError(f"logging.wandb={self.wandb!r} must be off, offline or online")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything a training run depends on.

    Attributes:
      model: sizes of the decoder and its attention mechanism.
      run_dir: folder of the run: configuration, metrics, checkpoints, evaluation.
      seed: of the parameters and of the order of the text.
      init_from: what to start from instead of random parameters: the run folder of a trained
        model, or a published model (a Hugging Face folder, a .gguf file, a package's name) with
        the tokenizer's kind "published". Its attention may be another one, see ``models.upcycle``.
        Empty: nothing.
      objective: "language_model" trains every parameter to predict the next token. "selector"
        trains only what the mechanisms select by, towards dense attention (``attend="fit"``): the
        language model stays as ``init_from`` left it, bit for bit.
      frozen: names of parameters, or the beginnings of names ("embedding", "layers/0"), which the
        objective "language_model" leaves as they are, bit for bit.
      steps: optimizer updates in all.
      batch_size: rows of a step, over all devices and microbatches.
      sequence_length: tokens of a row.
      microbatches: parts a batch is computed in, one after the other, to save memory.
      loss_chunk: tokens whose logits exist at the same time.
      data: the text and its split.
      tokenizer: how text becomes tokens.
      optimizer: AdamW and its schedule.
      mesh: how devices share the work.
      checkpoint: when state is saved.
      logging: what is reported.
      evaluation: what is scored on held-out text.
      evaluate_at_end: evaluate after the last step.

    Raises:
      ValueError: if a size is below 1 or two sizes do not fit each other.
    """

    model: ModelConfig
    run_dir: str = "runs/default"
    seed: int = 0
    init_from: str = ""
    objective: Literal["language_model", "selector"] = "language_model"
    frozen: tuple[str, ...] = ()
    steps: int = 1000
    batch_size: int = 8
    sequence_length: int = 1024
    microbatches: int = 1
    loss_chunk: int = 8192
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    evaluate_at_end: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "microbatches", "loss_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.sequence_length < 2:
            raise ValueError(
                f"sequence_length={self.sequence_length} must be at least 2: every token but the "
                "first one is predicted"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be in [0, 2**32)")
        if self.batch_size % self.microbatches:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of "
                f"microbatches={self.microbatches}; every microbatch needs as many rows"
            )
        if self.objective not in ("language_model", "selector"):
            raise ValueError(
                f"objective={self.objective!r} is unknown; use 'language_model' or 'selector'"
            )
        if self.objective == "selector" and not self.init_from:
            raise ValueError(
                "objective='selector' fits selectors to a frozen, trained model: name its run "
                "folder with --init-from"
            )
        if self.objective == "selector" and self.frozen:
            raise ValueError(
                f"frozen={self.frozen} with objective='selector', which freezes everything but the "
                "selectors itself; leave one of the two out"
            )
        if self.data.length_bins and self.data.length_bins[-1] > self.sequence_length:
            raise ValueError(
                f"data.length_bins={self.data.length_bins} ends above "
                f"sequence_length={self.sequence_length}; no piece can be longer than a row"
            )
        if 0 < self.data.positions_up_to < self.sequence_length:
            raise ValueError(
                f"data.positions_up_to={self.data.positions_up_to} is less than "
                f"sequence_length={self.sequence_length}; a row has as many positions as that"
            )
        alignment = self.model.alignment
        if self.sequence_length % alignment:
            raise ValueError(
                f"sequence_length={self.sequence_length} is not a multiple of {alignment}, the "
                f"block of {type(self.model.attention).__name__} that documents are aligned to; "
                f"use {max(self.sequence_length // alignment, 1) * alignment} or change the block"
            )
        if self.tokenizer.kind == "published" and not self.init_from:
            raise ValueError(
                "the tokenizer of kind 'published' comes with a published model: name it with "
                "--init-from"
            )
        needed = {"bytes": 259, "published": 1}.get(self.tokenizer.kind, self.tokenizer.vocab_size)
        if self.model.vocab_size < needed:
            raise ValueError(
                f"model.vocab_size={self.model.vocab_size} is smaller than the {needed} tokens of "
                f"the {self.tokenizer.kind} tokenizer; set --model.vocab-size {needed}"
            )


def load_recipe(name: str | Path) -> RunConfig:
    """The ``config`` that a recipe defines: a Python file, or a packaged recipe by its name.

    Raises:
      ConfigError: if there is no such recipe, it fails, or it defines no ``config`` of this type.
    """
    path = find_recipe(name)
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"recipe {path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError as error:  # a model or text that is not installed
        raise ConfigError(f"recipe {path}: {error}") from error
    except Exception as error:
        raise ConfigError(f"recipe {path} fails: {type(error).__name__}: {error}") from error
    config = getattr(module, "config", None)
    if not isinstance(config, RunConfig):
        raise ConfigError(
            f"recipe {path} must define `config = RunConfig(...)`; "
            f"its `config` is {type(config).__name__}"
        )
    return config


def recipe_of_run(run_dir: str | Path) -> str | None:
    """The name of the packaged recipe that trains ``run_dir`` unless told otherwise."""
    for recipe in list_recipes():
        with contextlib.suppress(ConfigError):
            if load_recipe(recipe.path).run_dir == str(run_dir):
                return recipe.name
    return None


def to_json(config: Any) -> Any:
    """A dataclass as JSON values; every dataclass carries its type name under ``"type"``."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"type": f"{type(config).__module__}.{type(config).__qualname__}", **fields}
    if isinstance(config, tuple | list):
        return [to_json(value) for value in config]
    return config


def from_json(value: Any) -> Any:
    """The inverse of :func:`to_json`; lists become tuples, so that configs stay hashable.

    Raises:
      ConfigError: if a type or a field is unknown, or a value is out of range.
    """
    if isinstance(value, list):
        return tuple(from_json(item) for item in value)
    if not isinstance(value, dict):
        return value
    name = value.get("type")
    if not isinstance(name, str) or "." not in name:
        raise ConfigError(f"a configuration section has the type {name!r}, not a dataclass's name")
    module, _, attribute = name.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"configuration type {name} cannot be imported: {error}") from error
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ConfigError(f"configuration type {name} is not a dataclass")
    fields = {key: from_json(item) for key, item in value.items() if key != "type"}
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} cannot be rebuilt: {error}") from error


def save_run_config(config: RunConfig, run_dir: str | Path) -> None:
    """Write ``config`` to the run folder."""
    text = json.dumps(to_json(config), indent=2) + "\n"
    temporary = Path(run_dir) / (CONFIG_FILE + ".partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(Path(run_dir) / CONFIG_FILE)


def load_run_config(run_dir: str | Path) -> RunConfig:
    """The configuration that a run folder was trained with.

    Raises:
      ConfigError: if the folder has no readable ``config.json``.
    """
    path = Path(run_dir) / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{run_dir} is no run folder: it has no {CONFIG_FILE}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); restore the file or choose another --run-dir"
        ) from error
    config = from_json(values)
    if not isinstance(config, RunConfig):
        raise ConfigError(f"{path} holds a {type(config).__name__}, not a RunConfig")
    return config


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """``{"model.layers": 4, ...}``; a dataclass field also lists its type's name."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            values[name] = type(value).__name__
            values.update(flatten(value, name + "."))
        else:
            values[name] = value
    return values


def check_resumable(old: RunConfig, new: RunConfig, *, allow_changes: bool = False) -> None:
    """Refuse to continue a run under a configuration that means another experiment.

    ``FREE_FIELDS`` may always differ. ``allow_changes`` lets the others through, except
    ``BOUND_FIELDS``; whether changed model sizes still fit the weights is seen on restoring.

    Raises:
      ConfigError: listing the fields that differ, with both values and the ways out.
    """
    before, after = flatten(old), flatten(new)
    absent = "absent"
    changed = [
        (name, before.get(name, absent), after.get(name, absent))
        for name in dict.fromkeys([*before, *after])
        if before.get(name, absent) != after.get(name, absent) and not _matches(name, FREE_FIELDS)
    ]
    bound = [change for change in changed if _matches(change[0], BOUND_FIELDS)]
    refused = bound if allow_changes else changed
    if not refused:
        return
    # Where a type changed, its fields say nothing more.
    types = tuple(f"{name}." for name, *_ in refused)
    lines = "\n".join(
        f"  {name}: {was!r} -> {now!r}" for name, was, now in refused if not name.startswith(types)
    )
    ways = f"undo them, or start a new run with --run-dir (now {new.run_dir!r})"
    if not bound:
        ways += ", or continue this one all the same with --resume-with-changes"
    raise ConfigError(
        f"the configuration changed since the run in {new.run_dir!r} began:\n{lines}\n{ways}"
    )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(
        name.startswith(pattern) if pattern.endswith(".") else name == pattern
        for pattern in patterns
    )
