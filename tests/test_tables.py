"""A table's figures from the files of its runs: statistics, reports, LaTeX, lines of progress."""

import csv
import io
import itertools
import json
import math
import random
import re
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.ablation.columns import FILTER
from engine.ablation.progress import Board
from engine.ablation.report import comma_separated, escaped, latex, markdown, on_terminal
from engine.ablation.results import collect
from engine.ablation.runs import Run, read_state
from engine.ablation.statistics import agreement, holm, paired, spread
from engine.ablation.table import Row, Table

NAMES = ["all regularisers", "- weight drop", "a|b_c & 50% of {x^2~y\\z} “AR/TAR” <> #1 --wdrop 0"]


def runs_of(folder: Path, rows: list[Row], seeds: tuple[int, ...], **flags: Any) -> list[Run]:
    flags = dict(epochs=2, max_updates=None) | flags
    saves = {(row.name, seed): folder / f"{row.slug}{seed}.pt" for row in rows for seed in seeds}
    return [Run(row, s, [], flags, saves[row.name, s]) for row in rows for s in seeds]


def write_summary(run: Run, **fields: Any) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    summary = dict(epochs=2, updates=9, seconds=4.0, diverged=False, best_valid_ppl=90.0)
    (run.folder / "summary.json").write_text(json.dumps(dict(summary, **fields)))


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    rows = [Row(name, published=dict(valid=60.0, test=58.8)) for name in NAMES]
    return runs_of(tmp_path, rows, (1, 2, 3))


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


# Figures


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    """Each row lacks another seed: only seeds 3 and 4 compare."""
    rows = [Row("one"), Row("other")]
    runs = runs_of(tmp_path, rows, (1, 2, 3, 4))
    test = [61.0, None, 65.0, 64.0, None, 77.0, 67.0, 69.0]
    for run, ppl in zip(runs, test, strict=True):
        if ppl is not None:
            write_summary(run, test_ppl=ppl, best_valid_ppl=ppl + 7 * (run.row is rows[1]))
    figures = collect(Table(tmp_path / "t.toml", "A", [], rows, [1, 2, 3, 4]), runs, tmp_path)
    other = figures["rows"][1]
    for split, mean in dict(test=3.5, valid=10.5).items():
        difference = other["difference"][split]
        assert (difference["seeds"], difference["n"], difference["mean"]) == ([3, 4], 2, mean)
        assert difference["sd"] == pytest.approx(statistics.stdev([2, 5]))
    assert other["test"]["mean"] == pytest.approx(71)


def test_differences_are_held_against_the_published_ones(tmp_path: Path) -> None:
    """A row without a published figure, and one without a run, do not count."""
    test = dict(base=58.8, worse=68.9, better=58.9, alone=None, waiting=70.0)
    rows = [Row(name, published={"test": p} if p else {}) for name, p in test.items()]
    table = Table(tmp_path / "t.toml", "A", [], rows, [1])
    runs = runs_of(tmp_path, rows, (1,))
    for run, ppl in zip(runs, (80.0, 85.0, 79.0, 90.0), strict=False):
        write_summary(run, test_ppl=ppl)
    figures = collect(table, runs, tmp_path)
    assert figures["agreement"]["valid"]["n"] == 0
    assert figures["agreement"]["test"] == dict(n=2, same_sign=1, tau=None, p=None)
    words = "Differences to “base”, held against the published difference: test: 1 of 2 have its"
    assert words in markdown(figures)


def test_a_curve_has_whole_epochs_only(tmp_path: Path) -> None:
    """--max-updates adds a validation within the epoch that it cuts short."""
    row = Row("base")
    table = Table(tmp_path / "t.toml", "A", [], [row], [1])
    [run] = runs_of(tmp_path, [row], (1,), epochs=9, max_updates=20)
    write_summary(run, updates=20, test_ppl=80.0)
    lines = [dict(event="valid", step=s, epoch=e, ppl=p) for s, e, p in
             ((8, 1, 99.0), (16, 2, 90.0), (20, 3, 95.0))]  # fmt: skip
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    [found] = collect(table, [run], tmp_path)["rows"][0]["runs"]
    assert (found["state"], found["curve"]) == ("done", [99.0, 90.0])


def test_a_perplexity_that_is_not_finite_is_divergence(tmp_path: Path) -> None:
    """Test loss and training may stay finite where exp(loss) does not."""
    [run] = runs_of(tmp_path, [Row("no clip")], (1,))
    write_summary(run, test_ppl=None)
    state = read_state(run)
    assert (state.kind, state.cause) == ("diverged", "its perplexity is not finite")
    write_summary(run, test_ppl=2e20)
    assert read_state(run).kind == "done"
    write_summary(run, test_ppl=2e20, epochs=1)
    assert read_state(run).kind == "new"


