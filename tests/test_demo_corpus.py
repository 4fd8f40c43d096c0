"""The corpus that is built from Python's own documentation."""

import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT

from data import demo
from data.corpus import load_corpus
from data.demo import build_demo
from data.download import ensure_corpus
from data.errors import DataError
from data.files import SPLITS


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("built") / "data" / "demo"
    ensure_corpus(folder)
    return folder


def lines_of(folder: Path) -> dict[str, list[str]]:
    return {s: (folder / f"{s}.txt").read_text("utf-8").splitlines() for s in SPLITS}


def test_sizes_shares_and_form(built: Path) -> None:
    lines = lines_of(built)
    corpus = load_corpus(built)
    sizes = {split: len(getattr(corpus, split)) for split in SPLITS}
    total = sum(sizes.values())
    assert sizes["train"] > 150_000
    assert 0.8 < sizes["train"] / total < 0.9
    assert 0.05 < sizes["valid"] / total < 0.12
    assert 0.05 < sizes["test"] / total < 0.12
    assert 2_000 < len(corpus.vocabulary) <= demo.MAX_VOCABULARY + 2
    train = Counter(" ".join(lines["train"]).split())
    assert 0.01 < train["<unk>"] / train.total() < 0.08
    assert min(train.values()) >= 2  # words are counted before duplicate lines go
    # Whatever the two other parts hold, training has seen.
    for split in ("valid", "test"):
        assert set(" ".join(lines[split]).split()) <= set(train)
    every = [line for part in lines.values() for line in part]
    assert len(set(every)) == len(every)
    for line in every:
        assert line.replace("<unk>", "").replace("N", "").islower()
        assert (
            re.search(r"[<>=\[\]{}$%&*#@\\|\"`~^+]|(?<![.\w])\d", line.replace("<unk>", "")) is None
        )
        assert 5 <= len(line.split()) <= 110


def test_the_same_in_another_process_with_stripped_docstrings(tmp_path: Path) -> None:
    """From a part of the library, for speed."""
    library = tmp_path / "lib"
    for name in ("asyncio", "email"):
        shutil.copytree(Path(sysconfig.get_path("stdlib")) / name, library / name)
    program = (
        "import sys, sysconfig\n"
        "from data import demo\n"
        "sysconfig.get_path, demo.MIN_SENTENCES = lambda name: sys.argv[1], 1\n"
        "demo._topics = lambda: iter(())\n"
        "demo.build_demo(sys.argv[2])"
    )
    texts = []
    for options, seed in ([], "1"), (["-OO"], "7"):
        output = tmp_path / seed
        command = [sys.executable, *options, "-c", program, str(library), str(output)]
        subprocess.run(command, check=True, env={"PYTHONHASHSEED": seed}, cwd=ROOT)
        texts.append([(output / f"{split}.txt").read_bytes() for split in SPLITS])
    assert texts[0] == texts[1]
    assert len(texts[0][0]) > 20_000


def test_prose_is_kept_and_code_is_not() -> None:
    text = """Open a file, and don't close it.

    The :class:`Path` "mode" is one of 17 modes (e.g. ``r``).
    It's now the turn -- we hope -- of the very last sentence in it.

      >>> this is the code of an example that is not prose.

    x = open(path)[0] or something else that is in the code.

    +----+-----+
    | of | the |
    +====+=====+

    * the first item of the list is here, and
      it goes on.
    1. the second item of the list is here.
    """
    assert [" ".join(sentence) for sentence in demo._sentences(text)] == [
        "open a file , and don't close it .",
        "the path mode is one of N modes ( eg r ) .",
        "it's now the turn , we hope , of the very last sentence in it .",
        "the first item of the list is here , and it goes on .",
        "the second item of the list is here .",
    ]


def test_python_without_its_sources_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    monkeypatch.setattr(demo, "_topics", lambda: iter(()))
    with pytest.raises(DataError, match="sources with their docstrings"):
        build_demo(tmp_path / "out")
    with pytest.raises(DataError, match="sources with their docstrings"):
        ensure_corpus(tmp_path / "data" / "demo")
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "data").iterdir()) == []
