"""``python -m train.evaluate``: score a trained run on held-out text, through its own cache.

python -m train.evaluate --config configs/quickstart.py --checkpoint runs/quickstart
python -m train.evaluate --checkpoint runs/quickstart --evaluation.windows 8
python -m train.evaluate --checkpoint runs/quickstart-dense --policy quest:budget=64
python -m train.evaluate --config configs/hash_smollm2.py --tasks niah_single_1,perplexity \\
    --lengths 1024 --samples 4 --policies dense quest oracle_topk --budgets 1/8,1/32
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import tyro
from rich.console import Console
from rich.markup import escape

from models.command_line import program, quiet_orbax
from sparse_attn import POLICIES, Dense, MechanismConfig, parse_mechanism
from train.config import (
    CONFIG_FILE,
    TOKENIZER_FOLDER,
    ConfigError,
    RunConfig,
    UserError,
    flatten,
    load_recipe,
    load_run_config,
)
from train.evaluation.report import Report
from train.recipes import flag_value

if TYPE_CHECKING:
    from train.evaluation.protocols import Protocol
    from train.evaluation.suite import Subject

PROGRAM = "python -m train.evaluate"
COMMAND = "sparse-attn-evaluate"
BOUND = ("model.", "tokenizer.", "data.")
"""Settings that the trained weights depend on: the recipe must agree with the run about them."""
FREE = ("data.cache_dir", "data.prefetch", "model.remat", "model.scan_layers")


@dataclasses.dataclass(frozen=True)
class Options:
    """Score a trained run on held-out text.

    Attributes:
      config: the recipe it was trained with, by name or path; without it, the configuration saved
        in the run folder.
      checkpoint: the run folder; by default the one that the recipe names.
      policy: attend by a training-free policy instead, NAME or NAME:FIELD=VALUE,...; for models
        with one K/V branch.
      tasks: ask these tasks instead of scoring windows, NAME,NAME,...: perplexity, mqar, those of
        RULER such as niah_single_1 (see docs/evaluation.md). Without a trained run, the model that
        the recipe starts from is asked.
      lengths: tokens of the tasks' samples, as 1024,4096.
      samples: of every task and length.
      policies: columns of the report: dense, own, NAME:FIELD=VALUE,..., mapping:FILE; by default
        dense, and own if that is another.
      budgets: tried by every policy that has one: keys or shares of them, as 1/8,1/32 or 64,256.
      protocols: what is sparse, one after another, as A,B,C: A the answer, B the question and the
        answer, C everything.
      scored: last tokens of a text that perplexity scores.
    """

    config: Path | None = None
    checkpoint: Path | None = None
    policy: str = ""
    tasks: str = ""
    lengths: str = "1024"
    samples: int = 16
    policies: tuple[str, ...] = ()
    budgets: str = ""
    protocols: str = "B"
    scored: int = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(Options):
    """Score a trained run, with the fields of its configuration."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 after a mistake of the caller, 130 after
    an interrupt.

    Raises:
      SystemExit: by the parser, with status 2 for an unknown flag or value and 0 for ``--help``.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(stderr=True)
    quiet_orbax()
    asking = False
    try:
        parsed = parse(arguments)
        asking = bool(parsed.tasks)
        if asking:
            ask(parsed, Console())
        else:
            evaluate(parsed.run, parsed.checkpoint, policy=parsed.policy, console=Console())
    except UserError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        kept = "; finished samples are kept, the same command goes on from here" if asking else ""
        console.print(f"interrupted{kept}")
        return 130
    return 0


