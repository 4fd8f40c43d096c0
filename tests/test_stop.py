"""A stop that is asked for within an update or an evaluation gives it up, and costs nothing."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Result, read_events, write_corpus
from forked import Child
from test_ranks import FLAGS as RANKS_FLAGS
from test_ranks import assert_same_run as assert_nearly_same_run
from test_ranks import children_of, command, wait_for
from test_resume import assert_same_run, start

import evaluation.evaluate
import evaluation.predictor
from engine.interrupt import Interrupt, StopRequested
from evaluation.evaluate import evaluate
from evaluation.plain import Plain
from model import RNNModel
from training.requests import Requests

Run = Callable[..., Result]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]


def signal_at(
    monkeypatch: pytest.MonkeyPatch, owner: type, call: int, number: signal.Signals
) -> None:
    """Send this process a signal as owner.check is called for the call-th time."""
    check, calls = owner.check, [0]  # type: ignore[attr-defined]

    def counted(self: Any) -> None:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), number)
        check(self)

    monkeypatch.setattr(owner, "check", counted)


SCHEMES = {
    "full": "--bptt-scheme full --lr 0.5",
    "randomized": "--bptt-scheme randomized --keep-prob 0.8 --bptt 5 --lr 2",
    "25, 10": "--bptt-scheme fixed --k1 25",
    "variable": "",
    "bf16": "--precision bf16 --loss-scale dynamic --loss-scale-window 5",
}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a scheme's uninterrupted run, and of the corpus."""
    folder = tmp_path_factory.mktemp("wholes")
    write_corpus(folder / "corpus")

    def get(name: str) -> Path:
        place = folder / name.replace(", ", "-")
        if not place.exists():
            place.mkdir()
            assert start(place / "whole.pt", folder / "corpus", *flags_of(name)) == 0
        return place

    return get


def flags_of(name: str) -> list[str]:
    filters = [] if name == "bf16" else ["--grad-filter", "2"]
    return [*SCHEMES[name].split(), *filters, "--epochs", "4"]


