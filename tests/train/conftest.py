"""A handful of documents, a tiny configuration, and one compilation shared by equal steps."""

import dataclasses
import random

import jax
import pytest

from configs.tiny import config as tiny
from sparse_attn import Dense
from train.config import CheckpointConfig, LoggingConfig

WORDS = ("the", "of", "and", "people", "congress", "nation", "state", "union", "peace", "war")


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder of twelve short texts that the split by name spreads over all splits."""
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    for i in range(12):
        text = " ".join(draw.choice(WORDS) for _ in range(60 + 10 * i))
        (folder / f"d{i}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def compilations(tmp_path_factory):
    """Compiled steps are kept on disk, for equal configurations and for subprocesses."""
    folder = tmp_path_factory.mktemp("compilations")
    names = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def config(texts, tmp_path, compilations):
    """``configs/tiny.py`` with dense attention, on the texts, in a run folder of its own."""
    return dataclasses.replace(
        tiny,
        run_dir=str(tmp_path / "run"),
        steps=6,
        model=dataclasses.replace(tiny.model, attention=Dense(), layers=1),
        data=dataclasses.replace(
            tiny.data,
            source=str(texts),
            cache_dir=str(tmp_path / "cache"),
            validation_fraction=0.2,
            evaluation_fraction=0.2,
        ),
        checkpoint=CheckpointConfig(every=3, keep=2),
        logging=LoggingConfig(inspect_every=0, progress=False),
        evaluate_at_end=False,
    )
