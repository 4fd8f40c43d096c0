"""Files that are either complete or absent, whatever happens while they are written."""

import errno
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import IO, Any

from data.errors import WriteError

SPLITS = ("train", "valid", "test")  # a corpus is a folder with SPLIT.txt for each
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's share, a file's limit


@contextmanager
def atomic_write(
    path: str | os.PathLike[str], mode: str = "wb", keep: Path | None = None
) -> Iterator[IO[Any]]:
    """Open a file for writing that appears under its name only once it is complete.

    The bytes go to a temporary file in the same folder, which is flushed to the disk and renamed
    over ``path`` when the block ends. If the block raises, or writing fails, the temporary file is
    removed and whatever ``path`` held before is untouched.

    Args:
        path: the file to create or replace; its folder must exist.
        mode: "wb" for bytes, "w" for text (UTF-8, newlines written as they are; bytes of file
            names that are no UTF-8 as backslash escapes).
        keep: the name under which what ``path`` held before is kept, replacing what was there;
            None: it is not kept.

    Yields:
        The open temporary file.

    Raises:
        WriteError: the file cannot be written.
    """
    path = Path(path)
    temporary = _temporary(path)
    with write_errors(path) as size:
        try:
            raw = _CountingFile(temporary)
            file: IO[Any] = io.BufferedWriter(raw)
            if mode == "w":
                file = io.TextIOWrapper(file, "utf-8", "backslashreplace", newline="")
            try:
                with file:
                    yield file
                    file.flush()
                    raw.check()
                    os.fsync(file.fileno())
            finally:
                size.append(raw.wanted)
            if keep is not None and path.exists():
                _keep(path, keep)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    sync_directory(path.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a folder that appears under its name only once it is complete.

    Write its files by atomic_write, which flushes them to the disk. If the block raises, the
    folder and what it holds are removed.

    Args:
        path: the folder to make; it must not exist, and its parent must.

    Yields:
        The temporary folder beside it, which is renamed when the block ends.

    Raises:
        OSError: ``path`` exists, or the folder cannot be made.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "exists already", str(path))
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(path.parent)


@contextmanager
def write_errors(path: Path) -> Iterator[list[int]]:
    """Turn an OSError into a WriteError, which names the file that was to be written.

    Yields:
        A list; its last number counts, if the disk is full, as the bytes that are wanted.
    """
    size = [0]
    try:
        yield size
    except WriteError:
        raise
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        if error.errno in FULL:
            left = shutil.disk_usage(path.parent).free
            reason += f" (at least {size[-1]:,} bytes wanted, {left:,} left)"
        raise WriteError(error.errno, reason, str(path)) from error


def write_all(file: io.FileIO, content: bytes) -> None:
    """Write to an unbuffered file.

    Raises:
        WriteError: the file cannot be written; a part of the content may have been.
    """
    with write_errors(Path(file.name)) as size:
        size.append(len(content))
        left = memoryview(content)
        while left:  # a disk that fills up takes a part
            left = left[file.write(left) :]


class _CountingFile(io.FileIO):
    """A new file that takes and counts all bytes, also those that a full disk does not take."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self.wanted = 0
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write or, after a failure, only count; returns the number of bytes consumed."""
        size = memoryview(data).nbytes
        if self._error is None:
            try:
                size = super().write(data)
            except OSError as error:
                self._error = error
        self.wanted += size
        return size

    def check(self) -> None:
        """Raise the first failure."""
        if self._error is not None:
            raise self._error


def _temporary(path: Path) -> Path:
    # The random part keeps apart two threads, and two machines that share a file system.
    return path.with_name(f".{path.name}.{os.getpid()}-{token_hex(4)}.tmp")


def _keep(path: Path, name: Path) -> None:
    """Give a file a second name."""
    temporary = _temporary(name)
    try:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(path, temporary)
        temporary.replace(name)
    finally:
        temporary.unlink(missing_ok=True)  # rename leaves it where both were the same file
    sync_directory(name.parent)


def sync_directory(folder: str | os.PathLike[str]) -> None:
    """Make renames inside a folder survive a power failure, where the system can do that."""
    # Windows cannot open a folder, and some network file systems cannot sync one.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
