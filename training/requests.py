"""Requests to stop or to write a checkpoint, shared by all processes of a run."""

import time

from engine.interrupt import Interrupt, StopRequested
from engine.ranks import Ranks
from training.state import TrainingOptions


class Requests:
    """Requests of signals and of the clock to the training loop, the same in all processes.

    Args:
        interrupt: records signals.
        options: how often checkpoints are due.
        ranks: the processes of the run.

    Attributes:
        stop: True if training shall stop.
        checkpoint: True if a checkpoint is due.
    """

    def __init__(self, interrupt: Interrupt, options: TrainingOptions, ranks: Ranks) -> None:
        self.interrupt = interrupt
        self.options = options
        self.ranks = ranks
        self.stop = self.checkpoint = False
        self.checkpoint_written()

    def checkpoint_written(self) -> None:
        """Restart the clock of --checkpoint-minutes."""
        self._last_checkpoint = time.monotonic()

    def share(self, update: int = -1) -> None:
        """All-reduce the requests; later ones take effect at the next all-reduce.

        Args:
            update: the last update's number; without it no checkpoint is due.
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
        """All-reduce the requests, and raise StopRequested in all processes if one shall stop."""
        self.share()
        if self.stop:
            raise StopRequested