def parse(arguments: Sequence[str]) -> Arguments:
    """The recipe, or the run's saved configuration, with the overrides of the command line.

    Raises:
      ConfigError: if neither ``--config`` nor ``--checkpoint`` is given, it cannot be read, or
        fields do not fit each other.
      SystemExit: on unknown flags (with a suggestion) or values that do not parse.
    """
    recipe = flag_value(arguments, "--config", "the name or path of a recipe, e.g. quickstart")
    run_dir = flag_value(arguments, "--checkpoint", "a run folder, e.g. runs/quickstart")
    described = "the recipe" if recipe else "the run"
    if recipe is None and run_dir is None and arguments[:1] and arguments[0].startswith("--tyro-"):
        recipe = "quickstart"  # whose flags are completed
    if recipe is not None:
        run, named = load_recipe(recipe), f"--config {recipe}"
    elif run_dir is not None:
        run, named = load_run_config(_existing(Path(run_dir))), f"--checkpoint {run_dir}"
    elif {"-h", "--help"} & set(arguments):
        tyro.cli(  # prints it and ends
            Options,
            prog=PROGRAM,
            args=["--help"],
            description=(
                "Score a trained run on held-out text, or ask it tasks. The fields of the run's "
                "configuration are flags, too: --checkpoint RUN_FOLDER --help lists them."
            ),
        )
    else:
        runs = sorted(str(path.parent) for path in Path("runs").glob(f"*/{CONFIG_FILE}"))
        here = f"there are {', '.join(runs)}" if runs else "there is none in runs/ yet, train one"
        raise ConfigError(
            f"nothing to evaluate: name a run folder with --checkpoint ({here}), or its recipe "
            f"with --config; {PROGRAM} --help says more"
        )
    try:
        return tyro.cli(
            Arguments,
            prog=program(f"{PROGRAM} {named}", COMMAND, arguments),
            description=(
                f"Score a trained run on held-out text, or ask it tasks. The fields of {described} "
                "can be changed by flags."
            ),
            args=list(arguments),
            default=Arguments(run=run),
            config=(tyro.conf.AvoidSubcommands,),
        )
    except ValueError as error:
        # Fields that fit one by one, but not each other.
        raise ConfigError(str(error)) from error


def parse_policy(text: str) -> MechanismConfig:
    """The policy, or dense attention, that ``NAME`` or ``NAME:FIELD=VALUE,...`` describes.

    Raises:
      ConfigError: if the name or a field is unknown, or a value does not fit.
    """
    try:
        return parse_mechanism(text, {"dense": Dense, **POLICIES})
    except ValueError as error:
        raise ConfigError(f"--policy {error}") from error


