"""metrics.jsonl: what a run logs, line by line."""

import json
import math
from pathlib import Path
from typing import Any, BinaryIO


class MetricsFile:
    """metrics.jsonl: one JSON object a line, each in the file before `write` returns.

    Args:
        path: the file; without `keep_bytes` it is started anew.
        keep_bytes: when resuming, the `size` that the checkpoint recorded. What was written
            since, a half-written last line included, is cut off: the resumed run writes it again.

    Raises:
        OSError: the file cannot be opened or written.
        ValueError: the file is shorter than `keep_bytes`, or has no line's end there.
    """

    def __init__(self, path: Path | str, keep_bytes: int | None = None) -> None:
        path = Path(path)
        self._size = keep_bytes or 0
        if keep_bytes is None:
            self._file: BinaryIO = path.open("wb")
            return
        content = path.read_bytes() if path.exists() else b""
        if len(content) < keep_bytes or content[:keep_bytes][-1:] not in (b"", b"\n"):
            raise ValueError(
                f"{path} ({len(content)} bytes) is not what the checkpoint's run had written to it"
                f" ({keep_bytes} bytes, in whole lines)"
            )
        self._file = path.open("ab")
        self._file.truncate(keep_bytes)

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

    def close(self) -> None:
        """Close the file; twice does no harm."""
        self._file.close()
