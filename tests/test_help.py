"""Every option of the command lines is described where its help is read from."""

import dataclasses

import docstring_parser
import pytest

from models import command_line, export_mapping
from models.config import ModelConfig
from sparse_attn import MECHANISMS, POLICIES
from train import evaluate, options
from train.config import RunConfig


def configurations():
    """Dataclasses that become options."""
    found = [
        *(options.Options, evaluate.Options, command_line.Arguments, export_mapping.Arguments),
        *(RunConfig, ModelConfig, *MECHANISMS.values(), *POLICIES.values()),
    ]
    for kind in found:  # grows
        parts = (field.default_factory for field in dataclasses.fields(kind))
        found += [part for part in parts if dataclasses.is_dataclass(part) and part not in found]
    return found


@pytest.mark.parametrize("kind", configurations(), ids=lambda kind: kind.__qualname__)
def test_every_option_is_described(kind):
    described = {}
    for base in reversed(kind.__mro__[:-1]):
        parsed = docstring_parser.parse(base.__doc__ or "")
        described |= {one.arg_name: one.description for one in parsed.params}
    for field in dataclasses.fields(kind):
        text = described.get(field.name)
        assert text, f"{kind.__qualname__} does not describe {field.name} under Attributes:"
        for line in text.splitlines()[1:]:
            # Help joins a line with the one before only if it begins with a letter.
            assert line.strip()[0].isalpha(), f"{field.name}: move the break before {line!r}"
