"""Corpora that are fetched by name, verified, and put in place only once they are complete."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from secrets import token_hex
from threading import Thread

from data.archive import BROKEN_ARCHIVE, LimitedFile, extract, md5_of, write_bytes_as_words
from data.demo import build_demo
from data.errors import DataError, WriteError
from data.files import SPLITS, atomic_write
from data.sources import KNOWN_CORPORA, CorpusSource, Mirror

TIMEOUT_SECONDS = 30.0


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
        DataError: every mirror failed (the message names each with its cause), the disk cannot
            be written, or the folder already holds a text of another content. The folder is as
            it was before.
    """
    folder = Path(folder)
    _fill_folder(folder, partial(_fetch_texts, source, folder, timeout))


class _MirrorError(Exception):
    """A mirror that does not deliver; the message names the URL and the cause."""


def _fill_folder(folder: Path, make_texts: Callable[[Path], None]) -> None:
    """Make the three texts in a temporary folder, then put the missing ones in place."""
    try:
        with _only_process(folder), _workplace(folder) as work:
            if not _is_complete(folder):
                make_texts(work)
                _put_in_place(work, folder)
    except WriteError:
        raise
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror or error})") from error


def _fetch_texts(source: CorpusSource, folder: Path, timeout: float, work: Path) -> None:
    if importlib.util.find_spec("pooch") is None:
        raise DataError(_by_hand(folder, "pooch"))
    failures = []
    for number, mirror in enumerate(source.mirrors):
        place = work / str(number)  # its own, since a mirror that is given up may still write
        place.mkdir()
        try:
            _within(source.most_seconds, partial(_fetch_from, mirror, source, place, timeout))
        except TimeoutError:
            failures.append(f"{mirror.url} (not done within {source.most_seconds:.0f} s)")
        except _MirrorError as error:
            failures.append(str(error))
        else:
            for split in SPLITS:
                (place / f"{split}.txt").rename(work / f"{split}.txt")
            return
    raise DataError(f"{folder}: cannot be downloaded: {'; '.join(failures)}")


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Do some work in a thread of its own, which is left behind if it takes longer.

    Raises:
        TimeoutError: it takes longer.
    """
    done: Future[None] = Future()
    Thread(target=_run, args=(work, done), daemon=True).start()
    try:
        done.result(seconds)
    finally:
        del done  # else its error's traceback holds it, and the connection, in a circle


def _run(work: Callable[[], None], done: "Future[None]") -> None:
    try:
        work()
        done.set_result(None)
    except BaseException as error:
        done.set_exception(error)
    finally:
        del done


def _is_complete(folder: Path) -> bool:
    try:
        return all((folder / f"{split}.txt").exists() for split in SPLITS)
    except OSError:  # a folder that cannot be entered
        return False


@contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    """Hold a lock next to the folder."""
    try:
        from filelock import FileLock
    except ImportError:
        raise DataError(_by_hand(folder, "filelock")) from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f".{folder.name}.lock"
    with FileLock(path):
        try:
            yield
        finally:
            # A waiting process notices that the file is gone, and makes its own.
            with suppress(OSError):
                path.unlink()


@contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """A temporary folder next to the given one; needs the lock."""
    for abandoned in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(abandoned, ignore_errors=True)
    work = folder.parent / f".{folder.name}.{os.getpid()}-{token_hex(4)}.tmp"
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _put_in_place(work: Path, folder: Path) -> None:
    missing = []
    for split in SPLITS:
        path = folder / f"{split}.txt"
        if not path.exists():
            missing.append(path)
        elif md5_of(path) != md5_of(work / path.name):
            raise DataError(f"{path}: already there with other content; move it out of the way")
    folder.mkdir(exist_ok=True)
    for path in missing:
        # Copied rather than renamed, since the folder may be a link to another disk.
        with (work / path.name).open("rb") as text, atomic_write(path) as file:
            shutil.copyfileobj(text, file)


def _fetch_from(mirror: Mirror, source: CorpusSource, work: Path, timeout: float) -> None:
    if "{split}" in mirror.url:
        for split in SPLITS:
            url = mirror.url.format(split=split)
            text_md5 = source.text_md5.get(split, "")
            _download(url, work / f"{split}.txt", text_md5, timeout, source.most_bytes)
        return
    archive = work / "archive"
    _download(mirror.url, archive, mirror.md5, timeout, source.most_bytes)
    try:
        if source.heldout_bytes:
            extract(archive, mirror.member, work / "raw", source.raw_md5, source.most_bytes)
            write_bytes_as_words(work / "raw", work, source.heldout_bytes)
        else:
            for split in SPLITS:
                member = mirror.member.format(split=split)
                text_md5 = source.text_md5.get(split, "")
                extract(archive, member, work / f"{split}.txt", text_md5, source.most_bytes)
    except KeyError as error:
        raise _MirrorError(f"{mirror.url} (the archive has no {error.args[0]})") from None
    except BROKEN_ARCHIVE as error:
        raise _MirrorError(f"{mirror.url} ({_one_line(error)})") from None


def _download(url: str, path: Path, md5: str, timeout: float, most: int) -> None:
    """Fetch one file and compare its checksum, if one is given."""
    import pooch  # type: ignore[import-untyped]
    import requests

    on_terminal = sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None
    print(f"downloading {url}", file=sys.stderr, flush=True)
    fetch = pooch.HTTPDownloader(
        progressbar=on_terminal,
        chunk_size=1 << 16,
        timeout=timeout,
        # Some mirrors turn away the default names of download libraries.
        headers={"User-Agent": "Mozilla/5.0 (compatible; awd-lstm-lm)"},
    )
    try:
        with LimitedFile(path, most) as file:
            fetch(url, file, None)
    except (requests.RequestException, ValueError) as error:
        raise _MirrorError(f"{url} ({_cause(error, timeout)})") from None
    if md5 and md5_of(path) != md5:
        raise _MirrorError(f"{url} (wrong checksum)")


def _cause(error: Exception, timeout: float) -> str:
    """The HTTP library's long message in a few words."""
    text = str(error)
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP status {response.status_code}"
    for sign, cause in (
        ("timed out", f"no answer for {timeout:g} s"),
        ("IncompleteRead", "cut short"),
        ("resolve", "unknown host"),
        ("refused", "connection refused"),
    ):
        if sign in text:
            return cause
    return _one_line(error)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _by_hand(folder: Path, package: str) -> str:
    return (
        f"{folder}: cannot be downloaded without the package {package}; pip install {package}, "
        "or put train.txt, valid.txt and test.txt there"
    )
