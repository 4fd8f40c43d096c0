"""ablate.py: tables in, runs of main.py, tables out."""

import csv
import gc
import importlib
import itertools
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, TINY, Result, write_corpus

import ablate
import programs.ablate
from engine.ablation import pool
from engine.ablation.latex import latex
from engine.ablation.pool import slots
from engine.ablation.report import markdown
from engine.ablation.results import collect
from engine.ablation.runs import Run, read_state
from engine.ablation.statistics import agreement, holm, paired, spread
from engine.ablation.table import Row, Table, load_table
from engine.errors import RunError
from engine.run_folder import lock_folder
from flags.ablation import parse_ablation

TABLES = sorted((ROOT / "ablations").glob("*.toml"))


@pytest.fixture
def make_table(tmp_path: Path) -> Callable[..., Path]:
    """make_table(rows, seeds=…): a table over a small corpus, a row per name and flags."""
    corpus = write_corpus(tmp_path / "corpus", lines=150)

    def make(rows: dict[str, str], seeds: tuple[int, ...] = (1, 2), flags: str = "") -> Path:
        lines = ['title = "What it costs in $x"', f"seeds = {list(seeds)}"]
        tiny = [flag for flag in TINY if flag not in ("--seed", "7")]  # the table has the seeds
        shared = [*tiny, "--data", str(corpus), "--epochs", "2", *flags.split()]
        lines.append(f"flags = {json.dumps(shared)}")
        for name, own in rows.items():
            lines += ["[[rows]]", f"name = {json.dumps(name)}", f"flags = {json.dumps(own)}"]
        path = tmp_path / "table.toml"
        path.write_text("\n".join(lines))
        return path

    return make


