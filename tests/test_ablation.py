"""ablate.py: tables in, runs of main.py, tables out."""

import csv
import gc
import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY, Result, read_summary, write_corpus
from test_tables import write_summary

import ablate
import programs.ablate
from data.corpus import load_corpus
from engine.ablation import pool
from engine.ablation.pool import slots
from engine.ablation.runs import Run, read_state
from engine.ablation.table import Row, load_table
from engine.errors import RunError, UsageError
from engine.run_folder import lock_folder
from flags.ablation import parse_ablation
from programs.table_plan import time_needed
from training.trainer import Trainer

TABLES = sorted((ROOT / "ablations").glob("*.toml"))


def write_table(folder: Path, rows: dict[str, str], seeds: Any = (1, 2), flags: str = "") -> Path:
    """A table over a small corpus, a row per name and flags."""
    corpus = folder / "corpus"
    if not corpus.exists():
        write_corpus(corpus, lines=150)
    tiny = [flag for flag in TINY if flag not in ("--seed", "7")]  # the table has the seeds
    shared = [*tiny, "--data", str(corpus), "--epochs", "2", *flags.split()]
    lines = ['title = "What it costs in $x"', f"seeds = {list(seeds)}"]
    lines.append(f"flags = {json.dumps(shared)}")
    for name, own in rows.items():
        lines += ["[[rows]]", f"name = {json.dumps(name)}", f"flags = {json.dumps(own)}"]
    path = folder / "table.toml"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def run_table(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def call(*argv: object) -> Result:
        capsys.readouterr()
        code = ablate.main([str(arg) for arg in argv])
        return Result(code, *capsys.readouterr())

    return call


def planned(table: Path, out: Path, *argv: str) -> list[Run]:
    """The table's runs."""
    args = parse_ablation([str(table), *argv])
    return programs.ablate.plan(programs.ablate.select(load_table(table, ROOT), args), args, out)


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
    run_table: Callable[..., Result], tmp_path: Path
) -> None:
    rows = {"base": "", "diverges": "--lr 1e10 --clip 0", "fails": "--batch-size 100000"}
    table, out = write_table(tmp_path, rows, (1,)), tmp_path / "out"
    to = ("--format", "png", "--output", out)
    first = run_table(table, "--jobs", 2, *to)
    assert first.code == 1
    assert first.err.splitlines()[-1].startswith("error: 1 of 3 runs failed (fails, seed 1)")
    assert "| base, seed 1: done, test ppl " in first.err
    assert first.out == without_picture(out)
    base, diverged, failed = json.loads((out / "table.json").read_text())["rows"]
    assert base["left_out"] == []
    summary = read_summary(out / base["runs"][0]["folder"])
    assert base["test"] == dict(n=1, mean=summary["test_ppl"], sd=None)
    assert base["valid"]["mean"] == summary["best_valid_ppl"]
    assert diverged["difference"]["test"]["mean"] is None
    assert (diverged["test"]["n"], failed["test"]["n"]) == (0, 0)
    assert "diverged: loss is" in " ".join(diverged["left_out"])
    assert "too few for --batch-size 100000" in failed["left_out"][0]
    line = next(line for line in first.out.splitlines() if line.startswith("| diverges"))
    assert "0 of 1 †" in line
    assert "† diverges: seed" in first.out

    # Once more: what is done stays, what failed is tried again, the rest is the same.
    times = {p: p.stat().st_mtime_ns for p in out.glob("runs/*/summary.json")}
    before = without_times(out)
    assert run_table(table, "--jobs", 2, *to).code == 1
    assert {p: p.stat().st_mtime_ns for p in out.glob("runs/*/summary.json")} == times
    starts = {p.stem: p.read_text().count("$ python main.py") for p in out.glob("runs/*.log")}
    assert starts == {"base-seed1": 1, "diverges-seed1": 1, "fails-seed1": 2}
    assert without_times(out) == before

    # A flag that is newer than the run has its default.
    path = out / "runs" / "base-seed1" / "config.json"
    config = json.loads(path.read_text())
    del config["flags"]["grad_filter"]
    path.write_text(json.dumps(config))
    for report in out.glob("table.*"):
        report.unlink()
    assert run_table(table, "--report-only", *to).code == 0
    assert without_times(out) == before
    for flags, was in (("--grad-filter", "10.0 (was 0.0)"), ("--bigram", "True (was False)")):
        other = run_table(write_table(tmp_path, {"base": flags}, (1,)), "--output", out)
        assert other.code == 2
        assert f"base-seed1: was run with other flags: {flags} {was};" in other.err


