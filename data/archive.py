"""Unpacks archives that are downloaded, within limits."""

import gzip
import hashlib
import shutil
import tarfile
import zipfile
import zlib
from functools import partial
from io import FileIO
from pathlib import Path

from data.files import SPLITS, atomic_write, write_all

BROKEN_ARCHIVE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    ValueError,
    RuntimeError,  # what zipfile raises for encryption and unknown compression
)


class LimitedFile:
    """A new file of at most so many bytes.

    Raises:
        ValueError: in write; there are more.
        WriteError: in write; the disk does not take them.
    """

    def __init__(self, path: Path, most: int) -> None:
        self._file = FileIO(path, "w")
        self._most = self._left = most

    def __enter__(self) -> "LimitedFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, content: bytes) -> None:
        """Write all of it."""
        self._left -= len(content)
        if self._left < 0:
            raise ValueError(f"more than {self._most:,} bytes")
        write_all(self._file, content)

    def flush(self) -> None:
        """No-op; write does not buffer."""


def extract(archive: Path, member: str, path: Path, md5: str, most: int) -> None:
    """Copy one member, asked for by its name, so that no archive chooses where to write.

    Raises:
        KeyError: there is no such member.
        ValueError: the file is no archive, the member no file or too large, or its checksum is
            wrong.
    """

    def check(size: int) -> None:
        if size > most:
            raise ValueError(f"{member} has {size:,} bytes, and {most:,} are the most expected")

    with LimitedFile(path, most) as file:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as bundle, bundle.open(member) as content:
                check(bundle.getinfo(member).file_size)
                shutil.copyfileobj(content, file)
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as bundle_:
                header = bundle_.getmember(member)
                check(header.size)
                found = bundle_.extractfile(header)
                if found is None:
                    raise ValueError(f"{member} is not a file")
                shutil.copyfileobj(found, file)
        else:
            raise ValueError("not an archive")
    if md5 and md5_of(path) != md5:
        raise ValueError(f"wrong checksum of {member}")


def write_bytes_as_words(raw: Path, folder: Path, heldout_bytes: int) -> None:
    """Cut a file into train, valid and test, each byte a word; newlines stay what they are."""
    size = raw.stat().st_size
    if size <= 2 * heldout_bytes:
        raise ValueError(f"{size} bytes are too few")
    ends = (size - 2 * heldout_bytes, size - heldout_bytes, size)
    words = [str(byte) if byte != ord("\n") else "\n" for byte in range(256)]
    with raw.open("rb") as source:
        for split, end in zip(SPLITS, ends, strict=True):
            with atomic_write(folder / f"{split}.txt", "w") as file:
                separator = ""
                while block := source.read(min(1 << 20, end - source.tell())):
                    file.write(separator + " ".join([words[byte] for byte in block]))
                    separator = " "


def md5_of(path: Path) -> str:
    """The file's MD5, in hexadecimal digits."""
    # Not a matter of security: these are the sums that the corpora are published with.
    with path.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
