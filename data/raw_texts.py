"""Finds the raw texts that prepare.py makes a corpus of, and reads them as one."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from data.errors import DataError

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


def read_lines(paths: Iterable[Path]) -> Iterator[tuple[int, int, str]]:
    """The lines of several texts as one; a line does not go on in the next file.

    Yields:
        The byte of the whole at which the line begins, the number of its bytes, and its text.

    Raises:
        DataError: a file cannot be read, is not UTF-8 text, or has a line of 16 MiB.
    """
    first = 0
    for path in paths:
        at = 0
        try:
            with path.open("rb") as file:
                while content := file.readline(LONGEST_LINE):
                    if len(content) == LONGEST_LINE:
                        raise DataError(
                            f"{path}: the line at byte {at} is longer than "
                            f"{LONGEST_LINE >> 20} MiB; break the text into lines"
                        )
                    yield first + at, len(content), _decode(content, path, at)
                    at += len(content)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        first += at


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
