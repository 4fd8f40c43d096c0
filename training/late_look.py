"""Looks at what an update left on the device, without making the device wait."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

What = TypeVar("What")


class LateLook(Generic[What]):
    """Looks at each update's values while the device is at the next update.

    On a GPU the values travel to pinned memory behind the update's kernels, and are looked at one
    update later, when they have long arrived.

    Args:
        look: called with what was pushed, and its values as numbers.
        device: where the values come from.
    """

    def __init__(self, look: Callable[[What, list[float]], None], device: torch.device) -> None:
        self._look = look
        self._device = device
        self._pending: tuple[What, Tensor, torch.cuda.Event | None] | None = None

    def push(self, what: What, values: list[Tensor]) -> None:
        """Take note of an update's values (scalars), and look at those of the one before."""
        common = torch.stack([value.detach().to(values[0].dtype) for value in values])
        common = common.to("cpu", non_blocking=True)  # from a GPU: into pinned memory
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
        self.check()
        self._pending = (what, common, event)

    def check(self) -> None:
        """Look at the values pushed last; call it before anything is made of them."""
        if self._pending is None:
            return
        what, values, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        self._look(what, values.tolist())
