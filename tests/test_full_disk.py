"""A full disk, whichever file meets it: one line names it, nothing is lost, the run goes on."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY, Result, full_disk_under, write_corpus
from test_download import md5, serving
from test_resume import FLAGS, assert_same_run, start

import ablate
from data.download import fetch_corpus
from data.errors import WriteError
from data.sources import CorpusSource, Mirror

Run = Callable[..., Result]


def wanted(line: str, path: Path, way_on: str) -> int:
    """The bytes that are wanted, by an error's line."""
    full = r"No space left on device \(at least ([\d,]+) bytes wanted, [\d,]+ left\)"
    found = re.fullmatch(f"error: {re.escape(str(path))}: cannot write: {full}; (.*)", line)
    assert found is not None, line
    assert found[2] == way_on
    return int(found[1].replace(",", ""))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder / "run.pt", write_corpus(folder / "corpus"), "--epochs", 2) == 0
    return folder


@pytest.mark.parametrize(
    ("name", "begun"),
    [
        ("last.pt", False),
        *((n, True) for n in ("run.pt", "last.pt", "metrics.jsonl", "summary.json")),
    ],
)
def test_of_a_run(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, name: str, begun: bool
) -> None:
    save, last = tmp_path / "run.pt", tmp_path / "run" / "last.pt"
    path = save if name == "run.pt" else tmp_path / "run" / name
    flags = [*FLAGS, "--epochs", 2, "--data", whole / "corpus", "--save", save]
    flags += ["--resume", "auto"]
    if begun:
        assert run(*flags, "--max-updates", 5).code == 0
    files = [save, last, tmp_path / "run" / "last.previous.pt"] if begun else []
    before = {file: file.read_bytes() for file in files if file.exists()}
    with monkeypatch.context() as patch:
        full_disk_under(patch, name)
        result = run(*flags)
    assert result.code == 1
    way_on = "no checkpoint was written yet"
    if last.exists():
        way_on = f"{last} is safe, and with more room --resume {last} goes on from there"
    size = wanted(result.err.splitlines()[-1], path, way_on)
    if name in ("run.pt", "last.pt"):  # before anything else of the run is changed
        assert all(file.read_bytes() == content for file, content in before.items() if file != save)
    assert not list(tmp_path.rglob("*.tmp"))
    assert run(*flags).code == 0
    assert_same_run(whole / "run.pt", save)
    written = path.stat().st_size
    assert size <= written if name == "metrics.jsonl" else written / 2 < size < 2 * written


def test_of_a_table(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out = tmp_path / "table.toml", tmp_path / "out"
    flags = json.dumps([*TINY[: TINY.index("--seed")], "--data", str(whole / "corpus")])
    table.write_text(f'title = "t"\nseeds = [1]\nflags = {flags}\n[[rows]]\nname = "base"\n')
    (out / "runs").mkdir(parents=True)
    (out / "runs" / "base-seed1.failed").write_text("its cause")  # there is something to report
    for name in ("table.md", "table.json"):
        with monkeypatch.context() as patch:
            full_disk_under(patch, name)
            assert ablate.main([str(table), "--output", str(out), "--report-only"]) == 1
        way_on = "nothing was lost, and with more room the same command goes on"
        wanted(capsys.readouterr().err.splitlines()[-1], out / name, way_on)
        assert not (out / name).exists()


def test_of_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {split: f"{split} a b c\n".encode() for split in ("train", "valid", "test")}
    sums = {split: md5(text) for split, text in texts.items()}
    with serving({f"/{split}": text for split, text in texts.items()}) as server:
        source = CorpusSource((Mirror(server.url + "/{split}"),), sums, most_bytes=100)
        with monkeypatch.context() as patch:
            full_disk_under(patch, "valid.txt")
            message = r"valid\.txt: cannot write: No space left on device \(at least 12 bytes"
            with pytest.raises(WriteError, match=message):
                fetch_corpus(source, tmp_path / "x")
        assert not list(tmp_path.iterdir())
        fetch_corpus(source, tmp_path / "x")
        assert (tmp_path / "x" / "valid.txt").read_bytes() == texts["valid"]
