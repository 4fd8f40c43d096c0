"""Whole runs of main.py, number by number, against by_hand.py, which shares no code with them.

Each case trains a tiny model for a few epochs without dropout: losses, norms, learning rates,
validation, the switch to averaging and the test in metrics.jsonl, summary.json and the weights
of the best model. Each is stopped and resumed; others have scaled losses, or 16 bits. Whatever a
run's parts are called, this is what they come to.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Collection
from itertools import pairwise
from pathlib import Path
from typing import Any

import by_hand
import pytest
import torch
from by_hand import ByHand, Weights
from conftest import ROOT, command_line, read_events, read_summary, read_weights, write_corpus

import main

Flags = dict[str, Any]
Condition = Callable[[ByHand], bool]

# nonmono 0 and a high learning rate: averaging starts within the first epochs.
BASE: Flags = dict(
    emsize=6, nhid=8, nlayers=2, batch_size=4, bptt=8, bptt_scheme="variable", lr=10.0, clip=0.25,
    alpha=0.5, beta=0.7, wdecay=0.002, optimizer="sgd", nonmono=0, epochs=4, eval_batch_size=7,
    test_batch_size=1, log_interval=3, dropout=0, dropouth=0, dropouti=0, dropoute=0, wdrop=0,
)  # fmt: skip
FIXED: Flags = dict(bptt_scheme="fixed")


def switched(run: ByHand) -> bool:
    """Averaging starts before the last epoch."""
    return any(line["epoch"] < len(run.of("valid")) for line in run.of("averaging"))


def slowed(run: ByHand) -> bool:
    """The learning rate fell before the last epoch."""
    rates = [line["lr"] for line in run.of("train")]
    return bool(rates[-1] < rates[0])


def always(run: ByHand) -> bool:
    return True


CASES: dict[str, tuple[Flags, Condition]] = {
    "variable": ({}, switched),
    "one untied layer, nonmono 1": (
        dict(FIXED, nlayers=1, untied=True, nonmono=1, epochs=6),
        switched,
    ),
    "two untied layers": (dict(untied=True), switched),
    "k1 < k2": (dict(FIXED, k1=3), switched),
    "k1 > k2": (dict(FIXED, k1=20), switched),
    "randomized": (dict(bptt_scheme="randomized", keep_prob=0.6, lr=3.0), switched),
    "full": (dict(bptt_scheme="full", lr=1.0, epochs=6), switched),
    "nothing else": (dict(FIXED, clip=0, alpha=0, beta=0, wdecay=0, lr=3.0), switched),
    "when": (dict(when=[1, 3]), slowed),
    "adam": (dict(optimizer="adam", lr=0.01, when=[2], wdecay=0.3), slowed),
    "divided": (dict(no_asgd=True, nonmono_decay=2.0), slowed),
    "never averaged": (dict(no_asgd=True), always),
}


class Runs:
    """Runs of main.py in this process on one corpus, and what they should leave."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.corpus = write_corpus(folder / "corpus", lines=40)
        self.known: dict[str, tuple[Flags, ByHand]] = {}

    def train(self, save: Path, flags: Flags, *more: object) -> None:
        argv = ["--device", "cpu", "--data", self.corpus, "--save", save, *command_line(flags)]
        assert main.main([*map(str, argv), *map(str, more)]) == 0

    def resume(self, save: Path, *more: object) -> None:
        """Every flag is the run's own."""
        assert main.main(["--resume", str(save), *map(str, more)]) == 0

    def initial(self, flags: Flags) -> Weights:
        """The weights that a run starts from: those after an update that moves nothing."""
        save = self.folder / f"initial{len(list(self.folder.iterdir()))}.pt"
        self.train(save, dict(flags, lr=1e-30, wdecay=0, max_updates=1))
        return read_weights(save)

    def by_hand(self, flags: Flags, skipped: Collection[int] = ()) -> ByHand:
        return by_hand.train(self.corpus, self.initial(flags), flags, skipped)

    def seeded(self, changes: Flags, condition: Condition) -> tuple[Flags, ByHand]:
        """BASE with changes and the first seed whose run meets the condition, and that run."""
        key = f"{sorted(changes.items())} {condition.__name__}"
        for seed in range(1, 40):
            if key in self.known:
                break
            flags = {**BASE, **changes, "seed": seed}
            expected = self.by_hand(flags)
            if condition(expected):
                self.known[key] = flags, expected
        return self.known[key]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def assert_events(save: Path, expected: ByHand, rel: float = 5e-6, loose: float = 0) -> None:
    """metrics.jsonl line by line; loose: the tolerance of losses and norms in training."""
    found = [line for line in read_events(save) if line["event"] != "loss_scale"]
    names = [(line["event"], line["step"]) for line in found]
    assert names == [(line["event"], line["step"]) for line in expected.events]
    for line, other in zip(found, expected.events, strict=True):
        tolerance = loose or rel if line["event"] == "train" else rel
        for name, value in other.items():
            if isinstance(value, float):
                assert line[name] == pytest.approx(value, rel=tolerance), (name, line, other)
            else:
                assert line[name] == value, (name, line, other)


