"""Makes a corpus of any text: train.txt, valid.txt and test.txt, with rare words as <unk>."""

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import SPLITS, atomic_write
from data.raw_texts import find_texts, read_lines
from data.tokenize import TOKENIZERS

EOS, UNK = "<eos>", "<unk>"
RECORD = "prepare.json"
# Called with the task, "counting" or "writing", the bytes done since the last call, and those of
# the whole task.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How a corpus is made of texts.

    Attributes:
        split: shares of train, valid and test in the bytes of the texts; they add up to 1.
        by_document: whole files go to one part; else the texts are cut at a line's end.
        tokenizer: "whitespace" or "words"; see data.tokenize.
        lowercase: put the text into lower case first.
        min_count: a word that train has less often becomes ``<unk>``, in all parts.
        vocab_size: most words of the vocabulary, ``<unk>`` and ``<eos>`` included: train's most
            frequent ones; None: all that min_count leaves.
    """

    split: tuple[float, float, float] = (0.9, 0.05, 0.05)
    by_document: bool = False
    tokenizer: str = "words"
    lowercase: bool = False
    min_count: int = 2
    vocab_size: int | None = None


def prepare(
    sources: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    how: Preparation,
    progress: Progress = lambda task, done, total: None,
) -> dict[str, Any]:
    """Make a corpus: train.txt, valid.txt, test.txt, and prepare.json, a record of what was done.

    The texts are taken as one, in the order given; train is its beginning, test its end. A line
    belongs to the part in which it begins. Lines without a word are left out. The texts are read
    twice, line by line: only the counts of train's words are held in memory.

    Args:
        sources: texts, and folders, which stand for the .txt files in and below them.
        output: the folder to make. It may exist, but without such files: nothing is overwritten.
        how: see Preparation.
        progress: see Progress.

    Returns:
        The record: what was asked for; the vocabulary's size; lines, words (without ``<eos>``) and
        unknown words of each part.

    Raises:
        DataError: a text cannot be used (see find_texts and read_lines), a part or the whole would
            be empty, or the output exists or cannot be written. No corpus is left then.
    """
    output = Path(output)
    paths = find_texts(sources, output)
    starts = list(accumulate((path.stat().st_size for path in paths), initial=0))
    if not starts[-1]:
        raise DataError(f"{', '.join(map(str, paths))}: empty")
    cuts = divide(starts, how)
    new = _make_folder(output)
    try:
        counts = _count(paths, cuts[0], how, progress)
        record = dict(
            sources=[str(source) for source in sources],
            files=len(paths),
            bytes=starts[-1],
            **asdict(how),
            words_of_train=len(counts),
        )
        _write(output, paths, cuts, how, _vocabulary(counts, how), record, progress)
    except BaseException as error:
        if new:
            with suppress(OSError):
                output.rmdir()
        if isinstance(error, OSError):
            raise DataError(f"{output}: cannot be written ({error.strerror or error})") from error
        raise
    return record


def divide(starts: list[int], how: Preparation) -> tuple[int, int]:
    """The bytes at which valid and test begin; by document test gets the last files, as many as
    come nearest to its share, valid those before them.

    Args:
        starts: where each of the files begins, and where the last one ends, in bytes of the whole.

    Raises:
        DataError: by document, fewer than three texts.
    """
    size = starts[-1]
    if not how.by_document:
        return round(size * how.split[0]), round(size * (1 - how.split[2]))
    starts = sorted({at for at in starts if at < size})
    if len(starts) < len(SPLITS):
        raise DataError(f"--by-document: {len(starts)} texts are too few for three parts")
    test = min(starts[2:], key=lambda at: abs(size - at - how.split[2] * size))
    before = [at for at in starts[1:] if at < test]
    return min(before, key=lambda at: abs(test - at - how.split[1] * size)), test


def examples(path: Path, count: int) -> list[str]:
    """Lines of a text, spread evenly over it."""
    size, found = path.stat().st_size, []
    with path.open("rb") as file:
        for number in range(count):
            file.seek(size * number // count)
            if number:  # in the middle of a line
                file.readline()
            found.append(file.readline().decode().strip())
    return [line for line in dict.fromkeys(found) if line]


def _make_folder(output: Path) -> bool:
    """Make the folder; returns whether it is new."""
    for name in (*(f"{split}.txt" for split in SPLITS), RECORD):
        if (output / name).exists():
            raise DataError(
                f"{output / name}: is there already, and nothing is overwritten; give another "
                "--output, or remove it"
            )
    try:
        new = not output.exists()
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{output}: cannot be made ({error.strerror or error})") from error
    return new


def _words(line: str, how: Preparation) -> list[str]:
    return TOKENIZERS[how.tokenizer](line.lower() if how.lowercase else line)


def _count(paths: list[Path], end: int, how: Preparation, progress: Progress) -> Counter[str]:
    """How often train, which ends before this byte, has each word."""
    counts = Counter[str]()
    for at, size, line in read_lines(paths):
        if at >= end:
            break
        counts.update(_words(line, how))
        progress("counting", size, end)
    return counts


def _vocabulary(counts: Counter[str], how: Preparation) -> set[str]:
    """The words that are kept."""
    special = {UNK, EOS}
    most = None if how.vocab_size is None else how.vocab_size - len(special)
    kept = [w for w, count in counts.most_common() if count >= how.min_count and w not in special]
    return special.union(kept[:most])


def _write(
    output: Path,
    paths: list[Path],
    cuts: tuple[int, int],
    how: Preparation,
    vocabulary: Collection[str],
    record: dict[str, Any],
    progress: Progress,
) -> None:
    """Write the three texts and the record, which gets the figures of the parts."""
    figures = {split: dict(lines=0, words=0, unknown=0) for split in SPLITS}
    with ExitStack() as stack:
        names = (RECORD, *(f"{split}.txt" for split in SPLITS))
        last, *files = [stack.enter_context(atomic_write(output / name, "w")) for name in names]
        for at, size, line in read_lines(paths):
            part = sum(at >= cut for cut in cuts)
            if words := _words(line, how):
                known = [word if word in vocabulary else UNK for word in words]
                files[part].write(" ".join(known) + "\n")
                found = figures[SPLITS[part]]
                found["lines"] += 1
                found["words"] += len(known)
                found["unknown"] += known.count(UNK)
            progress("writing", size, record["bytes"])
        for split, found in figures.items():
            if not found["lines"]:
                shares = ",".join(f"{share:g}" for share in how.split)
                raise DataError(
                    f"{output / f'{split}.txt'}: would be empty; --split {shares} needs a longer "
                    "text, or one of more lines"
                )
        unknown = any(found["unknown"] for found in figures.values())
        record.update(vocabulary=len(vocabulary) - (not unknown), **figures)
        json.dump(record, last, indent=1)
        last.write("\n")
