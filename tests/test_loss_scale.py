"""Loss scales against their rules, and what they do to a run."""

import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Result, read_events
from torch import Tensor, nn

from assembly import build_loss_scale
from bptt import Window
from flags.training import parse_training
from kernels.fused_step import FusedStep
from loss_scale import AnyLossScale, LogMax, LossScale
from model import RNNModel
from nt_asgd import NTASGD
from training.objective import Objective, paper_penalties
from training.step import PlainStep
from training.tally import MOST_OVERFLOWS
from training.update import Updater

Run = Callable[..., Result]


def test_trajectory_is_that_of_the_rules() -> None:
    draw = random.Random(5)
    scale = LossScale(2.0**6, low=2.0, high=2.0**8, window=4)
    value, clean, restored = 2.0**6, 0, LossScale()
    history = []
    for update in range(400):
        overflowed, before = draw.random() < 0.25, value
        notable = scale.note(update, overflowed)
        if overflowed:
            value, clean = max(2.0, value / 2), 0
        else:
            clean += 1
            if clean == 4:
                value, clean = min(2.0**8, value * 2), 0
        assert notable == (overflowed or value != before)
        if notable:
            history.append((update, value, overflowed))
        assert (scale.value, scale.clean, scale.history) == (value, clean, history)
        restored.load_state_dict(scale.state_dict())
        assert restored.state_dict() == scale.state_dict()
    static = LossScale(3.0, dynamic=False)
    for overflowed in [True] * 5 + [False] * 3000:
        static.note(0, overflowed)
    assert (static.value, len(static.history)) == (3.0, 5)


def log_max(samples: list[float]) -> float:
    """LogMax's scale after the log2 of these largest gradients, from its equations as sums.

    With weights w_i = (1 - b) b**(n - 1 - i) a corrected running mean is sum(w x) / sum(w).
    """
    x, age = np.array(samples), np.arange(len(samples))[::-1]

    def mean(values: np.ndarray, b: float) -> float:
        return float((b**age * values).sum() / (b**age).sum())

    variance = mean(x**2, 0.999) - mean(x, 0.999) ** 2
    cutoff = mean(x, 0.99) + 3.09 * math.sqrt(max(variance, 0))
    return float(min(max(2.0 ** (16 - cutoff), 2.0**-20), 2.0**40))


def test_logmax_is_its_equations() -> None:
    """Among log-normal gradients overflows, which count as 2**16, and gradients of zero."""
    draw, samples = random.Random(3), list[float]()
    scale = LogMax(low=2.0**-20, high=2.0**40)
    assert scale.value == 2.0**-20
    overflows = []
    for update in range(1500):
        kind = draw.random()
        x = draw.gauss(-4 + update / 500, 1.5)
        if kind < 0.02:
            assert scale.note(update, True, draw.choice([math.inf, math.nan]))
            samples.append(16)
            overflows.append((update, scale.value, True))
        elif kind < 0.04:
            before = scale.value
            assert not scale.note(update, False, 0.0)
            assert scale.value == before
        else:
            assert not scale.note(update, False, 2.0**x)
            samples.append(x)
        if samples:
            assert scale.value == pytest.approx(log_max(samples), rel=1e-7)
    assert scale.history == overflows
    assert len(overflows) > 10


