"""Texts to ids, against the plain loop of the original."""

import errno
import os
import random
from pathlib import Path

import pytest
import torch
from conftest import REAL_DATA

from data.corpus import Vocabulary, batchify, load_corpus
from data.errors import DataError
from data.files import SPLITS, atomic_write
from data.text import encode_words, read_text

# All that str.split() cuts at, all that looks like it, and what lies on the borders of blocks.
PIECES = [
    *["abc", "é", "語", "😀", "\u0301", ".", "<eos>", "<unk>", "\ufeff"],
    *[" ", "  ", "\t", "\v", "\f", "\x1c", "\x1f", "\x85", "\xa0", "\u2028", "\u2029", "\u3000"],
    *["\n", "\n", "\r", "\r\n", "\n\n", "\r\r\n", "\u200b", "\u180e", "\u2060"],
]


def plain_loop(folder: Path) -> tuple[list[str], dict[str, list[int]]]:
    """Words and ids as the original makes them, in the simplest way."""
    words: list[str] = []
    index: dict[str, int] = {}
    ids: dict[str, list[int]] = {}
    for split in SPLITS:
        ids[split] = []
        with (folder / f"{split}.txt").open(encoding="utf-8-sig") as file:
            for line in file:
                for word in [*line.split(), "<eos>"]:
                    if word not in index:
                        index[word] = len(words)
                        words.append(word)
                    ids[split].append(index[word])
    return words, ids


def write_texts(
    folder: Path,
    train: str | bytes = "a b c\n",
    valid: str | bytes = "b d\n",
    test: str | bytes = "e a\n",
) -> Path:
    folder.mkdir(exist_ok=True)
    for split, text in zip(SPLITS, (train, valid, test), strict=True):
        data = text if isinstance(text, bytes) else text.encode("utf-8")
        (folder / f"{split}.txt").write_bytes(data)
    return folder


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 22])
def test_ids_are_those_of_the_plain_loop_whatever_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr("data.corpus.BLOCK_CHARACTERS", block)
    rng = random.Random(block)
    for _ in range(40):
        texts = ["".join(rng.choices(PIECES, k=rng.randint(3, 40))) + "x" for _ in SPLITS]
        texts[0] += rng.choice(["", "\n", "\r", "\r\n", " ", "\n ", "\n\n"])
        folder = write_texts(tmp_path, *texts)
        words, ids = plain_loop(folder)
        if min(map(len, ids.values())) < 2:
            continue
        corpus = load_corpus(folder)
        assert list(corpus.vocabulary) == words
        for split in SPLITS:
            tensor = getattr(corpus, split)
            assert (tensor.dtype, tensor.tolist()) == (torch.int32, ids[split])


def test_vocabulary_round_trip_and_refusals() -> None:
    vocabulary = Vocabulary(["<eos>", "naïve", "語", "\ufeffx"])
    assert Vocabulary.from_text(vocabulary.to_text()) == vocabulary
    assert (len(vocabulary), vocabulary[2], vocabulary.index("語")) == (4, "語", 2)
    assert "naïve" in vocabulary
    assert "naive" not in vocabulary
    assert len(Vocabulary.from_text("")) == 0
    with pytest.raises(KeyError):
        vocabulary.index("naive")
    for bad in (["a", "a"], ["a b"], [""], ["a\u2028b"]):
        with pytest.raises(ValueError, match="vocabulary"):
            Vocabulary(bad)


