"""One update of the weights from one window of text."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bptt import Window
from engine.gradient import WindowGradient
from engine.loss_scale import LossScale
from engine.ranks import Ranks
from model import Hidden, RNNModel


@dataclass(frozen=True)
class Step:
    """What came of an update.

    loss: mean cross-entropy of the counted rows without the penalties, nats per token.
    norm: the gradient's global norm before clipping; None if neither clipped nor wanted.
    hidden: the states that the next window starts from.
    overflow: 1 if its gradients overflowed and the weights are as they were, else 0; None: its
        loss was not scaled.
    """

    loss: Tensor
    norm: Tensor | None
    hidden: Hidden
    overflow: Tensor | None = None


class Updater:
    """Loss, gradients, clipping and step.

    Args:
        model: in training mode when called.
        rows: word ids of the text, (N, B), on the model's device.
        optimizer: over the model's parameters, with the learning rates of an update in which
            bptt rows count.
        bptt: how many rows the learning rate is meant for.
        clip: largest global norm of the gradient, in which a tied matrix counts once; 0: any.
        alpha: weight of AR, 0: off.
        beta: weight of TAR, 0: off.
        loss_scale: factor on the loss while gradients are taken; None: 1, and nothing is skipped.
            Whoever calls adapts it, before the next update.
        ranks: the processes that share the batch, whose losses and gradients are averaged; None:
            there is one.
        check: called now and then before the step; gives the update up by raising an exception.
    """

    def __init__(
        self,
        model: RNNModel,
        rows: Tensor,
        optimizer: torch.optim.Optimizer,
        *,
        bptt: int,
        clip: float,
        alpha: float,
        beta: float,
        loss_scale: LossScale | None = None,
        ranks: Ranks | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self.rows = rows
        self.optimizer = optimizer
        self.bptt = bptt
        self.clip = clip
        self.loss_scale = loss_scale
        self.ranks = ranks or Ranks()
        self.check = check
        self.gradient = WindowGradient(model, alpha=alpha, beta=beta, ranks=ranks)

    @property
    def waits(self) -> bool:
        """Whether each update was waited for, since the next one's scale depends on it."""
        return self.loss_scale is not None

    def __call__(
        self,
        window: Window,
        hidden: Hidden,
        want_norm: bool = False,
        want_gradients: bool = False,
    ) -> Step:
        """Update the weights once.

        Args:
            window: how its text is run.
            hidden: states before the window; their history is cut off.
            want_norm: the gradient's norm is wanted even if nothing is clipped.
            want_gradients: the parameters' grad is looked at afterwards; here it always can be.

        Returns:
            See Step. Nothing is read back from the device, unless the loss is scaled: whether
            this update is to be skipped.
        """
        self.optimizer.zero_grad(set_to_none=True)
        scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        text = self.rows[window.start : window.start + window.length + 1]
        loss, hidden = self.gradient(window, text, hidden, scale, self.check)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.ranks.average([loss, *gradients])
        if self.loss_scale is None:
            norm = self._clip_gradients(want_norm)
            self._step(window.counted / self.bptt)
            return Step(loss, norm, hidden)
        torch._foreach_mul_(gradients, 1 / scale)
        norm = self._clip_gradients(True)
        assert norm is not None
        # A loss that is not finite is no matter of scale: it was taken before scaling.
        overflow = torch.isfinite(loss) & ~torch.isfinite(norm)
        if overflow:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self._step(window.counted / self.bptt)
        return Step(loss, norm, hidden, overflow)

    def settle(self, overflow: bool) -> None:
        """Learn what became of an update; there is nothing to be done about it here."""

    def restore(self) -> None:
        """What was loaded into optimizer and loss scale is used as it is."""

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