def test_logmax_backs_off_and_comes_back() -> None:
    """From each overflow at once, and long before overflows in a row count as divergence."""
    draw, scale = random.Random(1), LogMax()
    for update in range(3000):
        scale.note(update, False, 2.0 ** draw.gauss(-5, 0.5))
    settled = scale.value
    scale.note(3000, True, math.inf)
    assert 0.3 < scale.value / settled < 0.7
    for update in range(3001, 3001 + MOST_OVERFLOWS // 2):
        scale.note(update, True, math.nan)
    assert scale.value < settled / 1000
    for update in range(20_000):
        scale.note(update, False, 2.0 ** draw.gauss(-5, 0.5))
    assert 0.5 < scale.value / settled < 2


def test_logmax_stays_within_its_bounds_and_resumes_exactly() -> None:
    scale, other = LogMax(low=8.0, high=100.0), LogMax(low=8.0, high=100.0)
    found = set()
    for update, exponent in enumerate([-1000, 5, -3, 0, 200, 1000, -1074, 3]):
        scale.note(update, update == 3, 2.0**exponent)
        found.add(scale.value)
        other.load_state_dict(scale.state_dict())
        assert other.state_dict() == scale.state_dict()
    assert {8.0, 100.0} <= found
    assert all(8 <= value <= 100 for value in found)
    for update in range(50):
        scale.note(update, update % 7 == 0, 1.5**update)
        other.note(update, update % 7 == 0, 1.5**update)
    assert other.state_dict() == scale.state_dict()
    with pytest.raises(ValueError, match="largest gradient"):
        scale.note(0, False)


@pytest.mark.parametrize("wrong", [dict(value=0), dict(low=0), dict(low=9, high=8), dict(window=0)])
def test_no_such_scale(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no loss scale"):
        LossScale(**wrong)
    if "low" in wrong:
        with pytest.raises(ValueError, match="no loss scale"):
            LogMax(**wrong)


# In an update


def spoil(parameter: nn.Parameter, when: set[int]) -> None:
    """Make the parameter's gradient infinite in some updates."""
    update = 0

    def hook(grad: Tensor) -> Tensor:
        nonlocal update
        update += 1
        return grad * math.inf if update in when else grad

    parameter.register_hook(hook)


CASES = [(PlainStep, LossScale), (FusedStep, LossScale), (PlainStep, LogMax)]


@pytest.mark.parametrize(("make_step", "kind"), CASES)
def test_an_overflowing_update_changes_neither_weights_nor_average(
    make_step: Any, kind: type[AnyLossScale]
) -> None:
    """And the scale is adapted to each update, by its largest gradient before clipping."""
    model = RNNModel("LSTM", 40, 24, 36, 3, wdrop=0.5, tie_weights=True)
    optimizer = NTASGD(model.parameters(), lr=1.0, nonmono=0)
    optimizer.averaging = True
    scale = LossScale(2.0**10, window=3) if kind is LossScale else LogMax()
    step = make_step(optimizer, 0.25, scale)
    objective = Objective(model, paper_penalties(2, 1))
    updater = Updater(objective, torch.randint(0, 40, (7, 5)), step, bptt=6)
    unclipped: dict[int, Tensor] = {}
    for number, p in enumerate(model.parameters()):
        p.register_post_accumulate_grad_hook(
            lambda p, number=number: unclipped.update({number: p.grad.abs().max() / step.scale})
        )
    spoil(model.decoder.bias, {3, 4})  # type: ignore[arg-type]
    hidden = model.init_hidden(5)
    scales, counts = [], []
    for update in range(1, 9):
        before = [p.detach().clone() for p in model.parameters()]
        outcome = updater(Window(0, 6), hidden)
        hidden = outcome.hidden
        assert outcome.overflow is not None
        assert bool(outcome.overflow) == (update in (3, 4))
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert same == bool(outcome.overflow)
        largest = None if outcome.largest is None else float(outcome.largest)
        if kind is LogMax and update not in (3, 4):
            assert largest == pytest.approx(max(float(v) for v in unclipped.values()), rel=1e-5)
        step.note(bool(outcome.overflow))
        scale.note(update, bool(outcome.overflow), largest)
        if isinstance(step, FusedStep):  # which follows the rules by itself, on the device
            assert float(step.scale) == scale.value
            assert float(step.num_averaged) == optimizer.num_averaged
        scales.append(scale.value)
        counts.append(optimizer.num_averaged)
    if kind is LossScale:
        assert scales == [1024, 1024, 512, 256, 256, 256, 512, 512]
    else:
        assert scales[1] > 2**10
        assert scales[2] == scales[3] == 1
    assert counts == [1, 2, 2, 2, 3, 4, 5, 6]
    averages = [optimizer.state[p]["average"] for p in model.parameters()]
    assert all(torch.isfinite(average).all() for average in averages)


@pytest.mark.parametrize("make_step", [PlainStep, FusedStep])
def test_the_scale_that_is_stepped_by_stays_within_its_bounds(make_step: Any) -> None:
    p = nn.Parameter(torch.zeros(3))
    rules = LossScale(64.0, low=32.0, high=128.0, window=1)
    step = make_step(NTASGD([p], lr=1.0), 0, rules)
    scales = []
    for overflow in (False, False, False, True, True, True, True, False):
        p.grad = torch.full((3,), torch.inf if overflow else 1.0)
        step.prepare(1.0)
        step(torch.zeros(()))
        step.note(overflow)
        rules.note(0, overflow)
        scales.append(float(step.scale))
    assert scales == [128, 128, 128, 64, 32, 32, 32, 64]


# Through main.py


@pytest.mark.parametrize(
    ("flags", "precision", "expected"),
    [
        ("", "fp32", None),
        ("", "fp16", dict(dynamic=True, low=1.0, high=2.0**24, window=2000, value=2.0**16)),
        ("--loss-scale dynamic", "bf16", dict(dynamic=True, window=2000)),
        ("--loss-scale-bounds 2 64 --loss-scale-window 9", "fp16", dict(low=2, high=64, window=9)),
        ("--loss-scale 3.5", "fp16", dict(dynamic=False, value=3.5)),
        ("--loss-scale logmax --loss-scale-bounds 2 64", "fp32", dict(low=2, high=64, value=2)),
    ],
)
def test_flags_say_how_the_loss_is_scaled(
    flags: str, precision: str, expected: dict[str, Any] | None
) -> None:
    scale = build_loss_scale(parse_training(flags.split())[0], precision)
    assert (scale is None) == (expected is None)
    assert isinstance(scale, LogMax) == ("logmax" in flags)
    for name, value in (expected or {}).items():
        assert getattr(scale, name) == value


def test_overflows_without_end_are_divergence(run: Run, tmp_path: Path, flags: list[str]) -> None:
    """Such a scale overflows float16 whatever the weights are."""
    extra = ["--precision", "fp16", "--loss-scale", "1e12", "--epochs", "9"]
    result = run(*flags, *extra, "--save", tmp_path / "a.pt")
    assert result.code == 1
    assert re.search(rf"gradient norm is (inf|nan) at update {MOST_OVERFLOWS + 1} ", result.err)
    found = [event for event in read_events(tmp_path / "a") if event["event"] == "loss_scale"]
    assert len(found) == MOST_OVERFLOWS + 1
    assert all(event["overflow"] for event in found)


@pytest.mark.parametrize("kind", ["dynamic", "logmax"])
def test_scale_and_its_history_are_logged(
    run: Run, tmp_path: Path, flags: list[str], kind: str
) -> None:
    """A bound on the scale of 1e9 makes both overflow."""
    extra = ["--loss-scale", kind, "--loss-scale-bounds", "1", "1e9", "--loss-scale-window", "4"]
    result = run(*flags, *extra, "--precision", "fp16", "--save", tmp_path / "a.pt")
    assert result.code == 0, result.err
    scale, skipped = 2.0**16, 0
    shown, history = 0, []
    for line in read_events(tmp_path / "a"):
        if line["event"] == "loss_scale":
            if kind == "dynamic":
                assert line["scale"] == (scale / 2 if line["overflow"] else scale * 2)
            scale, skipped = line["scale"], skipped + line["overflow"]
            history.append((line["step"], scale, line["overflow"]))
        elif line["event"] == "train":
            assert kind == "logmax" or line["loss_scale"] == scale
            shown += line["overflows"]
            assert line["loss"] is None or line["loss"] < 20  # of updates that counted
    assert shown == skipped > 0
    state = torch.load(tmp_path / "a" / "last.pt", weights_only=True)
    assert state["callbacks"]["loss_scale"]["history"] == history
    assert state["position"]["overflows"] == skipped


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--loss-scale", "0"], "argument --loss-scale/--loss_scale: '0' is not a number above 0"),
        (["--loss-scale-bounds", "8", "4"], "argument --loss-scale-bounds: 8 is above 4"),
        (["--loss-scale-window", "0"], "argument --loss-scale-window"),
    ],
)
def test_what_cannot_be_is_one_line(
    run: Run, tmp_path: Path, flags: list[str], extra: list[str], message: str
) -> None:
    result = run(*flags, *extra, "--save", tmp_path / "a.pt")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: {message}")
    assert result.err.count("\n") == 1
    assert not (tmp_path / "a").exists()
