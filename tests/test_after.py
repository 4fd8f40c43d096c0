"""A table's `after`: programs that run on each row's model, and their columns."""

import csv
import importlib
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_ablation import planned, run_table, write_table  # noqa: F401

from data.text import read_text
from engine.ablation import pool
from engine.ablation.results import collect
from engine.ablation.runs import Run, State, read_state, source_of
from engine.ablation.stages import STAGES, After, Step, steps_after
from engine.ablation.table import Row, Table, load_table
from engine.checkpoint import load_model
from engine.errors import RunError, UsageError
from evaluation.cache import Cache
from evaluation.evaluate import evaluate, perplexity
from evaluation.plain import Plain

STAGED = """
after = ["finetune --epochs 1 --lr 1", "cache --window 9"]
[[rows]]
name = "base"
published = { valid = 60.7, test = 58.8, finetune = { valid = 60.0, test = 57.3 } }
"""


def staged_table(folder: Path) -> Path:
    """One row and seed, followed by fine-tuning and a cache."""
    path = write_table(folder, {}, (1,))
    path.write_text(path.read_text() + STAGED)
    return path


def run_here(table: Path, out: Path) -> None:
    """What ablate.py does in processes, in this one."""
    [run] = planned(table, out)
    run.save.parent.mkdir(parents=True)
    jobs: list[Run | Step] = [run, *run.steps]
    for job in jobs:
        assert importlib.import_module(job.program.removesuffix(".py")).main(job.argv) == 0
        if isinstance(job, Step):
            assert job.keep(0, source_of(read_state(run).summary))


def test_a_table_with_fine_tuning_and_a_cache(tmp_path: Path, run_table: Any) -> None:  # noqa: F811
    """Each figure is that of the program's own files; the cache works on the fine-tuned model."""
    table, out = staged_table(tmp_path), tmp_path / "out"
    plan = run_table(table, "--output", out, "--dry-run")
    assert "| after 1 of 1 runs: finetune --epochs 1 --lr 1; its time is not counted" in plan.out
    run_here(table, out)
    result = run_table(table, "--output", out)
    assert result.code == 0, result.err
    (row,) = json.loads((out / "table.json").read_text())["rows"]
    runs = out / "runs"
    tuned = json.loads((runs / "base-seed1.finetune" / "summary.json").read_text())
    assert row["after"]["finetune"]["valid"]["mean"] == tuned["best_valid_ppl"]
    assert row["after"]["finetune"]["test"]["mean"] == tuned["test_ppl"] != row["test"]["mean"]
    config = json.loads((runs / "base-seed1.finetune" / "config.json").read_text())
    assert config["origin"]["path"] == str(runs / "base-seed1.pt")
    assert (config["flags"]["lr"], config["flags"]["seed"], config["flags"]["nhid"]) == (1.0, 1, 8)
    model, vocabulary = load_model(runs / "base-seed1.finetune.pt")
    ids = read_text(tmp_path / "corpus" / "test.txt", vocabulary).ids
    cached = perplexity(evaluate(Cache(Plain(model), 9, 1.0, 0.1), ids, 1))
    assert row["after"]["cache"]["test"]["mean"] == pytest.approx(cached, rel=1e-6)
    assert row["after"]["cache"]["valid"]["n"] == 0

    header, _, line = [line for line in result.out.splitlines() if line.startswith("| ")][:3]
    names = [name.strip() for name in header.split("|")[-4:-1]]
    assert names == ["finetune, valid ppl", "finetune, test ppl", "cache, test ppl"]
    assert line.split("|")[-2].strip() == f"{cached:.2f}"
    against = next(line for line in result.out.splitlines() if line.startswith("| base, finetune"))
    assert "60.00 / 57.30" in against
    with (out / "table.csv").open() as file:
        (figures,) = csv.DictReader(file)
    assert float(figures["finetune_test_mean"]) == tuned["test_ppl"]
    assert (figures["cache_test_n"], figures["cache_valid_mean"]) == ("1", "")

    # Finished stages are not run again, and other flags are refused.
    times = {path: path.stat().st_mtime_ns for path in runs.rglob("*.*")}
    again = run_table(table, "--output", out)
    assert (again.code, again.out) == (0, result.out)
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*.*")} == times
    table.write_text(table.read_text().replace("--window 9", "--window 8"))
    refused = run_table(table, "--output", out)
    assert refused.code == 2
    assert "cache --window 8 (was --window 9); give another --output" in refused.err


