"""The Pallas interpreters: kernels run on a CPU as their chip would, and more strictly.

Inside ``with interpreted():`` every kernel of this package that is traced runs in the interpreter
of its platform: memory nobody wrote is NaN, reads out of bounds raise, and accesses that race are
recorded. Tracing is when it counts: a function that was already compiled keeps what it was.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

__all__ = ["interpreted", "interpreter"]

_active: contextvars.ContextVar[bool] = contextvars.ContextVar("interpreted", default=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels traced inside run in their platform's interpreter."""
    token = _active.set(True)
    try:
        yield
    finally:
        _active.reset(token)


def interpreter(platform: str) -> Any:
    """What a kernel passes as ``interpret=``: ``False``, or the parameters of the interpreter.

    ``platform`` is ``"tpu"`` or ``"gpu"``.

    Raises:
      ValueError: for another platform.
    """
    if platform not in ("tpu", "gpu"):
        raise ValueError(f"{platform=} has no Pallas interpreter; use 'tpu' or 'gpu'")
    if not _active.get():
        return False
    if platform == "tpu":
        from jax.experimental.pallas import tpu as pltpu

        return pltpu.InterpretParams(
            uninitialized_memory="nan", out_of_bounds_reads="raise", detect_races=True
        )
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams(detect_races=True)
