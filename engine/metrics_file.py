"""metrics.jsonl: a run's events, one JSON object per line."""

import json
import math
import os
from io import FileIO
from pathlib import Path
from typing import Any

from data.files import atomic_write, write_all, write_errors


class MetricsFile:
    """Writes metrics.jsonl; each line is in the file before `write` returns.

    Args:
        path: the file; overwritten without `keep_bytes`.
        keep_bytes: when resuming, the `size` in the checkpoint. Later bytes are cut off: the
            resumed run writes them again. If earlier bytes are missing or are not lines of JSON
            objects, a line with the event "gap" and the step of the line before replaces each such
            stretch.

    Attributes:
        damage: describes missing or unreadable bytes before `keep_bytes`; None: no damage.

    Raises:
        OSError: the file cannot be read.
        WriteError: the file cannot be written.
    """

    def __init__(self, path: Path | str, keep_bytes: int | None = None) -> None:
        self._path = path = Path(path)
        self.damage: str | None = None
        if keep_bytes is None:
            self._file = self._open("wb")
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
        self._file = self._open("ab")
        with write_errors(path):
            self._file.truncate(len(kept))
        self._size = len(kept)

    def _open(self, mode: str) -> FileIO:
        with write_errors(self._path):
            return FileIO(self._path, mode)  # unbuffered: close does not write what failed before

    @property
    def size(self) -> int:
        """Bytes in the file, for a checkpoint; a resumed run passes it as `keep_bytes`."""
        return self._size

    def write(self, record: dict[str, Any]) -> None:
        """Append one line; nan and inf become null.

        Raises:
            TypeError: a value is not a plain Python one (a tensor, a numpy scalar).
            ValueError: a float inside a list or dict is not finite.
            WriteError: the file cannot be written.
        """
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        line = (json.dumps(plain, allow_nan=False) + "\n").encode()
        write_all(self._file, line)
        self._size += len(line)

    def sync(self) -> None:
        """fsync the file, so that its lines survive a power failure. No-op once closed.

        Raises:
            WriteError: the file cannot be written.
        """
        if not self._file.closed:
            with write_errors(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; a no-op once closed."""
        self._file.close()


def _with_gaps(content: bytes, missing: bool) -> bytes:
    """Replace each stretch of lines that are no JSON objects by one "gap" line.

    Args:
        content: lines; the last one may be incomplete.
        missing: True if lines are missing at the end, which is a gap, too.
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
    """The JSON object of a complete line; None if it is none."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
