"""Signals that ask a run to stop."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any


class StopSignal:
    """Turns SIGINT and SIGTERM into a request to stop after the step; a second one is obeyed.

    JAX runs Python while it collects garbage, where the KeyboardInterrupt of a plain SIGINT would
    be lost, so a program that must not miss one listens before it imports JAX.
    """

    def __init__(self) -> None:
        self.requested = False
        self.name = ""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        # Python lets only the main thread handle signals.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested, self.name = True, signal.Signals(number).name
        os.write(2, f"\n{self.name}: stopping after this step; once more stops at once\n".encode())
