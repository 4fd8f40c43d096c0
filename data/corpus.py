"""A folder of text as tensors of word ids."""

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.errors import DataError
from data.files import SPLITS
from data.sources import KNOWN_CORPORA

EOS = "<eos>"
UNK = "<unk>"
BLOCK_CHARACTERS = 1 << 22


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
        train: int32 ids, (N,).
        valid: int32 ids, (N,).
        test: int32 ids, (N,).
        fingerprint: hexadecimal hash of the content of the three texts.
    """

    vocabulary: Vocabulary
    train: Tensor
    valid: Tensor
    test: Tensor
    fingerprint: str


def load_corpus(folder: str | os.PathLike[str]) -> Corpus:
    """Read train.txt, valid.txt and test.txt as word ids.

    Each line is split at whitespace and followed by ``<eos>``; ids count words by their first
    appearance in train, valid and test, in this order, which is how the original numbers them.
    A byte order mark at the beginning of a text is left out.

    Args:
        folder: the folder that holds the three texts.

    Raises:
        DataError: the folder or one of the texts is missing, empty, unreadable, binary, not
            UTF-8, or shorter than two tokens.
    """
    folder = Path(folder)
    if not folder.is_dir():
        reason = "not a folder" if folder.exists() else "no such folder"
        known = ", ".join(f"data/{name}" for name in ("demo", *KNOWN_CORPORA))
        raise DataError(
            f"{folder}: {reason}; a corpus is a folder with train.txt, valid.txt and test.txt; "
            f"made or downloaded where they are missing: {known}"
        )
    paths = {split: folder / f"{split}.txt" for split in SPLITS}
    for path in paths.values():  # before any of them is read, which may take a while
        _check_text(path)
    index = GrowingIndex()
    ids = {split: torch.from_numpy(encode_text(path, index)) for split, path in paths.items()}
    return Corpus(Vocabulary(index), fingerprint=_fingerprint(paths.values()), **ids)


def batchify(ids: Tensor, batch_size: int) -> Tensor:
    """Lay a text out as parallel columns, column b being its b-th contiguous stretch.

    The remainder of N / B is dropped, as in the original.

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


def encode_text(path: Path, index: dict[str, int]) -> npt.NDArray[np.int32]:
    """The ids of one text's words, (N,), N >= 2, by an index that has them or gives them.

    Raises:
        DataError: see load_corpus.
    """
    _check_text(path)
    ids = array("i")
    try:
        with path.open(encoding="utf-8-sig") as file:  # without a byte order mark
            tail = last = ""  # the beginning of a word, and the last character
            while text := file.read(BLOCK_CHARACTERS):
                if "\0" in text:
                    raise DataError(_flaw(path))
                # str.split() cuts at every whitespace, so a line's end can travel as a word.
                words = (tail + text.replace("\n", f" {EOS} ")).split()
                last = text[-1]
                tail = "" if last.isspace() else words.pop()
                ids.extend(map(index.__getitem__, words))
            rest = [tail] * bool(tail) + [EOS] * (last != "\n")
            ids.extend(map(index.__getitem__, rest))
    except UnicodeDecodeError:
        raise DataError(_flaw(path)) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if len(ids) < 2:
        raise DataError(f"{path}: a one-token text; at least two tokens are needed")
    return np.frombuffer(ids, np.int32)


def _check_text(path: Path) -> None:
    """Refuse an empty file, and a pipe or device, which might never end."""
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if not path.is_file():
        raise DataError(f"{path}: not a regular file")
    if not path.stat().st_size:
        raise DataError(f"{path}: empty")


def _flaw(path: Path) -> str:
    """Say why a file cannot be read as text, with the place of the first bad byte."""
    content = path.read_bytes()
    if b"\0" in content:
        return f"{path}: binary, not text (it contains NUL bytes)"
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line = len((content[: error.start] + b"?").splitlines())
        return f"{path}: not UTF-8 text (byte {error.start}, line {line})"
    return f"{path}: was changed while it was read"


def _fingerprint(paths: Iterable[Path]) -> str:
    """The hash of the hashes of several files, as they are now."""
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
