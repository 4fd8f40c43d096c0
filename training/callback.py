"""The interface of callbacks, through which techniques and statistics take part in training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class UpdateStart:
    """The next update.

    update: its number, from 1.
    progress: share of all epochs' rows that training has done before it, in [0, 1).
    optimizer: the optimizer; a callback may change its learning rates.
    """

    update: int
    progress: float
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class UpdateEnd:
    """A finished update that was not skipped.

    update: its number, from 1.
    epoch: its epoch, from 1.
    grad_norm: the gradient's global norm before clipping, a scalar on the device.
    log: writes an event: log(name, **values).
    """

    update: int
    epoch: int
    grad_norm: Tensor
    log: Callable[..., None]


@dataclass(frozen=True)
class StepEnd:
    """A step, taken or skipped.

    update: its number, from 1.
    overflow: True if its gradients overflowed and it was skipped.
    largest: the largest absolute gradient; None if the loss scale does not use it.
    log: writes an event: log(name, **values).
    """

    update: int
    overflow: bool
    largest: float | None
    log: Callable[..., None]


@dataclass(frozen=True)
class EpochEnd:
    """An epoch after its validation.

    epoch: its number, from 1; 0: the validation before training, see Position.begin_validated.
    valid_loss: nats per token.
    optimizer: the optimizer; a callback may change its learning rates.
    save_copy: saves the validated weights to the best model's path plus a suffix.
    log: writes an event: log(name, **values).
    """

    epoch: int
    valid_loss: float
    optimizer: torch.optim.Optimizer
    save_copy: Callable[[str], None]
    log: Callable[..., None]


class Callback:
    """A participant in training. All methods are no-ops; subclasses override what they need.

    Attributes:
        name: key of its state in checkpoints; empty if it has no state.
    """

    name = ""

    def update_begins(self, start: UpdateStart) -> None:
        """Called before an update, for instance to set its learning rate."""

    def wants_gradients(self, update: int) -> bool:
        """True if update_ended shall be called for this update, with its gradients in p.grad."""
        return False

    def update_ended(self, end: UpdateEnd) -> None:
        """Called after an update for which wants_gradients is True, unless it was skipped."""

    def step_ended(self, end: StepEnd) -> None:
        """Called for each step in order, up to one update late."""

    def figures(self) -> dict[str, float]:
        """Figures of the ended logging interval for its `train` event; resets them."""
        return {}

    def remark(self) -> str:
        """Text appended to the interval's log line; called before figures."""
        return ""

    def epoch_ended(self, end: EpochEnd) -> None:
        """Called at an epoch's end, after validation and after the best model was saved."""

    def stop_reason(self) -> str | None:
        """Why training shall end, in a word; asked before each update; None: it continues."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values for load_state_dict."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what state_dict returned."""
