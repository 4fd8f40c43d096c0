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
    """What an update leaves.

    loss: mean cross-entropy of the counted rows without the penalties, nats per token.
    norm: the gradient's global norm before clipping.
    hidden: the states that the next window starts from.
    overflow: 1 if its gradients overflowed and the weights are as they were, else 0; None: its
        loss was not scaled.
    largest: the largest gradient, absolute; None: the loss scale does not use it.
    """

    loss: Tensor
    norm: Tensor
    hidden: Hidden
    overflow: Tensor | None = None
    largest: Tensor | None = None


class Updater:
    """Loss, gradient, clipping and step.

    Args:
        objective: of a model in training mode.
        rows: word ids of the text, (N, B), on the model's device.
        step: over the model's parameters, with the learning rates of an update in which bptt rows
            count.
        bptt: how many rows the learning rate is meant for.
        make_noise: gives the random factors of an update; None: from torch's default generator.
        ranks: the processes that share the batch, whose losses and gradients are averaged; None:
            there is one.
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
        """Update the weights once.

        Args:
            window: how its text is run.
            hidden: states before the window; their history is cut off.
            keep_gradients: the parameters' grad has to be this update's afterwards. Here it
                always is; RecordedUpdater replays graphs otherwise.
            check: called now and then before the step; gives the update up by raising an exception.

        Returns:
            See Outcome. Nothing is read back from the device, unless by the step.
        """
        self.step.prepare(window.counted / self.bptt)
        text = self.rows[window.start : window.start + window.length + 1]
        return self.compute(window, text, hidden, check)

    def compute(
        self, window: Window, text: Tensor, hidden: Hidden, check: Callable[[], None]
    ) -> Outcome:
        """The update itself, once the step is prepared; text is the window's rows and one more."""
        for parameter in self.model.parameters():
            parameter.grad = None
        noise, scale = self.make_noise(), self.step.scale
        loss, hidden = self.gradient(window, text, hidden, noise, scale, check)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.ranks.average([loss, *gradients])
        norm, overflow, largest = self.step(loss)
        return Outcome(loss, norm, hidden, overflow, largest)
