"""The callbacks of training; see training.callback."""

from collections.abc import Callable
from typing import Any

from gradient_filter import GradientFilter
from loss_scale import AnyLossScale
from nt_asgd import NTASGD
from training.callback import Callback, EpochEnd, StepEnd, UpdateEnd


class NonMonotonicTrigger(Callback):
    """Tells NT-ASGD each epoch's validation loss; see nt_asgd."""

    def epoch_ended(self, end: EpochEnd) -> None:
        """Let the optimizer observe the loss, and say when it starts to average."""
        assert isinstance(end.optimizer, NTASGD)
        if end.optimizer.observe(end.valid_loss):
            print("Switching to ASGD", flush=True)
            end.log("averaging", epoch=end.epoch)


class LearningRateDrops(Callback):
    """Divides the learning rates by 10 at the end of given epochs, and keeps the model of then.

    Args:
        epochs: at whose ends, from 1.
    """

    def __init__(self, epochs: tuple[int, ...]) -> None:
        self.epochs = epochs

    def epoch_ended(self, end: EpochEnd) -> None:
        """Divide the learning rates, if it is time."""
        if end.epoch in self.epochs:
            print("Saving model before learning rate decreased", flush=True)
            end.save_copy(f".e{end.epoch}")
            for group in end.optimizer.param_groups:
                group["lr"] /= 10


class FilterFigures(Callback):
    """Logs how often and how hard gradient filters act.

    Args:
        filters: one a layer.
    """

    name = "gradient_filters"

    def __init__(self, filters: list[GradientFilter]) -> None:
        self.filters = filters

    def figures(self) -> dict[str, float]:
        """grad_filter_masked_lN, grad_filter_smallest_lN, grad_filter_params_lN."""
        found = {}
        for layer, gradient_filter in enumerate(self.filters):
            for what, value in gradient_filter.summary().items():
                found[f"grad_filter_{what}_l{layer}"] = value
            gradient_filter.reset_statistics()
        return found

    def state_dict(self) -> dict[str, Any]:
        """The counts of the interval under way."""
        return dict(statistics=[f.statistics.clone() for f in self.filters])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with these counts."""
        for gradient_filter, counts in zip(self.filters, state["statistics"], strict=True):
            gradient_filter.statistics.copy_(counts)


class GradientFigures(Callback):
    """Logs a `diagnostics` event every so many updates.

    Args:
        look: from the gradient's norm before clipping to the event's figures.
        every: updates from one event to the next.
    """

    def __init__(self, look: Callable[..., dict[str, float]], every: int) -> None:
        self.look = look
        self.every = every

    def wants_gradients(self, update: int) -> bool:
        """Every so many updates."""
        return update % self.every == 0

    def update_ended(self, end: UpdateEnd) -> None:
        """Log the figures."""
        end.log("diagnostics", epoch=end.epoch, **self.look(end.grad_norm))


class LossScaling(Callback):
    """Adapts the loss scale to each update, and logs overflows and its changes.

    Args:
        loss_scale: that the step takes out of the gradients.
    """

    name = "loss_scale"

    def __init__(self, loss_scale: AnyLossScale) -> None:
        self.loss_scale = loss_scale
        self.skipped = 0  # in the logging interval under way

    def step_ended(self, end: StepEnd) -> None:
        """Adapt; what goes into the scale's history is an event."""
        self.skipped += end.overflow
        if self.loss_scale.note(end.update, end.overflow, end.largest):
            scale = self.loss_scale.value
            end.log("loss_scale", step=end.update, scale=scale, overflow=end.overflow)

    def figures(self) -> dict[str, float]:
        """loss_scale, and overflows in the interval."""
        found = dict(loss_scale=self.loss_scale.value, overflows=self.skipped)
        self.skipped = 0
        return found

    def remark(self) -> str:
        """The scale, and the updates skipped in the interval."""
        return f" | loss scale {self.loss_scale.value:g}, {self.skipped} skipped"

    def state_dict(self) -> dict[str, Any]:
        """The scale's state, and the skipped updates of the interval."""
        return dict(self.loss_scale.state_dict(), skipped=self.skipped)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what state_dict returned."""
        self.loss_scale.load_state_dict(state)
        self.skipped = state["skipped"]
