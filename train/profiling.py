"""A window of steps traced by JAX's profiler."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from train.config import RunConfig

PROFILE_FOLDER = "profile"


class Profile:
    """Traces the steps ``logging.profile`` names into the run folder's ``profile``, for TensorBoard
    or Perfetto; each process writes its own devices.
    """

    def __init__(self, config: RunConfig) -> None:
        self._first, self._last = config.logging.profile
        self._folder = Path(config.run_dir) / PROFILE_FOLDER
        self._running = False

    def __enter__(self) -> Profile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._running:
            jax.profiler.stop_trace()

    def before(self, step: int) -> None:
        """Start if ``step`` is the first of the window."""
        if step == self._first:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, result: Any) -> None:
        """Stop when ``result`` of the window's last step is there."""
        if self._running and step == self._last:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            self._running = False
