"""metrics.jsonl: a run's events, one JSON object per line."""

import json
import math
import os
from io import FileIO
from pathlib import Path
from typing import Any

from data.files import write_all, write_errors

GAP = 64  # bytes, at least those of a `gap` event


def to_json(values: dict[str, Any], indent: int | None = None) -> bytes:
    """A JSON object and a line end; nan and inf become null.

    Raises:
        TypeError: a value is not a plain Python one (a tensor, a numpy scalar).
        ValueError: a float inside a list or dict is not finite.
    """
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
    return (json.dumps(finite, indent=indent, allow_nan=False) + "\n").encode()


def _whole_lines(content: bytes, most: int) -> bytes:
    return content[: content.rfind(b"\n", 0, most) + 1]


class MetricsFile:
    """Writes metrics.jsonl; each line is in the file before `write` returns.

    Args:
        path: the file; overwritten without `keep_bytes`.
        keep_bytes: when resuming, the `size` in the checkpoint. Later bytes are cut off, since the
            resumed run writes them again.

    Attributes:
        size: bytes in the file, for a checkpoint.
        damage: describes what is missing before `keep_bytes`; None: nothing. What remains are
            whole lines; the next one is padded to `keep_bytes`, so that a run that is resumed from
            the same checkpoint once more keeps that line, and none after it.

    Raises:
        OSError: the file cannot be read.
        WriteError: the file cannot be written.
    """

    def __init__(self, path: Path, keep_bytes: int | None = None) -> None:
        self.damage: str | None = None
        content = b""
        if keep_bytes is not None and path.exists():
            content = path.read_bytes()
        kept = _whole_lines(content, keep_bytes or 0)
        if keep_bytes is not None and len(kept) < keep_bytes:
            self.damage = (
                f"{path}: has {len(content)} bytes, of which the first {keep_bytes} should be the "
                "run's whole lines up to the checkpoint"
            )
            kept = _whole_lines(content, max(0, keep_bytes - GAP))
        self._least = keep_bytes or 0
        self.size = len(kept)
        with write_errors(path):
            # unbuffered: close does not write what failed before
            self._file = FileIO(path, "ab")
            self._file.truncate(self.size)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line.

        Raises:
            TypeError, ValueError: as to_json.
            WriteError: the file cannot be written.
        """
        line = to_json(record)[:-1].ljust(self._least - self.size - 1) + b"\n"
        write_all(self._file, line)
        self.size += len(line)

    def sync(self) -> None:
        """fsync the file, so that its lines survive a power failure.

        Raises:
            WriteError: the file cannot be written.
        """
        with write_errors(Path(self._file.name)):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; a no-op once closed."""
        self._file.close()
