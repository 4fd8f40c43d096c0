"""The ids of a corpus on the disk, keyed by the content of its texts.

``FOLDER/.corpus-v1-<16 hex digits>/`` holds vocabulary.txt, train.npy, valid.npy, test.npy and,
written last, manifest.json with the checksum of each: a cache without it is not complete.
"""

import json
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.files import SPLITS, atomic_write, write_errors

FORMAT = 1
MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.txt"

Ids = npt.NDArray[np.int32]


def cache_folder(folder: Path, fingerprint: str) -> Path:
    """The folder of the ids of the texts with this fingerprint."""
    return folder / f".corpus-v{FORMAT}-{fingerprint[:16]}"


def read(folder: Path, fingerprint: str) -> tuple[str, dict[str, Ids], str] | None:
    """Open a cache.

    Returns:
        The words, one per line; the ids of each part, (N,), mapped copy-on-write; the
        fingerprint. None if the cache is missing, incomplete, damaged or of another text.
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
    """Store the ids of a corpus, then remove the caches of older texts.

    Several processes may do this at once: each file is replaced atomically, and all of them
    write the same bytes. A process that has an old cache mapped keeps its data until it ends.

    Args:
        folder: the folder of the texts.
        fingerprint: hash of the content of the texts.
        vocabulary: the words, one per line.
        ids: for each part its ids, in pieces that are joined in order.

    Raises:
        WriteError: the folder cannot be written.
    """
    place = cache_folder(folder, fingerprint)
    try:
        with write_errors(place):
            place.mkdir(exist_ok=True)
        with atomic_write(place / VOCABULARY) as file:
            file.write(vocabulary.encode("utf-8"))
        for split, pieces in ids.items():
            _write_array(place / f"{split}.npy", pieces)
        names = [VOCABULARY, *(f"{split}.npy" for split in ids)]
        checksums = {name: _crc32(place / name) for name in names}
        with atomic_write(place / MANIFEST, "w") as file:
            json.dump({"fingerprint": fingerprint, "crc32": checksums}, file, indent=1)
    except OSError:
        if read(folder, fingerprint) is None:  # nor has another process completed it
            shutil.rmtree(place, ignore_errors=True)
            raise
    leftovers = place.glob(".*.tmp")  # of killed processes
    for path in [*leftovers, *(p for p in folder.glob(".corpus-v*") if p != place)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _write_array(path: Path, pieces: Sequence[Ids]) -> None:
    """Write pieces as one .npy file without holding their concatenation in memory."""
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
