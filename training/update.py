"""One update of the weights from one window of text."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from bptt import Window
from engine.ranks import Ranks
from model import Hidden
from noise import Noise
from training.gradient import WindowGradient
from training.objective import Objective
from training.step import Step


@dataclass(frozen=True)
class Outcome:
    """The result of an update.

    loss: mean cross-entropy of the counted rows without the penalties, nats per token.
    norm: the gradient's global norm before clipping.
    hidden: the states that the next window starts from.
    overflow: 1 if its gradients overflowed and the step was skipped, else 0; None: no loss scale.
    largest: the largest absolute gradient; None: the loss scale does not use it.
    """

    loss: Tensor
    norm: Tensor
    hidden: Hidden
    overflow: Tensor | None = None
    largest: Tensor | None = None


class Updater:
    """Loss, gradient, clipping and step.

    Args:
        objective: objective of a model in training mode.
        rows: word ids of the text, (N, B), on the model's device.
        step: step of the model's parameters.
        bptt: the learning rate is that of an update with this many counted rows.
        make_noise: makes the random factors of an update.
        ranks: the processes that share the batch; losses and gradients are averaged over them;
            None: one process.
    """

    def __init__(
        self,
        objective: Objective,
        rows: Tensor,
        step: Step,
        *,
        bptt: int,
        make_noise: Callable[[], Noise] = Noise,
        ranks: Ranks | None = None,
    ) -> None:
        self.model = objective.model
        self.rows = rows
        self.step = step
        self.bptt = bptt
        self.make_noise = make_noise
        self.ranks = ranks or Ranks()
        self.gradient = WindowGradient(objective)

    def __call__(
        self,
        window: Window,
        hidden: Hidden,
        keep_gradients: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """Update the weights once; only the step may synchronise with the device.

        Args:
            window: how the text is run.
            hidden: states before the window; they are detached.
            keep_gradients: p.grad must hold this update's gradients afterwards. Here it always
                does; RecordedUpdater then runs eagerly.
            check: called repeatedly before the step; may raise an exception to abandon the update.
        """
        self.step.prepare(window.counted / self.bptt)
        text = self.rows[window.start : window.start + window.length + 1]
        return self.compute(window, text, hidden, check)

    def compute(
        self, window: Window, text: Tensor, hidden: Hidden, check: Callable[[], None]
    ) -> Outcome:
        """Update the weights with a prepared step; text: the window's rows and one more."""
        for parameter in self.model.parameters():
            parameter.grad = None
        noise, scale = self.make_noise(), self.step.scale
        loss, hidden = self.gradient(window, text, hidden, noise, scale, check)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.ranks.average([loss, *gradients])
        norm, overflow, largest = self.step(loss)
        return Outcome(loss, norm, hidden, overflow, largest)
