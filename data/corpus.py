"""A folder of text as tensors of word ids, with a cache that cannot go stale."""

import codecs
import hashlib
import io
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data import cache as corpus_cache
from data.errors import DataError
from data.files import SPLITS
from data.sources import KNOWN_CORPORA

EOS = "<eos>"
UNK = "<unk>"
BLOCK_BYTES = 1 << 22


class Vocabulary:
    """The words of a corpus in the order of their ids.

    Args:
        words: distinct words without whitespace; the first one gets id 0.

    Raises:
        ValueError: a word occurs twice, is empty or contains whitespace.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self._words = tuple(words)
        self._index = {word: id_ for id_, word in enumerate(self._words)}
        if len(self._index) != len(self._words):
            raise ValueError("a vocabulary cannot hold the same word twice")
        if " ".join(self._words).split() != list(self._words):
            raise ValueError("a word of a vocabulary cannot be empty or contain whitespace")

    def __len__(self) -> int:
        return len(self._words)

    def __getitem__(self, id_: int) -> str:
        return self._words[id_]

    def __iter__(self) -> Iterator[str]:
        return iter(self._words)

    def __contains__(self, word: object) -> bool:
        return word in self._index

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vocabulary):
            return NotImplemented
        return self._words == other._words

    def __hash__(self) -> int:
        return hash(self._words)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} words)"

    def index(self, word: str) -> int:
        """The id of a word; raises KeyError if the vocabulary does not hold it."""
        return self._index[word]

    def to_text(self) -> str:
        """The words in id order, one per line, without a newline at the end."""
        return "\n".join(self._words)

    @classmethod
    def from_text(cls, text: str) -> "Vocabulary":
        """The inverse of :meth:`to_text`; raises ValueError like the constructor."""
        return cls(text.split("\n") if text else ())


@dataclass(frozen=True, eq=False)
class Corpus:
    """The three parts of a corpus over one vocabulary of V words.

    Attributes:
        vocabulary: the V words in id order.
        train: int32 ids, (N,); memory-mapped where a cache is used.
        valid: int32 ids, (N,).
        test: int32 ids, (N,).
        fingerprint: hexadecimal hash of the content of the three texts.
    """

    vocabulary: Vocabulary
    train: Tensor
    valid: Tensor
    test: Tensor
    fingerprint: str


def load_corpus(folder: str | os.PathLike[str], cache: bool = True) -> Corpus:
    """Read train.txt, valid.txt and test.txt as word ids.

    Each line is split at whitespace and followed by ``<eos>``; ids count words by their first
    appearance in train, valid and test, in this order, which is how the original numbers them.
    The ids are kept in a hidden folder next to the text. The texts are hashed on every call, so
    a changed text is never answered from an old cache, and a damaged cache is built anew.

    Args:
        folder: the folder that holds the three texts.
        cache: whether to use and to write the cache.

    Returns:
        The corpus; its tensors are memory-mapped if they come from the cache. If the cache
        cannot be written, a warning says so and the ids are kept in memory.

    Raises:
        DataError: the folder or one of the texts is missing, empty, unreadable, binary, not
            UTF-8, or shorter than two tokens.
    """
    folder = Path(folder)
    _check_present(folder)
    if cache and (cached := corpus_cache.read(folder, _fingerprint_of_files(folder))):
        return _from_cache(*cached)
    vocabulary, ids, fingerprint = _encode_folder(folder)
    if cache:
        try:
            corpus_cache.write(folder, fingerprint, vocabulary.to_text(), ids)
        except OSError as error:
            warnings.warn(
                f"the corpus cache is left out, and ids are kept in memory: {error}", stacklevel=2
            )
        if cached := corpus_cache.read(folder, fingerprint):
            return _from_cache(*cached)
    return _in_memory(vocabulary, ids, fingerprint)


def batchify(ids: Tensor, batch_size: int) -> Tensor:
    """Lay a text out as parallel columns, column b being its b-th contiguous stretch.

    The remainder of N / B is dropped, as in the original. Unlike there the result is a view, so
    that memory-mapped ids stay on the disk.

    Args:
        ids: (N,).
        batch_size: number of columns, B >= 1.

    Returns:
        A view of ``ids``, (N // B, B).

    Raises:
        ValueError: a column would hold fewer than two tokens, or ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {batch_size}")
    length = ids.numel() // batch_size
    if length < 2:
        raise ValueError(
            f"{ids.numel()} tokens are too few for a batch of {batch_size} "
            "(at least 2 per column are needed)"
        )
    return ids[: length * batch_size].view(batch_size, length).t()


class GrowingIndex(dict[str, int]):
    """Word to id; a word that is looked up for the first time gets the next id."""

    def __missing__(self, word: str) -> int:
        id_ = len(self)
        self[word] = id_
        return id_


_Encoded = tuple[Vocabulary, dict[str, list[npt.NDArray[np.int32]]], str]


def _encode_folder(folder: Path, block_bytes: int = BLOCK_BYTES) -> _Encoded:
    """Vocabulary, ids of each part in pieces, fingerprint."""
    index = GrowingIndex()
    ids, digests = {}, []
    for split in SPLITS:
        ids[split], digest = encode_text(folder / f"{split}.txt", index, block_bytes)
        digests.append(digest)
    return Vocabulary(index), ids, _fingerprint(digests)


def encode_text(
    path: Path, index: dict[str, int], block_bytes: int = BLOCK_BYTES
) -> tuple[list[npt.NDArray[np.int32]], bytes]:
    """Ids of one text, in pieces, and the hash of the very bytes that they were made of."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    digest = hashlib.sha256()
    pieces: list[npt.NDArray[np.int32]] = []
    num_bytes, tail, last = 0, "", ""
    for block in _blocks(path, block_bytes):
        digest.update(block)
        num_bytes += len(block)
        if b"\0" in block:
            raise DataError(f"{path}: binary, not text (it contains NUL bytes)")
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            offset = num_bytes - len(error.object) + error.start
            line = len((path.read_bytes()[:offset] + b"?").splitlines())
            raise DataError(f"{path}: not UTF-8 text (byte {offset}, line {line})") from None
        last = text[-1:] or last
        if not block:
            text += "" if last == "\n" else "\n"
        # str.split() cuts at every whitespace, so a line's end can travel as a word.
        words = (tail + text.replace("\n", f" {EOS} ")).split()
        tail = words.pop() if words and not text[-1:].isspace() else ""
        pieces.append(np.fromiter(map(index.__getitem__, words), np.int32, len(words)))
    if sum(len(piece) for piece in pieces) < 2:
        raise DataError(f"{path}: a one-token text; at least two tokens are needed")
    return pieces, digest.digest()


def _blocks(path: Path, block_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
    """The bytes of a file in blocks, the last of which is empty."""
    _check_file(path)
    try:
        with path.open("rb") as file:
            while block := file.read(block_bytes):
                yield block
        yield b""
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _fingerprint_of_files(folder: Path) -> str:
    digests = []
    for split in SPLITS:
        digest = hashlib.sha256()
        for block in _blocks(folder / f"{split}.txt"):
            digest.update(block)
        digests.append(digest.digest())
    return _fingerprint(digests)


def _fingerprint(digests: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _check_file(path: Path) -> None:
    """Raise for a pipe or a device, which might never end."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: not a regular file")


