"""The callbacks of training; see training.callback."""

from collections.abc import Callable
from typing import Any

from engine.device import release_freed_memory
from gradient_filter import GradientFilter
from loss_scale import AnyLossScale
from nt_asgd import NTASGD
from training.callback import Callback, EpochEnd, StepEnd, UpdateEnd, UpdateStart


class NonMonotonicTrigger(Callback):
    """Passes each epoch's validation loss to NT-ASGD; see nt_asgd."""

    def epoch_ended(self, end: EpochEnd) -> None:
        """Pass the loss to the optimizer; print and log the start of averaging."""
        assert isinstance(end.optimizer, NTASGD)
        if end.optimizer.observe(end.valid_loss):
            print("Switching to ASGD", flush=True)
            end.log("averaging", epoch=end.epoch)


class StopAtTrigger(Callback):
    """Ends training when NT-ASGD's trigger fires: fine-tuning, Merity et al. 2017, section 5.

    Args:
        optimizer: averages from the first step on.
    """

    def __init__(self, optimizer: NTASGD) -> None:
        self.optimizer = optimizer

    def epoch_ended(self, end: EpochEnd) -> None:
        """Pass the loss to the optimizer, except that of the weights before training."""
        if end.epoch > 0 and self.optimizer.observe(end.valid_loss):
            print("Done: validation has stopped improving", flush=True)
            end.log("trigger", epoch=end.epoch)

    def stop_reason(self) -> str | None:
        """See Callback."""
        return "trigger" if self.optimizer.triggered else None


class LearningRateDrops(Callback):
    """Saves a copy of the model and divides the learning rates by 10 at the end of given epochs.

    Args:
        epochs: numbers of these epochs, from 1.
    """

    def __init__(self, epochs: tuple[int, ...]) -> None:
        self.epochs = epochs

    def epoch_ended(self, end: EpochEnd) -> None:
        """Save a copy and divide the learning rates, if the epoch is one of those given."""
        if end.epoch in self.epochs:
            print("Saving model before learning rate decreased", flush=True)
            end.save_copy(f".e{end.epoch}")
            for group in end.optimizer.param_groups:
                group["lr"] /= 10


class FilterFigures(Callback):
    """Logs the statistics of gradient filters.

    Args:
        filters: one per layer.
    """

    name = "gradient_filters"

    def __init__(self, filters: list[GradientFilter]) -> None:
        self.filters = filters

    def figures(self) -> dict[str, float]:
        """grad_filter_singled_out_lN, grad_filter_scale_lN, grad_filter_smallest_lN and
        grad_filter_params_lN; see GradientFilter.summary."""
        found = {}
        for layer, gradient_filter in enumerate(self.filters):
            for what, value in gradient_filter.summary().items():
                found[f"grad_filter_{what}_l{layer}"] = value
            gradient_filter.reset_statistics()
        return found

    def state_dict(self) -> dict[str, Any]:
        """The statistics of the current logging interval."""
        return dict(statistics=[f.statistics.clone() for f in self.filters])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what state_dict returned."""
        for gradient_filter, counts in zip(self.filters, state["statistics"], strict=True):
            gradient_filter.statistics.copy_(counts)


class MemoryRelease(Callback):
    """Returns freed memory to the system at regular intervals, on a CPU.

    Windows differ in length, so malloc, which keeps what tensors free, needs ever more: 1.9 GB
    after 300 updates of the PTB recipe in bf16, 1.5 GB with this, which takes 0.1 % of the time.
    """

    EVERY = 100  # updates

    def update_begins(self, start: UpdateStart) -> None:
        """Release the memory, before every EVERY-th update."""
        if start.update % self.EVERY == 0:
            release_freed_memory()


class GradientFigures(Callback):
    """Logs a `diagnostics` event at regular intervals.

    Args:
        measure: computes the event's figures from the gradient's norm before clipping.
        every: updates between two events.
    """

    def __init__(self, measure: Callable[..., dict[str, float]], every: int) -> None:
        self.measure = measure
        self.every = every

    def wants_gradients(self, update: int) -> bool:
        """True for each `every`-th update."""
        return update % self.every == 0

    def update_ended(self, end: UpdateEnd) -> None:
        """Log the figures."""
        end.log("diagnostics", epoch=end.epoch, **self.measure(end.grad_norm))


class LossScaling(Callback):
    """Adapts the loss scale to each update; logs overflows and changes of the scale.

    Args:
        loss_scale: the step's loss scale.
    """

    name = "loss_scale"

    def __init__(self, loss_scale: AnyLossScale) -> None:
        self.loss_scale = loss_scale
        self.skipped = 0  # updates skipped in the current logging interval

    def step_ended(self, end: StepEnd) -> None:
        """Adapt the scale; log a `loss_scale` event for each overflow and each change."""
        self.skipped += end.overflow
        if self.loss_scale.note(end.overflow, end.largest):
            scale = self.loss_scale.value
            end.log("loss_scale", step=end.update, scale=scale, overflow=end.overflow)

    def figures(self) -> dict[str, float]:
        """loss_scale, and overflows (updates skipped in the interval)."""
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
