"""finetune.py: its rule against by_hand.py, exact resume, its flags, what it refuses."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import by_hand
import pytest
import torch
from conftest import (
    TINY,
    Result,
    command_line,
    read_events,
    read_summary,
    read_weights,
    write_corpus,
)
from test_checkpoint import bad_file
from test_resume import assert_same_run
from test_whole_run import (
    BASE,
    DECAYING,
    FIXED,
    Flags,
    Runs,
    assert_events,
    assert_weights,
    train_in_two,
)

import finetune
import main
from assembly import build_model
from engine.checkpoint import load_training_state
from engine.origin import read_origin
from flags.finetuning import parse_finetuning
from flags.training import parse_training
from programs.finetune import model_flags

Run = Callable[..., Result]


def contents(save: Path) -> dict[str, bytes]:
    """All files of a run, by its best model."""
    paths = [save, *save.with_suffix("").iterdir()]
    return {str(path): path.read_bytes() for path in paths if path.name != ".lock"}


class Trained:
    """A corpus, and small models that main.py trained on it; no test may change their files."""

    def __init__(self, folder: Path) -> None:
        self.runs = Runs(folder)
        self.corpus = self.runs.corpus
        self.before: dict[str, bytes] = {}

    def model(self, name: str, flags: Flags) -> Path:
        save = self.runs.folder / f"{name}.pt"
        if not save.exists():
            self.runs.train(save, flags)
            self.before.update(contents(save))
        return save


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture(autouse=True)
def _nothing_of_the_old_run_is_touched(trained: Trained) -> Any:
    yield
    assert {path: Path(path).read_bytes() for path in trained.before} == trained.before


OLD: Flags = dict(BASE, seed=1, epochs=2)

# Flags of the old run; settings of fine-tuning that differ from it; whether the trigger fires.
CASES: dict[str, tuple[Flags, Flags, bool]] = {
    "untied, variable": (dict(untied=True), dict(nonmono=0, epochs=9, seed=3), True),
    "k1 < k2": ({}, dict(FIXED, k1=3, nonmono=1, epochs=9, lr=20.0), True),
    "to the last epoch": ({}, dict(DECAYING, epochs=3, seed=2), False),
    "nothing is better": ({}, dict(nonmono=0, epochs=9, lr=40.0), True),
}


@pytest.mark.parametrize("case", CASES)
def test_fine_tuning_by_hand(trained: Trained, call: Run, tmp_path: Path, case: str) -> None:
    """All of it, then stopped within two epochs and resumed."""
    old, changes, triggered = CASES[case]
    start = trained.model(f"model{len(old)}", {**OLD, **old})
    flags = {**OLD, **old, **changes}
    expected = by_hand.train(trained.corpus, read_weights(start), flags, fine_tuning=True)
    assert bool(expected.of("trigger")) == triggered
    assert (expected.best_epoch == 0) == (case == "nothing is better")
    ends = [line["step"] for line in expected.of("valid")]
    stops = [(a + b) // 2 for a, b in pairwise(ends[:3])]
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    argv = ["--save", start, *command_line(changes)]
    assert call(finetune, *argv, "--output", whole).code == 0
    assert call(finetune, *argv, "--output", parts, "--max-updates", stops[0]).code == 0
    assert call(finetune, "--resume", parts, "--max-updates", stops[1]).code == 0
    assert call(finetune, "--resume", parts).code == 0
    assert_same_run(whole, parts)
    assert_events(whole, expected)
    assert_weights(whole, expected.best)
    summary = read_summary(whole)
    assert summary["best_valid_ppl"] == pytest.approx(
        min(line["ppl"] for line in expected.of("valid")), rel=5e-6
    )
    assert (summary["best_epoch"], summary["ended"]) == (
        expected.best_epoch,
        "trigger" if triggered else "epochs",
    )
    assert summary["epochs"] == len(expected.of("valid")) - 1
    assert call(finetune, "--resume", whole, "--epochs", 20).code == 0 or not triggered
    if triggered:  # it is over, however many epochs there might be
        assert read_summary(whole)["updates"] == summary["updates"]


@pytest.mark.slow
def test_in_two_processes(trained: Trained, tmp_path: Path) -> None:
    start = trained.model("model0", OLD)
    flags = {**OLD, **CASES["k1 < k2"][1]}
    del flags["optimizer"]  # no flag of finetune.py
    expected = by_hand.train(
        trained.corpus, read_weights(start), {**OLD, **flags}, fine_tuning=True
    )
    output = tmp_path / "two.pt"
    train_in_two(trained.runs, start, flags, "--output", output, program="finetune.py")
    assert_events(output, expected)
    assert_weights(output, expected.best)


@pytest.fixture
def dropping(trained: Trained) -> Path:
    save = trained.runs.folder / "dropping.pt"
    if not save.exists():
        argv = [*TINY, "--data", trained.corpus, "--epochs", 1, "--nonmono", 0, "--save", save]
        assert main.main([*map(str, argv)]) == 0
        trained.before.update(contents(save))
    return save


def flags_of(save: Path) -> dict[str, Any]:
    config = json.loads((save.with_suffix("") / "config.json").read_text())
    flags: dict[str, Any] = config["flags"]
    return flags


def test_flags_that_are_not_given_are_the_old_run_s(
    trained: Trained, call: Run, tmp_path: Path
) -> None:
    old: Flags = dict(FIXED, epochs=1, nonmono=3, wdecay=0, seed=5, when=[1], k1=2, alpha=0.0)
    old.update(max_updates=5, quick=True)  # of its own session; a trial
    start = trained.model("scheme", {**OLD, **old})
    output = start.with_name("scheme.finetuned.pt")
    result = call(finetune, "--save", start)
    config = start.with_suffix("") / "config.json"
    assert f"flags that are not given: those of its run ({config})" in result.err
    ours, theirs = flags_of(output), flags_of(start)
    different = {name for name in ours if ours[name] != theirs[name]}
    assert different == {"save", "when", "max_updates", "quick"}
    result = call(finetune, "--save", start, "--bptt-scheme", "variable", "--lr", 3, "--output",
                  tmp_path / "other.pt", "--max-updates", 1)  # fmt: skip
    assert result.code == 0, result.err
    ours = flags_of(tmp_path / "other.pt")
    assert (ours["lr"], ours["k1"], ours["wdecay"]) == (3.0, None, 0.0)


def test_adam_s_learning_rate_is_not_taken_over(
    trained: Trained, call: Run, tmp_path: Path
) -> None:
    start = trained.model("adam", dict(OLD, epochs=1, optimizer="adam", lr=0.01))
    argv = ["--save", start, "--output", tmp_path / "a.pt", "--max-updates", 1]
    assert "except --lr, which was for adam" in call(finetune, *argv).err
    flags = flags_of(tmp_path / "a.pt")
    assert (flags["optimizer"], flags["lr"], flags["nhid"]) == ("sgd", 30.0, 8)


def test_a_model_without_its_run(dropping: Path, call: Run, tmp_path: Path) -> None:
    """Sizes and dropouts are the model's, the rest has its defaults; weight drop may be off."""
    alone = tmp_path / "alone.pt"
    alone.write_bytes(dropping.read_bytes())
    copy = Path(shutil.copy(dropping, f"{alone}.e1"))  # as --when makes it
    argv = ["--save", alone, "--data", flags_of(dropping)["data"], "--batch-size", 4]
    result = call(finetune, *argv, "--wdrop", 0, "--max-updates", 1, "--output", tmp_path / "a.pt")
    assert f"their defaults ({tmp_path / 'alone' / 'config.json'} is not there)" in result.err
    flags = flags_of(tmp_path / "a.pt")
    wanted = dict(emsize=6, nhid=8, dropout=0.2, dropouti=0.2, wdrop=0.0, bptt=70, batch_size=4)
    assert {name: flags[name] for name in wanted} == wanted
    first = [line["loss"] for save in (dropping, tmp_path / "a.pt") for line in read_events(save)
             if line["event"] == "valid"]  # fmt: skip
    assert first[0] == pytest.approx(first[1], rel=1e-3)  # another --eval-batch-size
    assert call(finetune, *argv, "--save", copy, "--max-updates", 1).code == 0
    assert (tmp_path / "alone.pt.e1.finetuned.pt").is_file()


