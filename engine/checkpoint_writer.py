"""Writes checkpoints while training goes on."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint import write_checkpoint


class CheckpointWriter:
    """Writes checkpoints in the order in which they come.

    In the background, what is written is what the tensors held when `write` was called: they are
    copied first, into memory that is kept for the next ones (to get it from the system takes as
    long as to write the file). On a fast GPU the checkpoints of an epoch's end would otherwise
    take a good part of the time that the epoch took.

    Args:
        background: write returns before the file is there; False: it writes the file.
    """

    def __init__(self, background: bool) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoints") if background else None
        self._waiting: deque[tuple[str, Future[None]]] = deque()
        self._memory: dict[str, _Memory] = {}  # by format: of each one may be waiting

    def write(self, path: Path, payload: dict[str, Any]) -> None:
        """Write a checkpoint; see write_checkpoint.

        Raises:
            CheckpointError: this one, or in the background an earlier one, could not be written.
        """
        if self._pool is None:
            write_checkpoint(path, payload)
            return
        kind = payload["format"]
        while self._waiting and (
            self._waiting[0][1].done() or any(kind == waiting for waiting, _ in self._waiting)
        ):
            self._waiting.popleft()[1].result()
        kept = self._memory.setdefault(kind, _Memory()).copy(payload)
        self._waiting.append((kind, self._pool.submit(write_checkpoint, path, kept)))

    def wait(self) -> None:
        """Return once all files are there.

        Raises:
            CheckpointError: one could not be written.
        """
        while self._waiting:
            self._waiting.popleft()[1].result()


class _Memory:
    """Places on the CPU for the tensors of one payload after the other; a GPU's are pinned."""

    def __init__(self) -> None:
        self.places: list[Tensor] = []

    def copy(self, payload: Any) -> Any:
        """The same containers and values, the tensors' values in these places."""
        found: dict[Any, Tensor] = {}
        streams = set[torch.cuda.Stream]()

        def walk(value: Any) -> Any:
            if isinstance(value, Tensor):
                key = value.data_ptr(), value.dtype, value.shape, value.stride()
                if key not in found:  # a tied matrix is one
                    if value.is_cuda:
                        streams.add(torch.cuda.current_stream(value.device))
                    place = self._place(len(found), value)
                    found[key] = place.copy_(value.detach(), non_blocking=True)
                return found[key]
            if isinstance(value, dict):
                return {name: walk(item) for name, item in value.items()}
            if isinstance(value, (list, tuple)):
                return type(value)(walk(item) for item in value)
            return value

        copied = walk(payload)
        for stream in streams:
            stream.synchronize()
        return copied

    def _place(self, number: int, value: Tensor) -> Tensor:
        if number == len(self.places):
            self.places.append(torch.empty(0))
        place = self.places[number]
        if (place.shape, place.dtype) != (value.shape, value.dtype):
            place = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self.places[number] = place
        return place