def test_a_run_that_was_worse_than_guessing_goes_on_with_more_epochs(tmp_path: Path) -> None:
    """But not one that ended at a loss that is not finite, and so was not tested."""
    cause = "validation perplexity 5e+04 is worse than guessing"
    [run] = runs_of(tmp_path, [Row("base")], (1,), epochs=6)
    for epochs, test_ppl, kind in ((6, 5e4, "diverged"), (2, 5e4, "new"), (2, None, "diverged")):
        write_summary(run, epochs=epochs, test_ppl=test_ppl, diverged=True, cause=cause)
        state = read_state(run)
        assert (state.kind, state.cause) == (kind, cause if kind == "diverged" else "")


def test_a_row_s_smallest_mask_is_that_of_all_its_runs(tmp_path: Path) -> None:
    """The smallest of all intervals, layers and seeds; the other figures are means."""
    row = Row("filter")
    runs = runs_of(tmp_path, [row], (1, 2))
    for run, smallest in zip(runs, (0.3, 0.1), strict=True):
        write_summary(run, test_ppl=80.0)
        lines = [
            {f"grad_filter_{name}_l{layer}": value for layer in (0, 1) for name, value in
             dict(scale=0.5, singled_out=smallest, smallest=least, params=0.25).items()}
            for least in (0.4, smallest)
        ]  # fmt: skip
        events = [json.dumps(dict(line, event="train", step=1, epoch=1)) for line in lines]
        (run.folder / "metrics.jsonl").write_text("\n".join(events) + "\n")
    table = Table(tmp_path / "t.toml", "A", [], [row], [1, 2])
    [found] = collect(table, runs, tmp_path)["rows"]
    expected = dict(scale=0.5, singled_out=0.2, smallest=0.2, params=0.5)
    assert found["filter"] == pytest.approx(expected)


def test_a_line_of_the_csv_has_each_split_s_own_figures(figures: dict[str, Any]) -> None:
    lines = list(csv.DictReader(io.StringIO(comma_separated(figures))))
    assert [line["row"] for line in lines] == NAMES
    for line, row, published in zip(lines, figures["rows"], [(60.0, 58.8)] * 3, strict=True):
        for split, there in zip(("valid", "test"), published, strict=True):
            mean = statistics.fmean(r[f"{split}_ppl"] for r in row["runs"] if r["state"] == "done")
            assert float(line[f"{split}_mean"]) == pytest.approx(mean)
            assert float(line[f"{split}_published"]) == there
            assert float(line[f"{split}_beyond_published"]) == pytest.approx(mean - there)


# Statistics


def student_cdf(t: float, df: int) -> float:
    """By the trapezoid rule over the density."""
    x = np.linspace(-400, t, 400_001)
    log = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    return float(np.trapezoid(np.exp(log) * (1 + x**2 / df) ** (-(df + 1) / 2), x))


def test_paired_comparison_is_student_s() -> None:
    draw = random.Random(1)
    for n in (3, 4, 7):
        values = [draw.gauss(0.5, 1) for _ in range(n)]
        found = paired(values)
        mean, sd = sum(values) / n, statistics.stdev(values)
        assert (found["mean"], found["sd"]) == (pytest.approx(mean), pytest.approx(sd))
        reach = (found["high"] - mean) / (sd / n**0.5)
        assert student_cdf(reach, n - 1) == pytest.approx(0.975, abs=2e-5)
        assert mean - found["low"] == pytest.approx(found["high"] - mean)
        t = abs(mean) / (sd / n**0.5)
        assert found["p"] == pytest.approx(2 * (1 - student_cdf(t, n - 1)), abs=1e-4)


def test_few_seeds_say_nothing() -> None:
    assert spread([]) == dict(n=0, mean=None, sd=None)
    assert spread([3.0]) == dict(n=1, mean=3.0, sd=None)
    assert [paired([1.0])[key] for key in ("low", "high", "p", "sign_flip_p")] == [None] * 4
    two = paired([1.0, 2.0])
    assert (two["low"], two["p"]) == (pytest.approx(1.5 - 12.7062 * 0.5, abs=1e-3), None)
    assert paired([1.0] * 5)["sign_flip_p"] is None
    assert paired([0.0, 0.0, 0.0])["p"] is None  # no spread, no test


def test_sign_flip_counts_all_signs() -> None:
    values = [0.3, -0.1, 0.8, 1.1, 0.2, 0.6, -0.4]
    total = abs(sum(values))
    count = 0
    for signs in itertools.product((-1, 1), repeat=7):
        count += abs(sum(s * v for s, v in zip(signs, values, strict=True))) >= total - 1e-12
    assert paired(values)["sign_flip_p"] == count / 128
    assert paired([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])["sign_flip_p"] == 2 / 64


def test_holm() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == [pytest.approx(0.03), None, 0.06, 0.06]
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([None]) == [None]


