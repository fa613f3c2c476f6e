"""The choice of a backend: kernels are found by name, imported late, and fallbacks are logged."""

import importlib
import logging
import pkgutil
import subprocess
import sys

import jax
import pytest

import kernels_pallas
from kernels_pallas import common

OPS = [module.name for module in pkgutil.iter_modules(kernels_pallas.__path__) if module.ispkg]


def backends_of(op):
    module = importlib.import_module(f"kernels_pallas.{op}.api")
    tables = [value for name, value in vars(module).items() if name[0] == "_" and name.isupper()]
    return [table for table in tables if isinstance(table, dict) and "reference" in table]


@pytest.mark.parametrize("op", OPS)
def test_every_call_has_all_four_backends(op):
    tables = backends_of(op)
    assert tables
    for table in tables:
        assert set(table) == {"reference", "xla", "mosaic_tpu", "mosaic_gpu"}


def test_importing_the_ops_loads_no_kernel():
    code = "import sys\n" + "\n".join(f"import kernels_pallas.{op}" for op in OPS)
    code += "\nprint([name for name in sys.modules if 'pallas' in name and 'mosaic' in name])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_auto_takes_the_kernel_of_the_platform_or_logs_why_not(monkeypatch, caplog):
    def refuses(x):
        raise NotImplementedError(f"x={x} is odd")

    table = {"xla": lambda x: ("xla", x), "mosaic_tpu": lambda x: ("mosaic_tpu", x)}
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(common, "_logged", set())
    assert common.dispatch("toy", "auto", table, 2) == ("mosaic_tpu", 2)
    with caplog.at_level(logging.INFO, logger="sparse_attn"):
        for _ in range(2):
            found = common.dispatch("toy", "auto", table | {"mosaic_tpu": refuses}, 3)
            assert found == ("xla", 3)
    assert [r.message for r in caplog.records] == [
        "toy on tpu runs as xla (mosaic_tpu: x=3 is odd)"
    ]
    with pytest.raises(NotImplementedError, match="x=3 is odd"):
        common.dispatch("toy", "mosaic_tpu", table | {"mosaic_tpu": refuses}, 3)