def evaluate(
    config: RunConfig,
    checkpoint: str | Path | None = None,
    *,
    policy: str = "",
    console: Console | None = None,
) -> Report:
    """Score the newest checkpoint of a run, print the table and write evaluation.json.

    Args:
      config: says what is scored (``config.evaluation``) and must agree with the trained run about
        model, tokenizer and data.
      checkpoint: the run folder; ``config.run_dir`` by default.
      policy: attend by this training-free policy in the layers that are not kept dense, see
        :func:`parse_policy`; evaluation-POLICY.json is written instead.
      console: where the table goes; None prints nothing.

    Raises:
      UserError: if there is no such run, no usable checkpoint, or it is of another configuration.
    """
    import jax
    import numpy as np
    from flax import nnx

    from models.generate import generate
    from models.transformer import split
    from models.upcycle import upcycle
    from train.checkpoint import load_decoder
    from train.data import evaluation_documents, load_splits
    from train.evaluation.bytes_model import ByteModel
    from train.evaluation.perplexity import bits_per_byte, decoded, make_windows, teacher_forced
    from train.tokenizer import load_tokenizer

    run_dir = _existing(Path(config.run_dir if checkpoint is None else checkpoint))
    check_matches(config, load_run_config(run_dir), run_dir)
    wanted = config.evaluation
    seconds: dict[str, float] = {}
    decoder, _, step = load_decoder(run_dir)
    if policy:
        model = dataclasses.replace(
            config.model, attention=parse_policy(policy), attention_overrides=()
        )
        _, params, _ = split(decoder)
        with _user_errors():
            decoder = upcycle(params, decoder.config, model, rngs=nnx.Rngs(0))
        config = dataclasses.replace(config, model=model)
    with _user_errors():
        tokenizer = load_tokenizer(run_dir / TOKENIZER_FOLDER)
        documents = evaluation_documents(
            config.data, tokenizer, documents=wanted.windows or None, max_tokens=wanted.window
        )
    windows = make_windows(
        [document.tokens for document in documents],
        tokenizer.token_bytes,
        config.model.alignment,
    )
    scored_bytes = int(tokenizer.token_bytes[windows.tokens[windows.scored]].sum())
    batches = windows.batches(min(wanted.batch_size, len(documents)))

    def sample() -> str:
        if not wanted.sample_tokens:
            return ""
        prompt = [tokenizer.bos_id, *tokenizer.encode(wanted.prompt).tolist()]
        drawn = generate(
            decoder,
            [prompt],
            wanted.sample_tokens,
            temperature=wanted.temperature,
            top_k=wanted.top_k or None,
            seed=config.seed,
            stop_tokens=(tokenizer.eos_id,),
        )
        return tokenizer.decode(drawn[0])

    # Compiling takes one core and most of the time, so the parts go side by side.
    with ThreadPoolExecutor(2) as pool:
        decode = pool.submit(
            _timed, seconds, "decode", lambda: [decoded(decoder, b) for b in batches]
        )
        forward = pool.submit(
            _timed, seconds, "forward", lambda: [teacher_forced(decoder, b) for b in batches]
        )
        continuation = pool.submit(_timed, seconds, "sample", sample)
    with _user_errors():
        train_text = (text.encode() for text in load_splits(config.data)["train"]["text"])
        texts = [(document.text.encode(), 0) for document in documents]
        order2 = _timed(seconds, "order2", lambda: ByteModel.fit(train_text).bits_per_byte(texts))
    scores = forward.result()
    rows = [np.count_nonzero(batch.lengths) for batch in batches]
    selection = {
        name: float(np.average([metrics[name] for _, metrics in scores], weights=rows))
        for name in scores[0][1]
    }
    measured = selection.pop("density", None)
    report = Report(
        bits_per_byte_teacher_forced=bits_per_byte(
            sum(float(nats.sum(dtype=np.float64)) for nats, _ in scores), scored_bytes
        ),
        bits_per_byte_decode=bits_per_byte(
            sum(float(nats.sum(dtype=np.float64)) for nats in decode.result()), scored_bytes
        ),
        bits_per_byte_order2=order2,
        density=mean_density(config, windows.lengths.tolist(), measured),
        selection=selection,
        documents=len(documents),
        tokens=int(windows.scored.sum()),
        bytes=scored_bytes,
        window=wanted.window,
        mechanism=policy or type(config.model.attention).__name__,
        step=step,
        protocol="C",
        prompt=wanted.prompt,
        sample=continuation.result(),
        seconds={name: round(value, 3) for name, value in seconds.items()},
        device=jax.devices()[0].device_kind,
        jax=jax.__version__,
    )
    try:
        path = report.save(run_dir, f"-{policy.partition(':')[0]}" if policy else "")
    except OSError as error:
        raise UserError(
            f"the evaluation cannot be written into {run_dir}: {error.strerror}; make the folder "
            "writable, or copy the run and name the copy with --checkpoint"
        ) from error
    if console is not None:
        report.print(console)
        console.print(f"written to {path}", highlight=False)
    return report


def ask(arguments: Arguments, console: Console) -> Path:
    """Run the tasks of the command line on a trained run, or on the published model that its recipe
    starts from; finished samples are kept, so the same command goes on after a stop.

    Returns:
      The folder of report.html, report.md and results.json.

    Raises:
      UserError: if tasks, policies and model do not fit each other, or there is no model.
    """
    from rich.progress import Progress

    from train.checkpoint import FOLDER, is_run
    from train.evaluation.suite import OWN, Plan, run

    config = arguments.run
    run_dir = Path(arguments.checkpoint or config.run_dir)
    trained = (run_dir / FOLDER).is_dir()
    if not trained and (not config.init_from or is_run(config.init_from)):
        _existing(run_dir)
    with _user_errors():
        own = ("dense", OWN) if trained and config.model.attention != Dense() else ("dense",)
        plan = Plan(
            tasks=_names(arguments.tasks),
            lengths=tuple(_length(text) for text in _names(arguments.lengths)),
            samples=arguments.samples,
            policies=arguments.policies or own,
            budgets=tuple(_budget(text) for text in _names(arguments.budgets)),
            protocols=cast("tuple[Protocol, ...]", _names(arguments.protocols)),
            scored=arguments.scored,
        )
        subject = _subject(config, run_dir if trained else None)
        folder = run_dir / "evaluation"
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("samples", total=None)
            run(
                subject,
                plan,
                folder,
                progress=lambda done, of, cell, sample: bar.update(
                    task, completed=done, total=of, description=f"{cell.task} {cell.policy}"
                ),
            )
    report = (folder / "report.md").read_text(encoding="utf-8")
    console.print(report, markup=False, highlight=False, soft_wrap=True)
    console.print(f"written to {folder / 'report.html'}", highlight=False)
    return folder


