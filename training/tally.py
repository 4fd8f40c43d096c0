"""Accumulates loss, norm and overflow on the device and reads them one update late."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import DivergenceError
from training.state import Position
from training.update import Outcome

# After more overflows in a row training has diverged: no loss scale would help.
MOST_OVERFLOWS = 50


@dataclass(frozen=True)
class _Unread:
    """An update's scalars, being copied to the host.

    values: scalars in the order of names, valid once event has happened; event None: at once.
    """

    update: int
    tokens: int
    names: tuple[str, ...]
    values: Tensor
    event: torch.cuda.Event | None

    def read(self) -> dict[str, float]:
        if self.event is not None:
            self.event.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))


class Tally:
    """Accumulates losses, norms and overflows of a logging interval.

    On a GPU an update's scalars are copied asynchronously to pinned memory and read after the next
    update was queued, so that the device never waits for the host.

    Args:
        device: the training device.
        at: position, whose counts of skipped updates it increments.
        on_read: called for each update in order when its scalars are read, with its number, whether
            it was skipped, and its largest gradient if the loss scale uses that.
        describe: makes an error message from a cause, e.g. "loss is nan", and an update's number.

    Attributes:
        summed: summed loss of the interval's tokens, nats; on the device.
        grad_norm: norm before clipping of the last update that was not skipped; on the device.
        skipped: number of the last skipped update; 0: none.
    """

    def __init__(
        self,
        device: torch.device,
        at: Position,
        on_read: Callable[[int, bool, float | None], None],
        describe: Callable[[str, int], str],
    ) -> None:
        self.device = device
        self.at = at
        self.on_read = on_read
        self.describe = describe
        self.summed = torch.zeros((), dtype=torch.float64, device=device)
        self.grad_norm = torch.zeros((), device=device)
        self.skipped = 0
        self._unread: _Unread | None = None

    def add(self, update: int, outcome: Outcome, tokens: int) -> None:
        """Add an update without synchronisation, and read the scalars of the one before.

        Raises:
            DivergenceError: loss or norm of the one before was not finite.
        """
        scalars = {"loss": outcome.loss, "gradient norm": outcome.norm}
        loss = outcome.loss.double() * tokens
        if outcome.overflow is None:
            self.grad_norm = outcome.norm
        else:
            scalars["overflow"] = outcome.overflow
            loss = loss * (1 - outcome.overflow.double())
            self.grad_norm = torch.where(outcome.overflow > 0, self.grad_norm, outcome.norm)
        if outcome.largest is not None:
            scalars["largest"] = outcome.largest
        copied = self._copy(update, tokens, scalars)
        self.check()
        self._unread = copied
        self.summed += loss

    def check(self) -> None:
        """Synchronise with the last update and read its scalars, unless they were read.

        Raises:
            DivergenceError: its loss or norm is not finite.
        """
        if self._unread is None:
            return
        unread, self._unread = self._unread, None
        found = unread.read()
        overflow, largest = bool(found.pop("overflow", 0)), found.pop("largest", None)
        self.on_read(unread.update, overflow, largest)
        self.at.overflows += overflow
        self.at.overflows_in_a_row = self.at.overflows_in_a_row + 1 if overflow else 0
        if overflow and self.at.overflows_in_a_row <= MOST_OVERFLOWS:
            self.skipped = unread.update
            self.at.interval_skipped_tokens += unread.tokens
            return
        for name, value in found.items():
            if not abs(value) < math.inf:
                raise DivergenceError(self.describe(f"{name} is {value}", unread.update))

    def store(self) -> None:
        """Write the interval's loss and the norm to the position; synchronises."""
        self.at.interval_loss = float(self.summed)
        self.at.grad_norm = float(self.grad_norm)

    def restore(self) -> None:
        """Read them from the position, after it was loaded."""
        self.summed.fill_(self.at.interval_loss)
        self.grad_norm = torch.full_like(self.grad_norm, self.at.grad_norm)

    def _copy(self, update: int, tokens: int, scalars: dict[str, Tensor]) -> _Unread:
        dtype = scalars["loss"].dtype
        values = torch.stack([value.detach().to(dtype) for value in scalars.values()])
        values = values.to("cpu", non_blocking=True)  # from a GPU: into pinned memory
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
        return _Unread(update, tokens, tuple(scalars), values, event)
