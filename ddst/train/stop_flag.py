"""Ctrl-C and SIGTERM, which end training in order."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ddst.train.processes import agreed


class StopFlag:
    """Set by Ctrl-C or SIGTERM: the loop ends after the current step. A second Ctrl-C ends at once, as usual.

    Attributes:
        signal: the last one that was caught.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def agreed(self, busy: bool = False) -> int | None:
        """See :func:`ddst.train.processes.agreed`."""
        return agreed(lambda: self.signal, busy)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catches both signals inside the block (where the platform lets this thread)."""
        old: dict[int, Any] = {}
        try:
            for number in (int(signal.SIGINT), int(signal.SIGTERM)):
                old[number] = signal.signal(number, self._caught)
        except ValueError:
            pass  # Not the main thread: signals stay with whoever runs it.
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
