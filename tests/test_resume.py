"""A run that was stopped anywhere and resumed ends bit for bit where the other one ends."""

import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Result, read_events, write_corpus
from forked import Child

import assembly
import main
import programs.train
from engine.run_folder import RunFolder, is_in_use

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
    return main.main(
        [*FLAGS, "--data", str(corpus), "--save", str(save), "--resume", "auto", *map(str, more)]
    )


def test_stopped_at_every_turn(whole: Path, tmp_path: Path) -> None:
    """Every four updates, and around an epoch's end, the switch and the fall of the rate."""
    save, events = tmp_path / "whole.pt", read_events(whole / "whole")
    ends = [e["step"] for e in events if e["event"] == "valid"]
    switch = next(e["step"] for e in events if e["event"] == "averaging")
    places = {ends[0], switch - 1, switch, switch + 1, ends[3] + 2, ends[-1]}
    for updates in sorted(places | {*range(4, ends[-1], 4)}):
        assert start(save, whole / "corpus", "--max-updates", updates) == 0
    assert start(save, whole / "corpus") == 0
    assert_same_run(whole / "whole.pt", save)


def test_more_epochs_than_planned_and_other_checkpoints(whole: Path, tmp_path: Path) -> None:
    save = tmp_path / "whole.pt"
    assert start(save, whole / "corpus", "--epochs", 1, "--checkpoint-every", 2) == 0
    assert start(save, whole / "corpus", "--checkpoint-minutes", 1e-6, "--max-updates", 40) == 0
    assert start(save, whole / "corpus", "--epochs", 5) == 0
    assert_same_run(whole / "whole.pt", save)


KINDS = {
    "adam": "--optimizer adam --lr 0.01 --when 1 2",
    "GRU": "--model GRU --untied --grad-filter 2",
}


@pytest.mark.parametrize("name", KINDS)
def test_other_kinds_of_runs_resume(whole: Path, tmp_path: Path, name: str) -> None:
    """Stopped twice within an epoch; tests/test_stop.py has more kinds."""
    flags = [*KINDS[name].split(), "--epochs", "3"]
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    assert start(one, whole / "corpus", *flags) == 0
    steps = [e["step"] for e in read_events(one) if e["event"] == "valid"]
    for stop in (1 + steps[0] // 2, (steps[1] + steps[2]) // 2):
        assert start(two, whole / "corpus", *flags, "--max-updates", stop) == 0
        last = torch.load(tmp_path / "two" / "last.pt", weights_only=True)
        assert last["position"]["row"] > 0
    assert start(two, whole / "corpus", *flags) == 0
    assert_same_run(one, two)
    assert two.with_name("two.pt.e2").exists() == (name == "adam")


def test_resume_by_path_under_the_same_or_another_name(
    whole: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the model, by the folder, and from inside it; another run of the name is kept."""
    save, folder = tmp_path / "run.pt", tmp_path / "run"
    assert start(tmp_path / "two.pt", whole / "corpus", "--max-updates", 1) == 0
    other = (tmp_path / "two.pt").read_bytes()
    assert start(save, whole / "corpus", "--max-updates", 20) == 0
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for path, name in ((save, "one"), (folder, "two")):
        assert run("--resume", path, "--save", tmp_path / f"{name}.pt").code == 0
        assert_same_run(whole / "whole.pt", tmp_path / f"{name}.pt")
        assert before == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert (tmp_path / "two.1.pt").read_bytes() == other
    monkeypatch.chdir(tmp_path)
    assert run("--resume", save, "--save", "run.pt").code == 0
    assert_same_run(whole / "whole.pt", save)
    monkeypatch.chdir(folder)
    for place in ("last.pt", "."):
        assert run("--resume", place).code == 0  # every flag is the run's own
        assert_same_run(whole / "whole.pt", save)
    for place in ("one", "run"):
        config = json.loads((tmp_path / place / "config.json").read_text())
        first, second = config["sessions"][:2]
        assert config["argv"] == first["argv"] != second["argv"]
        assert (first["from_update"], second["from_update"]) == (0, 20)


def test_resume_with_another_suffix(whole: Path, tmp_path: Path, run: Run) -> None:
    """The run's own best model is found by its own, and goes on under the new one."""
    save, last = tmp_path / "run.pt", tmp_path / "run" / "last.pt"
    assert start(save, whole / "corpus", "--max-updates", 20) == 0
    for name, updates in (("other.bin", 20), ("run.bin", 20), ("run.model", 1000)):
        assert run("--resume", last, "--save", tmp_path / name, "--max-updates", updates).code == 0
    assert_same_run(whole / "whole.pt", tmp_path / "run.model")
    assert run("--resume", tmp_path / "other.bin").code == 0
    assert_same_run(whole / "whole.pt", tmp_path / "other.bin")


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


def spawn(save: Path, corpus: Path, *more: object) -> Child:
    """A run without an end."""
    flags = [*FLAGS, "--epochs", "100000", "--data", corpus, "--save", save, "--resume", "auto"]
    return Child([*flags, *more])


def test_killed_in_the_middle(whole: Path, tmp_path: Path) -> None:
    save = tmp_path / "killed.pt"
    child = spawn(save, whole / "corpus", "--checkpoint-every", 1)
    child.wait_for(tmp_path / "killed" / "metrics.jsonl", '"valid"')
    child.send(signal.SIGKILL)
    child.wait()
    last = torch.load(tmp_path / "killed" / "last.pt", weights_only=True)
    epochs = last["position"]["epoch"] + 1
    assert start(save, whole / "corpus", "--epochs", epochs) == 0
    assert start(tmp_path / "whole.pt", whole / "corpus", "--epochs", epochs) == 0
    assert_same_run(tmp_path / "whole.pt", save)
    assert not list(tmp_path.rglob("*.tmp"))


def test_control_c_once_tests_the_best_model(tmp_path: Path) -> None:
    child = spawn(tmp_path / "run.pt", write_corpus(tmp_path / "corpus"))
    child.wait_for(tmp_path / "run" / "metrics.jsonl", '"valid"')
    child.send(signal.SIGINT)
    code, out, err = child.wait()
    assert code == 0, err
    assert "Exiting from training early: the best model is of epoch" in out
    assert out.splitlines()[-1].startswith("| End of training | test loss")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test_ppl"] > 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_once_is_enough_when_training_is_over(
    whole: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(programs.train, "test_best", lambda *_: os.kill(os.getpid(), number))
    flags = [*FLAGS, "--data", whole / "corpus", "--max-updates", 3]
    result = run(*flags, "--save", tmp_path / "run.pt")
    assert (result.code, result.err.splitlines()[-1]) == (1, "error: interrupted")


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
        other = folder.with_name("run.pt.e3.finetuned.pt")  # another run's
        other.touch()
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(Path, "rename", killed)
            calls = number
            with RunFolder(f"{folder}.pt") as begun:
                begun.begin()
        with RunFolder(f"{folder}.pt") as begun:
            begun.begin()
            assert is_in_use(f"{folder}.pt")
        files = [path for path in folder.parent.rglob("*") if path.is_file()]
        found = {str(path.relative_to(folder.parent)): path.read_text() for path in files}
        assert found.pop("run/.lock") == found.pop(other.name) == ""
        assert found == {name: name for name in expected}