@pytest.mark.parametrize(
    "command",
    ["--untied --wdrop 0.3", "--model GRU --emsize 5 --nhid 7 --nlayers 2 --grad-filter 3"],
)
def test_a_model_s_flags_build_it(command: str) -> None:
    argv = ["--emsize", "9", "--nhid", "4", *command.split()]
    args, _ = parse_training(argv)
    flags = model_flags(build_model(args, 11))
    assert flags.items() <= vars(args).items()
    assert {"model", "emsize", "nhid", "nlayers", "untied", "decoder", "wdrop"} <= flags.keys()


def test_another_model_of_the_name_is_another_start(
    dropping: Path, call: Run, tmp_path: Path
) -> None:
    start = tmp_path / "m.pt"
    start.write_bytes(dropping.read_bytes())
    argv = ["--save", start, "--data", flags_of(dropping)["data"], "--max-updates", 1]
    argv += ["--batch-size", 4, "--resume"]
    output = tmp_path / "m.finetuned.pt"
    for _ in range(2):
        assert call(finetune, *argv, "auto").code == 0
        config = json.loads((output.with_suffix("") / "config.json").read_text())
        assert config["origin"] == read_origin(start).named()
        assert config["origin"].keys() == {"epoch", "update", "valid_loss", "checksum", "path"}
    assert not (tmp_path / "m.finetuned.1.pt").exists()
    moved = replace(read_origin(start), path=tmp_path / "moved.pt")
    assert moved.is_origin_of(load_training_state(output.with_suffix("") / "last.pt"))
    payload = torch.load(start, weights_only=True)
    payload["weights"]["decoder.bias"] += 1
    torch.save(payload, start)
    assert call(finetune, *argv, output).err == (
        f"error: argument --save: {output.with_suffix('') / 'last.pt'} started from another model\n"
    )
    last = output.with_suffix("") / "last.pt"
    state = last.read_bytes()
    torch.save({**torch.load(last, weights_only=True), "origin": 3}, last)
    assert refused(call(finetune, *argv, output), 1).startswith(f"{last}: damaged checkpoint")
    last.write_bytes(state)
    assert call(finetune, *argv, "auto", "--seed", 8).code == 0  # its own flags
    assert (tmp_path / "m.finetuned.1.pt").exists()
    (event, *_) = read_events(output)
    assert (event["event"], event["epoch"]) == ("valid", 0)


