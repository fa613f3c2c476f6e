"""Every option of the command lines is described where its help is read from."""

import argparse
import ast
import dataclasses
from pathlib import Path

import docstring_parser
import pytest
from readable_help import HelpFormatter

from models import command_line, export_mapping
from models.config import ModelConfig
from sparse_attn import MECHANISMS, POLICIES
from train import evaluate, options
from train.config import RunConfig

SCRIPTS = Path(__file__).parents[1] / "scripts"


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


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_every_option_of_a_script_is_described(script):
    """Read from its text: a few scripts need what tests do not have."""
    tree = ast.parse(script.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    adding = [
        call for call in calls if ast.unparse(call.func).split(".")[-1] in ("add", "add_argument")
    ]
    options = [
        c
        for c in adding
        if isinstance(c.args[0], ast.Constant) and str(c.args[0].value)[:2] == "--"
    ]
    for call in options:
        assert "help" in {keyword.arg for keyword in call.keywords}, ast.unparse(call)
    parsers = [call for call in calls if ast.unparse(call.func) == "argparse.ArgumentParser"]
    for call in parsers:
        assert "formatter_class=HelpFormatter" in ast.unparse(call), "defaults are not shown"
    assert parsers or not options


def test_scripts_show_defaults_as_they_are_typed():
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    parser.add_argument("--lengths", default=(1024, 4096), help="tokens")
    parser.add_argument("--share", default="1%", help="of them")
    for name, default in (("--quiet", False), ("--json", None), ("--others", ())):
        parser.add_argument(name, default=default, help="plain")
    said = " ".join(parser.format_help().split())
    assert "tokens (default: 1024,4096)" in said
    assert "of them (default: 1%)" in said
    assert said.count("(default") == 2
