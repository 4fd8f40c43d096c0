"""The step of an update: what is done to the weights once their gradient is there."""

from typing import Protocol

import torch
from torch import Tensor

from loss_scale import LossScale


class Step(Protocol):
    """How the weights are stepped by their gradients.

    scale: factor on the loss while gradients are taken.
    synchronizes: the caller has to learn of each update before it starts the next one.
    averaging: the optimizer averages its iterates.
    """

    synchronizes: bool
    averaging: bool

    @property
    def scale(self) -> float | Tensor:
        """See above."""

    def prepare(self, factor: float) -> None:
        """Say what the learning rates of the next step are multiplied by."""

    def __call__(self, loss: Tensor) -> tuple[Tensor, Tensor | None]:
        """Step by the parameters' gradients.

        Args:
            loss: the update's, not scaled. One that is not finite is no overflow.

        Returns:
            The gradient's global norm before clipping; and 1 if the gradients overflowed and the
            weights are as they were, else 0, None where the loss is not scaled.
        """

    def settle(self, overflow: bool) -> None:
        """Note that an update was skipped, or was not, in the order of the updates."""

    def restore(self) -> None:
        """Take over what was loaded into the optimizer and the loss scale."""


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
        self, optimizer: torch.optim.Optimizer, clip: float, loss_scale: LossScale | None = None
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

    def __call__(self, loss: Tensor) -> tuple[Tensor, Tensor | None]:
        """See Step. Reads from the device whether the update is to be skipped, if it may be."""
        groups = self.optimizer.param_groups
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        if self.loss_scale is not None:
            torch._foreach_mul_(gradients, 1 / self.scale)
        if self.clip:
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip)
        else:
            norm = torch.nn.utils.get_total_norm(gradients)
        overflow = None
        if self.loss_scale is not None:
            # A loss that is not finite is no matter of scale: it was taken before scaling.
            overflow = torch.isfinite(loss) & ~torch.isfinite(norm)
            if overflow:
                self.optimizer.zero_grad(set_to_none=True)
                return norm, overflow
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] *= self._factor
        self.optimizer.step()
        for group, lr in zip(groups, rates, strict=True):
            group["lr"] = lr
        return norm, overflow

    def settle(self, overflow: bool) -> None:
        """No-op; FusedStep overrides it."""

    def restore(self) -> None:
        """No-op: optimizer and loss scale are used as they are."""
