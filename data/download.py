"""Corpora that are fetched by name, verified, and put in place only once they are complete."""

import hashlib
import os
import shutil
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from data.demo import build_demo
from data.errors import DataError
from data.files import SPLITS, atomic_write, write_errors
from data.sources import KNOWN_CORPORA, CorpusSource, Mirror

TIMEOUT_SECONDS = 30.0
# Some mirrors turn away the default names of download libraries.
HEADERS = {"User-Agent": "Mozilla/5.0 (compatible; awd-lstm-lm)"}
# RuntimeError is what zipfile raises for encryption and unknown compression.
BROKEN_ARCHIVE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError)


def ensure_corpus(folder: str | os.PathLike[str], timeout: float = TIMEOUT_SECONDS) -> None:
    """Fetch or build a known corpus that is not there yet.

    No-op if the folder has train.txt, valid.txt and test.txt, or if its path does not end in
    ``data/NAME`` with the name of a known corpus (or ``demo``, which is built from Python's own
    documentation). Of several processes one does the work while the others wait.

    Args:
        folder: the folder that is to hold the three texts.
        timeout: seconds that a server may stay silent.

    Raises:
        DataError: the corpus cannot be fetched or built; the folder is as it was before.
        WriteError: the disk cannot be written.
    """
    folder = Path(folder)
    path = folder.absolute()
    if path.parent.name != "data" or path.is_file() or _is_complete(path):
        return
    if path.name == "demo":
        _fill_folder(folder, build_demo)
    elif path.name in KNOWN_CORPORA:
        fetch_corpus(KNOWN_CORPORA[path.name], folder, timeout)


def fetch_corpus(
    source: CorpusSource, folder: str | os.PathLike[str], timeout: float = TIMEOUT_SECONDS
) -> None:
    """Download a corpus from the first mirror that has it, verify it, and put it in place.

    Args:
        source: where it can be had, and its checksums.
        folder: where train.txt, valid.txt and test.txt shall be; created if need be.
        timeout: seconds that a server may stay silent.

    Raises:
        DataError: every mirror failed (the message names each with its cause), or the folder
            already holds a text of another content. The folder is as it was before.
        WriteError: the disk cannot be written.
    """
    folder = Path(folder)
    _fill_folder(folder, partial(_fetch_texts, source, folder, timeout))


class _MirrorError(Exception):
    """A mirror that does not deliver; the message names the URL and the cause."""


def _is_complete(folder: Path) -> bool:
    try:
        return all((folder / f"{split}.txt").exists() for split in SPLITS)
    except OSError:  # a folder that cannot be entered
        return False


def _fill_folder(folder: Path, make_texts: Callable[[Path], None]) -> None:
    """Make the three texts in a temporary folder, then put the missing ones in place."""
    from filelock import FileLock

    parent, lock = folder.parent, folder.parent / f".{folder.name}.lock"
    with write_errors(folder):
        parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            try:
                for abandoned in parent.glob(f".{folder.name}.*.tmp"):  # by a killed process
                    shutil.rmtree(abandoned, ignore_errors=True)
                if not _is_complete(folder):
                    with TemporaryDirectory(".tmp", f".{folder.name}.", parent) as work:
                        make_texts(Path(work))
                        _put_in_place(Path(work), folder)
            finally:
                # A waiting process notices that the lock is gone, and makes its own.
                with suppress(OSError):
                    lock.unlink()


def _put_in_place(work: Path, folder: Path) -> None:
    missing = []
    for split in SPLITS:
        path = folder / f"{split}.txt"
        if not path.exists():
            missing.append(path)
        elif _md5_of(path) != _md5_of(work / path.name):
            raise DataError(f"{path}: already there with other content; move it out of the way")
    folder.mkdir(exist_ok=True)
    for path in missing:
        # Copied rather than renamed, since the folder may be a link to another disk.
        with (work / path.name).open("rb") as text, atomic_write(path) as file:
            shutil.copyfileobj(text, file)


def _fetch_texts(source: CorpusSource, folder: Path, timeout: float, work: Path) -> None:
    failures = []
    for mirror in source.mirrors:
        try:
            _fetch_from(mirror, source, timeout, work)
            return
        except _MirrorError as error:
            failures.append(str(error))
    raise DataError(f"{folder}: cannot be downloaded: {'; '.join(failures)}")


