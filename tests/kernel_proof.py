"""What the kernel tests share: interpretation with races as failures, and relative errors."""

import contextlib
import dataclasses
import importlib

import jax
import numpy as np

from kernels_pallas.interpreting import interpreted

_INTERPRETERS = {
    "tpu": "jax._src.pallas.mosaic.interpret.interpret_pallas_call",
    "gpu": "jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call",
}


@dataclasses.dataclass
class Seen:
    """What one test saw: how many times it interpreted, and its worst error of each bound."""

    runs: int = 0
    errors: dict[float, float] = dataclasses.field(default_factory=dict)

    def clear(self):
        self.runs, self.errors = 0, {}


SEEN = Seen()
"""Of the test that runs; tests/kernels_pallas/conftest.py puts it in pytest's report."""


@contextlib.contextmanager
def strictly_interpreted(platform):
    """Kernels traced *and run* inside are interpreted; fails if an access raced with another."""
    interpreter = importlib.import_module(_INTERPRETERS[platform])
    SEEN.runs += 1
    try:
        with interpreted():
            yield
            jax.effects_barrier()
        races = interpreter.get_races() if platform == "gpu" else interpreter.races
        assert races is not None, f"no {platform} kernel was interpreted"
        assert not races.races_found, f"accesses of a {platform} kernel race"
    finally:
        # After an exception the interpreter refuses to start again without this.
        getattr(interpreter, f"reset_{platform}_interpret_mode_state")()


def relative_error(result, expected):
    """Root mean square of the difference over that of ``expected`` (float64); 0 if both are 0."""
    result, expected = (np.asarray(x, np.float64) for x in (result, expected))
    size = np.sqrt(np.mean(expected**2))
    error = np.sqrt(np.mean((result - expected) ** 2))
    return error if size == 0 else error / size


def hold(result, expected, bound, name="result"):
    """The :func:`relative_error` is below ``bound``."""
    error = relative_error(result, expected)
    SEEN.errors[bound] = max(float(error), SEEN.errors.get(bound, 0.0))
    assert error < bound, f"{name}: relative error {error:.2e} of {bound:.0e}"
