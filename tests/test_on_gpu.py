"""benchmarks/on_gpu.sh: without a GPU it says so; with one it does each step once."""

import os
import subprocess
import sys
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
    result = call(tmp_path / "out", PYTHON=sys.executable)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: {sys.executable} sees no GPU on this machine; everything here wants one\n"
    )
    assert not (tmp_path / "out").exists()
    assert call().returncode == 2


# Notes what it is asked for, writes what the benchmarks would, and fails now and then.
PYTHON = """#!/bin/bash
echo "$@" >> {folder}/asked
while [ $# -gt 0 ]; do
  case $1 in
    pytest) echo "3 failed"; exit 1;;
    *wikitext-2) test -e {folder}/mended || exit 1;;
    *main.py) mkdir -p "$STATE/PTB"; echo '{{"valid": 1}}' >> "$STATE/PTB/metrics.jsonl"
      head -c 100000 /dev/zero > "$STATE/PTB.pt"; exit 1;;
    --output) echo {{}} > "${{2%.md}}.json"
      printf 'how\\n\\n| part | in short |\\n\\n## more\\n\\n| x |\\n' > "$2";;
  esac
  shift
done
"""


@pytest.mark.parametrize("elsewhere", [False, True])
def test_each_step_is_done_once_and_the_recipe_resumed(elsewhere: bool, tmp_path: Path) -> None:
    """With an interpreter that sees a GPU."""
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(PYTHON.format(folder=tmp_path))
    python.chmod(0o755)
    state = tmp_path / "state" if elsewhere else out / "state"
    corpus = write_corpus(tmp_path / "penn")
    for turn in (1, 2):
        result = call(out, corpus, PYTHON=str(python), STATE=str(state))
        assert result.returncode == 0, result.stderr
        assert ("| training-wikitext-2 | failed" in result.stdout) == (turn == 1)
        assert ("| gpu-tests | failed" in result.stdout) == (turn == 1)
        assert "| gpu-tests | 3 failed |" in result.stdout
        (tmp_path / "mended").touch()
    asked = (tmp_path / "asked").read_text().splitlines()
    names = ["pytest -m gpu", "--recipe penn", "--recipe wikitext-2", "benchmarks.probe"]
    names += ["main.py @recipes"]
    counts = {what: sum(what in line for line in asked) for what in names}
    assert list(counts.values()) == [1, 1, 2, 1, 2]
    first = [next(i for i, line in enumerate(asked) if what in line) for what in names]
    assert first == sorted(first)
    assert all("--resume auto" in line for line in asked if "main.py" in line)
    # what is fetched: few small files, and the probe's first table last
    files = [path for path in out.rglob("*") if path.is_file() and state not in path.parents]
    assert {path.name for path in files} == {
        "report.md", "gpu-tests.log", "training-penn.json", "training-wikitext-2.json",
        "probe.json", "metrics.jsonl", "logs.txt",
    }  # fmt: skip
    assert all(path.parent == out and path.stat().st_size < 10_000 for path in files)
    assert result.stdout.endswith("| part | in short |\n")
    assert (out / "report.md").read_text().startswith(result.stdout)
    assert "# probe\n\nhow\n" in (out / "report.md").read_text()