def test_a_run_with_other_columns_of_the_test_text_is_refused(tmp_path: Path) -> None:
    """A resumed run may change them, but the rows of a table have to have the same."""
    [run] = planned(write_table(tmp_path, {"base": ""}, (1,)), tmp_path / "out")
    run.folder.mkdir(parents=True)
    for name, refused in (("log_interval", False), ("test_batch_size", True)):
        flags = dict(run.flags, **{name: 7})
        (run.folder / "config.json").write_text(json.dumps(dict(flags=flags)))
        if not refused:
            programs.ablate.check_folders([run])
            continue
        with pytest.raises(UsageError, match=r"--test-batch-size 1 \(was 7\)"):
            programs.ablate.check_folders([run])


def test_more_jobs_than_runs_make_nothing_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of three runs is done, at 10 s an epoch; two more of two epochs are left, and start."""
    monkeypatch.setattr("programs.table_plan.time.process_time", lambda: 4.0)
    table = write_table(tmp_path, {"base": ""}, (1, 2, 3))
    runs, corpus = planned(table, tmp_path / "out"), load_corpus(tmp_path / "corpus")
    write_summary(runs[0], seconds=20.0, test_ppl=70.0)
    for jobs, seconds in ((1, 48), (2, 24), (8, 24)):
        args = parse_ablation([str(table), "--jobs", str(jobs), "--threads", "1"])
        words = f"about {seconds} s, at 10.0 s an epoch so far"
        assert time_needed(runs, corpus, args) == words
    runs = planned(table, tmp_path / "out", "--flags=--max-updates 1")  # much less than an epoch
    assert " at 10.0 s an epoch" not in time_needed(runs, corpus, args)


def test_what_the_time_was_measured_with_is_freed(tmp_path: Path) -> None:
    """Before the runs start, whose GPU it may be on."""
    table = write_table(tmp_path, {"base": ""}, (1,))
    runs, corpus = planned(table, tmp_path / "out"), load_corpus(tmp_path / "corpus")
    gc.disable()
    try:
        words = time_needed(runs, corpus, parse_ablation([str(table), "--threads", "1"]))
        left = [one for one in gc.get_objects() if type(one) is Trainer]
    finally:
        gc.enable()
    assert words.startswith("about ")
    assert left == []


@pytest.mark.slow
def test_more_seeds_and_epochs_are_added_and_other_flags_refused(
    run_table: Callable[..., Result], tmp_path: Path
) -> None:
    # A flag of the row that is valid only with the table's.
    table = write_table(tmp_path, {"base": "--nonmono-decay 4"}, (1,), "--no-asgd")
    out = tmp_path / "out"
    assert run_table(table, "--output", out).code == 0
    to = ("--output", out)
    more = ("--flags=--epochs 3", "--seeds", "1,2", *to)
    plan = run_table(table, *more, "--dry-run")
    assert "2 runs with seeds 1, 2; " in plan.out
    assert "to train: 4 epochs, " in plan.out
    result = run_table(table, *more, "--jobs", 2)
    assert result.code == 0

    # The figures, from the runs' own files.
    (row,) = json.loads((out / "table.json").read_text())["rows"]
    one, two = (read_summary(out / run["folder"])["test_ppl"] for run in row["runs"])
    assert row["test"]["sd"] == pytest.approx(abs(one - two) / 2**0.5)
    assert [(run["epochs"], len(run["curve"])) for run in row["runs"]] == [(3, 3), (3, 3)]
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
def test_killed_at_random_moments_it_gives_the_same_table(tmp_path: Path) -> None:
    rows = {"base": "", "filter": "--grad-filter", "diverges": "--lr 1e10 --clip 0"}
    table = write_table(tmp_path, rows, (1, 2), "--checkpoint-every 7 --nonmono 0")
    command = [sys.executable, str(ROOT / "ablate.py"), str(table), "--jobs", "2", "--output"]
    draw = random.Random(10)
    for _ in range(10):
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


WAITS = """
import pathlib, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
folder = pathlib.Path(sys.argv[sys.argv.index("--save") + 1]).with_suffix("")
folder.mkdir(parents=True)
(folder / "metrics.jsonl").write_text('{"event": "valid", "epoch": 1, "ppl": 9.0}')
signal.pause()
"""


def test_interrupted_it_waits_for_checkpoints_and_goes_on(
    run_table: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "main.py").write_text(WAITS)
    monkeypatch.setattr(pool, "PROGRAM", tmp_path / "main.py")
    out = tmp_path / "out"

    def interrupt() -> None:
        while not (out / "runs" / "base-seed1" / "metrics.jsonl").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    result = run_table(write_table(tmp_path, {"base": ""}), "--output", out)
    assert result.code == 1
    last = "error: interrupted (1 started, 1 new); the same command goes on"
    assert result.err.splitlines()[-1] == last
    assert not list(out.glob("runs/*.failed"))


@pytest.mark.slow
def test_a_run_that_outlived_its_table_is_waited_for(
    run_table: Callable[..., Result], tmp_path: Path
) -> None:
    table, out = write_table(tmp_path, {"base": ""}, (1,)), tmp_path / "out"
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
    run_table: Callable[..., Result], tmp_path: Path
) -> None:
    lock = lock_folder(tmp_path / "out")
    result = run_table(write_table(tmp_path, {"base": ""}), "--output", tmp_path / "out")
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


def test_a_table_s_recipe_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_table(tmp_path, {"base": ""}, (1,))
    table.write_text(f'recipe = "recipes/penn.txt"\n{table.read_text()}')
    monkeypatch.chdir(tmp_path)
    [run] = planned(table, Path("out"))
    assert run.argv[0] == f"@{ROOT / 'recipes' / 'penn.txt'}"
    assert run.flags["dropouti"] == 0.2  # the table's, above the recipe's 0.4
    assert run.flags["clip"] == 0.25
    # One that is there comes first.
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "penn.txt").write_text("--clip 7")
    assert load_table(table, ROOT).flags[0] == "@recipes/penn.txt"
    table.write_text(table.read_text().replace("penn.txt", "none.txt"))
    with pytest.raises(UsageError, match=r"@recipes/none.txt: No such file or directory"):
        planned(table, Path("out"))


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
    for table, tuned in ((penn, (60.0, 57.3)), (wiki, (68.6, 65.8))):  # the full model alone
        assert [len(table.after_of(row)) for row in table.rows] == [1, 0, 0, 0, 0, 0, 0, 0]
        assert tuple(table.rows[0].published_after["finetune"].values()) == tuned


GOOD = 'title = "x"\nseeds = [1]\nrows = [{name = "a"}]\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("title = ", "not TOML"),
        (GOOD.replace("[1]", "[]"), "must not be empty"),
        (GOOD.replace("[1]", "[1, 1]"), "seeds [1, 1] name one twice"),
        (GOOD.replace("[1]", "[1.5]"), "whole numbers"),
        (GOOD + "colour = 1", "unknown key 'colour'"),
        (GOOD + "flags = 3", "flags are a string"),
        (
            GOOD.replace('{name = "a"}', '{name = "a"}, {name = "A!"}'),
            "rows 'a' and 'A!' would share the folder 'a'",
        ),
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
    run_table: Callable[..., Result], tmp_path: Path
) -> None:
    for flags, cause in (
        ("--emsize 200000000 --nhid 8", "argument --bptt: an update would need about"),
        (f"--emsize {2**31 - 1}", "Storage size calculation overflowed"),
    ):
        table = write_table(tmp_path, {"base": "", "too large": flags})
        result = run_table(table, "--output", tmp_path / "out")
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
        assert result.err.startswith(f"error: {table}: row 'too large': {cause}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "argv", "message"),
    [
        ("--no-such", [], "row 'b': unrecognized arguments: --no-such"),
        ("--wdrop 2", [], "row 'b': argument --wdrop: '2' is not a probability"),
        ("--save x.pt", [], "row 'b': argument --save: the table sets it"),
        ("--data elsewhere", [], "rows of different --data"),
        ("", ["--seeds", "1,1"], "argument --seeds: '1,1' names one twice"),
        ("", ["--gpus", "7"], "argument --gpus: there is no GPU 7"),
        ("", ["--rows", "nothing"], "argument --rows"),
        ("", ["--flags=--dry-run"], "argument --dry-run: the table sets it"),
        ("", ["--flags='"], "argument --flags"),
        ("", ["--flags=--seed 3", "--report-only"], "argument --seed: the table sets it"),
        ("", ["--ray", "--gpus", "0"], "argument --gpus: does not go with --ray"),
        ("", ["--ray-gpus", "1"], "argument --ray-gpus: needs --ray"),
    ],
)
def test_bad_flags_start_nothing(
    run_table: Callable[..., Result], tmp_path: Path, row: str, argv: list[str], message: str
) -> None:
    table = write_table(tmp_path, {"a": "", "b": row})
    result = run_table(table, "--output", tmp_path / "out", *argv)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert message in result.err
    assert not (tmp_path / "out").exists()


def test_jobs_share_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    places = slots(5, 2, [0, 3])
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places] == ["0", "3", "0", "3", "0"]
    assert {place["OMP_NUM_THREADS"] for place in places} == {"2"}
    assert "CUDA_VISIBLE_DEVICES" not in slots(1, 1, None)[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-abc")  # GPUs are numbered as seen
    assert [place["CUDA_VISIBLE_DEVICES"] for place in slots(2, 1, [0, 1])] == ["2", "GPU-abc"]


def test_the_plan_measures_the_gpu_that_is_given(
    run_table: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    table = write_table(tmp_path, {"base": "--batch-size 2"}, (1,))
    run_table(table, "--output", tmp_path / "out", "--gpus", "1", "--dry-run")
    assert chosen == [1]


def test_the_first_row_can_be_the_only_one(tmp_path: Path) -> None:
    table = write_table(tmp_path, {"base": "", "a": "", "b": ""}, (1,))
    for words, rows in ((["base"], ["base"]), (["B"], ["base", "b"])):
        runs = planned(table, tmp_path / "out", "--rows", *words)
        assert [run.row.name for run in runs] == rows


def test_a_run_that_is_tried_again_is_no_failure_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder's name need not be text, either."""
    program = tmp_path / "main.py"
    program.write_text("import pathlib, sys; print('failed:', pathlib.Path(sys.argv[1]).exists())")
    monkeypatch.setattr(pool, "PROGRAM", program)
    monkeypatch.setattr(pool, "GRACE_SECONDS", 0)
    save = tmp_path / os.fsdecode(b"\xe9") / "base.pt"
    run = Run(Row("base"), 1, [str(save.with_suffix(".failed"))], dict(epochs=1), save)
    for _ in range(2):
        pool.execute(run, {}, threading.Event())
        assert read_state(run).kind == "failed"
        log = run.log_path.read_bytes()
        assert os.fsencode(run.failure_path) in log
        assert log.splitlines()[-1] == b"failed: False"


