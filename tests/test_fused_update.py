"""The update of a GPU, on the CPU: against the plain one, captured or not, resumed, failing."""

import gc
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Result, read_weights, write_corpus
from cudnn_on_cpu import install_gpu_kernels
from record_on_cpu import CpuGraphs
from test_layers import Zoneout
from torch import Tensor, nn

import assembly
import training.trainer
from bptt import FixedWindows, FullWindows, RandomizedWindows, Scheme, VariableWindows, Window
from engine.checkpoint_writer import CheckpointWriter
from engine.errors import RunError
from kernels import lstm_cpu
from kernels.choose import Choice, choose_step, install
from kernels.fused_step import FusedStep
from kernels.graphs import Graphs, Work
from kernels.linear_cross_entropy import FastLinear
from kernels.precision import set_products
from layers import LAYERS
from loss_scale import LossScale
from model import RNNModel
from noise import Noise
from nt_asgd import NTASGD
from training.objective import Objective, paper_penalties
from training.recorded import RecordedUpdater
from training.step import PlainStep
from training.update import Updater

pytestmark = pytest.mark.usefixtures("with_cudnn")
Run = Callable[..., Result]
BPTT, WORDS, ROWS = 8, 30, 420

# The step


def test_step_is_its_equation() -> None:
    """Decay, clipping, loss scale and average, in float64 by loops over single numbers."""
    shapes, lr, decay, clip, scale = [(3, 5), (7,), (2, 2, 2)], 0.3, 0.01, 0.7, 96.0
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    optimizer = NTASGD(params, lr=lr, weight_decay=decay)
    step = FusedStep(optimizer, clip, LossScale(scale, dynamic=False))
    assert [tuple(p.shape) for p in params] == shapes
    weights = [w for p in params for w in p.detach().flatten().tolist()]
    average: list[float] = []
    for update in range(1, 6):
        optimizer.averaging = update >= 3
        gradient = torch.randn(len(weights), dtype=torch.float64) * (3 if update % 2 else 0.05)
        parts = gradient.split([p.numel() for p in params])
        for p, part in zip(params, parts, strict=True):
            p.grad = part.view(p.shape) * scale
        step.prepare(update)
        found_norm, overflow, _ = step(torch.zeros(()))
        norm = sum(float(g) ** 2 for g in gradient) ** 0.5
        factor = min(1.0, clip / (norm + 1e-6))
        weights = [
            w - lr * update * (factor * float(g) + decay * w)
            for w, g in zip(weights, gradient, strict=True)
        ]
        if update >= 3:
            count = update - 2
            old = average or weights
            average = [a + (w - a) / count for a, w in zip(old, weights, strict=True)]
        assert float(found_norm) == pytest.approx(norm, rel=1e-12)
        assert overflow is not None
        assert not overflow
        found = torch.cat([p.detach().flatten() for p in params]).tolist()
        assert found == pytest.approx(weights, rel=1e-6)  # its scalars are float32
        step.note(overflow=False)
    with optimizer.averaged_weights():
        found = torch.cat([p.detach().flatten() for p in params]).tolist()
        assert found == pytest.approx(average, rel=1e-6)
    assert optimizer.num_averaged == 3


def test_before_its_first_iterate_the_average_is_the_weights() -> None:
    """The update after the trigger may overflow, and validation may come right then."""
    p = nn.Parameter(torch.randn(4))
    optimizer = NTASGD([p], lr=1.0)
    optimizer.averaging = True
    step = FusedStep(optimizer, 0, LossScale(4.0))
    before = p.detach().clone()
    p.grad = torch.full((4,), float("inf"))
    step.prepare(1.0)
    step(torch.zeros(()))
    assert torch.equal(p.detach(), before)
    with optimizer.averaged_weights():
        assert torch.equal(p.detach(), before)
    p.grad = torch.ones(4)
    step(torch.zeros(()))  # at half the scale
    with optimizer.averaged_weights():
        torch.testing.assert_close(p.detach(), before - 0.5)


# The update: plain torch, the kernels of a GPU, and the same captured as graphs

RATES = dict(dropout=0.4, dropouth=0.25, dropouti=0.3, dropoute=0.1, wdrop=0.5)