def test_the_fingerprint_is_that_of_the_texts_bytes(tmp_path: Path) -> None:
    folder = write_texts(tmp_path, "a b c\n")
    path = folder / "train.txt"
    before, status = load_corpus(folder), path.stat()
    assert load_corpus(folder).fingerprint == before.fingerprint
    path.write_bytes(b"c b a\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = load_corpus(folder)
    assert list(after.vocabulary)[:3] == ["c", "b", "a"]
    # The same bytes cut into other texts are another corpus.
    moved = load_corpus(write_texts(folder, "c b a\nb d\n", "e a\n", "b d\n"))
    assert len({before.fingerprint, after.fingerprint, moved.fingerprint}) == 3


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (b"", "train.txt: empty"),
        (b"a b\0c\n", "train.txt: binary, not text"),
        ("a b\n".encode("utf-16"), "train.txt: binary, not text"),
        (b"ab\r\nc\rd\xff e\n", "train.txt: not UTF-8 text (byte 7, line 3)"),
        (b"ab\n\xe8\xaa", "train.txt: not UTF-8 text (byte 3, line 2)"),
        ("é\r\n語 a\n".encode() * 50 + b"\xff", "train.txt: not UTF-8 text (byte 500, line 101)"),
        (b"\n", "train.txt: a one-token text"),
        (b" \t ", "train.txt: a one-token text"),
        (None, "train.txt: no such file"),
    ],
)
def test_bad_text_is_one_line_that_names_file_and_cause(
    tmp_path: Path, train: bytes | None, message: str
) -> None:
    folder = write_texts(tmp_path, train or b"")
    if train is None:
        (folder / "train.txt").unlink()
    with pytest.raises(DataError) as caught:
        load_corpus(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder.*: data/demo, data/penn, "):
        load_corpus(tmp_path / "nowhere")
    folder = write_texts(tmp_path / "x")
    with pytest.raises(DataError, match=r"train\.txt: not a folder"):
        load_corpus(folder / "train.txt")
    (folder / "valid.txt").unlink()
    (folder / "valid.txt").mkdir()
    with pytest.raises(DataError, match=r"valid\.txt: not a regular file"):
        load_corpus(folder)


def test_text_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **keywords: object) -> None:  # not chmod, which root ignores
        raise PermissionError(errno.EACCES, "Permission denied")

    folder = write_texts(tmp_path)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"train\.txt: cannot be read \(Permission denied\)"):
        load_corpus(folder)


def test_batchify_is_a_view_of_contiguous_stretches(tmp_path: Path) -> None:
    ids = torch.arange(23, dtype=torch.int32)
    columns = batchify(ids, 4)
    assert columns.shape == (5, 4)
    assert columns[:, 1].tolist() == [5, 6, 7, 8, 9]
    assert columns.data_ptr() == ids.data_ptr()
    assert batchify(ids, 1).shape == (23, 1)
    with pytest.raises(ValueError, match="23 tokens are too few for a batch of 12"):
        batchify(ids, 12)
    with pytest.raises(ValueError, match="at least 1"):
        batchify(ids, 0)


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    with atomic_write(path, "w") as file:
        file.write("old\n")
    with pytest.raises(RuntimeError), atomic_write(path) as file:  # noqa: PT012
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "num_words", "lengths"),
    [
        ("penn", 10_000, (929_589, 73_760, 82_430)),
        ("wikitext-2", 33_278, (2_088_628, 217_646, 245_569)),
    ],
)
def test_published_sizes(
    tmp_path: Path, name: str, num_words: int, lengths: tuple[int, int, int]
) -> None:
    if not (REAL_DATA / name).is_dir():
        pytest.skip(f"{name} is not below AWD_DATA ({REAL_DATA})")
    folder = write_texts(tmp_path, *((REAL_DATA / name / f"{s}.txt").read_bytes() for s in SPLITS))
    corpus = load_corpus(folder)
    assert len(corpus.vocabulary) == num_words
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == lengths


# Any text by a vocabulary


def test_a_text_of_the_corpus_has_the_same_ids_again(tmp_path: Path) -> None:
    corpus = load_corpus(write_texts(tmp_path / "corpus"))
    for split in SPLITS:
        text = read_text(tmp_path / "corpus" / f"{split}.txt", corpus.vocabulary)
        assert torch.equal(text.ids, getattr(corpus, split))
        assert torch.equal(text.numbers, text.ids)
        assert text.ids.dtype == torch.int32


def test_words_that_a_vocabulary_lacks(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("b new a\nother b")
    vocabulary = Vocabulary(["a", "<unk>", "<eos>", "b"])
    text = read_text(path, vocabulary)
    assert text.ids.tolist() == [3, 1, 0, 2, 1, 3, 2]
    assert " ".join(text.words[n] for n in text.numbers) == "b new a <eos> other b <eos>"
    assert text.unknown == 2
    assert text.lines().tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert encode_words(["b", "new"], vocabulary).ids.tolist() == [3, 1]
    assert len(encode_words([], vocabulary).ids) == 0
    with pytest.raises(DataError, match=r"text\.txt: the vocabulary lacks 'new', 'other', and has"):
        read_text(path, Vocabulary(["a", "b", "<eos>"]))
    with pytest.raises(
        DataError, match=r"^the vocabulary lacks 'q', 'r', 's', 't', 'u' and 2 more"
    ):
        encode_words("qrstuvw", Vocabulary(["a"]))
    with pytest.raises(DataError, match=r"nowhere\.txt: no such file"):
        read_text(tmp_path / "nowhere.txt", Vocabulary(["<eos>"]))
    path.write_text("")
    with pytest.raises(DataError, match=r"text\.txt: empty"):
        read_text([str(path)], vocabulary)
