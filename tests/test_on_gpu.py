"""benchmarks/on_gpu.sh: without a GPU it says so; with one it does each step once."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_corpus

SCRIPT = ROOT / "benchmarks" / "on_gpu.sh"


def call(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    result = call(tmp_path / "out", PYTHON="python")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "error: python sees no GPU on this machine; everything here wants one\n"
    )
    assert not (tmp_path / "out").exists()
    assert call().returncode == 2


def test_each_step_is_done_once_and_the_recipe_resumed(tmp_path: Path) -> None:
    """With an interpreter that sees a GPU, notes what it is asked for, and fails now and then."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {tmp_path}/asked\n'
        f'case "$*" in *wikitext*) test -e {tmp_path}/mended;; *main.py*) exit 1;; esac\n'
    )
    python.chmod(0o755)
    corpus = write_corpus(tmp_path / "penn")
    for turn in (1, 2):
        result = call(tmp_path / "out", corpus, PYTHON=str(python))
        assert result.returncode == 0, result.stderr
        assert ("training-wikitext-2: failed" in result.stdout) == (turn == 1)
        (tmp_path / "mended").touch()
    asked = (tmp_path / "asked").read_text().splitlines()
    counts = {
        what: sum(what in line for line in asked)
        for what in ("pytest -m gpu", "--recipe penn", "--recipe wikitext-2", "main.py @recipes")
    }
    assert list(counts.values()) == [1, 1, 2, 2]
    assert all("--resume auto" in line for line in asked if "main.py" in line)
