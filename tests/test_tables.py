"""How ablation tables are shown: fitted to a terminal, in LaTeX, and the lines of progress."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_ablation import write_summary

from engine.ablation.columns import FILTER, MAIN
from engine.ablation.latex import escaped, latex
from engine.ablation.progress import Board
from engine.ablation.results import collect
from engine.ablation.runs import Run
from engine.ablation.table import Row, Table
from engine.ablation.terminal import fitted, on_terminal

NAMES = ["all regularisers", "- weight drop", "a|b_c & 50% of {x^2~y\\z} “AR/TAR” <> #1 --wdrop 0"]


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    rows = [Row(name, published=dict(valid=60.0, test=58.8)) for name in NAMES]
    flags = dict(epochs=2, max_updates=None)
    return [
        Run(row, seed, [], flags, tmp_path / f"{row.slug}{seed}.pt")
        for row in rows
        for seed in (1, 2, 3)
    ]


@pytest.fixture
def figures(runs: list[Run], tmp_path: Path) -> dict[str, Any]:
    for n, run in enumerate(runs[:-1]):
        write_summary(run, test_ppl=74 + n + 0.1 * n * n, best_valid_ppl=75.0 + n)
    runs[-1].failure_path.write_text("50% of $HOME_DIR was full")
    rows = [run.row for run in runs[::3]]
    table = Table(tmp_path / "a table.toml", "A & B: 100% in {$x_1$}", [], rows, [1, 2, 3])
    found = collect(table, runs, tmp_path)
    for row in found["rows"]:
        row["filter"] = dict(scale=0.9, singled_out=0.1, smallest=0.2, params=0.9)
    return found


# On a terminal


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120, 200])
def test_no_line_is_wider_than_the_terminal(figures: dict[str, Any], width: int) -> None:
    text = on_terminal(figures, width, Path("table.md"))
    assert max(map(len, text.splitlines())) <= width
    assert "](" not in text
    assert "flags and runs" in " ".join(text.split())


def test_decimals_go_before_columns(figures: dict[str, Any]) -> None:
    whole, left_out = fitted(MAIN, figures["rows"], 1000)
    assert left_out == []
    width = whole.index("\n")
    shapes = []
    for room in range(width, 30, -1):
        table, left_out = fitted(MAIN, figures["rows"], room)
        header, _, base, *_ = table.splitlines()
        assert len(header) == len(base) <= room
        assert [name for name in MAIN if name and name not in left_out] == [
            cell.strip() for cell in header.split("|")[2:-1]
        ]
        decimals = {len(digits) for digits in re.findall(r"[+-]?\d+\.(\d+)(?= [±\[])", table)}
        shapes.append((len(left_out), -max(decimals, default=0)))
    assert shapes == sorted(shapes)  # fewer decimals, then fewer columns, then again
    assert {(0, -2), (0, -1), (1, -1)} <= set(shapes)
    assert fitted(FILTER, figures["rows"], 10)[0].index("\n") <= 10


# LaTeX


def test_minus_and_special_characters() -> None:
    for text, tex in {
        "- weight drop": "$-$ weight drop",
        "-0.70 [-3.60, +2.19]": "$-$0.70 [$-$3.60, +2.19]",
        "AWD-LSTM, test - base": "AWD-LSTM, test $-$ base",
        "--wdrop 0": "-{}-wdrop 0",
        "75 ± 1 †": "75 $\\pm$ 1 $\\dagger$",
        "a\\b\nc": "a\\textbackslash{}b c",
        "50% & {x_1}^2": "50\\% \\& \\{x\\_1\\}\\textasciicircum{}2",
        "2 < 3 | “q”": "2 $<$ 3 \\textbar{} ``q''",
    }.items():
        assert escaped(text) == tex


def test_the_table_floats_with_caption_and_label(figures: dict[str, Any]) -> None:
    text = latex(figures)
    assert "\\label{tab:a-table}" in text
    assert "\\caption{A \\& B: 100\\% in \\{\\$x\\_1\\$\\}. Mean $\\pm$" in text
    assert "\n$-$ weight drop & 3 & " in text
    assert "\n% † a|b_c" in text
    body = [line for line in text.splitlines() if line.endswith("\\\\")]
    assert len(body) == 1 + len(NAMES)
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {len(MAIN) - 1}
    for begin in ("table", "tabular"):
        assert text.count(f"\\begin{{{begin}}}") == text.count(f"\\end{{{begin}}}") == 1


def test_the_table_compiles(figures: dict[str, Any], tmp_path: Path) -> None:
    program = next(filter(None, map(shutil.which, ("pdflatex", "lualatex", "tectonic"))), None)
    if program is None:
        pytest.skip("no TeX is installed (pdflatex, lualatex or tectonic)")
    (tmp_path / "table.tex").write_text(latex(figures), encoding="utf-8")
    (tmp_path / "page.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}"
        "Table~\\ref{tab:a-table}\\input{table}\\end{document}"
    )
    options = [] if "tectonic" in program else ["-interaction=nonstopmode", "-halt-on-error"]
    done = subprocess.run(
        [program, *options, "page.tex"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


# Progress


def test_a_run_is_under_way_or_ended_but_not_both(
    runs: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its figures are written before its process has ended."""
    board = Board(runs[:2])
    for run in runs[:2]:
        write_summary(run, test_ppl=70.0)
    one, two = (run.name for run in runs[:2])
    for running in ({one, two}, {two}, set()):
        board.tick(running)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" | ")[1] for line in lines] == [
        "1 of 2 runs ended, 1 under way",
        "2 of 2 runs ended, 0 under way",
    ]
