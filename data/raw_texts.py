"""Finds the raw texts that prepare.py makes a corpus of, and reads them as one, block by block."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from data.errors import DataError

BLOCK_BYTES = 1 << 20
LONGEST_LINE = 1 << 24  # bytes; what is held in memory has a bound


def find_texts(sources: Iterable[str | os.PathLike[str]], output: Path) -> list[Path]:
    """Files as they are given, and the .txt files in and below folders, by name.

    Raises:
        DataError: a file is missing, not a regular one, given twice or in the output folder; a
            folder has no text.
    """
    texts: dict[Path, Path] = {}
    made = output.resolve()
    for source in map(Path, sources):
        for path in _below(source) if source.is_dir() else [source]:
            if not path.exists():
                raise DataError(f"{path}: no such file")
            if not path.is_file():
                raise DataError(f"{path}: not a regular file, and it has to be read twice")
            real = path.resolve()
            if real in texts:
                raise DataError(f"{path}: given twice; train and test must not share a text")
            if made in real.parents:
                raise DataError(f"{path}: in the folder of the output, {output}")
            texts[real] = path
    return list(texts.values())


def _below(folder: Path) -> list[Path]:
    below = (path.relative_to(folder) for path in folder.rglob("*.txt") if path.is_file())
    shown = [path for path in below if not any(part.startswith(".") for part in path.parts)]
    if not shown:
        raise DataError(f"{folder}: has no .txt file; name files with another suffix one by one")
    return [folder / path for path in sorted(shown)]


class Texts:
    """Several texts as one, read in blocks of whole lines.

    Args:
        paths: regular files, UTF-8, whose lines end with a newline. A line does not go on in the
            next file.

    Attributes:
        starts: where each of the files begins, and where the last one ends, in bytes of the whole.
        size: bytes of the whole.

    Raises:
        DataError: a file cannot be read.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.starts = [0]
        for path in paths:
            try:
                self.starts.append(self.starts[-1] + path.stat().st_size)
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        self.size = self.starts[-1]

    def blocks(self, start: int, stop: int) -> Iterator[tuple[str, int]]:
        """The lines that begin at the bytes from start up to stop, in blocks.

        Yields:
            Whole lines, and the number of their bytes.

        Raises:
            DataError: a file cannot be read, is not UTF-8 text, has a line of over 16 MiB, or is
                shorter than it was.
        """
        for path, first, end in zip(self.paths, self.starts, self.starts[1:], strict=False):
            if first < stop and start < end:
                own = range(max(start - first, 0), min(stop, end) - first)
                try:
                    yield from _blocks(path, own, end - first)
                except OSError as error:
                    raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _blocks(path: Path, wanted: range, size: int) -> Iterator[tuple[str, int]]:
    with path.open("rb") as file:
        at, lines = wanted.start, b""  # lines: what is read from byte `at` on
        if at:  # to the first line that begins here or later
            file.seek(at - 1)
            at += len(file.readline(LONGEST_LINE)) - 1
        while at < wanted.stop:
            block = file.read(BLOCK_BYTES)
            lines += block
            end = lines.rfind(b"\n") + 1 if block else len(lines)
            if at + end > wanted.stop and block:
                end = lines.index(b"\n", wanted.stop - at - 1) + 1
            if not block and at + end < size:
                raise DataError(f"{path}: became shorter while it was read")
            if not end and len(lines) > LONGEST_LINE:
                raise DataError(
                    f"{path}: the line at byte {at} is longer than {LONGEST_LINE >> 20} MiB; break "
                    "the text into lines"
                )
            if end:
                yield _decode(lines[:end], path, at), end
            at, lines = at + end, lines[end:]


def _decode(content: bytes, path: Path, at: int) -> str:
    if (nul := content.find(b"\0")) >= 0:
        raise DataError(f"{path}: binary, not text (NUL at byte {at + nul})")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte {at + error.start}); iconv converts other encodings"
        ) from None
    return text if at else text.removeprefix("\ufeff")
