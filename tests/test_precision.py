"""Sixteen bits, loss scaling, and the fast kernel against the plain one."""

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Result, write_corpus
from engine.fused_update import FusedUpdater
from engine.gradient import WindowGradient
from engine.loss_scale import MOST_IN_A_ROW, LossScale
from engine.update import Updater
from torch import Tensor, nn

from bptt import Window
from engine.precision import choose_precision
from model import Masks, RNNModel
from nt_asgd import NTASGD

Run = Callable[..., Result]
SIZES = dict(ntoken=40, ninp=24, nhid=36, nlayers=3)
RATES = dict(dropout=0.4, dropouth=0.25, dropouti=0.3, dropoute=0.1, wdrop=0.5)


def make_model(**changes: Any) -> RNNModel:
    torch.manual_seed(1)
    return RNNModel("LSTM", **{**SIZES, **RATES, "tie_weights": True, **changes})


def cast(masks: Masks, dtype: torch.dtype) -> Masks:
    """The same masks in another dtype."""
    return Masks(
        None if masks.words is None else masks.words.to(dtype),
        [None if mask is None else mask.to(dtype) for mask in masks.locked],
        [{name: mask.to(dtype) for name, mask in layer.items()} for layer in masks.weights],
    )


def loss_and_gradients(
    model: RNNModel, rows: Tensor, masks: Masks, scale: float = 1.0
) -> tuple[float, dict[str, Tensor]]:
    """Of one window run in two pieces, with AR and TAR."""
    model.draw_masks = lambda bsz: masks  # type: ignore[method-assign]
    model.zero_grad()
    gradient = WindowGradient(model, alpha=2.0, beta=1.0)
    window = Window(0, len(rows) - 1, pieces=(4, len(rows) - 5))
    loss, _ = gradient(window, rows, model.init_hidden(rows.size(1)), scale)
    grads = {n: p.grad / scale for n, p in model.named_parameters() if p.grad is not None}
    assert all(p.grad.dtype == p.dtype for p in model.parameters() if p.grad is not None)
    return float(loss), grads


@pytest.mark.usefixtures("with_cudnn")
@pytest.mark.parametrize(
    ("dtype", "kernel", "tolerance"),
    [
        (torch.bfloat16, "plain", 0.03),
        (torch.bfloat16, "cpu", 0.03),
        (torch.bfloat16, "cudnn", 0.03),
        (torch.float16, "plain", 0.004),
        (None, "plain", 1e-5),
        (torch.float32, "cpu", 1e-5),
        (None, "cudnn", 1e-5),
    ],
)
@pytest.mark.parametrize(
    "changes", [{}, dict(grad_filter=0.5), dict(tie_weights=False, wdrop=0, nlayers=1)]
)
def test_loss_and_gradients_against_float64(
    dtype: torch.dtype | None, kernel: str, tolerance: float, changes: dict[str, Any]
) -> None:
    model, exact = make_model(**changes), make_model(**changes).double()
    rows = torch.randint(0, 40, (12, 6))
    masks = model.draw_masks(6)
    model.compute_in(dtype, kernel)
    scale = 1024.0 if dtype == torch.float16 else 1.0
    loss, grads = loss_and_gradients(model, rows, masks, scale)
    expected, exact_grads = loss_and_gradients(exact, rows, cast(masks, torch.float64))
    assert loss == pytest.approx(expected, rel=tolerance / 10)
    for name, grad in grads.items():
        error = (grad.double() - exact_grads[name]).norm() / exact_grads[name].norm()
        assert error < tolerance, (name, float(error))


def test_evaluation_stays_in_full_precision() -> None:
    model = make_model().eval()
    words = torch.randint(0, 40, (9, 4))
    expected, _ = model(words, model.init_hidden(4))
    model.compute_in(torch.bfloat16, kernel="cpu")
    found, hidden = model(words, model.init_hidden(4))
    assert torch.equal(found, expected)
    assert found.dtype == hidden[0][0].dtype == torch.float32
    model.train()
    _, hidden = model(words, model.init_hidden(4))
    assert {s.dtype for pair in hidden for s in pair} == {torch.float32}
    assert "compute_dtype" not in model.config()


# Loss scaling