# What is refused


def refused(result: Result, code: int) -> str:
    assert (result.code, result.out) == (code, ""), result
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    return result.err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "argument --save: is needed"),
        ("--resume auto", "argument --save: is needed"),
        ("--save {m} --output nosuffix", "argument --output: 'nosuffix' has no suffix"),
        ("--save {m} --output {m}", "argument --output: {m} would replace the run of --save"),
        ("--save {m} --output {folder}/dropping.bin", "argument --output: {folder}/dropping.bin"),
        ("--save {folder}/dropping/last.pt --output {m}", "argument --output: {m} would replace"),
        ("--save {m}.e1 --output {m}", "argument --output: {m} would replace"),
        ("--save {m} --nhid 9", "argument --nhid: 9, where {m} has 8"),
        ("--save {m} --untied", "argument --untied: True, where {m} has False"),
        ("--save {m} --model GRU", "argument --model: GRU, where {m} has LSTM"),
        ("--save {m} --optimizer adam", "unrecognized arguments: --optimizer adam"),
        ("--save {m} --no-asgd", "unrecognized arguments: --no-asgd"),
        ("--save {m} --k1 3", "argument --k1: goes with --bptt-scheme fixed only"),
        ("--save {m} --cuda", "argument --cuda: it switched CUDA off"),
    ],
)
def test_flags_that_cannot_be(dropping: Path, call: Run, flags: str, message: str) -> None:
    places = dict(m=dropping, folder=dropping.parent)
    line = refused(call(finetune, *flags.format(**places).split()), 2)
    assert line.startswith(message.format(**places))
    assert not (dropping.parent / "dropping.finetuned").exists()


def test_runs_and_texts_that_do_not_fit(
    dropping: Path, call: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = dropping.with_suffix("") / "last.pt"
    with monkeypatch.context() as patch:
        patch.chdir(last.parent)
        line = refused(call(finetune, "--save", last.name, "--output", tmp_path / "a.pt"), 1)
    assert line == f"last.pt: a training state; the model of this run is {dropping}"
    assert refused(call(finetune, "--resume", dropping), 1) == (
        f"{last}: a run of main.py, whose --resume continues it"
    )
    output = tmp_path / "tuned.pt"
    assert call(finetune, "--save", dropping, "--output", output, "--max-updates", 1).code == 0
    assert refused(call(main, "--resume", output), 1).endswith(
        "tuned/last.pt: a run of finetune.py, whose --resume continues it"
    )
    path = bad_file("malicious", tmp_path)
    assert refused(call(finetune, "--save", path), 1).startswith(f"{path}: ")
    assert not (tmp_path / "ran").exists()
    other = write_corpus(tmp_path / "other", words=3)
    result = call(finetune, "--save", dropping, "--data", other, "--output", tmp_path / "a.pt")
    assert refused(result, 1).startswith(f"{other}: its words (4) are not those of {dropping} (")
    other = write_corpus(tmp_path / "reordered", seed=5)
    result = call(finetune, "--save", dropping, "--data", other, "--output", tmp_path / "a.pt")
    assert refused(result, 1) == f"{other}: its words (31) are not those of {dropping} (31)"
    config = tmp_path / "copy" / "config.json"
    config.parent.mkdir()
    (tmp_path / "copy.pt").write_bytes(dropping.read_bytes())
    for text, message in [
        ("{", "not the configuration of a run"),
        ('{"flags": 3}', "not the configuration of a run"),
        ('{"flags": {"lr": "fast"}}', "argument --lr: 'fast' is not a number in (0, 1e30]"),
    ]:
        config.write_text(text)
        assert refused(call(finetune, "--save", tmp_path / "copy.pt"), 1) == f"{config}: {message}"


def test_the_other_flags_are_main_s() -> None:
    args, given, start = parse_finetuning(["--save", "a/PTB.pt", "--seed", "3"])
    main_args, _ = parse_training(["--save", "a/PTB.finetuned.pt", "--seed", "3"])
    assert (vars(args), given, start) == (vars(main_args), {"seed"}, "a/PTB.pt")
