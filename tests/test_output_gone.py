"""A terminal or a pipe that goes away ends no run: training goes on, results go where they can."""

import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TINY, Result, read_events, read_summary, write_corpus
from forked import Child

import programs.conclusion


@pytest.fixture
def argv(tmp_path: Path, corpus_folder: Path) -> list[object]:
    flags = ["--epochs", 4, "--log-interval", 1, "--data", corpus_folder]
    return [*TINY, *flags, "--save", tmp_path / "run.pt"]


def assert_done(folder: Path) -> None:
    assert read_summary(folder / "run.pt")["test_ppl"] > 1
    assert [line["event"] for line in read_events(folder / "run.pt")].count("valid") == 4
    for path in folder.rglob("*.json*"):  # nothing was printed into a file
        assert "batches" not in path.read_text(errors="replace")


@pytest.mark.parametrize("closed", [(2,), (1,), (0, 1, 2)])
def test_closed_from_the_start(tmp_path: Path, argv: list[object], closed: tuple[int, ...]) -> None:
    def close() -> None:
        for descriptor in closed:
            os.close(descriptor)
            setattr(sys, ("stdin", "stdout", "stderr")[descriptor], None)  # as Python starts then

    code, out, err = Child(argv, close).wait()
    assert code == 0
    assert ("| End of training" in out) == (1 not in closed)
    assert ("batches" in err) == (2 not in closed)
    assert_done(tmp_path)


@pytest.mark.parametrize("which", [(2,), (1,), (1, 2)])
def test_a_pipe_whose_reader_dies(
    tmp_path: Path, argv: list[object], which: tuple[int, ...]
) -> None:
    reader, writer = os.pipe()

    def connect() -> None:
        os.close(reader)
        for descriptor in which:
            os.dup2(writer, descriptor)
        os.close(writer)

    child = Child(argv, connect)
    os.close(writer)
    with open(reader) as lines:  # noqa: PTH123
        assert any("epoch" in line for line in lines)
    code, out, err = child.wait()
    assert code == 0
    assert 1 in which or out.splitlines()[-1].startswith("| End of training")
    assert "Traceback" not in out + err
    assert "Exception" not in out + err
    assert_done(tmp_path)


def test_a_terminal_that_is_closed_under_nohup(tmp_path: Path, argv: list[object]) -> None:
    """Its own controlling terminal, with a bar on it; SIGHUP is ignored, as nohup has it."""

    def nohup() -> None:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with (tmp_path / "out").open("wb") as file:
            os.dup2(file.fileno(), 1)

    child, seen = Child(argv, nohup, terminal=True), b""
    while b"epoch 1" not in seen:
        seen += os.read(child.terminal, 65536)
    os.close(child.terminal)
    assert child.wait().code == 0
    assert "| End of training" in (tmp_path / "out").read_text().splitlines()[-1]
    assert_done(tmp_path)


def test_output_is_as_it_was() -> None:
    """Same order, encoding and errors; nothing is lost where the disk takes only part of it."""
    code = (
        "import sys\n"
        "from engine.output import lasting_output\n"
        "print('before')\n"
        "with lasting_output():\n"
        "    print('within é', sys.stdout.encoding, sys.stdout.errors, sys.stdout.line_buffering)\n"
        "    print('x' * 300000)\n"
        "print('after')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for options, given in (([], "ascii:replace"), ([], "ascii"), (["-u"], "ascii")):
        environment["PYTHONIOENCODING"] = given
        done = subprocess.run(
            [sys.executable, *options, "-c", code], env=environment, capture_output=True, check=True
        )
        expected = ["before", "within ? ascii replace False", "x" * 300000, "after"]
        assert done.stdout.decode().splitlines() == expected


def test_the_summary_does_not_wait_for_the_samples(
    tmp_path: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, argv: list[object]
) -> None:
    def fail(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(programs.conclusion, "sample_sentences", fail)
    assert run(*argv, "--samples", 1).code == 1
    assert_done(tmp_path)


@pytest.mark.slow
def test_words_and_paths_that_the_locale_cannot_write(tmp_path: Path) -> None:
    """In ASCII: main.py with such words, ablate.py in such a folder, given by its bytes."""
    corpus, place = write_corpus(tmp_path / "corpus"), tmp_path / "é"
    place.mkdir()
    for path in corpus.glob("*.txt"):
        path.write_text(path.read_text().replace("w", "é"), encoding="utf-8")
    flags = [flag for flag in TINY if flag not in ("--seed", "7")]
    flags += ["--data", str(corpus), "--epochs", "1"]
    table = tmp_path / "table.toml"
    rows = f'seeds = [1]\nflags = {json.dumps(flags)}\n[[rows]]\nname = "é"\n'
    table.write_text(f'title = "é †"\n{rows}', encoding="utf-8")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    environment["PYTHONCOERCECLOCALE"] = "0"

    def start(program: str, *argv: object) -> str:
        command = [sys.executable, str(ROOT / program), *map(str, argv)]
        done = subprocess.run(command, env=environment, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode("ascii")

    assert "| It writes: ?" in start("main.py", *flags, "--save", place / "r.pt", "--samples", 2)
    assert read_summary(place / "r.pt")["test_ppl"] > 1
    assert "# ? ?" in start("ablate.py", table, "--output", place / "out")
    assert "# é †" in (place / "out" / "table.md").read_text(encoding="utf-8")