def test_ablate_prints_for_the_terminal_it_has(
    run_table: Callable[..., Result], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "50")
    table = write_table(
        tmp_path, {"base": "", "a row with a name that is rather long": "--wdrop 0"}
    )
    none = run_table(table, "--report-only", "--output", tmp_path / "out")
    assert (none.code, (tmp_path / "out").exists()) == (1, False)
    assert "no run has ended with these flags" in none.err
    (tmp_path / "out" / "runs").mkdir(parents=True)
    (tmp_path / "out" / "runs" / "base-seed1.failed").write_text("its cause")
    done = run_table(table, "--report-only", "--output", tmp_path / "out")
    assert done.code == 0
    assert max(map(len, done.out.splitlines())) <= 50
    assert "table.md" in done.out


# On a cluster


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # ray's own are no concern of ours
def test_on_ray_a_killed_node_loses_nothing(
    run_table: Callable[..., Result], tmp_path: Path
) -> None:
    """Two nodes on this machine, one of them killed in the middle of its run."""
    pytest.importorskip("ray", reason="requirements-cluster.txt")
    cluster_utils = importlib.import_module("ray.cluster_utils")
    rows = {"base": "", "- weight drop": "--wdrop 0", "filter": "--grad-filter"}
    table = write_table(tmp_path, rows, (1, 2), "--epochs 12 --checkpoint-every 7 --nonmono 0")
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
    run_table: Callable[..., Result], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run_table(write_table(tmp_path, {"a": ""}), "--ray", "--output", tmp_path / "out")
    assert result.code == 1
    assert result.err == "error: --ray: ray is not installed (requirements-cluster.txt)\n"
