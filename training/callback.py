"""What training calls back: the protocol of everything that has figures, state, or an epoch's end.

The training loop knows callbacks by this class alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class UpdateStart:
    """An update that is about to be made.

    update: its number, from 1.
    progress: the part of all epochs' text that training has seen before it, in [0, 1).
    optimizer: whose learning rates may be changed.
    """

    update: int
    progress: float
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class UpdateEnd:
    """An update whose outcome is known.

    update: its number, from 1.
    epoch: from 1.
    grad_norm: the gradient's global norm before clipping, a scalar on the device.
    log: writes an event: log(name, **values).
    """

    update: int
    epoch: int
    grad_norm: Tensor
    log: Callable[..., None]


@dataclass(frozen=True)
class StepEnd:
    """A step that was taken, or skipped since the gradients overflowed.

    update: its number, from 1.
    overflow: it was skipped.
    largest: the largest gradient, absolute, where the loss scale uses it; else None.
    log: writes an event: log(name, **values).
    """

    update: int
    overflow: bool
    largest: float | None
    log: Callable[..., None]


@dataclass(frozen=True)
class EpochEnd:
    """A validated epoch.

    epoch: from 1.
    valid_loss: nats per token.
    optimizer: whose learning rates may be changed.
    save_copy: keeps the weights that were validated beside the best model, as its name and this
        suffix.
    log: writes an event: log(name, **values).
    """

    epoch: int
    valid_loss: float
    optimizer: torch.optim.Optimizer
    save_copy: Callable[[str], None]
    log: Callable[..., None]


class Callback:
    """Takes part in training. Each method is a no-op that a callback overrides where it needs to.

    Attributes:
        name: under which checkpoints keep its state; empty: it has none.
    """

    name = ""

    def update_begins(self, start: UpdateStart) -> None:
        """Act before an update, for instance on its learning rate."""

    def wants_gradients(self, update: int) -> bool:
        """True if update_ended is to be called for this update, with its gradients in place."""
        return False

    def update_ended(self, end: UpdateEnd) -> None:
        """Look at an update that was asked for and not skipped; p.grad are its gradients."""

    def step_ended(self, end: StepEnd) -> None:
        """Look at a step; called for each in turn, up to one update late."""

    def figures(self) -> dict[str, float]:
        """What to add to the `train` event of the logging interval that ends; starts the next."""
        return {}

    def remark(self) -> str:
        """What to add to the interval's line; empty: nothing. Called before figures."""
        return ""

    def epoch_ended(self, end: EpochEnd) -> None:
        """Act at an epoch's end, after the best model was saved."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that load_state_dict continues from."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what state_dict returned."""
