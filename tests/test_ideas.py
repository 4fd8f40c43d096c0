"""The worked changes of docs/your-own-idea.md, each applied to a copy of the project and run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, read_events, write_corpus
from test_resume import assert_same_run

import main

PAGE = ROOT / "docs" / "your-own-idea.md"
PATCHES = {path.stem: path for path in sorted((ROOT / "docs" / "ideas").glob("*.patch"))}
# What a row of a table gives, beside the others' flags; a program is nothing to train with.
ROWS = {
    "penalty": "--cellnorm 0.1",
    "layer": "--model ZONEOUT --zoneout 0.1",
    "decoder": "--decoder mos --experts 3",
    "optimizer": "--optimizer adamw --lr 0.02",
    "program": "",
}
MOST_FILES, MOST_LINES = 3, 15
SEED = TINY.index("--seed")
FLAGS = [*TINY[:SEED], *TINY[SEED + 2 :], "--nonmono", "0", "--lr", "20", "--epochs", "3"]
# Runs several programs in one process, which imports torch once.
PROGRAMS = """
import importlib, json, sys
sys.modules["matplotlib"] = None  # which takes a second; no pictures
for program, argv in json.loads(sys.argv[1]):
    if code := importlib.import_module(program).main(argv):
        sys.exit(f"{program} {argv}: exit code {code}")
"""


def copy_project(folder: Path) -> None:
    """Programs, packages, tests and recipes; no corpora, no results."""
    files = [ROOT / "pyproject.toml", *ROOT.glob("*.py"), *ROOT.glob("recipes/*.txt")]
    for package in {path.parent for path in ROOT.glob("*/*.py")}:
        files += package.rglob("*.py")
    for path in files:
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())


def git_apply(patch: Path, folder: Path, *options: str) -> list[str]:
    """The lines that `git apply` prints; exact, without fuzz."""
    outside = dict(os.environ, GIT_CEILING_DIRECTORIES=str(folder.parent))
    command = ["git", "apply", *options, str(patch)]
    result = subprocess.run(command, cwd=folder, env=outside, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.fixture
def changed(tmp_path: Path, name: str) -> Path:
    """The project with the change in it."""
    copy_project(tmp_path / "project")
    git_apply(PATCHES[name], tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture(scope="module")
def awd_lstm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of this project as it is, and its corpus."""
    folder = tmp_path_factory.mktemp("awd-lstm")
    write_corpus(folder / "corpus")
    argv = [*FLAGS, "--seed", "1", "--data", folder / "corpus", "--save", folder / "run.pt"]
    assert main.main([str(word) for word in argv]) == 0
    return folder


