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
from conftest import Result, read_events, read_summary
from torch import nn

from assembly import build_loss_scale
from engine.errors import DivergenceError
from flags.training import parse_training
from kernels.fused_step import FusedStep
from loss_scale import LogMax, LossScale
from nt_asgd import NTASGD
from training.state import Position
from training.step import PlainStep
from training.tally import MOST_OVERFLOWS, Tally
from training.update import Outcome

Run = Callable[..., Result]


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
    for update in range(1500):
        kind = draw.random()
        x = draw.gauss(-4 + update / 500, 1.5)
        if kind < 0.02:
            assert scale.note(True, draw.choice([math.inf, math.nan]))
            samples.append(16)
        elif kind < 0.04:
            before = scale.value
            assert not scale.note(False, 0.0)
            assert scale.value == before
        else:
            assert not scale.note(False, 2.0**x)
            samples.append(x)
        if samples:
            assert scale.value == pytest.approx(log_max(samples), rel=1e-7)
    assert samples.count(16) > 10


def test_logmax_stays_within_its_bounds_and_resumes_exactly() -> None:
    scale, other = LogMax(low=8.0, high=100.0), LogMax(low=8.0, high=100.0)
    found = set()
    for update, exponent in enumerate([-1000, 5, -3, 0, 200, 1000, -1074, 3]):
        scale.note(update == 3, 2.0**exponent)
        found.add(scale.value)
        other.load_state_dict(scale.state_dict())
        assert other.state_dict() == scale.state_dict()
    assert {8.0, 100.0} <= found
    assert all(8 <= value <= 100 for value in found)
    for update in range(50):
        scale.note(update % 7 == 0, 1.5**update)
        other.note(update % 7 == 0, 1.5**update)
    assert other.state_dict() == scale.state_dict()
    with pytest.raises(ValueError, match="largest gradient"):
        scale.note(False)


# In a step


def test_logmax_gets_the_largest_gradient_before_clipping_without_the_scale() -> None:
    p, rules = nn.Parameter(torch.zeros(3)), LogMax(low=8.0)
    step = PlainStep(NTASGD([p], lr=1.0), 0.1, rules)
    for gradient, largest in ([1.0, -5.0, 2.0], 5.0), ([1.0, math.inf, 2.0], math.inf):
        before = p.detach().clone()
        p.grad = torch.tensor(gradient) * rules.value
        _, overflow, found = step(torch.zeros(()))
        assert overflow is not None
        assert found is not None
        assert (bool(overflow), float(found)) == (largest == math.inf, largest)
        assert torch.equal(p, before) == bool(overflow)


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
        rules.note(overflow)
        scales.append(float(step.scale))
    assert scales == [128, 128, 128, 64, 32, 32, 32, 64]


# Through main.py


@pytest.mark.parametrize(
    ("flags", "precision", "expected"),
    [
        ("", "fp32", None),
        ("", "fp16", dict(dynamic=True, low=1.0, high=2.0**24, window=2000, value=2.0**16)),
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


def test_overflows_count_as_divergence_only_in_a_row() -> None:
    at = Position()
    tally = Tally(torch.device("cpu"), at, lambda *_: None, lambda what, update: what)

    def update(overflow: bool) -> None:
        norm, skipped = torch.tensor(math.inf if overflow else 1.0), torch.tensor(float(overflow))
        tally.add(1, Outcome(torch.tensor(1.0), norm, [], skipped), 4)
        tally.check()

    for overflow in 3 * [*[True] * MOST_OVERFLOWS, False]:
        update(overflow)
    for _ in range(MOST_OVERFLOWS):
        update(True)
    with pytest.raises(DivergenceError, match="gradient norm is inf"):
        update(True)
    assert at.overflows == 4 * MOST_OVERFLOWS + 1


def test_logmax_is_logged_and_resumed_exactly(run: Run, tmp_path: Path, flags: list[str]) -> None:
    """A bound on the scale of 1e9 makes it overflow."""
    extra = ["--loss-scale", "logmax", "--loss-scale-bounds", "1", "1e9", "--precision", "fp16"]
    flags = [*flags, *extra, "--model", "GRU", "--bptt-scheme", "fixed", "--k1", "4"]
    assert run(*flags, "--save", tmp_path / "a.pt").code == 0
    assert run(*flags, "--save", tmp_path / "b.pt", "--max-updates", 20).code == 0
    assert run("--resume", tmp_path / "b", "--test-batch-size", "1").code == 0
    events = read_events(tmp_path / "a")
    assert read_events(tmp_path / "b") == events
    told = [line for line in events if line["event"] == "loss_scale"]
    assert told
    assert all(line["overflow"] for line in told)
    assert sum(line.get("overflows", 0) for line in events) == len(told)
    assert read_summary(tmp_path / "a.pt")["overflows"] == len(told)
