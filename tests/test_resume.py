"""A run that was stopped anywhere and resumed ends bit for bit where the other one ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY, Result, read_events, write_corpus

import assembly
import programs.train
from engine.run_folder import RunFolder

Run = Callable[..., Result]
# nonmono 0 and a high learning rate: averaging starts within the first epochs
FLAGS = [*TINY, "--nonmono", "0", "--lr", "20", "--epochs", "5", "--when", "4"]
CLOCKS = {"seconds", "training_seconds", "epoch_seconds", "interval_seconds"}


def assert_same(one: Any, other: Any, place: str = "state") -> None:
    """Bit for bit, through nested containers."""
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one.keys() - CLOCKS - {"metrics_bytes", "flags"}:
            assert_same(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{place}[{i}]")
    else:
        assert one == other, place


def assert_same_run(one: Path, other: Path) -> None:
    """Two runs by their --save paths."""
    assert read_events(one) == read_events(other)
    assert_same(*(torch.load(p, weights_only=True)["weights"] for p in (one, other)))
    assert_same(
        *(torch.load(p.with_suffix("") / "last.pt", weights_only=True) for p in (one, other))
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    write_corpus(folder / "corpus")
    assert start(folder / "whole.pt", folder / "corpus") == 0
    events = read_events(folder / "whole")
    switch = [e["epoch"] for e in events if e["event"] == "averaging"]
    assert switch, "this run has to switch to averaging"
    assert switch[0] < 5
    return folder


def start(save: Path, corpus: Path, *more: object) -> int:
    import main

    return main.main(
        [*FLAGS, "--data", str(corpus), "--save", str(save), "--resume", "auto", *map(str, more)]
    )


PLACES = [
    "epoch's end",
    "just before the switch",
    "at the switch",
    "just after the switch",
    "after the learning rate fell",
    "the end",
]


def update_of(place: str, whole: Path) -> int:
    """The update to stop after."""
    events = read_events(whole / "whole")
    ends = [e["step"] for e in events if e["event"] == "valid"]
    switch = next(e["step"] for e in events if e["event"] == "averaging")
    updates: list[int] = [ends[0], switch - 1, switch, switch + 1, ends[3] + 2, ends[-1]]
    return updates[PLACES.index(place)]


@pytest.mark.parametrize("place", PLACES)
def test_stopped_and_resumed(whole: Path, tmp_path: Path, place: str) -> None:
    save = tmp_path / "whole.pt"
    assert start(save, whole / "corpus", "--max-updates", update_of(place, whole)) == 0
    assert start(save, whole / "corpus") == 0
    assert_same_run(whole / "whole.pt", save)


def test_stopped_at_every_turn(whole: Path, tmp_path: Path) -> None:
    """Sessions of four updates each."""
    save = tmp_path / "whole.pt"
    total = read_events(whole / "whole")[-1]["step"]
    for updates in range(4, total, 4):
        assert start(save, whole / "corpus", "--max-updates", updates) == 0
    assert start(save, whole / "corpus") == 0
    assert_same_run(whole / "whole.pt", save)


def test_more_epochs_than_planned(whole: Path, tmp_path: Path) -> None:
    save = tmp_path / "whole.pt"
    assert start(save, whole / "corpus", "--epochs", 2) == 0
    assert start(save, whole / "corpus", "--epochs", 5) == 0
    assert_same_run(whole / "whole.pt", save)


def test_checkpoint_flags_change_nothing(whole: Path, tmp_path: Path) -> None:
    save = tmp_path / "whole.pt"
    assert start(save, whole / "corpus", "--checkpoint-every", 2, "--max-updates", 9) == 0
    assert start(save, whole / "corpus", "--checkpoint-minutes", 1e-6) == 0
    assert_same_run(whole / "whole.pt", save)


def test_adam_resumes_too(whole: Path, tmp_path: Path) -> None:
    flags = ["--optimizer", "adam", "--lr", "0.01", "--when", "2", "3"]
    for name in ("one", "two"):
        save = tmp_path / name / "run.pt"
        save.parent.mkdir()
        if name == "two":
            assert start(save, whole / "corpus", *flags, "--max-updates", 17) == 0
        assert start(save, whole / "corpus", *flags) == 0
        assert (tmp_path / name / "run.pt.e2").exists()
    assert_same_run(tmp_path / "one" / "run.pt", tmp_path / "two" / "run.pt")


KINDS = {
    "1, 1": "--bptt-scheme fixed --bptt 1",
    "4, 10": "--bptt-scheme fixed --k1 4",
    "25, 10": "--bptt-scheme fixed --k1 25",
    "randomized": "--bptt-scheme randomized --keep-prob 0.6 --bptt 5 --lr 2",
    "full": "--bptt-scheme full --lr 0.5",
    "GRU": "--model GRU --untied",
    "bf16": "--precision bf16 --loss-scale dynamic --loss-scale-window 5",
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_run_resumes(whole: Path, tmp_path: Path, name: str) -> None:
    """Stopped twice within an epoch (full: at its ends), with the gradient filter where it may."""
    flags = [*KINDS[name].split(), "--epochs", "3"]
    flags += [] if name == "bf16" else ["--grad-filter", "2"]
    for part in ("one", "two"):
        save = tmp_path / part / "run.pt"
        save.parent.mkdir()
        if part == "two":
            steps = [
                e["step"] for e in read_events(tmp_path / "one" / "run") if e["event"] == "valid"
            ]
            for stop in (1 + steps[0] // 2, (steps[1] + steps[2]) // 2):
                assert start(save, whole / "corpus", *flags, "--max-updates", stop) == 0
                last = torch.load(save.with_suffix("") / "last.pt", weights_only=True)
                assert (last["position"]["row"] > 0) == (name != "full")
        assert start(save, whole / "corpus", *flags) == 0
    assert_same_run(tmp_path / "one" / "run.pt", tmp_path / "two" / "run.pt")
    [test] = [e for e in read_events(tmp_path / "one" / "run") if e["event"] == "test"]
    tokens = torch.load(tmp_path / "one" / "run" / "last.pt", weights_only=True)["position"]
    words = len((whole / "corpus" / "train.txt").read_text().replace("\n", " <eos> ").split())
    assert tokens["tokens"] == 3 * (words // 4 - 1) * 4
    assert test["ppl"] < 60


def test_flags_of_a_scheme_on_resume(whole: Path, tmp_path: Path, run: Run) -> None:
    save = tmp_path / "run.pt"
    flags = ["--bptt-scheme", "fixed", "--max-updates", 3]
    assert start(save, whole / "corpus", *flags) == 0
    assert run("--resume", save, "--k1", 10, "--max-updates", 4).code == 0  # what it was anyway
    result = run("--resume", save, "--k1", 5)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "--k1 5 (was 10)" in result.err
    result = run("--resume", save, "--keep-prob", 0.5)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "--keep-prob 0.5 (was None)" in result.err


@pytest.mark.parametrize("what", ["last.pt", "folder", "best model"])
def test_resume_by_path_under_the_same_or_another_name(
    whole: Path, tmp_path: Path, run: Run, what: str
) -> None:
    save = tmp_path / "run.pt"
    assert start(save, whole / "corpus", "--max-updates", 20) == 0
    path = {"last.pt": tmp_path / "run" / "last.pt", "folder": tmp_path / "run"}.get(what, save)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    elsewhere = tmp_path / "elsewhere.pt"
    assert run("--resume", path, "--save", elsewhere).code == 0
    assert_same_run(whole / "whole.pt", elsewhere)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    assert run("--resume", path).code == 0  # every flag is the run's own
    assert_same_run(whole / "whole.pt", save)
    for place in ("run", "elsewhere"):
        config = json.loads((tmp_path / place / "config.json").read_text())
        first, second = config["sessions"]
        assert config["argv"] == first["argv"] != second["argv"]
        assert (first["from_update"], second["from_update"]) == (0, 20)


def test_resume_from_inside_the_run_s_folder(
    whole: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = tmp_path / "run.pt"
    assert start(save, whole / "corpus", "--max-updates", 20) == 0
    monkeypatch.chdir(tmp_path / "run")
    for path in ("last.pt", "."):
        assert run("--resume", path).code == 0
        assert_same_run(whole / "whole.pt", save)


def test_another_run_is_refused_with_a_list_of_the_differences(
    whole: Path, tmp_path: Path, run: Run
) -> None:
    save = tmp_path / "run.pt"
    assert start(save, whole / "corpus", "--max-updates", 3) == 0
    before = (tmp_path / "run" / "last.pt").read_bytes()
    result = run("--resume", save, "--nhid", 9, "--seed", 8, "--log-interval", 100, "--untied")
    assert result.code == 2
    assert result.err == (
        "error: argument --resume: the run was started with other flags: "
        "--nhid 9 (was 8), --seed 8 (was 7), --untied True (was False)\n"
    )
    other = write_corpus(tmp_path / "other", seed=5)
    result = run("--resume", save, "--data", other)
    assert result.code == 1
    assert result.err == f"error: {other}: its text is not that of the run to be resumed\n"
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def spawn(save: Path, corpus: Path, *more: str, new_session: bool = False) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "main.py"), *FLAGS, "--epochs", "100000"]
    command += ["--data", str(corpus), "--save", str(save), "--resume", "auto", *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=new_session,
    )  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen, text: str = "") -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and text in path.read_text(errors="replace"):
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} did not come: {process.communicate()}")


def test_killed_in_the_middle(whole: Path, tmp_path: Path) -> None:
    save = tmp_path / "killed.pt"
    process = spawn(save, whole / "corpus", "--checkpoint-every", "1")
    wait_for(tmp_path / "killed" / "metrics.jsonl", process, '"valid"')
    process.kill()
    process.communicate()
    last = torch.load(tmp_path / "killed" / "last.pt", weights_only=True)
    epochs = last["position"]["epoch"] + 1
    assert start(save, whole / "corpus", "--epochs", epochs) == 0
    assert start(tmp_path / "whole.pt", whole / "corpus", "--epochs", epochs) == 0
    assert_same_run(tmp_path / "whole.pt", save)
    assert not list(tmp_path.rglob("*.tmp"))


def test_control_c_once_tests_the_best_model(whole: Path, tmp_path: Path) -> None:
    process = spawn(tmp_path / "run.pt", whole / "corpus")
    wait_for(tmp_path / "run" / "metrics.jsonl", process, '"valid"')
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Exiting from training early: the best model is of epoch" in out
    assert out.splitlines()[-1].startswith("| End of training | test loss")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test_ppl"] > 1


@pytest.fixture
def long_test(tmp_path: Path) -> Path:
    """A corpus whose test text takes long, so that a signal comes while it is read."""
    corpus = write_corpus(tmp_path / "long")
    (corpus / "test.txt").write_text((corpus / "test.txt").read_text() * 12000)
    return corpus


def test_control_c_twice_stops_at_once(long_test: Path, tmp_path: Path) -> None:
    process = spawn(tmp_path / "run.pt", long_test)
    wait_for(tmp_path / "run" / "metrics.jsonl", process, '"valid"')
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Exiting from training early"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert err.splitlines()[-1] == "error: interrupted"
    assert "End of training" not in out


def test_once_is_enough_when_training_is_over(long_test: Path, tmp_path: Path) -> None:
    process = spawn(tmp_path / "run.pt", long_test, "--epochs", "1")
    wait_for(tmp_path / "run" / "last.pt", process)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert err.splitlines()[-1] == "error: interrupted"
    assert "End of training" not in out


def test_a_folder_belongs_to_one_run(whole: Path, tmp_path: Path, run: Run) -> None:
    save = tmp_path / "run.pt"
    with RunFolder(save):
        result = run(*FLAGS, "--data", whole / "corpus", "--save", save)
        assert result.code == 1
        holder = f"{tmp_path / 'run'}: another process is running there (process {os.getpid()}: "
        assert result.err.startswith(f"error: {holder}")
    assert start(save, whole / "corpus", "--max-updates", 1) == 0


def test_a_run_that_goes_on_between_reading_and_locking_is_not_resumed_from_the_old_state(
    whole: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, build = tmp_path / "whole.pt", assembly.build_trainer
    flags = [*FLAGS, "--data", whole / "corpus", "--save", save, "--resume", "auto"]
    for updates in (9, 20):  # no state was there yet; a state was

        def meanwhile(*args: Any, updates: int = updates) -> Any:
            monkeypatch.setattr(programs.train, "build_trainer", build)
            assert start(save, whole / "corpus", "--max-updates", updates) == 0
            return build(*args)

        monkeypatch.setattr(programs.train, "build_trainer", meanwhile)
        result = run(*flags, "--max-updates", 30)
        last = tmp_path / "whole" / "last.pt"
        message = f"{last}: another process has just replaced it; the same command goes on"
        assert (result.code, result.err.splitlines()[-1]) == (1, f"error: {message}")
    assert start(save, whole / "corpus") == 0
    assert_same_run(whole / "whole.pt", save)


def test_a_run_that_is_moved_aside_stays_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each of the renamings."""
    rename, calls = Path.rename, 0

    def killed(path: Path, target: Path) -> None:
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise KeyboardInterrupt
        rename(path, target)

    names = ["config.json", "metrics.jsonl", "last.pt", "summary.json", "last.previous.pt"]
    for number in range(8):
        folder = tmp_path / str(number) / "run"
        folder.mkdir(parents=True)
        expected = {f"run.1/{name}" for name in names} | {"run.1.pt", "run.1.pt.e3"}
        for name in expected:
            (folder.parent / name.replace(".1", "")).write_text(name)
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(Path, "rename", killed)
            calls = number
            with RunFolder(f"{folder}.pt") as begun:
                begun.begin()
        with RunFolder(f"{folder}.pt") as begun:
            begun.begin()
        files = [path for path in folder.parent.rglob("*") if path.is_file()]
        found = {str(path.relative_to(folder.parent)): path.read_text() for path in files}
        assert found.pop("run/.lock") == ""
        assert found == {name: name for name in expected}
