"""Ctrl-C once asks a run to end well, twice ends it at once; other signals ask for a checkpoint."""

import signal
from types import FrameType, TracebackType
from typing import Any

# What clusters send before they take a machine away (slurm: SIGUSR1, where --signal asks for it),
# and what a terminal sends as it is closed.
TERMINATING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopRequested(Exception):  # noqa: N818
    """Gives up what is under way, where a stop was asked for; a resumed run repeats it."""


class Interrupt:
    """While this context is entered, signals are noted for the training loop to look at.

    SIGINT (Ctrl-C): the first is noted, the second raises KeyboardInterrupt. SIGTERM, SIGUSR1 and
    SIGHUP are noted as a request to terminate; but SIGHUP stays ignored where it is, under nohup.
    Once the loop has ended and `release` was called, the next signal of any kind raises
    KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.requested = False
        self.terminated = False
        self._released = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        self._previous = {signal.SIGINT: signal.signal(signal.SIGINT, self._on_interrupt)}
        for number in TERMINATING:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._on_terminate)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise StopRequested where a stop was asked for."""
        if self.requested:
            raise StopRequested

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
