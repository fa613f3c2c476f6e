"""The same small model with every mechanism: recall, text, bytes, time and memory in one table.

    python scripts/compare_mechanisms.py --json benchmarks/results/mechanisms_cpu.json
    python scripts/compare_mechanisms.py --tasks mqar --mechanisms dense,nsa --seeds 0 --steps 200

Two layers, equal steps. ``mqar``: associative recall at T=512 with 16 bindings whose evidence lies
beyond every window, accuracy on 2048 fresh samples, read through the cache in chunks. Training goes
from short samples with few bindings to long ones (``CURRICULUM``, the same for all), without which
two layers learn which values there are and not which belongs to which key. ``text``: the
quickstart's text at T=512, bits per byte on its held-out documents. The core mechanisms run three
seeds, the others one. HashAttention and SeerAttention start from the trained dense model of their
seed and fit their selectors to it, the language model frozen.

Every run is a process of its own on one core, ``--jobs`` of them side by side; finished rows are
kept in the JSON file and not run again. ``density_bytes``: bytes a decoded token reads, auxiliary
codes and compressed keys included, over dense attention's, measured on held-out rows.
``step_seconds``: median processor time of a training step. ``peak_bytes``: arguments and
temporaries of the compiled step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from readable_help import HelpFormatter

if TYPE_CHECKING:
    import numpy as np

    from sparse_attn import MechanismConfig
    from train.config import RunConfig

CORE = ("dense", "nsa", "infllm_v2", "hash", "routing")
OTHERS = ("moba", "seer", "dsa")
FITTED = ("hash", "seer")
TASKS = {"mqar": "accuracy", "text": "bits_per_byte"}
LENGTH = 512
EVALUATED = 2048
CHUNK = 104
# Before the full task: steps, T, most bindings of a sample, samples of a batch. Up to T=48 every
# token after the bindings is a question; then there is filler as in the full task.
CURRICULUM = (
    *((500, 8, 2, 192), (150, 16, 4, 96), (300, 32, 8, 48), (200, 48, 16, 32)),
    *((100, 128, 16, 32), (100, 256, 16, 16)),
)
UNFILLED = 48
MQAR_TASK: dict[str, Any] = {"length": LENGTH, "vocab_size": 512, "pairs": 16, "gap": 64}
STEPS = {"mqar": 120, "text": 200}
FIT_STEPS = {"mqar": 100, "text": 100}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.worker:
        task, mechanism, seed = options.worker
        print(json.dumps(run_one(task, mechanism, int(seed), options)))
        return 0
    rows = read_rows(options.json)
    wanted = [
        (task, mechanism, seed)
        for task in options.tasks
        for mechanism in options.mechanisms
        for seed in options.seeds[: None if mechanism in CORE else 1]
        if not any(identity(row) == (task, mechanism, seed) for row in rows)
    ]
    # Seed by seed, the fitted ones after the dense model that they start from.
    wanted.sort(key=lambda job: (job[2], job[1] in FITTED))
    run_all(wanted, rows, options)
    show(rows)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def names(text: str) -> tuple[str, ...]:
        return tuple(part for part in text.split(",") if part)

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in names(text))

    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--tasks", type=names, default=tuple(TASKS), help="of " + ",".join(TASKS))
    add("--mechanisms", type=names, default=(*CORE, *OTHERS), help="by name: NAME,NAME,...")
    add("--seeds", type=numbers, default=(0, 1, 2), help="the first one for non-core mechanisms")
    add("--steps", type=int, help="training steps, the same for all; default by task")
    add("--fit-steps", type=int, help="steps of fitting a selector to the dense model")
    add("--evaluated", type=int, default=EVALUATED, help="MQAR samples")
    add("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs side by side")
    add(
        "--json",
        type=Path,
        default=Path("runs/compare/mechanisms.json"),
        help="table of rows; those that are there are kept",
    )
    add("--folder", type=Path, default=Path("runs/compare"), help="dense models are kept here")
    add("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = [name for name in options.tasks if name not in TASKS]
    unknown += [name for name in options.mechanisms if name not in (*CORE, *OTHERS)]
    if unknown:
        parser.error(f"unknown: {','.join(unknown)}; tasks {TASKS}, mechanisms {(*CORE, *OTHERS)}")
    return options


def identity(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["task"], row["mechanism"], row["seed"]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.sort(key=lambda row: (row["task"], (*CORE, *OTHERS).index(row["mechanism"]), row["seed"]))
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def run_all(
    wanted: list[tuple[str, str, int]], rows: list[dict[str, Any]], options: argparse.Namespace
) -> None:
    """Every job in a process on a core of its own; a row is written as soon as it is known."""
    cores = sorted(os.sched_getaffinity(0))[: options.jobs]
    running: dict[int, tuple[subprocess.Popen[str], tuple[str, str, int]]] = {}
    waiting = list(wanted)
    while waiting or running:
        for core, (process, job) in list(running.items()):
            if process.poll() is None:
                continue
            del running[core]
            out = process.stdout.read() if process.stdout else ""
            if process.returncode:
                raise SystemExit(f"{job} failed with status {process.returncode}")
            rows.append(json.loads(out.strip().splitlines()[-1]))
            write_rows(rows, options.json)
            print(describe(rows, job), file=sys.stderr, flush=True)
        done = {identity(row) for row in rows}
        for core in cores:
            ready = [
                job
                for job in waiting
                if job[1] not in FITTED or dense_folder(options, job[0], job[2]).is_dir()
            ]
            if core in running or not ready:
                continue
            job = ready[0]
            waiting.remove(job)
            running[core] = (start(job, core, options), job)
        stuck = waiting and not running
        if stuck:
            missing = sorted({(task, seed) for task, _, seed in waiting})
            raise SystemExit(
                f"no dense model for {missing} in {options.folder}: add dense to --mechanisms "
                f"(done: {sorted(done)})"
            )
        time.sleep(0.2)


def start(
    job: tuple[str, str, int], core: int, options: argparse.Namespace
) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--worker", *map(str, job)]
    command += ["--folder", str(options.folder), "--evaluated", str(options.evaluated)]
    for name in ("steps", "fit_steps"):
        if getattr(options, name) is not None:
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags},
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )


def dense_folder(options: argparse.Namespace, task: str, seed: int) -> Path:
    return options.folder / f"{task}-dense-{seed}"


def mechanism_configs(task: str) -> dict[str, MechanismConfig]:
    """At most half of the causal pairs at T=512; every window ends before the evidence.

    ``text`` takes smaller budgets, with which the mechanisms differ more.
    """
    mqar = task == "mqar"
    from sparse_attn import DSA, NSA, Dense, HashAttention, InfLLMV2, MoBA, Routing, Seer

    return {
        "dense": Dense(),
        "nsa": NSA(
            compression_block=8,
            compression_stride=4,
            selection_block=8,
            selected_blocks=14 if mqar else 8,
            window=32,
        ),
        "infllm_v2": InfLLMV2(
            compression_block=4 if mqar else 8,
            compression_stride=2 if mqar else 4,
            coarse_block=16,
            coarse_stride=8,
            selection_block=8,
            selected_blocks=18 if mqar else 12,
            window=32,
            dense_len=0,
        ),
        "hash": HashAttention(
            budget=64, sinks=4, recent=28, anneal_steps=100, positive_weight_per_token=0.0
        ),
        # Centroids that follow fast, since there are few steps, and leave queries and keys alone.
        "routing": Routing(
            clusters=4, cluster_window=192, local_window=8, sinks=4, decay=0.99, commitment=0.0
        )
        if mqar
        else Routing(clusters=16, cluster_window=64, local_window=32, sinks=4),
        "moba": MoBA(selection_block=16, selected_blocks=6),
        "seer": Seer(selection_block=8, selected_tokens=96),
        "dsa": DSA(selected_tokens=96, index_heads=4, index_width=16),
    }


def run_config(task: str, mechanism: str, seed: int, options: argparse.Namespace) -> RunConfig:
    """The same model and optimizer for all; fitted mechanisms train their selector only."""
    from models.transformer import ModelConfig
    from train.config import OptimizerConfig, RunConfig
    from train.tokenizer import TokenizerConfig

    fitted = mechanism in FITTED
    chosen, by_task = (options.fit_steps, FIT_STEPS) if fitted else (options.steps, STEPS)
    mqar = task == "mqar"
    before = 0 if fitted or not mqar else sum(steps for steps, *_ in CURRICULUM)
    return RunConfig(
        run_dir=str(dense_folder(options, task, seed)),
        seed=seed,
        steps=before + (chosen or by_task[task]),
        objective="selector" if fitted else "language_model",
        # Random embeddings as they are: what matches and copies must then work for any token, and
        # carries over from short samples to long ones. Learned ones fit the short samples only.
        frozen=("embedding",) if mqar and not fitted else (),
        init_from=str(dense_folder(options, task, seed)) if fitted else "",
        batch_size=16 if mqar else 4,
        sequence_length=LENGTH,
        model=ModelConfig(
            vocab_size=MQAR_TASK["vocab_size"] if mqar else 4096,
            layers=2,
            model_width=64 if mqar else 128,
            query_heads=4,
            kv_heads=2,
            head_width=64 if mqar else 32,
            mlp_width=128 if mqar else 352,
            embedding_multiplier=8.0 if mqar else 1.0,
            qkv_bias=mqar,
            qkv_bias_scale=0.5 if mqar else 0.0,
            attention=mechanism_configs(task)[mechanism],
        ),
        tokenizer=TokenizerConfig(kind="bytes")
        if mqar
        else TokenizerConfig(kind="sentencepiece", vocab_size=4096),
        optimizer=OptimizerConfig(
            learning_rate=3e-3 if mqar else 6e-3,
            warmup_steps=50 if mqar else 20,
            # MQAR: about 1e-3 from T=256 on. Higher, NSA forgets what to select; lower, 220 steps
            # are too few for it to learn what to select there.
            final_fraction=1 / 3 if mqar and not fitted else 0.1,
            weight_decay=0.0 if mqar else 0.1,
        ),
    )


def run_one(task: str, mechanism: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train and score one model; the row."""
    import jax

    from models.transformer import abstract, merge
    from train.checkpoint import Checkpoints
    from train.config import save_run_config
    from train.loop import continued_state, plan
    from train.step import abstract_batch, make_state, make_train_step

    config = run_config(task, mechanism, seed, options)
    shapes, placement = plan(config)
    if config.init_from:
        state, _ = continued_state(config, placement)
    else:
        state = make_state(config, placement)
    step = make_train_step(config, placement)
    compiled = step.lower(shapes, abstract_batch(config, placement)).compile()
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    seconds, shape = [], (config.batch_size, config.sequence_length)
    for number, batch in zip(range(config.steps), batches(task, config), strict=False):
        begun = time.process_time()
        full = batch["tokens"].shape == shape
        state, metrics = (compiled if full else step)(state, placement.put_batch(batch))
        loss = float(metrics["loss"])
        if full:
            seconds.append(time.process_time() - begun)
        if number % 20 == 0:
            print(f"{task} {mechanism} {seed}: step {number} loss {loss:.4f}", file=sys.stderr)
    if mechanism == "dense":
        folder = Path(config.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_run_config(config, folder)
        with Checkpoints(folder, keep=1) as checkpoints:
            checkpoints.save(config.steps, state, None, config)
    decoder = merge(abstract(config.model)[0], state.params, state.state)
    score = score_mqar if task == "mqar" else score_text
    value, measured = score(decoder, config, options)
    return {
        "task": task,
        "mechanism": mechanism,
        "length": LENGTH,
        "seed": seed,
        TASKS[task]: value,
        "density_bytes": 1.0 if mechanism == "dense" else measured.pop("bytes_density"),
        "step_seconds": statistics.median(seconds[2:] or seconds),
        "peak_bytes": peak,
        "steps": config.steps,
        "last_loss": loss,
        "density": 1.0 if mechanism == "dense" else measured.pop("density"),
        "selection": measured,
        "config": {"type": type(config.model.attention).__name__}
        | dataclasses.asdict(config.model.attention),  # type: ignore[call-overload]
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def batches(task: str, config: RunConfig) -> Iterator[dict[str, np.ndarray]]:
    """Training batches for ever, the same for every mechanism."""
    import numpy as np

    from train.data import make_tokenizer, make_train_iterator
    from train.evaluation.mqar import MQAR, draw_samples

    if task == "text":
        tokenizer = make_tokenizer(config.data, config.tokenizer)
        # One alignment for all, so that every mechanism reads the same rows.
        yield from make_train_iterator(
            config.data, tokenizer, LENGTH, config.batch_size, alignment=16, seed=config.seed
        )
    rng = np.random.default_rng([config.seed, 1])
    drawn = 0
    stages = () if config.init_from else CURRICULUM
    full = (1 << 30, LENGTH, MQAR_TASK["pairs"], config.batch_size)
    for steps, length, most, count in (*stages, full):
        for _ in range(steps):
            now = MQAR_TASK | {"length": length, "gap": MQAR_TASK["gap"] * length // LENGTH}
            if length <= UNFILLED:
                pairs = int(rng.integers(max(most // 2, 2), most + 1))
                now |= {"pairs": pairs, "gap": 0, "question_rate": 1.0}
            samples = draw_samples(MQAR(**now), config.seed, count, drawn)
            drawn += count
            shape = samples.tokens.shape
            yield {
                "tokens": samples.tokens,
                "targets": samples.targets,
                "weights": samples.weights,
                "segment_ids": np.ones(shape, np.int32),
                "positions": np.broadcast_to(np.arange(length, dtype=np.int32), shape),
            }


def score_mqar(
    decoder: Any, config: RunConfig, options: argparse.Namespace
) -> tuple[float, dict[str, float]]:
    """Accuracy over all questions, read through the cache: a prefill, then chunks of tokens."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from models.transformer import merge, split
    from train.evaluation.mqar import MQAR, draw_samples

    graphdef, params, state = split(decoder.unstacked())
    begin = MQAR(**MQAR_TASK).first_question

    @jax.jit
    def answers(params: Any, state: Any, tokens: Any) -> Any:
        decoder = merge(graphdef, params, state)
        caches = decoder.init_caches(*tokens.shape)
        caches = decoder.hidden(tokens[:, :begin], caches).caches
        chunks = tokens[:, begin:].reshape(tokens.shape[0], -1, CHUNK)

        def read(caches: Any, chunk: Any) -> tuple[Any, Any]:
            output = decoder(chunk, caches)
            return output.caches, jnp.argmax(output.logits, axis=-1)

        _, found = jax.lax.scan(read, caches, jnp.moveaxis(chunks, 1, 0))
        return jnp.moveaxis(found, 0, 1).reshape(tokens.shape[0], -1)

    @jax.jit
    def inspect(params: Any, state: Any, tokens: Any) -> Any:
        return merge(graphdef, params, state).hidden(tokens, inspect=True).aux.metrics

    size, right, asked = 64, 0, 0.0
    for first in range(0, options.evaluated, size):
        # Seeds from 2**20 on are never trained on.
        samples = draw_samples(MQAR(**MQAR_TASK), 2**20 + config.seed, size, first)
        found = np.asarray(answers(params, state, samples.tokens))
        weights = samples.weights[:, begin:]
        right += int(((found == samples.targets[:, begin:]) * weights).sum())
        asked += float(weights.sum())
        if first == 0:
            measured = inspect(params, state, samples.tokens[:8])
    return right / asked, {name: float(value) for name, value in measured.items()}


def score_text(
    decoder: Any, config: RunConfig, options: argparse.Namespace
) -> tuple[float, dict[str, float]]:
    """Bits per byte of held-out documents, by single steps through the cache."""
    import numpy as np

    from train.data import evaluation_documents, make_tokenizer
    from train.evaluation.perplexity import bits_per_byte, decoded, make_windows, teacher_forced

    del options
    tokenizer = make_tokenizer(config.data, config.tokenizer)
    documents = evaluation_documents(config.data, tokenizer, documents=16, max_tokens=LENGTH)
    windows = make_windows([d.tokens for d in documents], tokenizer.token_bytes, 16)
    size = int(tokenizer.token_bytes[windows.tokens[windows.scored]].sum())
    nats = float(decoded(decoder, windows).sum(dtype=np.float64))
    forward, measured = teacher_forced(decoder, windows)
    difference = abs(bits_per_byte(float(forward.sum(dtype=np.float64)) - nats, size))
    if difference > 1e-3:
        raise SystemExit(f"forward and decode disagree by {difference:.2e} bits per byte")
    return bits_per_byte(nats, size), measured


def describe(rows: list[dict[str, Any]], job: tuple[str, str, int]) -> str:
    row = next(row for row in rows if identity(row) == job)
    return f"{job}: {TASKS[row['task']]} {row[TASKS[row['task']]]:.4f}"


def show(rows: list[dict[str, Any]]) -> None:
    """Means over seeds, one line a task and mechanism."""
    from rich.console import Console
    from rich.table import Table

    for task, score in TASKS.items():
        table = Table(title=f"{task}, T={LENGTH}")
        for column in ("mechanism", "seeds", score, "of dense", "bytes", "pairs", "step s", "MiB"):
            table.add_column(column, justify="left" if column == "mechanism" else "right")

        def mean(mechanism: str, name: str, task: str = task) -> float:
            values = [r[name] for r in rows if (r["task"], r["mechanism"]) == (task, mechanism)]
            return statistics.fmean(values) if values else float("nan")

        for mechanism in (*CORE, *OTHERS):
            count = sum((r["task"], r["mechanism"]) == (task, mechanism) for r in rows)
            if not count:
                continue
            value = mean(mechanism, score)
            table.add_row(
                mechanism,
                str(count),
                f"{value:.4f}",
                f"{value / mean('dense', score):.1%}",
                f"{mean(mechanism, 'density_bytes'):.1%}",
                f"{mean(mechanism, 'density'):.1%}",
                f"{mean(mechanism, 'step_seconds'):.3f}",
                f"{mean(mechanism, 'peak_bytes') / 2**20:.0f}",
            )
        if table.row_count:
            Console(width=110).print(table)


if __name__ == "__main__":
    sys.exit(main())
