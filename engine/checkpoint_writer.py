"""Writes checkpoints, in the background on a GPU."""

from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

from torch import Tensor

from data.errors import WriteError
from engine.checkpoint import write_checkpoint
from engine.tracking import warn

MOST_PENDING = 2  # an epoch's end writes the best model and the training state


class CheckpointWriter:
    """Writes checkpoints in order, in a thread, which Ctrl-C does not interrupt.

    In the background, `write` first copies the tensors to the CPU, so that later updates do not
    change them. A file is written only if the pending one before it was: a training state belongs
    to its best model.

    Leaving the context waits until all files are written. If an exception ends it, a file that
    could not be written is a warning.

    Args:
        background: `write` returns before the file is written, as on a GPU.
    """

    def __init__(self, background: bool) -> None:
        self._background = background
        self._pool = ThreadPoolExecutor(1, "checkpoints")
        self._pending: list[Future[None]] = []

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            self.wait()
        except WriteError as late:
            if error is None:
                raise
            if late is not error:
                warn(str(late))

    def write(self, path: Path, payload: dict[str, Any], keep: Path | None = None) -> None:
        """Write a checkpoint; see write_checkpoint.

        Raises:
            WriteError: it (in the background: an earlier one) could not be written.
        """
        self.wait(MOST_PENDING - 1)
        before = self._pending[-1] if self._pending else None
        if before is not None and before.done():
            before.result()
        if self._background:
            payload = _copied(payload, {})
        self._pending.append(self._pool.submit(_write_after, before, path, payload, keep))
        if not self._background:
            self.wait()

    def wait(self, most: int = 0) -> None:
        """Wait until at most this many files are pending.

        Raises:
            WriteError: a file could not be written.
        """
        while len(self._pending) > most:
            wait_for(self._pending[:1])  # Ctrl-C leaves the file pending
            self._pending.pop(0).result()


def _write_after(before: Future[None] | None, *checkpoint: Any) -> None:
    """Write a checkpoint; raises the error of the one before it, if that failed."""
    if before is not None:
        before.result()
    write_checkpoint(*checkpoint)


def _copied(value: Any, known: dict[Any, Tensor]) -> Any:
    """Copy containers and tensors to the CPU; tied tensors stay tied."""
    if isinstance(value, Tensor):
        key = value.data_ptr(), value.dtype, value.shape, value.stride()
        if key not in known:
            known[key] = value.detach().to("cpu", copy=True)
        return known[key]
    if isinstance(value, dict):
        return {name: _copied(item, known) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_copied(item, known) for item in value])
    return value