def _fetch_from(mirror: Mirror, source: CorpusSource, timeout: float, work: Path) -> None:
    deadline = time.monotonic() + source.most_seconds
    texts = {split: work / f"{split}.txt" for split in SPLITS}
    if not mirror.member:
        for split, path in texts.items():
            url = mirror.url.format(split=split)
            _download(url, path, source.text_md5.get(split, ""), source, timeout, deadline)
        return
    archive, raw = work / "archive", work / "raw"
    _download(mirror.url, archive, mirror.md5, source, timeout, deadline)
    try:
        if source.heldout_bytes:
            _extract(archive, mirror.member, raw, source.raw_md5, source.most_bytes)
            _write_bytes_as_words(raw, texts, source.heldout_bytes)
            return
        for split, path in texts.items():
            member, md5 = mirror.member.format(split=split), source.text_md5.get(split, "")
            _extract(archive, member, path, md5, source.most_bytes)
    except KeyError as error:
        raise _MirrorError(f"{mirror.url} (the archive has no {error.args[0]})") from None
    except (ValueError, *BROKEN_ARCHIVE) as error:
        raise _MirrorError(f"{mirror.url} ({error or type(error).__name__})") from None


def _download(
    url: str, path: Path, md5: str, source: CorpusSource, timeout: float, deadline: float
) -> None:
    """Fetch one file, within limits of size and time, and compare its checksum, if one is given."""
    import requests
    from urllib3.exceptions import HTTPError, ProtocolError, ReadTimeoutError

    print(f"downloading {url}", file=sys.stderr, flush=True)
    try:
        with (
            requests.get(url, stream=True, timeout=timeout, headers=HEADERS) as answer,
            atomic_write(path) as file,
        ):
            if not answer.ok:
                raise _MirrorError(f"{url} (HTTP status {answer.status_code})")
            # read1 waits for one packet only, so that the clock is read however few bytes come.
            while block := answer.raw.read1(1 << 16, decode_content=True):
                file.write(block)
                if file.tell() > source.most_bytes:
                    raise _MirrorError(f"{url} (more than {source.most_bytes:,} bytes)")
                if time.monotonic() > deadline:
                    raise _MirrorError(f"{url} (not done within {source.most_seconds:.0f} s)")
    except (requests.Timeout, ReadTimeoutError):
        raise _MirrorError(f"{url} (no answer for {timeout:g} s)") from None
    except ProtocolError:
        raise _MirrorError(f"{url} (cut short)") from None
    except (requests.RequestException, HTTPError) as error:
        raise _MirrorError(f"{url} ({type(error).__name__})") from None
    if md5 and _md5_of(path) != md5:
        raise _MirrorError(f"{url} (wrong checksum)")


def _extract(archive: Path, member: str, path: Path, md5: str, most: int) -> None:
    """Copy one member, asked for by its name, so that no archive chooses where to write.

    Raises:
        KeyError: there is no such member.
        ValueError: the file is no archive, the member no file or too large, or its checksum is
            wrong.
    """

    def check(size: int) -> None:  # more than an archive declares is not read from it
        if size > most:
            raise ValueError(f"{member} has {size:,} bytes, and {most:,} are the most expected")

    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as bundle, bundle.open(member) as content:
            check(bundle.getinfo(member).file_size)
            with atomic_write(path) as file:
                shutil.copyfileobj(content, file)
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as bundle_:
            header = bundle_.getmember(member)
            check(header.size)
            found = bundle_.extractfile(header)
            if found is None:
                raise ValueError(f"{member} is not a file")
            with atomic_write(path) as file:
                shutil.copyfileobj(found, file)
    else:
        raise ValueError("not an archive")
    if md5 and _md5_of(path) != md5:
        raise ValueError(f"wrong checksum of {member}")


def _write_bytes_as_words(raw: Path, texts: dict[str, Path], heldout_bytes: int) -> None:
    """Cut a file into train, valid and test, each byte a word; newlines stay what they are."""
    size = raw.stat().st_size
    if size <= 2 * heldout_bytes:
        raise ValueError(f"{size} bytes are too few")
    ends = (size - 2 * heldout_bytes, size - heldout_bytes, size)
    words = [str(byte) if byte != ord("\n") else "\n" for byte in range(256)]
    with raw.open("rb") as source:
        for path, end in zip(texts.values(), ends, strict=True):
            with atomic_write(path, "w") as file:
                separator = ""
                while block := source.read(min(1 << 20, end - source.tell())):
                    file.write(separator + " ".join([words[byte] for byte in block]))
                    separator = " "


def _md5_of(path: Path) -> str:
    # Not a matter of security: these are the sums that the corpora are published with.
    with path.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
