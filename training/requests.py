"""Requests to stop or to write a checkpoint, shared by all processes of a run."""

import time

from engine.interrupt import Interrupt, StopRequested
from engine.ranks import Ranks
from training.state import TrainingOptions


class Requests:
    """What signals and the clock ask of the training loop.

    Args:
        interrupt: notes signals.
        options: how often checkpoints are due.
        ranks: the processes that act on a request together.

    Attributes:
        stop: an early end is asked for.
        checkpoint: a checkpoint is due.
    """

    def __init__(self, interrupt: Interrupt, options: TrainingOptions, ranks: Ranks) -> None:
        self.interrupt = interrupt
        self.options = options
        self.ranks = ranks
        self.stop = self.checkpoint = False
        self.checkpoint_written()

    def checkpoint_written(self) -> None:
        """Start the clock anew."""
        self._last_checkpoint = time.monotonic()

    def share(self, update: int = -1) -> None:
        """All-reduce the requests.

        What comes in afterwards waits for the next time, so that all processes do the same.

        Args:
            update: the last update's number, where a checkpoint may be due after it.
        """
        every, minutes = self.options.checkpoint_every, self.options.checkpoint_minutes
        waited = time.monotonic() - self._last_checkpoint
        due = update >= 0 and bool((every and update % every == 0) or waited >= 60 * minutes)
        asked = self.interrupt.requested, self.interrupt.terminated
        stop, terminate, checkpoint = self.ranks.largest(*asked, due)
        self.stop, self.checkpoint = bool(stop), bool(checkpoint)
        self.interrupt.requested |= bool(stop)
        self.interrupt.terminated |= bool(terminate)

    def check(self) -> None:
        """Share the requests, and raise StopRequested in all processes if one has to stop."""
        self.share()
        if self.stop:
            raise StopRequested
