"""prepare.py against what it says it does, written out in memory; and its errors."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY, Result

import prepare
from data.corpus import load_corpus
from data.tokenize import words

Run = Callable[..., Result]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("It's well-known, isn't it?", "It 's well-known , isn 't it ?"),
        ("‘Don’t,’ he said--twice.", "‘ Don 't , ' he said -- twice ."),
        ("the dogs' 1,000.5 bones at 10:30.", "the dogs ' 1,000.5 bones at 10:30 ."),
        ("Mr. <unk> paid $3.50 (or 90%)...", "Mr . <unk> paid $ 3.50 ( or 90 % ) ..."),
        ("- a -b c- snake_case 1990's", "- a - b c - snake _ case 1990 's"),
        ("e\u0301te\u0301, नमस्ते!!", "e\u0301te\u0301 , नमस्ते !!"),
        (" \t ", ""),
    ],
)
def test_words(line: str, expected: str) -> None:
    assert " ".join(words(line)) == expected


def some_text(draw: random.Random, lines: int) -> list[str]:
    """Lines as they come: blank ones, Greek, punctuation, carriage returns."""
    known = ["the", "The", "cat", "dog's", "λόγος", "1,000", "said,", "end.", *map(str, range(40))]
    return [
        draw.choice(["", "  "])
        + " ".join(draw.choices(known, k=draw.choice([0, 1, 3, 12])))
        + draw.choice(["", "", "\r"])
        for _ in range(lines)
    ]


def by_hand(
    texts: list[list[str]], shares: list[float], tokenizer: str, lower: bool, least: int, most: int
) -> dict[str, list[str]]:
    """The lines of each part."""
    total = sum(len("\n".join(lines).encode()) for lines in texts)
    at, found = 0, {"train": list[list[str]](), "valid": [], "test": []}
    for lines in texts:
        for number, line in enumerate(lines):
            part = "train" if at < round(total * shares[0]) else "valid"
            part = part if at < round(total * (1 - shares[2])) else "test"
            line_words = line.lower() if lower else line
            if tokens := words(line_words) if tokenizer == "words" else line_words.split():
                found[part].append(tokens)
            at += len(line.encode()) + (number < len(lines) - 1)
    counts = Counter(word for line in found["train"] for word in line)
    kept = {word for word, count in counts.most_common(most - 2) if count >= least}
    return {
        part: [" ".join(word if word in kept else "<unk>" for word in line) for line in lines]
        for part, lines in found.items()
    }


@pytest.mark.parametrize(("tokenizer", "lower"), [("words", True), ("whitespace", False)])
def test_the_parts_are_those_of_the_definition(
    call: Run, tmp_path: Path, tokenizer: str, lower: bool
) -> None:
    """Wherever parts begin and end, inside a character, a line or between files."""
    draw, compared = random.Random(3), 0
    for number in range(12):
        texts = [some_text(draw, lines) for lines in (30, 1, 25)]
        folder = tmp_path / f"texts{number}"
        folder.mkdir()
        for name, lines in zip(("a.txt", "b.txt", "c.txt"), texts, strict=True):
            (folder / name).write_bytes("\n".join(lines).encode())
        shares, output = draw.choice([[0.5, 0.2, 0.3], [0.9, 0.05, 0.05]]), tmp_path / f"{number}"
        flags = ["--split", ",".join(map(str, shares)), "--tokenizer", tokenizer]
        flags += ["--min-count", "2", "--vocab-size", "12", *["--lowercase"] * lower]
        expected = by_hand(texts, shares, tokenizer, lower, 2, 12)
        result = call(prepare, folder, "--output", output, *flags)
        if not all(expected.values()):
            assert (result.code, output.exists()) == (1, False)
            continue
        assert result.code == 0, result.err
        compared += 1
        record = json.loads((output / "prepare.json").read_text())
        for part, lines in expected.items():
            text = (output / f"{part}.txt").read_text()
            assert text == "".join(f"{line}\n" for line in lines)
            unknown = text.split().count("<unk>")
            assert record[part] == dict(lines=len(lines), words=len(text.split()), unknown=unknown)
        assert record["vocabulary"] == len(load_corpus(output).vocabulary)
    assert compared > 5


def test_whole_files_by_document(call: Run, tmp_path: Path) -> None:
    for name, lines in (("b/1", 70), ("b/2", 10), ("c", 9), ("d", 11)):
        path = tmp_path / "texts" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{path.stem} \n" * lines)
    flags = ["--by-document", "--min-count", 1, "--split", "0.7,0.15,0.15", "--output"]
    result = call(prepare, tmp_path / "texts", *flags, tmp_path / "out")
    assert "warning: train.txt has no <unk>, and valid.txt or test.txt has" in result.err
    assert "warning: test.txt: 100% of its words are <unk>" in result.err
    found = [
        (tmp_path / "out" / f"{s}.txt").read_text().split() for s in ("train", "valid", "test")
    ]
    assert found == [["1"] * 70, ["<unk>"] * 19, ["<unk>"] * 11]
    one = tmp_path / "texts" / "c.txt"
    result = call(prepare, one, *flags, tmp_path / "other")
    assert result.err == "error: --by-document: 1 texts are too few for three parts\n"
    assert not (tmp_path / "other").exists()


def test_main_trains_on_it_and_nothing_is_overwritten(call: Run, run: Run, tmp_path: Path) -> None:
    draw, text, output = random.Random(1), tmp_path / "mine.txt", tmp_path / "new" / "mine"
    text.write_text("\ufeff" + "\n".join(some_text(draw, 900)), encoding="utf-8")
    result = call(prepare, text, "--output", output)
    assert result.code == 0
    corpus = load_corpus(output)
    sizes = [f"{len(part):,} tokens" for part in (corpus.train, corpus.valid, corpus.test)]
    assert all(size in result.out for size in sizes)
    assert f"{len(corpus.vocabulary):,} words" in result.out
    assert "\ufeff" not in "".join(corpus.vocabulary)
    lines = result.out.split("lines of train.txt:\n")[1].splitlines()[:-1]
    assert len(lines) == 10
    train = (output / "train.txt").read_text().splitlines()
    assert {line.removeprefix("|   ") for line in lines} <= set(train)
    done = run(*TINY, "--data", output, "--max-updates", 2, "--save", tmp_path / "run.pt")
    assert done.code == 0, done.err

    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    again = call(prepare, text, "--output", output)
    assert again.code == 1
    assert f"{output}/train.txt: is there already, and nothing is overwritten" in again.err
    assert before == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}


def test_errors_are_one_line_and_leave_nothing(
    call: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.raw_texts.LONGEST_LINE", 1 << 20)
    Path("long.txt").write_text("a word\n" * 5 + "word " * 300_000)
    Path("good.txt").write_text("a word\n" * 50)
    Path("latin.txt").write_bytes(b"abc\n" * 10 + "caf\u00e9\n".encode("latin-1"))
    Path("binary.txt").write_bytes(b"abc\n" * 10 + b"\0\n")
    Path("short.txt").write_text("one line only")
    Path("none.txt").touch()
    Path("empty").mkdir()
    Path("file").touch()
    Path("inside").mkdir()
    Path("inside/text.txt").write_text("a word\n" * 50)
    for argv, code, message in [
        ("latin.txt", 1, "latin.txt: not UTF-8 text (byte 43); iconv converts other encodings"),
        ("good.txt binary.txt", 1, "binary.txt: binary, not text (NUL at byte 40)"),
        ("long.txt", 1, "long.txt: the line at byte 35 is longer than 1 MiB; break the text into"),
        ("short.txt", 1, "out/valid.txt: would be empty; --split 0.9,0.05,0.05 needs a longer"),
        ("none.txt", 1, "none.txt: empty"),
        ("nowhere.txt", 1, "nowhere.txt: no such file"),
        ("/dev/null", 1, "/dev/null: not a regular file"),
        ("empty", 1, "empty: has no .txt file"),
        ("good.txt ./good.txt", 1, "good.txt: given twice"),
        ("inside --output inside", 1, "inside/text.txt: in the folder of the output, inside"),
        ("good.txt --output file", 1, "file: cannot be made (File exists)"),
        ("good.txt --split 0.9,0.2,-0.1", 2, "argument --split: '-0.1' is not a number above 0"),
        ("good.txt --split 0.9,0.2,0.1", 2, "argument --split: '0.9,0.2,0.1' is not three shares"),
        ("good.txt --vocab-size 2", 2, "argument --vocab-size/--vocab_size: '2' is not"),
        ("good.txt --min-count 0", 2, "argument --min-count/--min_count: '0' is not"),
    ]:  # fmt: skip
        before = sorted(tmp_path.rglob("*"))
        result = call(prepare, "--output", "out", *argv.split())
        assert (result.code, result.out) == (code, "")
        *progress, line = result.err.splitlines()
        assert line.startswith(f"error: {message}")
        assert all(text.startswith(("| counting", "| writing")) for text in progress)
        assert sorted(tmp_path.rglob("*")) == before, argv
    assert call(prepare, "good.txt").err.startswith("error: argument --output: give a folder")
    assert call(prepare, "good.txt", "--output", "out").code == 0
