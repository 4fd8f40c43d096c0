"""Signals that stop a run: Ctrl-C and those that clusters and terminals send."""

import signal
from types import FrameType
from typing import Any

# Sent by clusters before they reclaim a machine (slurm: SIGUSR1, if --signal says so), and by a
# terminal that closes.
TERMINATING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopRequested(Exception):  # noqa: N818
    """Abandons the current update or validation to stop the run; a resumed run repeats it."""


class Interrupt:
    """A context that records signals for the training loop.

    SIGINT (Ctrl-C): the first sets `requested`, the second raises KeyboardInterrupt. SIGTERM,
    SIGUSR1 and SIGHUP set `terminated` too; SIGHUP stays ignored under nohup. After `release` each
    of these signals raises KeyboardInterrupt.
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

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise StopRequested if a stop was requested."""
        if self.requested:
            raise StopRequested

    def release(self) -> None:
        """From now on signals raise KeyboardInterrupt: nothing is left to save."""
        self._released = True

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.requested or self._released:
            raise KeyboardInterrupt
        self.requested = True

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        if self._released:
            raise KeyboardInterrupt
        self.requested = self.terminated = True
