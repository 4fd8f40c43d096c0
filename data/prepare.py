"""Makes a corpus of any text: train.txt, valid.txt and test.txt, with rare words as <unk>."""

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import SPLITS, atomic_write
from data.raw_texts import Texts, find_texts
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
    twice, in blocks: only the counts of train's words are held in memory.

    Args:
        sources: texts, and folders, which stand for the .txt files in and below them.
        output: the folder to make. It may exist, but without such files: nothing is overwritten.
        how: see Preparation.
        progress: see Progress.

    Returns:
        The record: what was asked for; the vocabulary's size; lines, words (without ``<eos>``) and
        unknown words of each part.

    Raises:
        DataError: a text cannot be used (see find_texts and Texts.blocks), a part would be empty,
            or the output exists or cannot be written. No corpus is left then.
    """
    output = Path(output)
    texts = Texts(find_texts(sources, output))
    ranges = divide(texts, how)
    new = _make_folder(output)
    try:
        counts = _count(texts, ranges["train"], how, progress)
        record = dict(
            sources=[str(source) for source in sources],
            files=len(texts.paths),
            bytes=texts.size,
            **asdict(how),
            words_of_train=len(counts),
        )
        _write(output, texts, ranges, how, _vocabulary(counts, how), record, progress)
    except BaseException as error:
        if new:
            with suppress(OSError):
                output.rmdir()
        if isinstance(error, OSError):
            raise DataError(f"{output}: cannot be written ({error.strerror or error})") from error
        raise
    return record


def divide(texts: Texts, how: Preparation) -> dict[str, range]:
    """The bytes of each part; by document test gets the last files, as many as come nearest to its
    share, valid those before them.

    Raises:
        DataError: by document, fewer than three texts.
    """
    size = texts.size
    valid, test = round(size * how.split[0]), round(size * (1 - how.split[2]))
    if how.by_document:
        starts = sorted({at for at in texts.starts if at < size})
        if len(starts) < len(SPLITS):
            raise DataError(f"--by-document: {len(starts)} texts are too few for three parts")
        test = min(starts[2:], key=lambda at: abs(size - at - how.split[2] * size))
        before = [at for at in starts[1:] if at < test]
        valid = min(before, key=lambda at: abs(test - at - how.split[1] * size))
    bounds = (0, valid, test, size)
    return {split: range(*bounds[n : n + 2]) for n, split in enumerate(SPLITS)}


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


def _lines(text: str, how: Preparation) -> list[list[str]]:
    """The words of each line."""
    text = text.lower() if how.lowercase else text
    return list(map(TOKENIZERS[how.tokenizer], text.split("\n")))


def _count(texts: Texts, train: range, how: Preparation, progress: Progress) -> Counter[str]:
    """How often train has each word."""
    counts = Counter[str]()
    for text, num_bytes in texts.blocks(train.start, train.stop):
        for words in _lines(text, how):
            counts.update(words)
        progress("counting", num_bytes, len(train))
    return counts


def _vocabulary(counts: Counter[str], how: Preparation) -> set[str]:
    """The words that are kept."""
    special = {UNK, EOS}
    most = None if how.vocab_size is None else how.vocab_size - len(special)
    kept = [w for w, count in counts.most_common() if count >= how.min_count and w not in special]
    return special.union(kept[:most])


def _write(
    output: Path,
    texts: Texts,
    ranges: dict[str, range],
    how: Preparation,
    vocabulary: Collection[str],
    record: dict[str, Any],
    progress: Progress,
) -> None:
    """Write the three texts and the record, which gets the figures of the parts."""
    figures = {split: dict(lines=0, words=0, unknown=0) for split in SPLITS}
    with ExitStack() as stack:
        last = stack.enter_context(atomic_write(output / RECORD, "w"))
        for split, part in ranges.items():
            file, found = (
                stack.enter_context(atomic_write(output / f"{split}.txt", "w")),
                figures[split],
            )
            for text, num_bytes in texts.blocks(part.start, part.stop):
                for words in _lines(text, how):
                    if words:
                        known = [word if word in vocabulary else UNK for word in words]
                        file.write(" ".join(known) + "\n")
                        found["lines"] += 1
                        found["words"] += len(known)
                        found["unknown"] += known.count(UNK)
                progress("writing", num_bytes, texts.size)
            if not found["lines"]:
                shares = ",".join(f"{share:g}" for share in how.split)
                raise DataError(
                    f"{output / f'{split}.txt'}: would be empty; --split {shares} needs a longer "
                    "text, or one of more lines"
                )
        unknown = any(part["unknown"] for part in figures.values())
        record.update(vocabulary=len(vocabulary) - (not unknown), **figures)
        json.dump(record, last, indent=1)
        last.write("\n")