def created(patch: Path) -> list[str]:
    return re.findall(r"^--- /dev/null\n\+\+\+ b/(.*)$", patch.read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", ROWS)
def test_a_change_is_small(tmp_path: Path, name: str) -> None:
    """A file of its own and its test; besides, lines added and removed are both counted.

    A program also has its entry point, a file at the top.
    """
    new = created(PATCHES[name])
    assert len([path for path in new if path.startswith("tests/")]) == 1
    assert len(new) == (3 if name == "program" else 2)
    counts = [line.split("\t") for line in git_apply(PATCHES[name], tmp_path, "--numstat")]
    touched = {path: int(more) + int(less) for more, less, path in counts if path not in new}
    assert len(touched) <= MOST_FILES
    assert sum(touched.values()) <= MOST_LINES
    assert f"| {len(touched)} files, {sum(touched.values())} lines |" in PAGE.read_text()


@pytest.mark.parametrize("name", ROWS)
def test_a_change_trains_and_resumes_and_is_a_row(
    changed: Path, awd_lstm: Path, tmp_path: Path, name: str
) -> None:
    table = tmp_path / "idea.toml"
    shared = json.dumps([*FLAGS, "--data", str(awd_lstm / "corpus")])
    rows = "".join(
        f"[[rows]]\nname = '{row}'\nflags = '{flags}'\n"
        for row, flags in (("base", ""), ("idea", ROWS[name]))
    )
    table.write_text(f"title = 'Mine'\nseeds = [1]\nflags = {shared}\n{rows}")
    runs = tmp_path / "results" / "runs"
    runs.mkdir(parents=True)
    base, row, whole = runs / "base-seed1.pt", runs / "idea-seed1.pt", tmp_path / "whole.pt"

    def train(save: Path, flags: str) -> tuple[str, list[str]]:
        argv = [*FLAGS, "--data", str(awd_lstm / "corpus"), *flags.split(), "--seed", "1"]
        return "main", [*argv, "--save", str(save), "--resume", "auto"]

    [own_test] = [path for path in created(PATCHES[name]) if path.startswith("tests/")]
    programs = [
        train(base, ""),
        train(whole, ROWS[name]),
        train(row, f"{ROWS[name]} --max-updates 14"),
        train(row, ROWS[name]),
        # Both runs are done, so nothing is left to run; were a flag lost, they would be refused.
        ("ablate", [str(table), "--output", str(tmp_path / "results")]),
        ("pytest", [own_test, "-n", "0", "-p", "no:cacheprovider"]),
    ]
    if name == "program":
        programs.append(("score", [str(row), str(awd_lstm / "corpus" / "test.txt")]))
    command = [sys.executable, "-c", PROGRAMS, json.dumps(programs)]
    result = subprocess.run(command, cwd=changed, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr

    updates = [line["step"] for line in read_events(row) if line["event"] == "valid"]
    assert updates[0] < 14 < updates[1]  # it stopped within an epoch
    assert_same_run(whole, row)
    assert_same_run(awd_lstm / "run.pt", base)
    assert (read_events(row) == read_events(base)) == (ROWS[name] == "")
    report = json.loads((tmp_path / "results" / "table.json").read_text())
    [test] = [line for line in read_events(row) if line["event"] == "test"]
    assert report["rows"][1]["name"] == "idea"
    assert report["rows"][1]["test"]["mean"] == pytest.approx(test["ppl"])
    if name == "program":
        assert result.stdout.endswith(f"| ppl {test['ppl']:8.2f}\n")


def blocks(language: str) -> list[str]:
    """The page's fenced code in a language."""
    fence = rf"^```{language}\n(.*?)^```"
    return re.findall(fence, PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_page_shows_what_the_patches_do() -> None:
    added = "".join(
        line[1:]
        for path in PATCHES.values()
        for line in path.read_text().splitlines(keepends=True)
        if line.startswith("+")
    )
    assert PATCHES.keys() == ROWS.keys()
    for name, flags in ROWS.items():
        assert f"](ideas/{name}.patch)" in PAGE.read_text()
        assert f"| `{flags}` |" in PAGE.read_text() or not flags
    for code in blocks("python"):
        assert code in added


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_a_change_keeps_to_the_rules_of_the_project(changed: Path) -> None:
    """Its imports point down, and its flag acts and is refused where it means nothing."""
    files = [f"tests/test_{name}.py" for name in ("architecture", "flags", "flags_act")]
    known = "architecture or test_flags.py or missing or cellnorm or zoneout or experts"
    command = [sys.executable, "-m", "pytest", *files, "-k", known]
    result = subprocess.run(command, cwd=changed, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layer"])
def test_the_page_s_table_is_run(changed: Path, awd_lstm: Path, name: str) -> None:
    [table] = blocks("toml")
    (changed / "zoneout.toml").write_text(table)
    tiny = " ".join([*FLAGS, "--data", str(awd_lstm / "corpus")])
    command = [sys.executable, "ablate.py", "zoneout.toml", "--seeds", "1", f"--flags={tiny}"]
    result = subprocess.run(command, cwd=changed, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((changed / "results" / "zoneout" / "table.json").read_text())["rows"]
    assert len(rows) == 3
    assert len({row["test"]["mean"] for row in rows}) == 3
    assert [row["test"]["n"] for row in rows] == [1, 1, 1]
