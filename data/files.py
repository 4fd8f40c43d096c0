"""Files that are either complete or absent, whatever happens while they are written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import IO, Any

SPLITS = ("train", "valid", "test")  # a corpus is a folder with SPLIT.txt for each


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file for writing that appears under its name only once it is complete.

    The bytes go to a temporary file in the same folder, which is flushed to the disk and renamed
    over ``path`` when the block ends. If the block raises, or writing fails, the temporary file is
    removed and whatever ``path`` held before is untouched.

    Args:
        path: the file to create or replace; its folder must exist.
        mode: "wb" for bytes, "w" for text (UTF-8, newlines written as they are).

    Yields:
        The open temporary file.

    Raises:
        ValueError: ``mode`` is neither "wb" nor "w".
        OSError: the file cannot be written.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"mode must be 'wb' or 'w', got {mode!r}")
    path = Path(path)
    # The random part keeps apart two threads, and two machines that share a file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{token_hex(4)}.tmp")
    text = {} if mode == "wb" else {"encoding": "utf-8", "newline": ""}
    try:
        with temporary.open(mode, **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def sync_directory(folder: str | os.PathLike[str]) -> None:
    """Make renames inside a folder survive a power failure, where the system can do that."""
    # Windows cannot open a folder, and some network file systems cannot sync one.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
