"""What updates leave: summed up on the device, and looked at when it is there."""

import math
from collections.abc import Callable
from typing import Any

import torch

from engine.errors import DivergenceError
from engine.late_look import LateLook
from engine.loss_scale import LossScale
from engine.training_state import Position
from engine.update import Step

# An update's number, its tokens, and the names of the values that it left.
Noted = tuple[int, int, tuple[str, ...]]


class Tally:
    """Losses, norms and overflows of the updates of a logging interval.

    Args:
        device: that trains.
        at: whose counts of skipped updates are kept.
        loss_scale: adapted to what became of each update, in order; None: no loss is scaled.
        settled: told of each update, once it is known, whether it was skipped.
        log: gets the scale's changes, as an event's name, step and values.
        describe: makes an error's text out of what is not finite, e.g. "loss is nan", and the
            update's number.

    Attributes:
        grad_norm: gradient's norm before clipping, of the last update that counted; on the device.
        skipped: number of the last update that was skipped, 0: none was.
    """

    def __init__(
        self,
        device: torch.device,
        at: Position,
        loss_scale: LossScale | None,
        settled: Callable[[bool], None],
        log: Callable[..., None],
        describe: Callable[[str, int], str],
    ) -> None:
        self.at = at
        self.loss_scale = loss_scale
        self.settled = settled
        self.log = log
        self.describe = describe
        self.summed = torch.zeros((), dtype=torch.float64, device=device)
        self.grad_norm = torch.zeros((), device=device)
        self.skipped = 0
        self._late = LateLook(self._look, device)

    def add(self, update: int, step: Step, tokens: int) -> None:
        """Count an update, without waiting for it.

        Raises:
            DivergenceError: the one before was not finite.
        """
        values = {"loss": step.loss, "gradient norm": step.norm, "overflow": step.overflow}
        there = {name: value for name, value in values.items() if value is not None}
        self._late.push((update, tokens, tuple(there)), list(there.values()))
        loss = step.loss.double() * tokens
        if step.overflow is not None:
            assert step.norm is not None
            loss = loss * (1 - step.overflow.double())
            self.grad_norm = torch.where(step.overflow > 0, self.grad_norm, step.norm)
        elif step.norm is not None:
            self.grad_norm = step.norm
        self.summed += loss

    def check(self) -> None:
        """Wait for the last update, and look at what it left.

        Raises:
            DivergenceError: it is not finite.
        """
        self._late.check()

    def _look(self, noted: Noted, values: list[float]) -> None:
        update, tokens, names = noted
        found = dict(zip(names, values, strict=True))
        overflow = bool(found.pop("overflow", 0))
        self.settled(overflow)
        if self.loss_scale is not None:
            hopeless = self.loss_scale.hopeless
            notable = self.loss_scale.note(update, overflow)
            if overflow and not hopeless:
                self.skipped = update
                self.at.interval_skipped += 1
                self.at.interval_skipped_tokens += tokens
                found.clear()
            if notable:
                now: dict[str, Any] = dict(scale=self.loss_scale.value, overflow=overflow)
                self.log("loss_scale", step=update, **now)
        for name, value in found.items():
            if not abs(value) < math.inf:
                raise DivergenceError(self.describe(f"{name} is {value}", update))