def assert_weights(save: Path, expected: Weights, tolerance: float = 1e-5) -> None:
    """Of the saved model, to a part of each tensor's largest one, where that is not nothing."""
    found = read_weights(save)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        error = (found[name].double() - weight).abs().max() / weight.abs().max().clamp(min=1e-6)
        assert error < tolerance, (name, float(error))


def assert_summary(save: Path, expected: ByHand, rel: float = 5e-6) -> None:
    summary = read_summary(save)
    best = min(line["ppl"] for line in expected.of("valid"))
    assert summary["best_valid_ppl"] == pytest.approx(best, rel=rel)
    assert summary["test_ppl"] == pytest.approx(expected.of("test")[0]["ppl"], rel=rel)
    assert summary["best_epoch"] == expected.best_epoch
    assert summary["epochs"] == len(expected.of("valid"))
    assert summary["updates"] == len(expected.valid)
    assert summary["parameters"] == sum(weight.numel() for weight in expected.best.values())
    assert summary["diverged"] is False


def assert_as_by_hand(save: Path, expected: ByHand) -> None:
    assert_events(save, expected)
    assert_summary(save, expected)
    assert_weights(save, expected.best)


def test_a_whole_run(runs: Runs, tmp_path: Path) -> None:
    flags, expected = runs.seeded(*CASES["variable"])
    runs.train(tmp_path / "run.pt", flags)
    assert_as_by_hand(tmp_path / "run.pt", expected)


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_stopped_twice(runs: Runs, tmp_path: Path, case: str) -> None:
    """In the middle of an epoch, and of the last one: with NT-ASGD after the switch."""
    flags, expected = runs.seeded(*CASES[case])
    ends = [0, *(line["step"] for line in expected.of("valid"))]
    save = tmp_path / "run.pt"
    runs.train(save, flags, "--max-updates", (ends[1] + ends[2]) // 2)
    runs.resume(save, "--max-updates", (ends[-2] + ends[-1]) // 2)
    runs.resume(save)
    assert_as_by_hand(save, expected)


def test_the_best_model_of_an_epoch_s_end_comes_back(runs: Runs, tmp_path: Path) -> None:
    """A stop in mid-epoch tests the weights it finds, if they are better; the run goes on."""

    def stop_of(run: ByHand) -> int:
        """An update of the last epoch after which they are the best so far; 0: there is none."""
        best = min(line["loss"] for line in run.of("valid")[:-1])
        last = range(run.of("valid")[-2]["step"] + 1, len(run.valid))
        return next((update for update in last if run.valid[update - 1] < best - 1e-4), 0)

    def better_for_a_while(run: ByHand) -> bool:
        return stop_of(run) > 0 and run.best_epoch < len(run.of("valid"))

    flags, expected = runs.seeded({}, better_for_a_while)
    save = tmp_path / "run.pt"
    stop = stop_of(expected)
    runs.train(save, flags, "--max-updates", stop)
    tested = read_events(save)
    assert [line["event"] for line in tested[-2:]] == ["valid", "test"]
    assert tested[-2]["loss"] == pytest.approx(expected.valid[stop - 1], rel=5e-6)
    with pytest.raises(AssertionError):
        assert_weights(save, expected.best)
    runs.resume(save, "--save", tmp_path / "other.pt")
    assert_as_by_hand(tmp_path / "other.pt", expected)
    runs.resume(save)
    assert_as_by_hand(save, expected)


def test_what_when_keeps_is_what_that_epoch_validated(runs: Runs, tmp_path: Path) -> None:
    """The weights, the average once there is one, and whose they are."""
    flags, expected = runs.seeded(dict(when=[2, 4]), switched)
    save = tmp_path / "run.pt"
    runs.train(save, flags)
    valid = by_hand.read_ids(runs.corpus)["valid"]
    for epoch in (2, 4):
        kept = save.with_name(f"run.pt.e{epoch}")
        line = expected.of("valid")[epoch - 1]
        details = torch.load(kept, weights_only=True)["details"]
        assert (details["epoch"], details["update"]) == (epoch, line["step"])
        assert details["valid_loss"] == pytest.approx(line["loss"], rel=5e-6)
        weights = {name: weight.double() for name, weight in read_weights(kept).items()}
        loss = by_hand.evaluate(weights, valid, flags["eval_batch_size"])
        assert loss == pytest.approx(line["loss"], rel=5e-6)


def test_the_first_weights_are_drawn_as_the_paper_says(runs: Runs) -> None:
    """Embedding and decoder uniform in [-0.1, 0.1], no bias; LSTMs in +-1/sqrt(units)."""
    for untied in (False, True):
        flags = dict(BASE, emsize=30, nhid=40, seed=3, untied=untied)
        for name, weight in runs.initial(flags).items():
            units = 40 if untied or name.startswith("rnns.0") else 30
            bound = 1 / math.sqrt(units) if name.startswith("rnns") else 0.1
            if name == "decoder.bias":
                assert weight.abs().max() < 1e-20
                continue
            assert weight.abs().max() <= bound
            assert weight.abs().max() > 0.95 * bound or weight.dim() == 1
            assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.15)


# Scaled losses


def replayed(overflows: Collection[int], updates: int, flags: Flags) -> list[dict[str, Any]]:
    """The loss_scale lines of a run in which these updates overflow; and the scale after each."""
    low, high = flags["loss_scale_bounds"]
    scale, clean = min(max(2.0**16, low), high), 0
    history = []
    for update in range(1, updates + 1):
        before = scale
        if update in overflows:
            scale, clean = max(scale / 2, low), 0
        else:
            clean += 1
            if clean == flags["loss_scale_window"]:
                scale, clean = min(scale * 2, high), 0
        notable = update in overflows or scale != before
        history.append(
            dict(step=update, scale=scale, overflow=update in overflows, clean=clean, told=notable)
        )
    return history


def assert_scaled(save: Path, flags: Flags) -> tuple[set[int], list[dict[str, Any]]]:
    """The scale moved by its rules; returns the updates that were skipped, and its history."""
    events = read_events(save)
    told = [line for line in events if line["event"] == "loss_scale"]
    skipped = {line["step"] for line in told if line["overflow"]}
    updates = events[-1]["step"]
    assert 0 < len(skipped) < updates / 2
    history = replayed(skipped, updates, flags)
    found = [(line["step"], line["scale"], line["overflow"]) for line in told]
    assert found == [(h["step"], h["scale"], h["overflow"]) for h in history if h["told"]]
    before = 0
    for line in events:
        if line["event"] == "train":
            assert line["loss_scale"] == history[line["step"] - 1]["scale"]
            assert line["overflows"] == len(skipped & set(range(before + 1, line["step"] + 1)))
            before = line["step"]
    assert read_summary(save)["overflows"] == len(skipped)
    return skipped, history


# Clipped to nothing, a gradient's rounding and size do not matter, and weights only decay: so what
# 16 bits and fast kernels do to the steps and averages shows to the last digit.
DECAYING: Flags = dict(clip=1e-12, wdecay=0.002, lr=2.0)
# Powers of two are exact until they overflow: beyond float32, and where scaled gradients are
# squared, as in bf16's fast step, beyond 2**64. Short windows make enough updates to get there.
GROWING: Flags = dict(FIXED, bptt=3, loss_scale_bounds=[2.0**60, 2.0**127])
SCALED: dict[str, tuple[Flags, float]] = {
    "fp32": (
        dict(GROWING, precision="fp32", lr=4.0, epochs=7, loss_scale_bounds=[2.0**60, 2.0**140]),
        0,
    ),
    "bf16": (dict(GROWING, **DECAYING, precision="bf16"), 0.02),
    "fp16": (dict(DECAYING, precision="fp16", loss_scale_bounds=[1.0, 2.0**30], epochs=9), 0.002),
}


@pytest.mark.parametrize("precision", SCALED)
def test_losses_are_scaled_and_updates_skipped(runs: Runs, tmp_path: Path, precision: str) -> None:
    """Skipped updates count in no loss and no average; a resumed run knows how many were clean."""
    changes, loose = SCALED[precision]
    changes = dict(changes, loss_scale="dynamic", loss_scale_window=2)
    flags, _ = runs.seeded(changes, switched)
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    runs.train(whole, flags)
    skipped, history = assert_scaled(whole, flags)
    expected = runs.by_hand(flags, skipped)
    assert switched(expected)
    assert max(skipped) > expected.of("averaging")[0]["step"]
    assert_events(whole, expected, loose=loose)
    assert_weights(whole, expected.best)

    # An update before the scale grows, two before it has grown too far.
    stops = [h["step"] for h in history if h["clean"] == 1 and h["step"] + 2 in skipped]
    runs.train(parts, flags, "--max-updates", stops[0])
    runs.resume(parts, "--max-updates", stops[-1])
    runs.resume(parts)
    assert assert_scaled(parts, flags) == (skipped, history)
    assert_events(parts, expected, loose=loose)
    assert_weights(parts, expected.best)


# 16 bits, whose kernels on a CPU have a step and average of their own


def well_apart(run: ByHand) -> bool:
    """It switches, and no validation loss is so near another that rounding could order them."""
    losses = sorted(line["loss"] for line in run.of("valid"))
    gaps = [b - a for a, b in pairwise(losses)]
    return switched(run) and min(gaps) > 0.01


def assert_near(runs: Runs, save: Path, flags: Flags, expected: ByHand) -> None:
    """As by hand, but for what 16 bits cost: the weights' way from their first values, too."""
    assert_events(save, expected, rel=0.003, loose=0.05)
    initial, found = runs.initial(flags), read_weights(save)
    for name, weight in expected.best.items():
        way = weight - initial[name]
        error = (found[name].double() - weight).norm() / way.norm()
        assert error < 0.05, (name, float(error))


LEARNING: Flags = dict(lr=5.0, epochs=3)


def test_sixteen_bits_learn_the_same(runs: Runs, tmp_path: Path) -> None:
    flags, expected = runs.seeded(LEARNING, well_apart)
    flags = dict(flags, precision="bf16")
    runs.train(tmp_path / "run.pt", flags)
    assert_near(runs, tmp_path / "run.pt", flags, expected)


# Two processes


def train_in_two(
    runs: Runs, save: Path, flags: Flags, *more: object, program: str = "main.py"
) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    argv = ["--device", "cpu", "--data", runs.corpus, "--save", save, *command_line(flags), *more]
    command = [*launch, str(ROOT / program), *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_by_the_fast_step(runs: Runs, tmp_path: Path) -> None:
    """Each has the gradient of its own columns; together they take one step."""
    flags, expected = runs.seeded(LEARNING, well_apart)
    flags = dict(flags, precision="bf16")
    train_in_two(runs, tmp_path / "run.pt", flags)
    assert_near(runs, tmp_path / "run.pt", flags, expected)
