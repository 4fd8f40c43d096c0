"""Ctrl-C once asks a run to end well; twice ends it at once."""

import signal
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """While this context is entered, signals are noted for the training loop to look at.

    SIGINT (Ctrl-C): the first is noted, the second raises KeyboardInterrupt. SIGTERM, which
    clusters send before they take a machine away, is noted. Once the loop has ended and `release`
    was called, the next signal of either kind raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.requested = False
        self.terminated = False
        self._released = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        self._previous = {
            signal.SIGINT: signal.signal(signal.SIGINT, self._on_interrupt),
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._on_terminate),
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def release(self) -> None:
        """There is nothing left that an early end would have to save."""
        self._released = True

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.requested or self._released:
            raise KeyboardInterrupt
        self.requested = True

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        if self._released:
            raise KeyboardInterrupt
        self.requested = self.terminated = True
