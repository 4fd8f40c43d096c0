"""Texts to ids, against the plain loop of the original, and the cache."""

import errno
import multiprocessing
import os
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import full_disk_under

from data import cache as corpus_cache
from data import corpus as corpus_module
from data.corpus import Corpus, Vocabulary, batchify, load_corpus
from data.errors import DataError
from data.files import SPLITS, atomic_write
from data.text import encode_words, read_text

REAL_DATA = Path(os.environ.get("AWD_DATA") or Path(__file__).parents[1] / "../shared/data")
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
        with (folder / f"{split}.txt").open(encoding="utf-8") as file:
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


def assert_same(corpus: Corpus, words: list[str], ids: dict[str, list[int]]) -> None:
    assert list(corpus.vocabulary) == words
    for split in SPLITS:
        tensor = getattr(corpus, split)
        assert tensor.dtype == torch.int32
        assert tensor.tolist() == ids[split]


def caches(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7, 64, 1 << 22])
def test_ids_are_those_of_the_plain_loop_whatever_the_text(
    tmp_path: Path, block_bytes: int
) -> None:
    rng = random.Random(block_bytes)
    for _ in range(60):
        texts = ["".join(rng.choices(PIECES, k=rng.randint(3, 40))) + "x" for _ in SPLITS]
        texts[0] += rng.choice(["", "\n", "\r", "\r\n", " ", "\n ", "\n\n"])
        folder = write_texts(tmp_path, *texts)
        words, ids = plain_loop(folder)
        if min(map(len, ids.values())) < 2:
            continue
        vocabulary, pieces, _ = corpus_module._encode_folder(folder, block_bytes)
        assert list(vocabulary) == words
        for split in SPLITS:
            assert [id_ for piece in pieces[split] for id_ in piece.tolist()] == ids[split]


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


def test_cache_gives_the_same_corpus_without_reading_the_words_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_texts(tmp_path)
    cold = load_corpus(folder)
    assert [path.name for path in caches(folder)] == [f".corpus-v1-{cold.fingerprint[:16]}"]
    monkeypatch.setattr(corpus_module, "_encode_folder", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warm = load_corpus(folder)
    assert_same(warm, *plain_loop(folder))
    assert_same(cold, *plain_loop(folder))
    assert warm.fingerprint == cold.fingerprint
    warm.train[0] = 3  # ids are mapped copy-on-write: this must not reach the disk
    assert load_corpus(folder).train[0] == 0


def test_changed_text_is_noticed_even_with_the_same_size_and_time(tmp_path: Path) -> None:
    folder = write_texts(tmp_path, "a b c\n")
    path = folder / "train.txt"
    before, status = load_corpus(folder), path.stat()
    path.write_bytes(b"c b a\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = load_corpus(folder)
    assert list(after.vocabulary)[:3] == ["c", "b", "a"]
    assert after.fingerprint != before.fingerprint
    assert len(caches(folder)) == 1  # the old one is gone,
    assert before.train.tolist() == [0, 1, 2, 3]  # but who had it mapped still reads it
    # The same bytes cut into other texts are another corpus.
    moved = load_corpus(write_texts(folder, "c b a\nb d\n", "e a\n", "b d\n"))
    assert moved.fingerprint != after.fingerprint


@pytest.mark.parametrize("name", ["train.npy", "vocabulary.txt", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "removed"])
def test_damaged_cache_is_rebuilt(tmp_path: Path, name: str, damage: str) -> None:
    folder = write_texts(tmp_path)
    load_corpus(folder)
    [place] = caches(folder)
    path = place / name
    (place / f".{name}.1-aa.tmp").touch()  # as a killed process leaves it
    data = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        flipped = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
        path.write_bytes({"flipped": flipped, "cut": data[:-3]}[damage])
    assert_same(load_corpus(folder), *plain_loop(folder))
    assert path.read_bytes() == data
    assert caches(folder) == [place]
    assert len(list(place.iterdir())) == 5


def _load_together(folder: Path, barrier: Any, queue: Any) -> None:
    warnings.simplefilter("error")
    for _ in range(10):
        barrier.wait(20)
        corpus = load_corpus(folder)
        queue.put((corpus.fingerprint, corpus.train.tolist()))
        barrier.wait(20)
        shutil.rmtree(corpus_cache.cache_folder(folder, corpus.fingerprint), ignore_errors=True)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_at_once_both_succeed(tmp_path: Path) -> None:
    folder = write_texts(tmp_path)
    expected = load_corpus(folder, cache=False)
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=_load_together, args=(folder, barrier, queue)) for _ in "ab"
    ]
    for process in processes:
        process.start()
    results = [queue.get(timeout=30) for _ in range(20)]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert all(result == (expected.fingerprint, expected.train.tolist()) for result in results)
    assert list(folder.rglob("*.tmp")) == []


@pytest.mark.parametrize("where", ["mkdir", "train.npy"])
def test_cache_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A folder without permission, and a disk that fills up."""
    folder = write_texts(tmp_path)

    def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    if where == "mkdir":
        monkeypatch.setattr(Path, where, refuse)
    else:
        full_disk_under(monkeypatch, where)
    cause = "Permission denied" if where == "mkdir" else "No space left on device .at least 1"
    with pytest.warns(UserWarning, match=rf"cache .*corpus-v1-.*: cannot write: {cause}"):
        corpus = load_corpus(folder)
    assert_same(corpus, *plain_loop(folder))
    assert caches(folder) == []


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (b"", "train.txt: empty"),
        (b"a b\0c\n", "train.txt: binary, not text"),
        ("a b\n".encode("utf-16"), "train.txt: binary, not text"),
        (b"ab\r\nc\rd\xff e\n", "train.txt: not UTF-8 text (byte 7, line 3)"),
        (b"ab\n\xe8\xaa", "train.txt: not UTF-8 text (byte 3, line 2)"),
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
    assert caches(folder) == []


def test_bad_byte_is_located_across_blocks(tmp_path: Path) -> None:
    data = "é\r\n語 a\n".encode() * 50 + b"\xff"
    path = tmp_path / "x.txt"
    path.write_bytes(data)
    for block_bytes in (1, 2, 3, 5, 1000):
        with pytest.raises(DataError, match=rf"byte {len(data) - 1}, line 101\)"):
            corpus_module.encode_text(path, corpus_module.GrowingIndex(), block_bytes)


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
    def refuse(*args: object) -> None:  # not chmod: root, who may run this, reads everything
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
    corpus = load_corpus(write_texts(tmp_path / "corpus"), cache=False)
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
    assert [text.words[n] for n in text.numbers] == [
        "b",
        "new",
        "a",
        "<eos>",
        "other",
        "b",
        "<eos>",
    ]
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
    with pytest.raises(DataError, match=r"nowhere\.txt: cannot be read \(No such file"):
        read_text(tmp_path / "nowhere.txt", Vocabulary(["<eos>"]))
    path.write_text("")
    with pytest.raises(DataError, match=r"text\.txt: empty"):
        read_text([str(path)], vocabulary)