def test_agreement_counts_signs_and_pairs_in_order() -> None:
    """Kendall's tau: pairs in the same order less pairs in the other; exact over all orders."""
    here, published = [0.2, -0.1, 1.5, 0.9, 0.4], [0.1, 3.9, 6.3, 2.0, 5.1]

    def tau(values: tuple[float, ...]) -> float:
        pairs = list(itertools.combinations(range(5), 2))
        rises = ((values[i] < values[j]) == (published[i] < published[j]) for i, j in pairs)
        return sum(1 if same else -1 for same in rises) / len(pairs)

    found = agreement(here, published)
    assert (found["n"], found["same_sign"]) == (5, 4)
    assert found["tau"] == pytest.approx(tau(tuple(here)))
    orders = list(itertools.permutations(here))
    as_far = sum(abs(tau(order)) >= abs(found["tau"]) - 1e-12 for order in orders)
    assert found["p"] == pytest.approx(as_far / len(orders))
    assert agreement([1.0, -1.0], [1.0, 2.0]) == dict(n=2, same_sign=1, tau=None, p=None)
    assert agreement([1.0] * 3, [1.0, 2.0, 3.0])["tau"] is None


# Pages


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120, 200])
def test_no_line_is_wider_than_the_terminal(figures: dict[str, Any], width: int) -> None:
    """Columns that do not fit are named."""
    text = on_terminal(figures, width, Path("table.md"))
    assert max(map(len, text.splitlines())) <= width
    assert "](" not in text
    words = " ".join(text.split())
    assert "flags and runs" in words
    for heading in ("seeds", "test ppl", "p (test)"):
        assert (f"| {heading} " in words) != (heading in words.split("The rest (")[1])
    whole = on_terminal(figures, 1000, Path("table.md"))
    assert set(FILTER) <= {cell.strip() for line in whole.splitlines() for cell in line.split("|")}
    assert "The rest (flags and runs) is in" in whole


def test_decimals_go_before_columns(figures: dict[str, Any]) -> None:
    whole = on_terminal(figures, 1000, Path("table.md"))
    width = max(len(line) for line in whole.splitlines() if line.startswith("|"))
    shorter = on_terminal(figures, width - 1, Path("table.md"))
    assert "(flags and runs)" in " ".join(shorter.split())  # no column is missing
    assert " ± " in shorter
    assert not re.search(r"± \d+\.\d\d", shorter)


def test_a_page_is_aligned(figures: dict[str, Any]) -> None:
    text = markdown(figures, "curves.png")
    assert "| a\\|b_c & 50% of" in text
    assert "| 2 of 3 † |" in text
    assert "![Validation perplexity per epoch](curves.png)" in text
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 4
    assert all(len({len(line) for line in table.splitlines()}) == 1 for table in tables)


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
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {6}


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
    board.tick({one, two}, set())
    board.tick({two}, {one})
    board.tick(set(), {two})
    assert capsys.readouterr().err.splitlines() == [
        "| all regularisers, seed 1: done, test ppl 70.00",
        "| 1 of 2 runs ended, 1 under way",
        "| all regularisers, seed 2: done, test ppl 70.00",
        "| 2 of 2 runs ended, 0 under way",
    ]


def test_a_run_that_updates_will_end_is_measured_in_updates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter takes 60 s; of its 8000 epochs it will see two."""
    clock = [0.0]
    monkeypatch.setattr("engine.ablation.progress.time.monotonic", lambda: clock[0])
    [run] = runs_of(tmp_path, [Row("base")], (1,), epochs=8000, max_updates=80)
    board = Board([run])
    run.folder.mkdir()
    line = dict(event="valid", step=20, epoch=1, ppl=90.0)
    (run.folder / "metrics.jsonl").write_text(json.dumps(line))
    clock[0] = 60.0
    board.tick({run.name}, set())
    assert capsys.readouterr().err.splitlines() == [
        "| base, seed 1: 20 of 80 updates, valid ppl 90.00",
        "| 0 of 1 runs ended, 1 under way, about 3.0 min left",
    ]


def test_runs_that_had_ended_before_take_no_time(
    runs: list[Run], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of five were there; the third takes a minute, and so will the others, of which one has
    failed before."""
    clock = [0.0]
    monkeypatch.setattr("engine.ablation.progress.time.monotonic", lambda: clock[0])
    for run in runs[:2]:
        write_summary(run, test_ppl=70.0)
    runs[4].failure_path.write_text("its cause")
    board = Board(runs[:5])
    clock[0] = 60.0
    write_summary(runs[2], test_ppl=70.0)
    board.tick(set(), {runs[2].name})
    line = capsys.readouterr().err
    assert line.endswith("\n| 3 of 5 runs ended, 0 under way, about 2.0 min left\n")
