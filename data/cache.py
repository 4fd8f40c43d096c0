"""The ids of a corpus on the disk, keyed by the content of its texts.

``FOLDER/.corpus-v1-<16 hex digits>/`` holds vocabulary.txt, train.npy, valid.npy, test.npy and
manifest.json with the checksum of each. It is complete from the moment it has its name.
"""

import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

import numpy as np
import numpy.typing as npt

from data.files import SPLITS, atomic_write, sync_directory

FORMAT = 1
MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.txt"
ABANDONED_SECONDS = 24 * 3600.0

Ids = npt.NDArray[np.int32]


def cache_folder(folder: Path, fingerprint: str) -> Path:
    """Where the ids of the texts with this fingerprint are kept."""
    return folder / f".corpus-v{FORMAT}-{fingerprint[:16]}"


def read(folder: Path, fingerprint: str) -> tuple[str, dict[str, Ids], str] | None:
    """Open a cache.

    Returns:
        The words, one per line; the ids of each part, (N,), mapped copy-on-write; the
        fingerprint. None if there is no such cache, or it is damaged or of another text.
    """
    place = cache_folder(folder, fingerprint)
    try:
        manifest = json.loads((place / MANIFEST).read_text("utf-8"))
        if manifest["fingerprint"] != fingerprint:
            return None
        names = [VOCABULARY, *(f"{split}.npy" for split in SPLITS)]
        if any(_crc32(place / name) != manifest["crc32"][name] for name in names):
            return None
        text = (place / VOCABULARY).read_bytes().decode("utf-8")
        # "c": torch wants writable memory, and what it writes must not reach the disk.
        ids = {split: np.load(place / f"{split}.npy", mmap_mode="c") for split in SPLITS}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return text, ids, fingerprint


def write(
    folder: Path, fingerprint: str, vocabulary: str, ids: Mapping[str, Sequence[Ids]]
) -> None:
    """Store the ids of a corpus, then remove what this program kept for older texts.

    Several processes may do this at once: all succeed, and one of their results stays.

    Args:
        folder: the folder of the texts.
        fingerprint: hash of the content of the texts.
        vocabulary: the words, one per line.
        ids: for each part its ids, in pieces that are joined in order.

    Raises:
        OSError: the folder cannot be written.
    """
    place = cache_folder(folder, fingerprint)
    temporary = folder / f"{place.name}.{os.getpid()}-{token_hex(4)}.tmp"
    try:
        temporary.mkdir()
        with atomic_write(temporary / VOCABULARY) as file:
            file.write(vocabulary.encode("utf-8"))
        for split, pieces in ids.items():
            _write_array(temporary / f"{split}.npy", pieces)
        checksums = {path.name: _crc32(path) for path in sorted(temporary.iterdir())}
        with atomic_write(temporary / MANIFEST, "w") as file:
            json.dump({"fingerprint": fingerprint, "crc32": checksums}, file, indent=1)
        _move_in(temporary, place, folder, fingerprint)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _remove_stale(folder, keep=place)


def _write_array(path: Path, pieces: Sequence[Ids]) -> None:
    """Write pieces as one .npy file without ever holding their concatenation."""
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(np.int32)),
        "fortran_order": False,
        "shape": (sum(len(piece) for piece in pieces),),
    }
    with atomic_write(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(piece.data)


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _move_in(temporary: Path, place: Path, folder: Path, fingerprint: str) -> None:
    """Rename a finished cache to its place, unless another process has put a sound one there."""
    for attempts_left in reversed(range(5)):
        try:
            temporary.rename(place)
            break
        except OSError:
            if read(folder, fingerprint) is not None:
                return
            if not attempts_left:
                raise
        # What is there is damaged. It is renamed first, since removing it takes time in which
        # a process could find half of it.
        aside = temporary.with_name(f"{temporary.name}.old.tmp")
        with suppress(FileNotFoundError):  # another process was faster
            place.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    sync_directory(folder)


def _remove_stale(folder: Path, keep: Path) -> None:
    """Remove caches of older texts, and what killed processes have left half-written.

    A running process that has an old cache mapped keeps its data until it ends.
    """
    for path in folder.iterdir():
        if path != keep and re.fullmatch(r"\.corpus-v\d+-[0-9a-f]{16}", path.name):
            shutil.rmtree(path, ignore_errors=True)
        elif re.fullmatch(r"\.corpus-v\d+-[0-9a-f]{16}\..*\.tmp", path.name):
            try:
                abandoned = time.time() - path.stat().st_mtime > ABANDONED_SECONDS
            except OSError:  # another process has just renamed it
                continue
            if abandoned:
                shutil.rmtree(path, ignore_errors=True)