def _check_present(folder: Path) -> None:
    """Raise for a missing or empty text before any of them is read, which may take a while."""
    expected = "a corpus is a folder with train.txt, valid.txt and test.txt"
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: not a folder; {expected}")
    for path in (folder, *(folder / f"{split}.txt" for split in SPLITS)):
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            if path == folder:
                known = ", ".join(f"data/{name}" for name in ("demo", *KNOWN_CORPORA))
                expected += f"; made or downloaded where they are missing: {known}"
            kind = "folder" if path == folder else "file"
            raise DataError(f"{path}: no such {kind}; {expected}") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        if path != folder:
            _check_file(path)
        if path.is_file() and size == 0:
            raise DataError(f"{path}: empty")


def _in_memory(
    vocabulary: Vocabulary, ids: dict[str, list[npt.NDArray[np.int32]]], fingerprint: str
) -> Corpus:
    # Popping frees the pieces of one part before the next one is joined.
    tensors = {split: torch.from_numpy(np.concatenate(ids.pop(split))) for split in SPLITS}
    return Corpus(vocabulary, fingerprint=fingerprint, **tensors)


def _from_cache(text: str, ids: dict[str, npt.NDArray[np.int32]], fingerprint: str) -> Corpus:
    tensors = {split: torch.from_numpy(ids[split]) for split in SPLITS}
    return Corpus(Vocabulary.from_text(text), fingerprint=fingerprint, **tensors)
