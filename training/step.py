"""The step of an update: unscaling, clipping, optimizer."""

import math

import torch
from torch import Tensor

from kernels.fused_step import FusedStep
from loss_scale import AnyLossScale


class PlainStep:
    """Clipping by the global norm, then the optimizer's own step.

    Args:
        optimizer: any optimizer; its parameters are clipped together.
        clip: largest global norm of the gradient; 0: no clipping.
        loss_scale: the loss scale, which its owner adapts before the next step; None: the loss is
            not scaled, and no update is skipped.

    Attributes:
        scale: factor on the loss in backward.
        synchronizes: True if each update's outcome must be read before the next update.
        averaging: True if the step averages the iterates itself.
    """

    averaging = False  # the optimizer does

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
        """See above."""
        return 1.0 if self.loss_scale is None else self.loss_scale.value

    def prepare(self, factor: float) -> None:
        """Set the factor on the learning rates of the next step."""
        self._factor = factor

    def __call__(self, loss: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Step by the parameters' gradients, or skip the step if they overflowed.

        With a loss scale this synchronises, to decide that.

        Args:
            loss: the update's loss, unscaled. If it is not finite, the update is not an overflow:
                training has diverged.

        Returns:
            norm: the gradient's global norm before clipping, unscaled.
            overflow: 1 if the step was skipped, else 0; None without a loss scale.
            largest: the largest absolute gradient before clipping, unscaled; None if the loss
                scale does not use it.
        """
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
            # The loss was computed before scaling: if it is not finite, scaling is not the cause.
            overflow = torch.isfinite(loss) & ~torch.isfinite(norm)
            if overflow:
                return norm, overflow, largest
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] *= self._factor
        self.optimizer.step()
        for group, lr in zip(groups, rates, strict=True):
            group["lr"] = lr
        return norm, overflow, largest

    def note(self, overflow: bool) -> None:
        """Record whether an update was skipped; called for each in order. No-op here."""

    def restore(self) -> None:
        """Read the loaded states of optimizer and loss scale again. No-op here."""


Step = PlainStep | FusedStep  # two with the same methods