# With programs that only pretend

FAKE = """
import json, pathlib, sys
program, argv = pathlib.Path(sys.argv[0]), sys.argv[1:]
name = program.name
if name == "evaluate.py":
    name = "cache" if "--cache" in argv else "dynamic"
    path = argv[argv.index("--summary") + 1]
else:
    flag = "--save" if name == "main.py" else "--output"
    path = argv[argv.index(flag) + 1].removesuffix(".pt") + "/summary.json"
plan = json.loads(program.with_name("plan.json").read_text())
with program.with_name("calls").open("a") as calls:
    calls.write(name + "\\n")
code, summary = plan[name]
if summary is not None:
    pathlib.Path(path).parent.mkdir(exist_ok=True)
    pathlib.Path(path).write_text(json.dumps(summary))
if code:
    print("error: it broke", file=sys.stderr)
sys.exit(code)
"""
MAIN: dict[str, Any] = dict(
    epochs=2, updates=9, seconds=1.0, best_epoch=2, best_valid_ppl=9.0, test_ppl=8.0
)
TUNED = dict(best_valid_ppl=7.0, test_ppl=6.0, ended="trigger")
FINE = {
    "main.py": [0, MAIN],
    "finetune.py": [0, TUNED],
    "cache": [0, dict(loss=1.0, ppl=5.0)],
    "dynamic": [0, dict(loss=1.0, ppl=4.0)],
}


class Pretended:
    """A run with all stages, of fake programs that follow a plan: exit code and summary."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        for name in ("main.py", "finetune.py", "evaluate.py"):
            (folder / name).write_text(FAKE)
        monkeypatch.setattr(pool, "PROGRAM", folder / "main.py")
        monkeypatch.setattr(pool, "GRACE_SECONDS", 0)
        after = [After(name) for name in STAGES]
        self.table = Table(folder / "t.toml", "T", [], [Row("base")], [1], after=after)
        save = folder / "base-seed1.pt"
        flags = dict(data="corpus", device="cpu", epochs=2, max_updates=None)
        steps = steps_after(save, flags, after)
        self.run = Run(self.table.rows[0], 1, ["--save", str(save)], flags, save, steps)

    def execute(self, **plan: Any) -> tuple[list[str], State]:
        """Returns which programs were started, and the state after them."""
        (self.folder / "plan.json").write_text(json.dumps({**FINE, **plan}))
        calls = self.folder / "calls"
        calls.write_text("")
        pool.execute(self.run, {}, threading.Event())
        return calls.read_text().split(), read_state(self.run)

    def row(self) -> dict[str, Any]:
        row: dict[str, Any] = collect(self.table, [self.run], self.folder)["rows"][0]
        return row


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pretended:
    return Pretended(tmp_path, monkeypatch)


ALL = ["main.py", "finetune.py", "cache", "dynamic"]


def test_stages_follow_in_order_once_and_a_longer_run_is_followed_anew(
    pretended: Pretended,
) -> None:
    """The summary of a start before it does not count for the new model."""
    calls, state = pretended.execute()
    assert (calls, state.kind) == (ALL, "done")
    assert [step.ppl for step in state.steps.values()] == [
        dict(valid=7.0, test=6.0), dict(test=5.0), dict(test=4.0)
    ]  # fmt: skip
    models = [step.model.name for step in pretended.run.steps]
    assert models == ["base-seed1.pt", "base-seed1.finetune.pt", "base-seed1.finetune.pt"]
    assert pretended.execute()[0] == []
    better = {**MAIN, "epochs": 3, "best_epoch": 3, "best_valid_ppl": 8.5}
    pretended.run.flags["epochs"] = 3
    calls, state = pretended.execute(**{"main.py": [0, better], "finetune.py": [1, None]})
    assert (calls, state.kind) == (["main.py", "finetune.py"], "failed")
    assert pretended.row()["after"]["finetune"]["test"]["n"] == 0
    calls, state = pretended.execute()
    assert (calls, state.kind) == (["finetune.py", "cache", "dynamic"], "done")


def test_a_stage_is_done_anew_where_fine_tuning_now_comes_before_it(pretended: Pretended) -> None:
    """Its figure was that of the run's own best model."""
    every = list(pretended.run.steps)
    pretended.run.steps[:] = [replace(every[1], model=pretended.run.save)]
    assert pretended.execute()[0] == ["main.py", "cache"]
    pretended.run.steps[:] = every
    assert read_state(pretended.run).steps["cache"].kind == "started"
    plan = dict(cache=[0, dict(loss=1.0, ppl=3.0)])
    calls, state = pretended.execute(**plan)
    assert (calls, state.steps["cache"].ppl) == (["finetune.py", "cache", "dynamic"], {"test": 3.0})
    record = json.loads(every[1].record_path.read_text())
    del record["model"]  # as an older version wrote it
    every[1].record_path.write_text(json.dumps(record))
    assert pretended.execute()[0] == []