def _subject(config: RunConfig, run_dir: Path | None) -> Subject:
    """The model, its tokenizer and held-out texts."""
    from models.loading import load
    from train.checkpoint import load_decoder
    from train.data import evaluation_documents
    from train.evaluation.suite import Subject
    from train.tokenizer import load_tokenizer

    if run_dir is not None:
        decoder, _, step = load_decoder(run_dir)
        tokenizer = load_tokenizer(run_dir / TOKENIZER_FOLDER)
        name = f"{run_dir.name} at step {step}"
    else:
        loaded = load(config.init_from, attention=Dense())
        if loaded.tokenizer is None:
            raise ValueError(f"{config.init_from} comes without a tokenizer; add tokenizer.json")
        decoder, tokenizer, name = loaded.decoder, loaded.tokenizer, config.init_from

    def documents(length: int | None) -> list[Any]:
        found = evaluation_documents(config.data, tokenizer, max_tokens=length)
        return [one.tokens for one in found if length is None or len(one.tokens) >= length]

    return Subject(decoder, tokenizer, documents, name, config.model.dense_layers)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _length(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"--lengths {text!r} is no number of tokens; e.g. 1024,4096") from error


def _budget(text: str) -> int | float:
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"--budgets {text!r} is no number of keys and no share of them; e.g. 64,256 or 1/8,1/32"
        ) from error
    return int(value) if value.denominator == 1 else float(value)


def mean_density(config: RunConfig, lengths: Sequence[int], measured: float | None) -> float:
    """Attended over causal pairs of the scored windows, averaged over layers.

    Layers that select report what they attended (``measured``); the others know it.
    """
    pairs = [length * (length + 1) / 2 for length in lengths]
    total = 0.0
    for run in config.model.runs:
        if measured is not None and not isinstance(run.attention, Dense):
            density = measured
        else:
            known = [run.attention.density(length) for length in lengths]
            density = math.sumprod(known, pairs) / sum(pairs)
        total += run.count * density
    return total / config.model.layers


def check_matches(config: RunConfig, trained: RunConfig, run_dir: Path) -> None:
    """Refuse to score weights as something they were not trained as.

    Raises:
      ConfigError: if model, tokenizer or data differ, with the first differences.
    """
    mine, theirs = flatten(config), flatten(trained)
    different = [
        f"{name}: {run_dir} has {theirs.get(name)!r}, the recipe says {mine.get(name)!r}"
        for name in sorted(mine.keys() | theirs.keys())
        if name.startswith(BOUND)
        and not name.startswith(FREE)
        and mine.get(name) != theirs.get(name)
    ]
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise ConfigError(
            f"the run was trained with another configuration: {'; '.join(different[:3])}{more}; "
            f"evaluate it as it was trained with {PROGRAM} --checkpoint {run_dir}"
        )


def _existing(run_dir: Path) -> Path:
    if not run_dir.is_dir():
        raise ConfigError(
            f"{run_dir} is no run folder; train one first (python -m train --config RECIPE) or "
            "name another with --checkpoint"
        )
    return run_dir


def _timed[T](seconds: dict[str, float], part: str, call: Callable[[], T]) -> T:
    start = time.perf_counter()
    result = call()
    seconds[part] = time.perf_counter() - start
    return result


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """Corpora that are missing and settings that do not fit are the caller's to mend."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
