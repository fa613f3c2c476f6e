"""The mechanism that CONTRIBUTING.md builds, run from the page through the property suite."""

import re
import sys
import types
from pathlib import Path

import attention_cases as cases
import jax
import pytest
import test_properties as properties

from sparse_attn import registry

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def config():
    """The page's first Python block as a module; registered while this file runs."""
    code = re.search(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    module = types.ModuleType("block_window")
    sys.modules[module.__name__] = module
    exec(compile(code[1], str(PAGE), "exec"), module.__dict__)
    kind = registry.MECHANISMS["block_window"]
    yield kind.tiny()[0]
    del registry.MECHANISMS["block_window"], registry._modules[kind], sys.modules["block_window"]


def test_it_is_registered_and_refuses_bad_sizes(config):
    assert type(config) in registry.registered()
    with pytest.raises(ValueError, match="blocks=0 must be at least 1"):
        type(config)(blocks=0)


def test_it_selects_what_it_says(config):
    module = cases.mechanism(config, cases.SHAPES["G2"], dtype="float32")
    parts = cases.arrays(cases.SHAPES["G2"], 1, 1, 40, dtype="float32")
    _, aux = cases.call(module, parts, inspect=True)
    assert aux.selection.indices[0, 39, 0].tolist() == [0, 3, 4]
    assert aux.selection.indices[0, 9, 0].tolist() == [0, 1, -1]
    assert 0 < float(aux.metrics["density"]) < 1


@pytest.mark.parametrize(
    "item",
    [
        lambda c: properties.test_1_covering_budget_equals_dense(c, "xla", "G2", None),
        lambda c: properties.test_2_prefill_equals_single_steps_equals_chunks(c, "xla", None),
        lambda c: properties.test_2_truncation_undoes_tokens(c, None),
        lambda c: properties.test_3_later_tokens_change_nothing_earlier(c, "xla", None),
        lambda c: properties.test_4_packed_documents_equal_separate_documents(c, "xla", None),
        lambda c: properties.test_9_xla_equals_reference_with_poisoned_padding(c, None),
        lambda c: properties.test_9_long_sequences_run_sparse_and_equal_the_reference(c, None),
        lambda c: properties.test_inspection_measures_quality_and_cost(c),
        lambda c: (
            properties.test_dense_attend_equals_dense_and_inspection_still_shows_the_sparse_choice(
                c, None
            )
        ),
    ],
    ids=["1", "2", "2-truncate", "3", "4", "9", "9-long", "inspect", "dense"],
)
def test_it_passes_the_property_suite(config, item):
    with jax.enable_x64(True):
        item(config)


def test_its_memory_grows_linearly(config):
    properties.test_11_compiled_memory_grows_linearly(config)