@pytest.fixture
def run_table(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def call(*argv: object) -> Result:
        capsys.readouterr()
        code = ablate.main([str(arg) for arg in argv])
        return Result(code, *capsys.readouterr())

    return call


def without_times(folder: Path) -> dict[str, str]:
    """A report's text files with every measured time taken out."""
    texts = {name: (folder / f"table.{name}").read_text() for name in ("md", "csv", "tex", "json")}
    texts["json"] = re.sub(r'("seconds_per_epoch": )[\d.e-]+', r"\1", texts["json"])
    texts["csv"] = re.sub(r"[\d.]+(,[^,\n]*\n)", r"\1", texts["csv"])
    # The second last column of the last table of table.md; its width depends on the figures.
    texts["md"] = re.sub(r"\| *[\d.]+ *(\| [^|]*\|\n)", r"\1", texts["md"])
    return texts


def without_picture(folder: Path) -> str:
    """The report's page without the link to its picture, which only the page has."""
    link = "![Validation perplexity per epoch](curves.png)\n\n"
    before, after = (folder / "table.md").read_text().split(link)
    return before + after


# From flags to a table


def test_a_table_with_rows_that_work_diverge_and_fail(
    make_table: Callable[..., Path], run_table: Callable[..., Result], tmp_path: Path
) -> None:
    rows = {"base": "", "diverges": "--lr 1e10 --clip 0", "fails": "--batch-size 100000"}
    table, out = make_table(rows, (1,)), tmp_path / "out"
    first = run_table(table, "--jobs", 2, "--output", out)
    assert first.code == 1
    assert first.err.splitlines()[-1].startswith("error: 1 of 3 runs failed (fails, seed 1)")
    assert "| base, seed 1: done, test ppl " in first.err
    assert first.out == without_picture(out)
    base, diverged, failed = json.loads((out / "table.json").read_text())["rows"]
    assert base["left_out"] == []
    assert diverged["difference"]["test"]["mean"] is None
    assert [base["test"]["n"], diverged["test"]["n"], failed["test"]["n"]] == [1, 0, 0]
    assert "diverged: loss is" in " ".join(diverged["left_out"])
    assert "too few for --batch-size 100000" in failed["left_out"][0]
    line = next(line for line in first.out.splitlines() if line.startswith("| diverges"))
    assert "0 of 1 †" in line
    assert "† diverges: seed" in first.out

    # Once more: what is done stays, what failed is tried again, the rest is the same.
    times = {p: p.stat().st_mtime_ns for p in out.glob("runs/*/summary.json")}
    before = without_times(out)
    assert run_table(table, "--jobs", 2, "--output", out).code == 1
    assert {p: p.stat().st_mtime_ns for p in out.glob("runs/*/summary.json")} == times
    starts = {p.stem: p.read_text().count("$ python main.py") for p in out.glob("runs/*.log")}
    assert starts == {"base-seed1": 1, "diverges-seed1": 1, "fails-seed1": 2}
    assert without_times(out) == before
    for path in out.glob("table.*"):
        path.unlink()
    assert run_table(table, "--report-only", "--output", out).code == 0
    assert without_times(out) == before


@pytest.mark.slow
def test_more_seeds_and_epochs_are_added_and_other_flags_refused(
    make_table: Callable[..., Path], run_table: Callable[..., Result], tmp_path: Path
) -> None:
    # A flag of the row that is valid only with the table's.
    table, out = make_table({"base": "--nonmono-decay 4"}, (1,), "--no-asgd"), tmp_path / "out"
    assert run_table(table, "--output", out).code == 0
    more = ("--flags=--epochs 3", "--seeds", "1,2", "--output", out)
    plan = run_table(table, *more, "--dry-run")
    assert "2 runs with seeds 1, 2; " in plan.out
    assert "to train: 4 epochs, " in plan.out
    result = run_table(table, *more, "--jobs", 2)
    assert result.code == 0

    # The figures, from the runs' own files.
    (row,) = json.loads((out / "table.json").read_text())["rows"]
    folders = [out / "runs" / f"base-seed{seed}" for seed in (1, 2)]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    one, two = (summary["test_ppl"] for summary in summaries)
    assert row["test"]["mean"] == pytest.approx((one + two) / 2)
    assert row["test"]["sd"] == pytest.approx(abs(one - two) / 2**0.5)
    valid = [summary["best_valid_ppl"] for summary in summaries]
    assert row["valid"]["mean"] == pytest.approx(sum(valid) / 2)
    for run, folder in zip(row["runs"], folders, strict=True):
        assert (out / run["folder"]).samefile(folder)
        assert (run["epochs"], len(run["curve"])) == (3, 3)
    with (out / "table.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert line["row"] == "base"
    assert float(line["test_mean"]) == pytest.approx((one + two) / 2)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    def refused(*argv: object) -> str:
        refusal = run_table(table, "--output", out, *argv)
        assert refusal.code == 2
        return refusal.err

    mixed = refused("--flags=--alpha 0")
    assert "base-seed1: was run with other flags: --alpha 0.0 (was 2.0)" in mixed
    assert "3 epochs are done, and 1 are asked for" in refused("--flags=--epochs 1")
    write_corpus(tmp_path / "corpus", lines=150, seed=5)
    assert "another text was in" in refused(*more[:-2])


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 10])
def test_killed_at_random_moments_it_gives_the_same_table(
    make_table: Callable[..., Path], tmp_path: Path, kills: int
) -> None:
    rows = {"base": "", "filter": "--grad-filter"}
    if kills > 1:
        rows["diverges"] = "--lr 1e10 --clip 0"
    table = make_table(rows, (1, 2) if kills > 1 else (1,), "--checkpoint-every 7 --nonmono 0")
    command = [sys.executable, str(ROOT / "ablate.py"), str(table), "--jobs", "2", "--output"]
    draw = random.Random(kills)
    for _ in range(kills):
        process = subprocess.Popen(
            [*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        time.sleep(draw.uniform(1.5, 6.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for name in ("killed", "whole"):
        done = subprocess.run([*command, str(tmp_path / name)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert without_times(tmp_path / "killed") == without_times(tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "table.json").read_text())["rows"][1]["filter"]


def test_interrupted_it_checkpoints_and_goes_on(
    make_table: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    table = make_table({"base": ""}, (1,), "--epochs 100000")
    command = [sys.executable, str(ROOT / "ablate.py"), str(table), "--output", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    metrics = out / "runs" / "base-seed1" / "metrics.jsonl"
    while not (metrics.exists() and '"valid"' in metrics.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to the runs, too
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines()[-1] == "error: interrupted (1 started); the same command goes on"
    log = (out / "runs" / "base-seed1.log").read_text()
    assert "Traceback" not in log
    assert not (out / "runs" / "base-seed1.failed").exists()
    assert (out / "runs" / "base-seed1" / "last.pt").exists()


@pytest.mark.slow
def test_a_run_that_outlived_its_table_is_waited_for(
    make_table: Callable[..., Path], run_table: Callable[..., Result], tmp_path: Path
) -> None:
    table, out = make_table({"base": ""}, (1,)), tmp_path / "out"
    (out / "runs").mkdir(parents=True)
    code = (
        "import sys, time; from pathlib import Path; from engine.run_folder import lock_folder; "
        "lock = lock_folder(Path(sys.argv[1])); print(flush=True); time.sleep(2); print('ended')"
    )
    command = [sys.executable, "-c", code, str(out / "runs" / "base-seed1")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        result = run_table(table, "--output", out)
        assert other.poll() is not None  # it was done before the run began
    assert result.code == 0, result.err


def test_two_tables_in_one_folder_are_refused(
    make_table: Callable[..., Path], run_table: Callable[..., Result], tmp_path: Path
) -> None:
    lock = lock_folder(tmp_path / "out")
    result = run_table(make_table({"base": ""}), "--output", tmp_path / "out")
    lock.release()
    assert (result.code, result.out) == (1, "")
    holder = f"{tmp_path / 'out'}: another process is running there (process {os.getpid()}: "
    assert result.err.startswith(f"error: {holder}")


# Tables and flags


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_shipped_tables_are_what_main_takes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    table = load_table(path)
    args = parse_ablation([str(path)])
    runs = programs.ablate.plan(table, args, Path("results") / table.name)
    assert len(runs) == len(table.rows) * len(table.seeds) >= 10
    flags = [json.dumps(dict(run.flags, seed=0, save="")) for run in runs]
    assert len(set(flags)) == len(table.rows)  # no two rows are the same
    assert len({run.save for run in runs}) == len(runs)


def test_the_paper_s_rows_carry_its_numbers() -> None:
    penn, wiki = (load_table(ROOT / f"ablations/paper-{n}.toml") for n in ("penn", "wikitext-2"))
    published = [
        [(r.published["valid"], r.published["test"]) for r in t.rows] for t in (penn, wiki)
    ]
    assert published == [
        [(60.7, 58.8), (66.3, 63.7), (61.3, 58.9), (65.1, 62.7), (63.7, 61.0), (62.7, 60.3),
         (68.0, 65.6), (71.1, 68.9)],
        [(69.1, 66.0), (73.3, 69.7), (69.3, 66.2), (71.1, 68.1), (71.9, 68.7), (73.2, 70.1),
         (73.7, 70.7), (78.4, 74.9)],
    ]  # fmt: skip
    tenth = load_table(ROOT / "ablations/paper-penn-tenth.toml")
    assert [(r.name, r.published, r.published_after) for r in tenth.rows] == [
        (r.name, r.published, r.published_after) for r in penn.rows
    ]


GOOD = 'title = "x"\nseeds = [1]\nrows = [{name = "a"}]\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("title = ", "not TOML"),
        ("seeds = [1]", "title is missing"),
        (GOOD.replace("[1]", "[]"), "must not be empty"),
        (GOOD.replace("[1]", "[1, 1]"), "seeds [1, 1] name one twice"),
        (GOOD.replace("[1]", "[1.5]"), "whole numbers"),
        (GOOD + "colour = 1", "unknown key 'colour'"),
        (GOOD + "flags = 3", "flags are a string"),
        (GOOD + "recipe = 3", "recipe is not a string"),
        (
            GOOD.replace('{name = "a"}', '{name = "a"}, {name = "A!"}'),
            "rows 'a' and 'A!' would share the folder 'a'",
        ),
        (GOOD.replace('{name = "a"}', "{}"), "row 1: name is missing"),
        (GOOD.replace('"a"}', '"a", flag = ""}'), "row 1: unknown key 'flag'"),
        (GOOD.replace('"a"}', '"a", published = 3}'), "row 'a': published is"),
    ],
)
def test_a_bad_table_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(content)
    with pytest.raises(RunError) as caught:
        load_table(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_row_that_cannot_fit_starts_nothing(
    make_table: Callable[..., Path], run_table: Callable[..., Result], tmp_path: Path
) -> None:
    for flags, cause in (
        ("--emsize 200000000 --nhid 8", "argument --bptt: an update would need about"),
        (f"--emsize {2**31 - 1}", "Storage size calculation overflowed"),
    ):
        table = make_table({"base": "", "too large": flags})
        result = run_table(table, "--output", tmp_path / "out")
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
        assert result.err.startswith(f"error: {table}: row 'too large': {cause}")
    assert not (tmp_path / "out").exists()


def test_a_folder_s_name_need_not_be_text(
    make_table: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "main.py").write_text("import sys; sys.exit('error: no')")
    monkeypatch.setattr(pool, "PROGRAM", tmp_path / "main.py")
    out = tmp_path / os.fsdecode(b"\xe9")
    (out / "runs").mkdir(parents=True)
    path = make_table({"base": ""}, (1,))
    [run] = programs.ablate.plan(load_table(path), parse_ablation([str(path)]), out)
    pool.execute(run, {}, threading.Event())
    assert os.fsencode(run.save) in run.log_path.read_bytes()
    assert run.failure_path.read_text() == "no\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--no-such", "row 'b': unrecognized arguments: --no-such"),
        ("--wdrop 2", "row 'b': argument --wdrop: '2' is not a probability"),
        ("--seed 3", "row 'b': argument --seed: the table sets it"),
        ("--save x.pt", "row 'b': argument --save: the table sets it"),
        ("--data elsewhere", "rows of different --data"),
    ],
)
def test_bad_flags_of_a_row_start_nothing(
    make_table: Callable[..., Path], run_table: Callable[..., Result], tmp_path: Path,
    flags: str, message: str,
) -> None:  # fmt: skip
    result = run_table(make_table({"a": "", "b": flags}), "--output", tmp_path / "out")
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--jobs", "0"], "argument --jobs"),
        (["--seeds", "1,1"], "argument --seeds: '1,1' names one twice"),
        (["--seeds", "a"], "argument --seeds"),
        (["--gpus", "7"], "argument --gpus: there is no GPU 7"),
        (["--rows", "nothing"], "argument --rows"),
        (["--flags=--dry-run"], "argument --dry-run: the table sets it"),
        (["--flags='"], "argument --flags"),
        (["--flags=--seed 3", "--report-only"], "argument --seed: the table sets it"),
        (["--ray", "--gpus", "0"], "argument --gpus: does not go with --ray"),
        (["--ray-gpus", "1"], "argument --ray-gpus: needs --ray"),
        (["--dry-run", "--report-only"], "argument --report-only: does not go with --dry-run"),
    ],
)
def test_bad_flags_of_ablate(
    make_table: Callable[..., Path], run_table: Callable[..., Result], tmp_path: Path,
    argv: list[str], message: str,
) -> None:  # fmt: skip
    result = run_table(make_table({"a": ""}), "--output", tmp_path / "out", *argv)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: {message}") or message in result.err
    assert result.err.count("\n") == 1


def test_jobs_share_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    places = slots(5, 2, [0, 3])
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places] == ["0", "3", "0", "3", "0"]
    assert {place["OMP_NUM_THREADS"] for place in places} == {"2"}
    assert "CUDA_VISIBLE_DEVICES" not in slots(1, 1, None)[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-abc")  # GPUs are numbered as seen
    assert [place["CUDA_VISIBLE_DEVICES"] for place in slots(2, 1, [0, 1])] == ["2", "GPU-abc"]


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


# What is written


def write_summary(run: Run, **fields: Any) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    summary = dict(epochs=2, updates=9, seconds=4.0, diverged=False, best_valid_ppl=90.0)
    (run.folder / "summary.json").write_text(json.dumps(dict(summary, **fields)))


def test_differences_are_paired_by_seed_and_names_escaped(tmp_path: Path) -> None:
    """Each row lacks another seed: only seeds 3 and 4 compare."""
    rows = [Row("a|b_c & 50%"), Row("other")]
    table = Table(tmp_path / "t.toml", "A & B", [], rows, [1, 2, 3, 4])
    flags = dict(epochs=2, max_updates=None)
    runs = [
        Run(row, seed, [], flags, tmp_path / f"{row.slug}{seed}.pt")
        for row in rows
        for seed in table.seeds
    ]
    ppl = {rows[0].name: [61.0, None, 65.0, 64.0], rows[1].name: [None, 77.0, 67.0, 69.0]}
    for run in runs:
        if (value := ppl[run.row.name][run.seed - 1]) is not None:
            write_summary(run, test_ppl=value)
    runs[1].failure_path.write_text("50% of $HOME_DIR")
    figures = collect(table, runs, tmp_path)
    difference = figures["rows"][1]["difference"]["test"]
    assert (difference["seeds"], difference["n"], difference["mean"]) == ([3, 4], 2, 3.5)
    text = markdown(figures)
    assert "| a\\|b_c & 50% | 3 of 4 † |" in text
    rows_of_text = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in rows_of_text[:4]}) == 1  # columns are aligned
    tex = latex(figures)
    assert "a\\textbar{}b\\_c \\& 50\\% & 3 of 4 $\\dagger$ & 90.00" in tex
    assert "failed: 50% of $HOME_DIR" in tex


def test_differences_are_held_against_the_published_ones(tmp_path: Path) -> None:
    """A row without a published figure, and one without a run, do not count."""
    test = dict(base=58.8, worse=68.9, better=58.9, alone=None, waiting=70.0)
    rows = [Row(name, published={"test": p} if p else {}) for name, p in test.items()]
    table = Table(tmp_path / "t.toml", "A", [], rows, [1])
    flags = dict(epochs=2, max_updates=None)
    runs = [Run(row, 1, [], flags, tmp_path / f"{row.slug}1.pt") for row in rows]
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
    run = Run(row, 1, [], dict(epochs=9, max_updates=20), tmp_path / "base-seed1.pt")
    write_summary(run, updates=20, test_ppl=80.0)
    lines = [dict(event="valid", step=s, epoch=e, ppl=p) for s, e, p in
             ((8, 1, 99.0), (16, 2, 90.0), (20, 3, 95.0))]  # fmt: skip
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    [found] = collect(table, [run], tmp_path)["rows"][0]["runs"]
    assert (found["state"], found["curve"]) == ("done", [99.0, 90.0])


def test_a_run_that_is_tried_again_is_no_failure_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "main.py"
    program.write_text("import pathlib, sys; print('failed:', pathlib.Path(sys.argv[1]).exists())")
    monkeypatch.setattr(pool, "PROGRAM", program)
    monkeypatch.setattr(pool, "GRACE_SECONDS", 0)
    save = tmp_path / "base.pt"
    run = Run(Row("base"), 1, [str(save.with_suffix(".failed"))], dict(epochs=1), save)
    for _ in range(2):
        pool.execute(run, {}, threading.Event())
        assert read_state(run).kind == "failed"
        assert run.log_path.read_text().splitlines()[-1] == "failed: False"


def test_ablate_prints_for_the_terminal_it_has(
    make_table: Callable[..., Path], run_table: Callable[..., Result], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "50")
    table = make_table({"base": "", "a row with a name that is rather long": "--wdrop 0"})
    done = run_table(table, "--report-only", "--output", tmp_path / "out")
    assert done.code == 0
    assert max(map(len, done.out.splitlines())) <= 50
    assert "table.md" in done.out


# On a cluster


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # ray's own are no concern of ours
def test_on_ray_a_killed_node_loses_nothing(
    make_table: Callable[..., Path], run_table: Callable[..., Result], tmp_path: Path
) -> None:
    """Two nodes on this machine, one of them killed in the middle of its run."""
    pytest.importorskip("ray", reason="requirements-cluster.txt")
    cluster_utils = importlib.import_module("ray.cluster_utils")
    rows = {"base": "", "- weight drop": "--wdrop 0", "filter": "--grad-filter"}
    table = make_table(rows, (1, 2), "--epochs 12 --checkpoint-every 7 --nonmono 0")
    assert run_table(table, "--threads", 1, "--output", tmp_path / "local").code == 0

    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=dict(num_cpus=1))
    try:
        victim = cluster.add_node(num_cpus=1)
        command = [sys.executable, str(ROOT / "ablate.py"), str(table), "--ray", cluster.address]
        output = tmp_path / "ray"
        process = subprocess.Popen([*command, "--output", str(output)], stdout=subprocess.PIPE)
        deadline = time.monotonic() + 200
        while sum('"valid"' in p.read_text() for p in output.glob("runs/*/metrics.jsonl")) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        cluster.remove_node(victim, allow_graceful=False)
        assert process.wait(timeout=300) == 0
    finally:
        cluster.shutdown()
    assert without_times(tmp_path / "ray") == without_times(tmp_path / "local")
    for log in output.glob("runs/*.log"):  # started twice at most, and tested once
        text = log.read_text()
        assert text.count("$ python main.py") <= 2
        assert text.count("End of training") == 1
    gc.collect()  # what ray leaves open is complained about here, not in the next test


