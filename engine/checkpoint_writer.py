"""Writes checkpoints, in the background on a GPU."""

import copy
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from data.errors import WriteError
from engine.checkpoint import write_checkpoint
from engine.tracking import warn

MOST_PENDING = 2  # an epoch's end writes the best model and the training state


class CheckpointWriter:
    """Writes checkpoints in order, on a GPU in the background during training.

    In the background, `write` first copies the tensors to the CPU, so that later updates do not
    change them; at most MOST_PENDING files are pending. If a file cannot be written, the pending
    ones are dropped, since a run's files must be consistent.

    Leaving the context waits until all files are written. If an exception ends it, a file that
    could not be written is a warning.

    Args:
        background: `write` returns before the file is written.
    """

    def __init__(self, background: bool) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoints") if background else None
        self._pending: deque[Future[None]] = deque()
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
        except WriteError as late:
            if error is None:
                raise
            warn(str(late))

    def write(self, path: Path, payload: dict[str, Any], keep: Path | None = None) -> None:
        """Write a checkpoint; see write_checkpoint.

        Raises:
            WriteError: it (in the background: an earlier one) could not be written.
        """
        if self._pool is None:
            write_checkpoint(path, payload, keep)
            return
        self._finish(MOST_PENDING - 1)
        self._raise()
        copied = _copied(payload, {})
        self._pending.append(self._pool.submit(self._write, path, copied, keep))

    def wait(self) -> None:
        """Wait until all files are written.

        Raises:
            WriteError: a file could not be written.
        """
        self._finish()
        self._raise()

    def _write(self, path: Path, payload: dict[str, Any], keep: Path | None) -> None:
        """Write in the pool's thread; no-op after a failure, to keep the files consistent."""
        if self._error is None:
            try:
                write_checkpoint(path, payload, keep)
            except BaseException as error:
                self._error = error

    def _finish(self, left: int = 0) -> None:
        """Wait until at most `left` files are pending."""
        try:
            while len(self._pending) > left:
                self._pending[0].result()
                self._pending.popleft()
        except BaseException as error:  # Ctrl-C: finish the file being written, drop the others
            self._error = self._error or error
            while self._pending:
                self._pending.popleft().result()
            raise

    def _raise(self) -> None:
        if self._error is not None:
            self._finish()
            error, self._error = self._error, None
            raise error


def _copied(value: Any, known: dict[Any, Tensor]) -> Any:
    """Copy containers and tensors to the CPU; tied tensors stay tied."""
    if isinstance(value, Tensor):
        key = value.data_ptr(), value.dtype, value.shape, value.stride()
        if key not in known:
            known[key] = value.detach().to("cpu", copy=True)
        return known[key]
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update((name, _copied(item, known)) for name, item in value.items())
        return copied
    if isinstance(value, list | tuple):
        return type(value)([_copied(item, known) for item in value])
    return value
