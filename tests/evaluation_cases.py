"""A small dense model for tests of evaluation, and scripts as modules."""

import importlib.util
import sys
from pathlib import Path

import pytest

from models.config import ModelConfig
from sparse_attn import Dense

SCRIPTS = Path(__file__).parent.parent / "scripts"
MODEL = ModelConfig(
    vocab_size=259,
    layers=2,
    model_width=16,
    query_heads=2,
    kv_heads=1,
    head_width=8,
    mlp_width=32,
    attention=Dense(),
    scan_layers=False,
)


def load_script(name):
    """``scripts/NAME.py`` as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while they are made.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
    return module
