"""Reads any text as ids of a given vocabulary."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.corpus import EOS, UNK, GrowingIndex, Vocabulary, encode_text
from data.errors import DataError

NAMED = 5  # unknown words that an error names
STDIN = "-"


@dataclass(frozen=True, eq=False)
class Text:
    """A text as ids of a vocabulary of V words.

    Attributes:
        ids: int32, (N,); words that the vocabulary lacks are ``<unk>``.
        numbers: int32, (N,); like ids, but words that the vocabulary lacks count from V on.
        words: the word of each number.
        unknown: how many of the N words the vocabulary lacks.
    """

    ids: Tensor
    numbers: Tensor
    words: Sequence[str]
    unknown: int

    def lines(self) -> Tensor:
        """The number of each word's line, (N,), from 0; ``<eos>`` ends a line."""
        ends = self.numbers == (self.words.index(EOS) if EOS in self.words else -1)
        return ends.cumsum(0) - ends.long()


def read_text(
    paths: str | os.PathLike[str] | Sequence[str], vocabulary: Vocabulary, before: str | None = None
) -> Text:
    """Read a text, or several as one; load_corpus says what its words are.

    Args:
        paths: the text; "-" for standard input.
        vocabulary: has ``<unk>``, or all words of the text.
        before: a word to put before the text; None: none.

    Raises:
        DataError: a text is empty, cannot be read, is binary, not UTF-8 or shorter than two
            tokens, or has a word that the vocabulary lacks, ``<unk>`` included.
    """
    several = [paths] if isinstance(paths, str | os.PathLike) else paths
    index = _index(vocabulary)
    pieces = [np.array([index[before]] if before else [], np.int32)]
    for name in several:
        with _file(name) as path:
            try:
                pieces.append(encode_text(path, index))
            except DataError as error:
                called = "standard input" if name == STDIN else str(path)
                raise DataError(str(error).replace(str(path), called)) from None
    return _text(np.concatenate(pieces), index, vocabulary, f"{' '.join(map(str, several))}: ")


def encode_words(words: Iterable[str], vocabulary: Vocabulary) -> Text:
    """The ids of words, N >= 0 of them.

    Raises:
        DataError: a word that the vocabulary lacks, ``<unk>`` included.
    """
    index = _index(vocabulary)
    numbers = np.fromiter(map(index.__getitem__, words), np.int32)
    return _text(numbers, index, vocabulary)


def _index(vocabulary: Vocabulary) -> GrowingIndex:
    return GrowingIndex({word: id_ for id_, word in enumerate(vocabulary)})


def _text(
    numbers: npt.NDArray[np.int32], index: GrowingIndex, vocabulary: Vocabulary, place: str = ""
) -> Text:
    words, ids = list(index), numbers
    missing = numbers >= len(vocabulary)
    if missing.any():
        if UNK not in vocabulary:
            new = words[len(vocabulary) :]
            more = f" and {len(new) - NAMED:,} more words" if len(new) > NAMED else ""
            named = ", ".join(map(repr, new[:NAMED]))
            raise DataError(f"{place}the vocabulary lacks {named}{more}, and has no {UNK}")
        ids = np.where(missing, np.int32(vocabulary.index(UNK)), numbers)
    return Text(torch.from_numpy(ids), torch.from_numpy(numbers), words, int(missing.sum()))


@contextmanager
def _file(name: str | os.PathLike[str]) -> Iterator[Path]:
    """The path of a text; standard input is copied to a temporary file."""
    if name != STDIN:
        yield Path(name)
        return
    with tempfile.NamedTemporaryFile(prefix="standard-input-") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
        file.flush()
        yield Path(file.name)