@pytest.mark.parametrize(
    ("outcome", "left_out"),
    [
        ([1, None], "seed 1 failed: it broke (finetune)"),
        ([0, dict(TUNED, ended="interrupted")], "seed 1 failed:"),
        ([1, dict(diverged=True, cause="loss is nan")],
         "seed 1 diverged: loss is nan (finetune)"),
        ([0, dict(TUNED, test_ppl=None)],
         "seed 1 diverged: its perplexity is not finite (finetune)"),
    ],
)  # fmt: skip
def test_a_stage_without_a_result(pretended: Pretended, outcome: Any, left_out: str) -> None:
    """The run's own figures stay; the stages after it wait; what failed is tried again."""
    calls, state = pretended.execute(**{"finetune.py": outcome})
    assert (calls, state.kind, state.trained) == (ALL[:2], left_out.split()[2].strip(":"), True)
    row = pretended.row()
    assert row["test"]["mean"] == 8.0
    assert [row["after"][name]["test"]["n"] for name in STAGES] == [0, 0, 0]
    assert row["left_out"][0].startswith(left_out)
    assert "seed 1 not started yet (cache)" in row["left_out"]
    assert pretended.execute()[0] == (ALL[1:] if state.kind == "failed" else [])


# Tables


def test_an_after_that_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    for after, message in {
        '"finetune"': "after is a list of strings",
        '[" "]': "after is a list of strings",
        '["sleep"]': "after: no stage 'sleep' (there are finetune, cache, dynamic)",
        '["cache", "cache --window 9"]': "after names a stage twice",
    }.items():
        path.write_text(f'title = "x"\nseeds = [1]\nafter = {after}\n[[rows]]\nname = "a"\n')
        with pytest.raises(RunError) as caught:
            load_table(path)
        assert message in str(caught.value)
        path.write_text(f'title = "x"\nseeds = [1]\n[[rows]]\nname = "a"\nafter = {after}\n')
        with pytest.raises(RunError, match="row 'a': after"):
            load_table(path)


def test_bad_flags_of_a_stage_are_refused(tmp_path: Path) -> None:
    path = staged_table(tmp_path)
    text = path.read_text().replace(', "cache --window 9"', "")
    for after, message in {
        "finetune --lr fast": "finetune: argument --lr: 'fast' is not a number",
        "finetune --optimizer adam": "finetune: unrecognized arguments: --optimizer adam",
        "finetune --seed 3": "finetune: argument --seed: a table may not give it",
        "finetune --output x.pt": "finetune: argument --output: a table may not give it",
        "dynamic --dynamic sgd": "dynamic: argument --dynamic: a table may not give it",
        "dynamic --theta 1": "dynamic: argument --theta: goes with --cache only",
        "cache -h": "cache: -h runs nothing",
    }.items():
        path.write_text(text.replace("finetune --epochs 1 --lr 1", after))
        with pytest.raises(UsageError) as caught:
            planned(path, tmp_path / "out")
        assert f"row 'base': {message}" in str(caught.value)


def test_a_row_may_have_stages_of_its_own(tmp_path: Path) -> None:
    path = staged_table(tmp_path)
    path.write_text(path.read_text() + '[[rows]]\nname = "none"\nafter = []\n')
    table = load_table(path)
    assert [[after.name for after in table.after_of(row)] for row in table.rows] == [
        ["finetune", "cache"], []
    ]  # fmt: skip
    assert table.stages == ["finetune", "cache"]
    assert table.rows[0].published_after == dict(finetune=dict(valid=60.0, test=57.3))


def test_fine_tuning_in_a_trial_of_a_table_is_a_trial(tmp_path: Path) -> None:
    path = staged_table(tmp_path)
    for trial in ([], ["--quick"]):
        [run] = planned(path, tmp_path / "out", *(f"--flags={flag}" for flag in trial))
        assert [{"--quick"} & {*step.argv} for step in run.steps] == [{*trial}, set()]
