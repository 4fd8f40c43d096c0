"""Writes checkpoints while training goes on."""

import copy
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint import write_checkpoint
from engine.errors import CheckpointError
from engine.tracking import warn


class CheckpointWriter:
    """Writes checkpoints in the order in which they come.

    In the background, what is written is what the tensors held when `write` was called: they are
    copied first, into memory that is kept for the next ones (to get it from the system takes as
    long as to write the file), as much as one checkpoint of each format needs. On a fast GPU the
    checkpoints of an epoch's end would otherwise take a good part of the time that the epoch took.

    A context that is left once all files are there. Where an exception leaves it, a file that
    could not be written is warned of.

    Args:
        background: write returns before the file is there; False: it writes the file.
    """

    def __init__(self, background: bool) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoints") if background else None
        self._waiting: deque[tuple[str, Future[None]]] = deque()  # format, and when it is there
        self._memory: dict[str, _Memory] = {}  # by format
        self._error: BaseException | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except CheckpointError as late:
            if error is None:
                raise
            warn(str(late))

    def write(self, path: Path, payload: dict[str, Any], keep: Path | None = None) -> None:
        """Write a checkpoint; see write_checkpoint.

        Raises:
            CheckpointError: it could not be written; in the background: an earlier one could not,
                and none since was.
        """
        if self._pool is None:
            write_checkpoint(path, payload, keep)
            return
        kind = payload["format"]
        self._drain(kind)  # whose memory is in use
        self._raise()
        kept = self._memory.setdefault(kind, _Memory()).copy(payload)
        self._waiting.append((kind, self._pool.submit(self._write, path, kept, keep)))

    def wait(self) -> None:
        """Return once all files are there.

        Raises:
            CheckpointError: one could not be written, and none after it was.
        """
        try:
            self._drain()
        except BaseException as error:  # Ctrl-C: the file in hand is finished, no other begun
            self._error = self._error or error
            self._drain()
            raise
        self._raise()

    def _write(self, path: Path, payload: dict[str, Any], keep: Path | None) -> None:
        """In the background; nothing after a failure, since a run's files belong together."""
        if self._error is None:
            try:
                write_checkpoint(path, payload, keep)
            except BaseException as error:
                self._error = error

    def _drain(self, kind: str | None = None) -> None:
        """Wait for all files, or until none of this format is left."""
        while self._waiting and (kind is None or kind in (other for other, _ in self._waiting)):
            self._waiting[0][1].result()
            self._waiting.popleft()

    def _raise(self) -> None:
        if self._error is not None:
            self._drain()
            error, self._error = self._error, None
            raise error


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
                copied = copy.copy(value)
                copied.update((name, walk(item)) for name, item in value.items())
                return copied
            if isinstance(value, (list, tuple)):
                return type(value)([walk(item) for item in value])
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
            place = torch.empty(value.shape, dtype=value.dtype)
            if value.is_cuda:
                with suppress(RuntimeError):  # the system gives no more of it: a slower copy
                    place = place.pin_memory()
            self.places[number] = place
        return place
