"""A terminal or a pipe that goes away ends no run: training goes on, results go where they can."""

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY, Result, read_summary, write_corpus

import programs.conclusion
from engine.output import lasting_output


def slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture
def command(tmp_path: Path, corpus_folder: Path) -> list[str]:
    flags = [*TINY, "--epochs", "4", "--log-interval", "1", "--data", str(corpus_folder)]
    return [sys.executable, str(ROOT / "main.py"), *flags, "--save", str(tmp_path / "run.pt")]


def assert_done(folder: Path) -> None:
    assert json.loads((folder / "run" / "summary.json").read_text())["test_ppl"] > 1
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines].count("valid") == 4
    for path in folder.rglob("*.json*"):  # nothing was printed into a file
        assert "batches" not in path.read_text(errors="replace")


@pytest.mark.parametrize("closed", ["2>&-", slow("1>&-"), slow("1>&- 2>&-"), "0<&- 1>&- 2>&-"])
def test_closed_from_the_start(tmp_path: Path, command: list[str], closed: str) -> None:
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *command]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0
    assert ("| End of training" in done.stdout) == ("1>" not in closed)
    assert ("batches" in done.stderr) == ("2>" not in closed)
    assert_done(tmp_path)


@pytest.mark.parametrize("options", [[], slow(["-u"])])
@pytest.mark.parametrize("which", ["stderr", slow("stdout"), slow("both")])
def test_a_pipe_whose_reader_dies(
    tmp_path: Path, command: list[str], which: str, options: list[str]
) -> None:
    command[1:1] = options
    pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, **pipes, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert any("batches" in line for line in process.stderr)
        if which != "stdout":
            process.stderr.close()
        if which != "stderr":
            process.stdout.close()
        rest = process.stdout if which == "stderr" else process.stderr
        left = "" if which == "both" else rest.read()
        assert process.wait(timeout=120) == 0
    assert which != "stderr" or left.splitlines()[-1].startswith("| End of training")
    assert "Traceback" not in left
    assert "Exception" not in left
    assert_done(tmp_path)


@pytest.mark.parametrize("also_stdout", [False, slow(True)])
def test_a_terminal_that_is_closed_under_nohup(
    tmp_path: Path, command: list[str], also_stdout: bool
) -> None:
    """Its own controlling terminal, with a bar on it; SIGHUP is ignored, as nohup has it."""
    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if not also_stdout:
            with (tmp_path / "out").open("wb") as file:
                os.dup2(file.fileno(), 1)
        os.execv(command[0], command)
    seen = b""
    while b"epoch 1" not in seen:
        seen += os.read(terminal, 65536)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    if not also_stdout:
        assert "| End of training" in (tmp_path / "out").read_text().splitlines()[-1]
    assert_done(tmp_path)


def test_a_full_disk_under_the_log(tmp_path: Path, command: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        assert subprocess.run(command, stdout=full, stderr=full, timeout=120).returncode == 0
    assert_done(tmp_path)


def test_output_is_as_it_was(tmp_path: Path) -> None:
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
        buffering = "False"
        expected = ["before", f"within ? ascii replace {buffering}", "x" * 300000, "after"]
        assert done.stdout.decode().splitlines() == expected


def test_streams_of_tests_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with lasting_output():
        assert (sys.stdout, sys.stderr) == before
        print("seen")
    assert capsys.readouterr().out == "seen\n"


def test_the_summary_does_not_wait_for_the_samples(
    tmp_path: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, corpus_folder: Path
) -> None:
    def fail(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(programs.conclusion, "sample_sentences", fail)
    flags = ["--data", corpus_folder, "--save", tmp_path / "run.pt", "--epochs", 1, "--samples", 1]
    assert run(*TINY, *flags).code == 1
    assert read_summary(tmp_path / "run.pt")["test_ppl"] > 1


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