class Mixed(FixedWindows):
    """Windows of one length, which are run in different ways."""

    def windows(self, num_steps: int, start: int = 0) -> Iterator[Window]:
        ways: list[dict[str, Any]] = [
            {}, dict(warmup=3), dict(pieces=(3, 5)), dict(pieces=(3, 5), crossing=0.0),
            dict(pieces=(3, 5), crossing=2.0), dict(pieces=(3, 5), advance=3),
        ]  # fmt: skip
        for start, way in zip(range(0, num_steps - BPTT, BPTT), cycle(ways), strict=False):
            yield Window(start, BPTT, **way)


SCHEMES: dict[str, Callable[[], Scheme]] = {
    "variable": lambda: VariableWindows(BPTT, 1),
    "overlapping": lambda: FixedWindows(BPTT, 3),
    "in pieces": lambda: FixedWindows(3, BPTT),
    "randomized": lambda: RandomizedWindows(4, 0.5, 1),
    "full": lambda: FullWindows(6),
    "mixed": lambda: Mixed(BPTT),
}


class Built:
    """A model and its updater: "plain", "fast" or "captured"."""

    def __init__(
        self,
        path: str,
        *,
        scheme: str = "variable",
        loss_scale: LossScale | None = None,
        dtype: torch.dtype = torch.float64,
        rnn: str = "LSTM",
        sizes: tuple[int, int, int] = (5, 7, 3),
        tied: bool = True,
        clip: float = 0.25,
        alpha: float = 2.0,
        beta: float = 1.0,
        wdecay: float = 0.01,
        device: str = "cpu",
        compute: torch.dtype | None = None,
        **changes: Any,
    ) -> None:
        torch.manual_seed(5)
        model = RNNModel(rnn, WORDS, *sizes, **dict(RATES, **changes), tie_weights=tied)
        self.model = model.to(device, dtype).train()
        if device == "cuda":
            install(self.model, compute, torch.device(device), fast=path != "plain")
        elif path != "plain" and rnn == "LSTM":
            install_gpu_kernels(self.model, compute)
        else:
            install(self.model, compute, torch.device(device), fast=path != "plain")
        rows = torch.randint(0, WORDS, (ROWS, 4)).to(device)
        self.generator = torch.Generator(device).manual_seed(6)
        self.optimizer = NTASGD(self.model.parameters(), 3.0 if scheme != "full" else 0.1, wdecay)
        self.scheme = SCHEMES[scheme]()
        self.num_steps = 100 if scheme == "full" else ROWS - 1
        make_step = PlainStep if path == "plain" else FusedStep
        self.step = make_step(self.optimizer, clip, loss_scale)
        self.updater: Updater | RecordedUpdater = Updater(
            Objective(self.model, paper_penalties(alpha, beta)), rows, self.step, bptt=BPTT,
            make_noise=lambda: Noise(self.generator),
        )  # fmt: skip
        if path == "captured":
            self.graphs: Graphs = CpuGraphs(self.generator)
            if device == "cuda":
                self.graphs = Graphs(torch.device(device), self.generator)
            self.updater = RecordedUpdater(self.updater, self.graphs)

        self.overflows = list[bool]()  # of each update

    def train(self, updates: int = 30) -> list[Tensor]:
        """Updates, with averaging from the middle on; losses, norms, weights, averages, states."""
        windows = list(self.scheme.windows(self.num_steps))
        hidden, found = self.model.init_hidden(4), list[Tensor]()
        rules = self.step.loss_scale
        for number in range(updates):
            if number == updates // 2:
                self.optimizer.averaging = True
            outcome = self.updater(windows[number % len(windows)], hidden)
            hidden = outcome.hidden
            overflow = bool(outcome.overflow)
            self.step.note(overflow)
            if rules is not None:
                rules.note(overflow)
                self.overflows.append(overflow)
            norm = outcome.norm.nan_to_num(0) if overflow else outcome.norm
            found += [outcome.loss.clone(), norm.clone()]
        found += [p.detach().clone() for p in self.model.parameters()]
        with self.optimizer.averaged_weights():
            found += [p.detach().clone() for p in self.model.parameters()]
        found += [part.detach().clone() for state in hidden for part in state]
        filters = [layer.gradient_filter for layer in self.model.layers]
        return [*found, *(f.statistics.clone() for f in filters if f is not None)]


@pytest.fixture
def own_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYERS, "OWN", Zoneout)


