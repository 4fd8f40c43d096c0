"""Accumulates loss, norm and overflow on the device and reads them one update late."""

import math
from collections.abc import Callable

import torch

from engine.errors import DivergenceError
from training.late_look import LateLook
from training.state import Position
from training.update import Outcome

# So many overflows one after another are no matter of scale: training has diverged.
MOST_OVERFLOWS = 50
# An update's number, its tokens, and the names of the values that it left.
Noted = tuple[int, int, tuple[str, ...]]


class Tally:
    """Losses, norms and overflows of the updates of a logging interval.

    Args:
        device: that trains.
        at: whose counts of skipped updates are kept.
        settled: told of each update, once it is known, its number and whether it was skipped.
        describe: makes an error's text out of what is not finite, e.g. "loss is nan", and the
            update's number.

    Attributes:
        summed: loss of the interval's tokens, nats; on the device.
        grad_norm: gradient's norm before clipping, of the last update that counted; on the device.
        skipped: number of the last update that was skipped, 0: none was.
    """

    def __init__(
        self,
        device: torch.device,
        at: Position,
        settled: Callable[[int, bool], None],
        describe: Callable[[str, int], str],
    ) -> None:
        self.at = at
        self.settled = settled
        self.describe = describe
        self.summed = torch.zeros((), dtype=torch.float64, device=device)
        self.grad_norm = torch.zeros((), device=device)
        self.skipped = 0
        self._late = LateLook(self._look, device)

    def add(self, update: int, outcome: Outcome, tokens: int) -> None:
        """Count an update without waiting for it.

        Raises:
            DivergenceError: the one before was not finite.
        """
        values = {"loss": outcome.loss, "gradient norm": outcome.norm}
        loss = outcome.loss.double() * tokens
        if outcome.overflow is None:
            self.grad_norm = outcome.norm
        else:
            values["overflow"] = outcome.overflow
            loss = loss * (1 - outcome.overflow.double())
            self.grad_norm = torch.where(outcome.overflow > 0, self.grad_norm, outcome.norm)
        self._late.push((update, tokens, tuple(values)), list(values.values()))
        self.summed += loss

    def check(self) -> None:
        """Wait for the last update, and read what it left.

        Raises:
            DivergenceError: it is not finite.
        """
        self._late.check()

    def _look(self, noted: Noted, values: list[float]) -> None:
        update, tokens, names = noted
        found = dict(zip(names, values, strict=True))
        overflow = bool(found.pop("overflow", 0))
        self.settled(update, overflow)
        self.at.overflows += overflow
        self.at.overflows_in_a_row = self.at.overflows_in_a_row + 1 if overflow else 0
        if overflow and self.at.overflows_in_a_row <= MOST_OVERFLOWS:
            self.skipped = update
            self.at.interval_skipped_tokens += tokens
            return
        for name, value in found.items():
            if not abs(value) < math.inf:
                raise DivergenceError(self.describe(f"{name} is {value}", update))
