"""The step of an update: from the gradients to the new weights."""

import math
from typing import Protocol

import torch
from torch import Tensor

from loss_scale import AnyLossScale


class Step(Protocol):
    """How the weights are stepped by their gradients.

    scale: factor on the loss while gradients are taken.
    synchronizes: each update's outcome is to be read before the next update begins.
    averaging: the optimizer averages its iterates.
    """

    synchronizes: bool
    averaging: bool

    @property
    def scale(self) -> float | Tensor:
        """See above."""

    def prepare(self, factor: float) -> None:
        """Set what the learning rates of the next step are multiplied by."""

    def __call__(self, loss: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Step by the parameters' gradients.

        Args:
            loss: the update's, not scaled. One that is not finite is no overflow.

        Returns:
            The gradient's global norm before clipping; 1 if the gradients overflowed and the
            weights are as they were, else 0, None where the loss is not scaled; the largest
            gradient before clipping, absolute, None where the loss scale does not use it.
        """

    def note(self, overflow: bool) -> None:
        """Take note of whether an update overflowed; called for each update in turn."""

    def restore(self) -> None:
        """Read the optimizer and the loss scale again, after their states were loaded."""


class PlainStep:
    """Clipping by the global norm, then the optimizer's own step.

    Args:
        optimizer: any; its parameters are clipped together, a tied matrix counted once.
        clip: largest global norm of the gradient; 0: any.
        loss_scale: taken out of the gradients, and whose owner adapts it before the next step;
            None: the loss is not scaled, and no update is skipped.
    """

    averaging = False  # what differs between updates is the optimizer's own business

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        clip: float,
        loss_scale: AnyLossScale | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.clip = clip
        self.loss_scale = loss_scale
        self.synchronizes = loss_scale is not None
        self._factor = 1.0

    @property
    def scale(self) -> float:
        """See Step."""
        return 1.0 if self.loss_scale is None else self.loss_scale.value

    def prepare(self, factor: float) -> None:
        """See Step."""
        self._factor = factor

    def __call__(self, loss: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See Step. Where the loss is scaled it synchronises, to decide whether to skip."""
        groups = self.optimizer.param_groups
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        largest = None
        if self.loss_scale is not None:
            torch._foreach_mul_(gradients, 1 / self.scale)
            if self.loss_scale.uses_largest:
                largest = torch.nn.utils.get_total_norm(gradients, math.inf)
        if self.clip:
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip)
        else:
            norm = torch.nn.utils.get_total_norm(gradients)
        overflow = None
        if self.loss_scale is not None:
            # The loss itself was computed before scaling: not finite, it is no matter of scale.
            overflow = torch.isfinite(loss) & ~torch.isfinite(norm)
            if overflow:
                self.optimizer.zero_grad(set_to_none=True)
                return norm, overflow, largest
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] *= self._factor
        self.optimizer.step()
        for group, lr in zip(groups, rates, strict=True):
            group["lr"] = lr
        return norm, overflow, largest

    def note(self, overflow: bool) -> None:
        """No-op; FusedStep overrides it."""

    def restore(self) -> None:
        """No-op: optimizer and loss scale are used as they are."""
