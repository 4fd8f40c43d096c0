"""One update of the weights from one window of text."""

import torch
import torch.nn.functional as F
from torch import Tensor

from activation_regularize import activation_regularization, temporal_activation_regularization
from model import Hidden, RNNModel, repackage_hidden


class Updater:
    """Loss, gradients, clipping and step.

    Args:
        model: in training mode when called.
        optimizer: over the model's parameters, with the learning rates of a window of bptt steps.
        bptt: the window length that the learning rate is meant for.
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
        self.alpha = alpha
        self.beta = beta

    def __call__(
        self, inputs: Tensor, targets: Tensor, hidden: Hidden, want_norm: bool = False
    ) -> tuple[Tensor, Tensor | None, Hidden]:
        """Update the weights once.

        Args:
            inputs: word ids, (T, B).
            targets: the words that follow them, (T·B,).
            hidden: states before the window; their history is cut off.
            want_norm: the gradient's norm is wanted even if nothing is clipped.

        Returns:
            The mean cross-entropy without the penalties, nats per token; the gradient's global
            norm before clipping (None if neither clipped nor wanted); the states after the window.
            Nothing is read back from the device.
        """
        self.optimizer.zero_grad(set_to_none=True)
        result, hidden, raw_outputs, outputs = self.model(
            inputs, repackage_hidden(hidden), return_h=True
        )
        loss = F.cross_entropy(self.model.decoder(result), targets)
        objective = loss
        if self.alpha:
            objective = objective + activation_regularization(outputs[-1], self.alpha)
        if self.beta:
            objective = objective + temporal_activation_regularization(raw_outputs[-1], self.beta)
        objective.backward()
        norm = self._clip_gradients(want_norm)
        self._step(len(inputs) / self.bptt)
        return loss.detach(), norm, hidden

    def _clip_gradients(self, want_norm: bool) -> Tensor | None:
        parameters = list(self.model.parameters())
        if self.clip:
            return torch.nn.utils.clip_grad_norm_(parameters, self.clip)
        if want_norm:
            gradients = [p.grad for p in parameters if p.grad is not None]
            return torch.nn.utils.get_total_norm(gradients)
        return None

    def _step(self, scale: float) -> None:
        """Step with every learning rate multiplied by scale, T / bptt."""
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] *= scale
        self.optimizer.step()
        for group, lr in zip(groups, rates, strict=True):
            group["lr"] = lr
