"""One update of the weights from one window of text."""

import torch
from torch import Tensor

from bptt import Window
from engine.gradient import WindowGradient
from model import Hidden, RNNModel


class Updater:
    """Loss, gradients, clipping and step.

    Args:
        model: in training mode when called.
        optimizer: over the model's parameters, with the learning rates of an update in which
            bptt rows count.
        bptt: how many rows the learning rate is meant for.
        clip: largest global norm of the gradient, in which a tied matrix counts once; 0: any.
        alpha: weight of AR, 0: off.
        beta: weight of TAR, 0: off.
    """

    def __init__(
        self,
        model: RNNModel,
        optimizer: torch.optim.Optimizer,
        *,
        bptt: int,
        clip: float,
        alpha: float,
        beta: float,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.bptt = bptt
        self.clip = clip
        self.gradient = WindowGradient(model, alpha=alpha, beta=beta)

    def __call__(
        self, window: Window, rows: Tensor, hidden: Hidden, want_norm: bool = False
    ) -> tuple[Tensor, Tensor | None, Hidden]:
        """Update the weights once.

        Args:
            window: how its text is run.
            rows: the window's word ids and those of one row more, (T + 1, B).
            hidden: states before the window; their history is cut off.
            want_norm: the gradient's norm is wanted even if nothing is clipped.

        Returns:
            The mean cross-entropy of the counted rows without the penalties, nats per token; the
            gradient's global norm before clipping (None if neither clipped nor wanted); the
            states that the next window starts from. Nothing is read back from the device.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss, hidden = self.gradient(window, rows, hidden)
        norm = self._clip_gradients(want_norm)
        self._step(window.counted / self.bptt)
        return loss, norm, hidden

    def _clip_gradients(self, want_norm: bool) -> Tensor | None:
        parameters = list(self.model.parameters())
        if self.clip:
            return torch.nn.utils.clip_grad_norm_(parameters, self.clip)
        if want_norm:
            gradients = [p.grad for p in parameters if p.grad is not None]
            return torch.nn.utils.get_total_norm(gradients)
        return None

    def _step(self, scale: float) -> None:
        """Step with every learning rate multiplied by scale, counted rows / bptt."""
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] *= scale
        self.optimizer.step()
        for group, lr in zip(groups, rates, strict=True):
            group["lr"] = lr