@pytest.mark.parametrize("name", SCHEMES)
def test_an_update_is_given_up_and_repeated(
    wholes: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Three times, by another signal each; where a window has one piece also while averaging."""
    whole, save = wholes(name), tmp_path / "whole.pt"
    corpus, flags = whole.parent / "corpus", flags_of(name)
    updates = []
    one_piece = name in ("variable", "bf16")
    calls = (4, 17, 16) if one_piece else (4, 30, 30)
    for call, number in zip(calls, SIGNALS, strict=False):
        with monkeypatch.context() as patch:
            signal_at(patch, Requests, call, number)
            stopped = start(save, corpus, *flags)
        assert stopped == (0 if number == signal.SIGINT else 1)
        last = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)
        updates.append(last["position"]["update"])
    assert updates == sorted(set(updates))
    assert last["optimizer"]["nt_asgd"]["averaging"] or not one_piece
    assert start(save, corpus, *flags) == 0
    assert_same_run(whole / "whole.pt", save)


def test_control_c_twice_stops_at_once() -> None:
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert (interrupt.requested, interrupt.terminated) == (True, False)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_validation_is_given_up_and_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """In the first epoch, and in one whose validation is of the averaged weights."""
    monkeypatch.setattr(evaluation.evaluate, "WINDOW_TOKENS", 9)
    corpus, save = write_corpus(tmp_path / "corpus"), tmp_path / "run.pt"
    assert start(tmp_path / "whole.pt", corpus) == 0
    rows = len((corpus / "train.txt").read_text().replace("\n", " <eos> ").split()) // 4 - 1
    for epoch, call in ((1, 5), (5, 60)):
        with monkeypatch.context() as patch:
            signal_at(patch, Interrupt, call, number)
            stopped = start(save, corpus, "--max-updates", 1000)
        assert stopped == (0 if number == signal.SIGINT else 1)
        position = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["position"]
        assert (position["epoch"], position["row"]) == (epoch, rows)
        validated = [e["epoch"] for e in read_events(tmp_path / "run") if e["event"] == "valid"]
        assert validated == list(range(1, epoch))
        # As many updates as there were: the validation is still the epoch's.
    assert start(save, corpus, "--max-updates", position["update"]) == 0
    assert_same_run(tmp_path / "whole.pt", save)


def test_the_validation_of_a_run_cut_short_is_given_up(
    wholes: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of --max-updates, after its checkpoint."""
    whole, save = wholes("variable"), tmp_path / "whole.pt"
    corpus, flags = whole.parent / "corpus", flags_of("variable")
    with monkeypatch.context() as patch:
        signal_at(patch, Interrupt, 1, signal.SIGUSR1)
        assert start(save, corpus, *flags, "--max-updates", 3) == 1
    assert "valid" not in (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert start(save, corpus, *flags) == 0
    assert_same_run(whole / "whole.pt", save)


def test_evaluation_asks_between_windows_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = RNNModel("LSTM", 9, 4, 5, 2)
    ids, calls = torch.arange(101) % 9, []
    plain = evaluate(Plain(model), ids, 2, window=5)
    monkeypatch.setattr(evaluation.predictor, "BLOCK_VALUES", 9 * 5)
    found = evaluate(Plain(model), ids, 2, 5, lambda: calls.append(0))
    assert found == pytest.approx(plain, rel=1e-6)
    assert len(calls) == 20
    interrupt = Interrupt()
    interrupt.check()
    interrupt.requested = True
    with pytest.raises(StopRequested):
        evaluate(Plain(model.train()), ids, 2, 5, interrupt.check)
    assert model.training


def longer(corpus: Path, split: str, times: int) -> None:
    path = corpus / f"{split}.txt"
    path.write_text(path.read_text() * times)


@pytest.mark.parametrize(
    ("within", "number"),
    [("full", signal.SIGUSR1), ("validation", signal.SIGTERM)],
)
def test_it_takes_two_seconds(tmp_path: Path, number: signal.Signals, within: str) -> None:
    """Where the update or the validation takes most of a minute."""
    corpus, flags = write_corpus(tmp_path / "corpus"), "--bptt-scheme full --lr 0.1"
    longer(corpus, *(("valid", 40000) if within == "validation" else ("train", 600)))
    if within == "validation":
        flags = "--checkpoint-every 100000"
    child = Child([*TINY, *flags.split(), "--data", corpus, "--save", tmp_path / "run.pt"])
    if within == "validation":
        child.wait_for(tmp_path / "run" / "metrics.jsonl", '"train"')
    else:
        child.wait_until(lambda: "from update 0" in child.printed()[1])
    time.sleep(1)
    asked, last = time.monotonic(), tmp_path / "run" / "last.pt"
    child.send(number)
    child.wait_until(lambda: last.exists() or child.ended())
    assert time.monotonic() - asked < 2
    code, _, err = child.wait()
    assert code == 1
    assert err.splitlines()[-1] == f"error: terminated; --resume {last} goes on from here"
    position = torch.load(last, weights_only=True)["position"]
    assert (position["update"] == 0) == (within != "validation")


@pytest.mark.slow
def test_processes_stop_together(run: Run, tmp_path: Path) -> None:
    """Where the leader gets the signal as it validates, and the other one waits for it."""
    corpus = write_corpus(tmp_path / "corpus")
    longer(corpus, "valid", 20000)
    flags = [*RANKS_FLAGS, "--data", corpus, "--epochs", "1", "--checkpoint-every", "100000"]
    process = subprocess.Popen(
        command(2, *flags, "--save", tmp_path / "two.pt"), stderr=subprocess.PIPE, text=True
    )
    wait_for(process, tmp_path / "two", '"train"')
    time.sleep(2)
    os.kill(children_of(process)[0], signal.SIGUSR1)  # the leader
    err = process.communicate(timeout=60)[1]
    assert "error: terminated; --resume" in err
    assert "another process of this run is gone" not in err
    position = torch.load(tmp_path / "two" / "last.pt", weights_only=True)["position"]
    assert position["update"] > 0
    assert [event["event"] for event in read_events(tmp_path / "two.pt")].count("valid") == 0
    done = subprocess.run(
        command(2, "--resume", tmp_path / "two"), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert run(*flags, "--save", tmp_path / "one.pt").code == 0
    assert_nearly_same_run(tmp_path / "two", tmp_path / "one")
