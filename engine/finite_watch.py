"""Notices a loss or gradient that is no longer finite, without a device sync per update."""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.errors import DivergenceError


class FiniteWatch:
    """Looks at each update's loss and gradient norm while the device is at the next update.

    On a GPU the values travel to pinned memory behind the update's kernels, and are looked at one
    update later, when they have long arrived.

    Args:
        describe: makes the error's text out of what is not finite, e.g. "loss is nan", and the
            update's number.
        device: where the values come from.
    """

    def __init__(self, describe: Callable[[str, int], str], device: torch.device) -> None:
        self._describe = describe
        self._device = device
        self._pending: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def push(self, update: int, loss: Tensor, grad_norm: Tensor | None) -> None:
        """Take note of an update's values (scalars), and look at those of the one before.

        Raises:
            DivergenceError: the update before was not finite.
        """
        values = torch.stack([loss.detach()] + ([] if grad_norm is None else [grad_norm.detach()]))
        values = values.to("cpu", non_blocking=True)  # from a GPU: into pinned memory
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        self.check()
        self._pending = (update, values, event)

    def check(self) -> None:
        """Look at the values pushed last; call it before anything is made of them.

        Raises:
            DivergenceError: they are not finite.
        """
        if self._pending is None:
            return
        update, values, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        for name, value in zip(("loss", "gradient norm"), values.tolist(), strict=False):
            if not abs(value) < float("inf"):
                raise DivergenceError(self._describe(f"{name} is {value}", update))
