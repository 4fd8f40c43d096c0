"""docs/first-hour.md from its first line to its last, on a small text and with a small model."""

import importlib
import io
import re
import runpy
import shlex
import tomllib
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from conftest import ROOT
from test_readme import blocks

PAGE = ROOT / "docs" / "first-hour.md"
# Later flags win, also over those of the page's recipe.
SMALL = ["--emsize", "8", "--nhid", "8", "--batch-size", "4", "--max-updates", "4"]


def commands() -> list[str]:
    return [line for block in blocks(PAGE, "sh") for line in block.splitlines()]


def write_what_the_page_shows(folder: Path) -> None:
    """Its text, a part of the one that it names; its recipe, and its table."""
    [command] = [line for line in commands() if " -c " in line]
    (folder / "page.py").write_text(shlex.split(command)[2])
    shown = io.StringIO()
    with redirect_stdout(shown):
        runpy.run_path(str(folder / "page.py"))
    (folder / "reference.txt").write_text(shown.getvalue()[:30_000])
    [recipe] = [block for block in blocks(PAGE, "text") if "--data data/mine" in block]
    (folder / "mine.txt").write_text(recipe)
    [table] = blocks(PAGE, "toml")
    assert len(tomllib.loads(table)["rows"]) == 2
    (folder / "mine.toml").write_text(table)


@pytest.mark.parametrize("table", ["its plan", pytest.param("its runs", marks=pytest.mark.slow)])
def test_the_page_works(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_what_the_page_shows(tmp_path)
    for line in commands()[1:]:
        _, program, *arguments = shlex.split(line, comments=True)
        if program == "main.py":
            arguments += SMALL
        if program == "ablate.py":
            if table == "its plan" and "--dry-run" not in arguments:
                continue
            arguments.append(f"--flags={shlex.join(SMALL)}")
        module = importlib.import_module(program.removesuffix(".py"))
        assert module.main(arguments) == 0, (line, capsys.readouterr().err)
    made = {path.name for path in tmp_path.iterdir()}
    for name in re.findall(r"`([\w.-]+\.(?:pt|png|tsv))`", PAGE.read_text()):
        assert name in made, name
    for snippet in blocks(PAGE, "python"):
        (tmp_path / "page.py").write_text(snippet)
        runpy.run_path(str(tmp_path / "page.py"))
