"""metrics.jsonl: what a run logs, line by line."""

import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

from data.files import atomic_write


class MetricsFile:
    """metrics.jsonl: one JSON object a line, each in the file before `write` returns.

    Args:
        path: the file; without `keep_bytes` it is started anew.
        keep_bytes: when resuming, the `size` that the checkpoint recorded. What was written
            since, a half-written last line included, is cut off: the resumed run writes it again.
            Where the file is shorter, or has lines before that point which are not JSON objects,
            each missing stretch is replaced by a line with the event "gap", whose step is that
            of the line before.

    Attributes:
        damage: what was missing or unreadable before `keep_bytes`, in words; None: nothing.

    Raises:
        OSError: the file cannot be opened or written.
    """

    def __init__(self, path: Path | str, keep_bytes: int | None = None) -> None:
        path = Path(path)
        self.damage: str | None = None
        if keep_bytes is None:
            self._file: BinaryIO = path.open("wb")
            self._size = 0
            return
        content = path.read_bytes() if path.exists() else b""
        kept = _with_gaps(content[:keep_bytes], missing=len(content) < keep_bytes)
        if kept != content[:keep_bytes]:
            self.damage = (
                f"has {len(content)} bytes, of which the first {keep_bytes} should be the run's "
                "whole lines up to the checkpoint"
            )
            with atomic_write(path) as file:
                file.write(kept)
        self._file = path.open("ab")
        self._file.truncate(len(kept))
        self._size = len(kept)

    @property
    def size(self) -> int:
        """Bytes in the file so far; goes into checkpoints, comes back as `keep_bytes`."""
        return self._size

    def write(self, record: dict[str, Any]) -> None:
        """Append one line; floats that JSON has no word for (nan, inf) become null.

        Raises:
            TypeError: a value is not a plain Python one (a tensor, a numpy scalar).
            ValueError: a float inside a list or dict is not finite.
            OSError: the disk is full or gone.
        """
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        line = (json.dumps(plain, allow_nan=False) + "\n").encode()
        self._file.write(line)
        self._file.flush()
        self._size += len(line)

    def sync(self) -> None:
        """Flush the lines so far to the disk, against a power failure. No-op once closed.

        Raises:
            OSError: the disk is full or gone.
        """
        if not self._file.closed:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; twice does no harm."""
        self._file.close()


def _with_gaps(content: bytes, missing: bool) -> bytes:
    """The lines that are JSON objects, a gap's line for each stretch between or after them.

    Args:
        content: lines; the last one may have no end.
        missing: more should follow.
    """
    kept, step, in_gap = list[bytes](), 0, False
    for line in [*content.splitlines(keepends=True), *([b""] if missing else [])]:
        record = _record(line)
        if record is not None:
            kept.append(line)
            step = record.get("step", step)
        elif not in_gap:
            kept.append((json.dumps({"event": "gap", "step": step}) + "\n").encode())
        in_gap = record is None
    return b"".join(kept)


def _record(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a whole line; None where it is not one."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