def test_without_ray_it_says_so(
    make_table: Callable[..., Path], run_table: Callable[..., Result], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run_table(make_table({"a": ""}), "--ray", "--output", tmp_path / "out")
    assert result.code == 1
    assert result.err == "error: --ray: ray is not installed (requirements-cluster.txt)\n"


def test_a_perplexity_that_is_not_finite_is_divergence(tmp_path: Path) -> None:
    """Test loss and training may stay finite where exp(loss) does not."""
    run = Run(Row("no clip"), 1, [], dict(epochs=2, max_updates=None), tmp_path / "a.pt")
    write_summary(run, test_ppl=None)
    state = read_state(run)
    assert (state.kind, state.cause) == ("diverged", "its perplexity is not finite")
    write_summary(run, test_ppl=2e20)
    assert read_state(run).kind == "done"
    write_summary(run, test_ppl=2e20, epochs=1)
    assert read_state(run).kind == "new"


def test_a_run_that_is_older_than_a_flag_is_not_done_for_a_row_with_it(
    make_table: Callable[..., Path], run_table: Callable[..., Result], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run_table(make_table({"base": ""}, (1,)), "--output", out).code == 0
    path = out / "runs" / "base-seed1" / "config.json"
    config = json.loads(path.read_text())
    del config["flags"]["grad_filter"]
    path.write_text(json.dumps(config))
    assert run_table(make_table({"base": ""}, (1,)), "--output", out, "--report-only").code == 0
    other = run_table(make_table({"base": "--grad-filter"}, (1,)), "--output", out)
    assert other.code == 2
    assert "base-seed1: was run with other flags: --grad-filter 10.0 (was 0.0);" in other.err
    other = run_table(make_table({"base": "--bigram"}, (1,)), "--output", out)
    assert "base-seed1: was run with other flags: --bigram True (was False);" in other.err


def test_a_table_s_recipe_is_found_from_anywhere(
    make_table: Callable[..., Path], run_table: Callable[..., Result], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    table = make_table({"base": ""}, (1,))
    table.write_text(f'recipe = "recipes/penn.txt"\n{table.read_text()}')
    monkeypatch.chdir(tmp_path)
    assert load_table(table, ROOT).flags[0] == f"@{ROOT / 'recipes' / 'penn.txt'}"
    done = run_table(table, "--flags=--epochs 1", "--output", "out")
    assert (done.code, done.out) == (0, without_picture(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "runs" / "base-seed1" / "config.json").read_text())
    assert config["flags"]["dropouti"] == 0.2  # the table's, above the recipe's 0.4
    assert config["flags"]["clip"] == 0.25
    # One that is there comes first.
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "penn.txt").write_text("--clip 7")
    assert load_table(table, ROOT).flags[0] == "@recipes/penn.txt"
    (tmp_path / "recipes" / "penn.txt").unlink()
    table.write_text(table.read_text().replace("penn.txt", "none.txt"))
    missing = run_table(table, "--output", "out")
    assert missing.code == 2
    assert "@recipes/none.txt: No such file or directory" in missing.err