CHANGES: list[dict[str, Any]] = [
    *(dict(scheme=name) for name in ("variable", "randomized", "full", "mixed")),
    dict(dict.fromkeys((*RATES, "clip", "alpha", "beta", "wdecay"), 0), sizes=(5, 7, 1)),
    dict(tied=False, sizes=(5, 7, 2), grad_filter=2.0, scheme="overlapping"),
    dict(rnn="GRU", clip=0, wdrop=0),
    dict(rnn="OWN", scheme="in pieces", grad_filter=2.0, grad_filter_normalize=True),
]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_fast_and_captured_updates_are_the_plain_ones(
    own_layer: None, changes: dict[str, Any]
) -> None:
    updates = dict(full=2, mixed=30).get(changes.get("scheme", ""), 20)
    plain = Built("plain", **changes).train(updates)
    fast = Built("fast", **changes).train(updates)
    captured = Built("captured", **changes)
    found = captured.train(updates)
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
    assert all(torch.equal(a, b) for a, b in zip(found, fast, strict=True))
    assert captured.step.num_averaged == captured.optimizer.num_averaged == updates // 2  # type: ignore[union-attr]
    recorder = captured.graphs
    assert isinstance(recorder, CpuGraphs)
    if changes.get("scheme") == "full":  # of too many pieces
        assert (recorder.ran, recorder.captured) == (0, 0)
    else:
        assert 0 < recorder.captured < recorder.replayed


def test_a_layer_of_ones_own_in_sixteen_bits_keeps_the_fast_decoder_step_and_graphs(
    own_layer: None,
) -> None:
    same: dict[str, Any] = dict(rnn="OWN", dtype=torch.float32)
    exact = Built("plain", **same).train(12)
    fast = Built("fast", **same, compute=torch.bfloat16)
    captured = Built("captured", **same, compute=torch.bfloat16)
    reason = lstm_cpu.why_not(fast.model.layers[0], torch.bfloat16, torch.device("cpu"))
    assert reason == "Zoneout has no fast kernel on a CPU"
    assert isinstance(fast.model.decoder.kernel, FastLinear)
    assert choose_step(fast.optimizer, torch.bfloat16, torch.device("cpu"), True) == Choice("fused")
    found = fast.train(12)
    assert all(torch.equal(a, b) for a, b in zip(captured.train(12), found, strict=True))
    for a, b in zip(found[:10], exact[:10], strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0)
    assert not torch.equal(found[0], exact[0])