def test_trajectory_is_that_of_the_rules() -> None:
    draw = random.Random(5)
    scale = LossScale(2.0**6, low=2.0, high=2.0**8, window=4)
    value, clean, overflows, restored = 2.0**6, 0, 0, LossScale()
    history = []
    for update in range(400):
        overflowed, before = draw.random() < 0.25, value
        scale.note(update, overflowed)
        if overflowed:
            value, clean, overflows = max(2.0, value / 2), 0, overflows + 1
        else:
            clean += 1
            if clean == 4:
                value, clean = min(2.0**8, value * 2), 0
        if overflowed or value != before:
            history.append((update, value, overflowed))
        state = scale.state_dict()
        restored.load_state_dict(state)
        assert (scale.value, scale.overflows, scale.history) == (value, overflows, history)
        assert restored.state_dict() == scale.state_dict()
        if update == 200:
            kept, length = state, len(history)
    assert len(kept["history"]) == length < len(history)
    static = LossScale(3.0, dynamic=False)
    for overflowed in [True] * 5 + [False] * 3000:
        static.note(0, overflowed)
    assert (static.value, static.overflows) == (3.0, 5)


@pytest.mark.parametrize("wrong", [dict(value=0), dict(low=0), dict(low=9, high=8), dict(window=0)])
def test_no_such_scale(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no loss scale"):
        LossScale(**wrong)


class Planted(nn.Module):
    """Hooks into a parameter's gradient and makes it infinite in some updates."""

    def __init__(self, parameter: nn.Parameter, when: set[int]) -> None:
        super().__init__()
        self.update, self.when = 0, when
        parameter.register_hook(self.spoil)

    def spoil(self, grad: Tensor) -> Tensor:
        self.update += 1
        return grad * math.inf if self.update in self.when else grad


UPDATERS = {"plain": Updater, "cudnn": FusedUpdater}


@pytest.mark.usefixtures("with_cudnn")
@pytest.mark.parametrize("kernel", list(UPDATERS))
def test_an_overflowing_update_changes_neither_weights_nor_average(kernel: str) -> None:
    model = make_model()
    model.compute_in(None, kernel)
    optimizer = NTASGD(model.parameters(), lr=1.0, nonmono=0)
    optimizer.averaging = True
    scale, rows = LossScale(2.0**10, window=3), torch.randint(0, 40, (7, 5))
    options: dict[str, Any] = dict(bptt=6, clip=0.25, alpha=2, beta=1, loss_scale=scale)
    updater = UPDATERS[kernel](model, rows, optimizer, **options)
    Planted(model.decoder.bias, {3, 4})
    hidden = model.init_hidden(5)
    scales, counts = [], []
    for update in range(1, 9):
        before = [p.detach().clone() for p in model.parameters()]
        step = updater(Window(0, 6), hidden)
        hidden = step.hidden
        assert step.overflow is not None
        assert bool(step.overflow) == (update in (3, 4))
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert same == bool(step.overflow)
        updater.settle(bool(step.overflow))
        scale.note(update, bool(step.overflow))
        if isinstance(updater, FusedUpdater):  # which goes by its own
            assert float(updater.step.scale) == scale.value
            assert float(updater.step.count) == optimizer.num_averaged
        scales.append(scale.value)
        counts.append(optimizer.num_averaged)
    assert scales == [1024, 1024, 512, 256, 256, 256, 512, 512]
    assert counts == [1, 2, 2, 2, 3, 4, 5, 6]
    assert scale.overflows == 2
    averages = [optimizer.state[p]["average"] for p in model.parameters()]
    assert all(torch.isfinite(average).all() for average in averages)


def test_overflows_without_end_are_divergence(run: Run, tmp_path: Path, flags: list[str]) -> None:
    """Such a scale overflows float16 whatever the weights are."""
    extra = ["--precision", "fp16", "--loss-scale", "1e12", "--epochs", "9"]
    result = run(*flags, *extra, "--save", tmp_path / "a.pt")
    assert result.code == 1
    assert re.search(rf"gradient norm is (inf|nan) at update {MOST_IN_A_ROW + 1} ", result.err)
    found = [event for event in events(tmp_path / "a") if event["event"] == "loss_scale"]
    assert len(found) == MOST_IN_A_ROW + 1
    assert all(event["overflow"] for event in found)


# Through main.py


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    corpus = write_corpus(tmp_path / "corpus", lines=120)
    return [*TINY, "--data", str(corpus), "--epochs", "2", "--nonmono", "0"]


def events(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--grad-filter", "2", "--kernel", "plain"],
        ["--bptt-scheme", "fixed", "--k1", "4"],
        ["--bptt-scheme", "fixed", "--k1", "25"],
        ["--bptt-scheme", "randomized"],
        ["--bptt-scheme", "full", "--lr", "0.05", "--epochs", "12"],
    ],
    ids=" ".join,
)
def test_sixteen_bits_train_and_resume_exactly(
    run: Run, tmp_path: Path, flags: list[str], precision: str, more: list[str]
) -> None:
    flags = [*flags, *more, "--precision", precision]
    if precision == "fp16":  # a first scale that overflows, and one that grows soon
        flags += ["--loss-scale-bounds", "1", "1e9", "--loss-scale-window", "5"]
    whole = run(*flags, "--save", tmp_path / "whole.pt")
    assert whole.code == 0, whole.err
    assert f"| precision {precision} | " in whole.err
    stop = 7 if "full" in more else 20
    stopped = run(*flags, "--save", tmp_path / "part.pt", "--max-updates", stop)
    assert stopped.code == 0
    resumed = run("--resume", tmp_path / "part", "--test-batch-size", "1")
    assert resumed.code == 0, resumed.err
    assert events(tmp_path / "part") == events(tmp_path / "whole")
    found = [
        torch.load(tmp_path / name, weights_only=True)["weights"]
        for name in ("part.pt", "whole.pt")
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    plain = run(*flags[: flags.index("--precision")], "--save", tmp_path / "fp32.pt")
    kinds = ("train", "valid")
    losses = [
        {kind: [e["loss"] for e in events(tmp_path / name) if e["event"] == kind] for kind in kinds}
        for name in ("whole", "fp32")
    ]
    assert plain.code == 0
    assert losses[0]["train"] != losses[1]["train"]
    assert losses[0]["valid"] == pytest.approx(losses[1]["valid"], abs=0.05)


def test_scale_and_its_history_are_logged(run: Run, tmp_path: Path, flags: list[str]) -> None:
    extra = ["--precision", "fp16", "--loss-scale-bounds", "1", "1e9", "--loss-scale-window", "4"]
    assert run(*flags, *extra, "--save", tmp_path / "a.pt").code == 0
    scale, skipped = 2.0**16, 0
    shown, history = 0, []
    for line in events(tmp_path / "a"):
        if line["event"] == "loss_scale":
            assert line["scale"] == scale / 2 if line["overflow"] else scale * 2
            scale, skipped = line["scale"], skipped + line["overflow"]
            history.append((line["step"], scale, line["overflow"]))
        elif line["event"] == "train":
            assert line["loss_scale"] == scale
            shown += line["overflows"]
            assert line["loss"] is None or line["loss"] < 20  # of updates that counted
    assert shown == skipped > 0
    state = torch.load(tmp_path / "a" / "last.pt", weights_only=True)["loss_scale"]
    assert (state["value"], state["overflows"], state["history"]) == (scale, skipped, history)


def test_the_scale_changes_nothing_else(run: Run, tmp_path: Path, flags: list[str]) -> None:
    """A power of two in float32 is exact: through clipping, filter and penalties, too."""
    flags = [*flags, "--grad-filter", "2", "--epochs", "1"]
    found = []
    for name, extra in (("one", []), ("scaled", ["--loss-scale", "1024"])):
        assert run(*flags, *extra, "--save", tmp_path / f"{name}.pt").code == 0
        drop = ("loss_scale", "overflows")
        found.append(
            [{k: v for k, v in e.items() if k not in drop} for e in events(tmp_path / name)]
        )
    assert found[0] == found[1]
    assert any("grad_filter_masked_l0" in event for event in found[0])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--precision", "tf32"], "argument --precision: tf32 needs a GPU of compute capability"),
        (["--precision", "fp8"], "argument --precision: invalid choice: 'fp8'"),
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


def test_a_device_that_cannot_do_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: nn.LSTM, *_: object) -> None:
        raise RuntimeError('"addmm_impl_cpu_" not implemented\nfor Half')

    monkeypatch.setattr(nn.LSTM, "forward", refuse)
    with pytest.raises(ValueError, match="cannot train an LSTM in fp16"):
        choose_precision("fp16", torch.device("cpu"))
    assert choose_precision("auto", torch.device("cpu")) == "fp32"