def test_scale_follows_the_plain_updates() -> None:
    """From a scale at which float16 would overflow, down and up again."""
    found, scales = [], []
    for kind in ("plain", "captured"):
        rules = LossScale(2.0**26, high=2.0**40, window=6)
        built = Built(kind, loss_scale=rules, dtype=torch.float32)
        bias = built.model.decoder.bias
        assert isinstance(bias, Tensor)
        bias.register_hook(lambda g: g.where(g.abs() < 65504, torch.inf))
        found.append(built.train())
        scales.append(rules.state_dict())
        if isinstance(built.step, FusedStep):
            assert float(built.step.scale) == rules.value
            assert int(built.step.clean) == rules.clean
    assert scales[0] == scales[1]
    assert sum(built.overflows) > 3
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_where_gradients_are_wanted_they_are_this_updates() -> None:
    """And not those of the graph that was captured last."""
    found = []
    for path in ("fast", "captured"):
        built = Built(path)
        hidden = built.model.init_hidden(4)
        for length in (10, 10, 10, 7, 7, 7):
            hidden = built.updater(Window(20, length), hidden).hidden
        built.updater(Window(60, 10), hidden, keep_gradients=True)
        found.append([p.grad for p in built.model.parameters()])
    for a, b in zip(*found, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


# Graphs


class Refusing(CpuGraphs):
    """Cannot capture, nor end the capture."""

    def capture(self, work: Work) -> Work:
        try:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        finally:
            raise RuntimeError("failed due to a previous error during capture")


def test_a_capture_that_fails_ends_the_run_and_names_the_first_cause() -> None:
    graphs = Refusing()
    graphs.run("a", lambda: None)
    reason = "operation not permitted when stream is capturing; --kernel eager does without"
    with pytest.raises(RunError, match=reason):
        graphs.run("a", lambda: None)


def test_a_capture_frees_no_older_graph() -> None:
    """That Python's garbage collector finds meanwhile, which CUDA takes for an error."""
    graphs, collects = CpuGraphs(), list[bool]()
    for _ in range(3):  # eagerly, captured, replayed
        graphs.run("a", lambda: collects.append(gc.isenabled()))
    assert (collects, gc.isenabled()) == ([True, False], True)


PRECISIONS = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@pytest.mark.gpu
@pytest.mark.parametrize("compute", list(PRECISIONS))
@pytest.mark.parametrize(
    "changes",
    [
        dict(grad_filter=2.0), dict(sizes=(5, 7, 1), tied=False), dict(rnn="OWN"),
        dict(scheme="overlapping"), dict(scheme="in pieces"),
        dict(sizes=(400, 1150, 3)),  # for less than 193 units cuDNN has kernels of their own
    ],
    ids=str,
)  # fmt: skip
def test_graphs_of_a_gpu_are_its_eager_updates(
    own_layer: None, compute: torch.dtype | None, changes: dict[str, Any]
) -> None:
    """Bit for bit, whoever used memory in between, and near the plain updates' losses."""
    same: dict[str, Any] = dict(changes, device="cuda", compute=compute, dtype=torch.float32)
    set_products(PRECISIONS[compute], torch.device("cuda"))
    found = []
    for path in ("plain", "fast", "captured"):
        same["loss_scale"] = LossScale(2.0**12) if compute == torch.float16 else None
        built = Built(path, **same)
        found.append(built.train(30))
        torch.full((50_000_000,), torch.nan, device="cuda")
        found[-1] += built.train(30)
    assert len(built.graphs.replays) >= 2
    plain, eager, captured = found
    assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))
    tolerance = 1e-3 if compute is None else 0.1
    for a, b in zip(eager[:20:2], plain[:20:2], strict=True):  # losses
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# The program


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[CpuGraphs]:
    """main.py takes a GPU's kernels and step, captures, and writes in the background."""
    recorders = []
    build = assembly.build_updater

    def install_fast(model: RNNModel, dtype: torch.dtype | None, *_: Any) -> dict[str, Choice]:
        install_gpu_kernels(model, dtype)
        return {"layers": Choice("cudnn"), "decoder": Choice("linear_cross_entropy")}

    def build_captured(*args: Any) -> Any:
        updater, choices = build(*args)
        assert isinstance(updater, Updater)
        recorders.append(CpuGraphs(args[4]))
        return RecordedUpdater(updater, recorders[-1]), choices

    monkeypatch.setattr(assembly, "install", install_fast)
    monkeypatch.setattr(assembly, "choose_step", lambda *_: Choice("fused"))
    monkeypatch.setattr("assembly.build_updater", build_captured)
    monkeypatch.setattr(
        training.trainer, "CheckpointWriter", lambda background: CheckpointWriter(True)
    )
    return recorders


@pytest.mark.parametrize(("precision", "stop"), [("fp32", 36), ("fp16", 13)])
def test_main_trains_and_resumes_exactly(
    run: Run, tmp_path: Path, as_on_a_gpu: list[CpuGraphs], precision: str, stop: int
) -> None:
    """Stopped while averaging, and before."""
    corpus = write_corpus(tmp_path / "corpus")
    flags: list[Any] = [*TINY, "--data", corpus, "--epochs", 4, "--nonmono", 0, "--lr", 9]
    flags += ["--grad-filter", 2, "--diagnostics", 7, "--precision", precision]
    if precision == "fp16":
        flags += ["--loss-scale-bounds", 1, 1e9, "--loss-scale-window", 5]
    whole = run(*flags, "--save", tmp_path / "whole.pt")
    assert whole.code == 0, whole.err
    assert "layers: cudnn | decoder: linear_cross_entropy | step: fused" in whole.err
    assert "Switching to ASGD" in whole.out
    assert as_on_a_gpu[0].replayed > 20
    assert run(*flags, "--save", tmp_path / "part.pt", "--max-updates", stop).code == 0
    last = torch.load(tmp_path / "part" / "last.pt", weights_only=True)
    assert last["optimizer"]["nt_asgd"]["averaging"] == (stop > 20)
    resumed = run("--resume", tmp_path / "part", "--test-batch-size", 1)
    assert resumed.code == 0, resumed.err
    ours, theirs = (read_weights(tmp_path / f"{name}.pt") for name in ("part", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_full_disk_ends_the_run_though_it_writes_in_the_background(
    run: Run, tmp_path: Path, as_on_a_gpu: list[CpuGraphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "corpus")

    def full(payload: object, file: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    result = run(*TINY, "--data", corpus, "--epochs", 1, "--save", tmp_path / "run.pt")
    assert result.code == 1
    last = result.err.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'run.pt'}: cannot write: No space left on device")
    assert not (tmp_path / "run.pt").exists()
