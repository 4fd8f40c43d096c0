"""The update of a GPU, on the CPU: against the plain one, recorded or not, resumed, failing."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Result, write_corpus
from record_on_cpu import CpuRecorder
from torch import Tensor, nn

import assembly
import engine.trainer
import main
from bptt import FixedWindows, FullWindows, RandomizedWindows, Scheme, VariableWindows, Window
from data.corpus import load_corpus
from engine.checkpoint_writer import CheckpointWriter
from engine.errors import RunError
from engine.fused_step import FusedStep
from engine.fused_update import FusedUpdater
from engine.graphs import CudaRecorder, Graphs, Recorder, Work
from engine.interrupt import Interrupt
from engine.loss_scale import LossScale
from engine.precision import allow_products
from engine.ranks import Ranks
from engine.run_folder import RunFolder
from engine.tracking import Tracker, WandbOptions
from engine.trainer import Trainer
from engine.training_state import TrainingOptions
from model import RNNModel
from nt_asgd import NTASGD

pytestmark = pytest.mark.usefixtures("with_cudnn")
Run = Callable[..., Result]
BPTT = 8

# The step


def test_step_is_its_equation() -> None:
    """Decay, clipping, loss scale and average, in float64 by loops over single numbers."""
    shapes, lr, decay, clip, scale = [(3, 5), (7,), (2, 2, 2)], 0.3, 0.01, 0.7, 96.0
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    optimizer = NTASGD(params, lr=99.0, weight_decay=decay)
    step = FusedStep(optimizer, clip, LossScale(scale, dynamic=False))
    assert [tuple(p.shape) for p in params] == shapes
    weights = [w for p in params for w in p.detach().flatten().tolist()]
    average: list[float] = []
    for update in range(1, 6):
        if update == 3:
            optimizer.averaging = True
            step.restore()
        gradient = torch.randn(len(weights), dtype=torch.float64) * (3 if update % 2 else 0.05)
        parts = gradient.split([p.numel() for p in params])
        for p, part in zip(params, parts, strict=True):
            p.grad = part.view(p.shape) * scale
        step.set_rate(lr * update)
        step(torch.zeros(()))
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
        assert float(step.norm) == pytest.approx(norm, rel=1e-12)
        found = torch.cat([p.detach().flatten() for p in params]).tolist()
        assert found == pytest.approx(weights, rel=1e-6)  # its scalars are float32
        step.settle(overflow=False)
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
    step.set_rate(1.0)
    step(torch.zeros(()))
    assert torch.equal(p.detach(), before)
    with optimizer.averaged_weights():
        assert torch.equal(p.detach(), before)
    p.grad = torch.ones(4)
    step(torch.zeros(()))  # at half the scale
    with optimizer.averaged_weights():
        torch.testing.assert_close(p.detach(), before - 0.5)


# The update

RATES = dict(dropout=0.4, dropouth=0.25, dropouti=0.3, dropoute=0.1, wdrop=0.5)
MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer(tmp_path: Path) -> Iterator[MakeTrainer]:
    with ExitStack() as stack:
        yield lambda *args, **changes: build_trainer(tmp_path, stack, *args, **changes)


class Mirrored(Ranks):
    """Two processes, the other one of which computes what this one does."""

    def __init__(self) -> None:
        super().__init__(0, 2)

    def average(self, tensors: list[Tensor]) -> None:
        assert all(tensor.isfinite().all() for tensor in tensors)

    def gather(self, columns: Tensor, dim: int) -> Tensor:
        return torch.cat([columns, columns], dim)

    def largest(self, *values: int) -> list[int]:
        return list(values)


def build_trainer(
    tmp_path: Path,
    stack: ExitStack,
    kernel: str,
    recorder: Recorder | None = None,
    *,
    scheme: str = "",
    loss_scale: LossScale | None = None,
    dtype: torch.dtype = torch.float64,
    clip: float = 0.25,
    alpha: float = 2.0,
    beta: float = 1.0,
    wdecay: float = 0.01,
    nlayers: int = 3,
    tied: bool = True,
    device: str = "cpu",
    compute: torch.dtype | None = None,
    processes: int = 1,
    chunks: int = 1,
    sizes: tuple[int, int] = (5, 7),
    lines: int = 300,
    **changes: Any,
) -> Trainer:
    corpus = load_corpus(write_corpus(tmp_path / "corpus", lines=lines))
    torch.manual_seed(5)
    words = len(corpus.vocabulary)
    rates = dict(RATES, **changes)
    model = RNNModel("LSTM", words, *sizes, nlayers, **rates, tie_weights=tied)
    model = model.to(device, dtype)
    model.compute_in(compute, kernel, chunks if kernel == "cudnn" else 1)
    folder = RunFolder(tmp_path / f"{kernel} {recorder is not None}.pt")
    stack.enter_context(folder)
    tracker = stack.enter_context(closing(Tracker(folder.folder, {}, WandbOptions())))
    options = TrainingOptions(epochs=1, batch_size=4, bptt=BPTT, clip=clip, alpha=alpha, beta=beta)
    windows = SCHEMES[scheme]() if scheme else VariableWindows(BPTT, 1)
    trainer = Trainer(
        model, NTASGD(model.parameters(), 3.0, wdecay), windows, corpus,
        options, folder, Interrupt(), identity={}, loss_scale=loss_scale, recorder=recorder,
        ranks=Mirrored() if processes == 2 else None,
    )  # fmt: skip
    trainer.tracker = tracker
    return trainer


def train(trainer: Trainer, updates: int = 40) -> list[Tensor]:
    """Updates, with averaging from the middle on; losses, weights, averages, states."""
    trainer.model.train()
    torch.manual_seed(6)
    losses = []
    for number, window in enumerate(trainer.scheme.windows(trainer.num_steps)):
        if number == updates:
            break
        if number == updates // 2:
            trainer.tally.check()
            trainer.optimizer.averaging = True  # type: ignore[attr-defined]
        trainer.update(window)
        losses.append(trainer.tally.summed.clone())
    assert len(losses) == min(updates, number + 1)
    trainer.tally.check()
    if isinstance(trainer.updater, FusedUpdater):
        assert float(trainer.updater.step.count) == trainer.optimizer.num_averaged  # type: ignore[attr-defined]
    found = [*losses, *(p.detach().clone() for p in trainer.model.parameters())]
    with trainer.evaluated_weights():
        found += [p.detach().clone() for p in trainer.model.parameters()]
    found += [state.detach().clone() for pair in trainer.hidden for state in pair]
    return [*found, *(gate.statistics.clone() for gate in trainer.model.gradient_filters)]


OFF = [{name: 0} for name in (*RATES, "clip", "alpha", "beta", "wdecay")]
SCHEMES: dict[str, Callable[[], Scheme]] = {
    "fixed": lambda: FixedWindows(BPTT),
    "overlapping": lambda: FixedWindows(BPTT, 3),
    "in pieces": lambda: FixedWindows(3, BPTT),
    "randomized": lambda: RandomizedWindows(4, 0.5, 1),
    "full": lambda: FullWindows(6),
}
CHANGES: list[dict[str, Any]] = [
    {}, dict(nlayers=1), dict(tied=False, nlayers=2), dict(grad_filter=2.0), *OFF,
    dict(zip(RATES, [0.0] * 5, strict=True), grad_filter=0.5, nlayers=1, tied=False),
    *(dict(scheme=name) for name in SCHEMES),
    dict(processes=2, grad_filter=2.0), dict(processes=2, chunks=2),
    dict(chunks=3), dict(chunks=50), dict(chunks=2, nlayers=1), dict(chunks=2, tied=False),
    dict(chunks=3, scheme="overlapping"), dict(chunks=2, scheme="full"),
]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_it_is_the_plain_update_recorded_or_not(
    make_trainer: MakeTrainer, changes: dict[str, Any]
) -> None:
    recorder = CpuRecorder()
    plain = train(make_trainer("plain", **changes))
    eager = train(make_trainer("cudnn", **changes))
    trainer = make_trainer("cudnn", recorder, **changes)
    assert isinstance(trainer.updater, FusedUpdater)
    recorded = train(trainer)
    for a, b in zip(eager, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(recorded, eager, strict=True))
    if changes.get("scheme") == "full" or "processes" in changes:
        # an update an epoch, of many pieces; or updates that wait for others
        assert (recorder.ran, recorder.recorded) == (0, 0)
    else:
        assert 0 < recorder.recorded < recorder.replayed
        assert recorder.replayed > 15


@pytest.mark.parametrize("recorded", [False, True])
def test_scale_goes_the_plain_updates_way(make_trainer: MakeTrainer, recorded: bool) -> None:
    """From a scale at which float16 would overflow, down and up again; nothing is waited for."""
    found, scales = [], []
    for kernel, recorder in (("plain", None), ("cudnn", CpuRecorder() if recorded else None)):
        rules = LossScale(2.0**26, high=2.0**40, window=6)
        trainer = make_trainer(kernel, recorder, loss_scale=rules, dtype=torch.float32)
        trainer.model.decoder.bias.register_hook(lambda g: g.where(g.abs() < 65504, torch.inf))
        found.append(train(trainer))
        scales.append(rules.state_dict())
        log = (trainer.folder.folder / "metrics.jsonl").read_text()
        found.append([torch.tensor([ord(c) for c in log])])
        if isinstance(trainer.updater, FusedUpdater):
            assert float(trainer.updater.step.scale) == rules.value
    assert scales[0] == scales[1]
    assert scales[0]["overflows"] > 3
    assert torch.equal(found[1][0], found[3][0])
    for a, b in zip(found[0], found[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_where_gradients_are_wanted_they_are_this_updates(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("cudnn", CpuRecorder(), clip=0.02)
    trainer.model.train()
    updater, hidden = trainer.updater, trainer.hidden
    for start in range(0, 50, 10):
        step = updater(Window(start, 10), hidden)
    step = updater(Window(60, 10), step.hidden, want_gradients=True)
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    clipped = float(torch.nn.utils.get_total_norm(gradients))
    assert step.norm is not None
    assert clipped == pytest.approx(0.02, rel=1e-5) != pytest.approx(float(step.norm), rel=0.1)


class Refusing(CpuRecorder):
    """Cannot record."""

    def record(self, work: Work) -> Work:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")


def test_what_cannot_be_recorded_is_said_and_done_as_it_is(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Refusing()
    refused = train(make_trainer("cudnn", recorder))
    message = "updates are not recorded: operation not permitted when stream is capturing"
    assert capsys.readouterr().err.count(message) == 1
    eager = train(make_trainer("cudnn"))
    assert all(torch.equal(a, b) for a, b in zip(refused, eager, strict=True))
    assert recorder.ran == 40


class Broken(Refusing):
    """And leaves the device unfit for anything."""

    def run(self, work: Work) -> None:
        if self.ran == 3:
            raise RuntimeError("unspecified launch failure")
        super().run(work)

    def record(self, work: Work) -> Work:
        try:
            raise RuntimeError("cudaMalloc while capturing")
        finally:
            self.ran = 3
            raise RuntimeError("failed due to a previous error during capture")


def test_where_nothing_works_after_it_the_first_cause_is_named() -> None:
    reasons: list[str] = []
    graphs = Graphs(Broken(), reasons.append)
    graphs.run("a", lambda: None)
    with pytest.raises(RunError, match="cudaMalloc while capturing; --kernel eager does without"):
        graphs.run("a", lambda: None)
    assert reasons == ["cudaMalloc while capturing"]


@pytest.mark.gpu
def test_after_a_failed_recording_a_gpu_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    """Random numbers are drawn on the same stream as before; the cause is the first one."""
    x, reasons = torch.ones(3, device="cuda"), list[str]()
    graphs = Graphs(CudaRecorder(torch.device("cuda")), reasons.append)
    done: list[float] = []
    stream = torch.cuda.current_stream()

    def work() -> None:
        x.add_(torch.rand(3, device="cuda"))
        done.append(float(x.sum()))

    for _ in range(4):
        graphs.run("a", work)
    assert len(done) == 4
    assert len(reasons) == 1
    assert torch.cuda.current_stream() == stream


def test_first_as_it_is_then_recorded_then_replayed() -> None:
    recorder, done = CpuRecorder(), torch.zeros(())
    graphs = Graphs(recorder, lambda why: pytest.fail(why))

    def work() -> None:
        done.add_(1)

    for kind in "abaaacab":
        graphs.run(kind, work)
    assert float(done) == 8
    assert (recorder.ran, recorder.recorded, recorder.replayed) == (3, 2, 5)
    with pytest.raises(RuntimeError, match="reads a value back"):
        recorder.record(lambda: print(float(done)))


PRECISIONS = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@pytest.mark.parametrize("compute", list(PRECISIONS))
def test_a_graph_is_its_update_whoever_used_memory_in_between(
    device: torch.device, compute: torch.dtype | None
) -> None:
    """On a GPU at the paper's size."""
    gpu = device.type == "cuda"
    words, width, units = (2000, 400, 1150) if gpu else (40, 10, 14)
    rates: dict[str, Any] = dict(RATES, tie_weights=True)
    allow_products(PRECISIONS[compute], device)
    rows = torch.randint(0, words, (200, 20), device=device)
    found = []
    for recorder in (None, CudaRecorder(device) if gpu else CpuRecorder()):
        torch.manual_seed(1)
        model = RNNModel("LSTM", words, width, units, 3, **rates).to(device)
        model.compute_in(compute, "cudnn")
        updater = FusedUpdater(
            model, rows, NTASGD(model.parameters(), 10.0), bptt=70, clip=0.25, alpha=2, beta=1,
            graphs=None if recorder is None else Graphs(recorder, lambda why: pytest.fail(why)),
            loss_scale=LossScale(2.0**12) if compute == torch.float16 else None,
        )  # fmt: skip
        hidden, losses = model.init_hidden(20), []
        for number, length in enumerate([70, 41, 70, 41, 70, 70, 41, 70]):
            step = updater(Window(10 * number, length), hidden)
            hidden = step.hidden
            losses.append(step.loss.clone())
            torch.full((50_000_000 if gpu else 50_000,), torch.nan, device=device)
        assert all(loss.isfinite() for loss in losses)
        found.append([*losses, *(p.detach().clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("compute", list(PRECISIONS))
@pytest.mark.parametrize(
    "changes",
    [
        {}, dict(grad_filter=2.0), dict(nlayers=1, tied=False), dict(chunks=3),
        dict(sizes=(200, 200)),  # for less than 193 units cuDNN has kernels of their own
    ],
    ids=str,
)  # fmt: skip
def test_graphs_of_a_gpu_are_the_updates_as_they_are(
    make_trainer: MakeTrainer, compute: torch.dtype | None, changes: dict[str, Any]
) -> None:
    """Bit for bit, over 100 updates, and the plain updates' results within the precision."""
    same: dict[str, Any] = dict(changes, device="cuda", compute=compute, dtype=torch.float32)
    same["lines"] = 600
    allow_products(PRECISIONS[compute], torch.device("cuda"))
    found = []
    for kernel, recorder in (
        ("plain", None),
        ("cudnn", None),
        ("cudnn", CudaRecorder(torch.device("cuda"))),
    ):
        scale = LossScale(2.0**12) if compute == torch.float16 else None
        trainer = make_trainer(kernel, recorder, loss_scale=scale, **same)
        found.append(train(trainer, updates=100))
        if recorder is not None:
            assert isinstance(trainer.updater, FusedUpdater)
            assert trainer.updater.graphs is not None
            assert trainer.updater.graphs.works
            assert len(trainer.updater.graphs.replays) > 3
    plain, eager, recorded = found
    assert all(torch.equal(a, b) for a, b in zip(recorded, eager, strict=True))
    tolerance = 1e-3 if compute is None else 0.1
    for a, b in zip(eager[:100], plain[:100], strict=True):  # summed losses
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# The program


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> CpuRecorder:
    """main.py takes the kernel that it takes on a GPU, records, and writes in the background."""
    recorder = CpuRecorder()
    monkeypatch.setattr(assembly, "choose_kernel", lambda *_: ("cudnn", "for a test"))
    monkeypatch.setattr(main, "build_recorder", lambda *_: (recorder, " | recorded"))
    monkeypatch.setattr(
        engine.trainer, "CheckpointWriter", lambda background: CheckpointWriter(True)
    )
    return recorder


@pytest.mark.parametrize(
    ("precision", "more"),
    [("fp32", "--grad-filter 2"), ("fp16", "--grad-filter 2"), ("fp32", "--wavefront 2")],
)
def test_main_trains_and_resumes_exactly(
    run: Run, tmp_path: Path, as_on_a_gpu: CpuRecorder, precision: str, more: str
) -> None:
    corpus = write_corpus(tmp_path / "corpus", lines=120)
    flags: list[Any] = [*TINY, "--data", corpus, "--epochs", 4, "--nonmono", 0, "--lr", 9]
    flags += [*more.split(), "--diagnostics", 7, "--precision", precision]
    if precision == "fp16":
        flags += ["--loss-scale-bounds", 1, 1e9, "--loss-scale-window", 5]
    whole = run(*flags, "--save", tmp_path / "whole.pt")
    assert whole.code == 0, whole.err
    chunks = " | windows in 2 chunks" if "--wavefront" in more else ""
    assert f"cudnn kernel, for a test{chunks} | recorded" in whole.err
    assert "Switching to ASGD" in whole.out
    assert as_on_a_gpu.replayed > 20
    for stop in (13, 29, 60):
        name = tmp_path / f"part{stop}"
        assert run(*flags, "--save", f"{name}.pt", "--max-updates", stop).code == 0
        last = torch.load(name / "last.pt", weights_only=True)["position"]
        models = [p for p in (Path(f"{name}.pt"), name / "best.previous.pt") if p.exists()]
        kept = [torch.load(p, weights_only=True)["details"]["epoch"] for p in models]
        assert last["best_epoch"] is None or last["best_epoch"] in kept
        resumed = run("--resume", name, "--test-batch-size", 1)
        assert resumed.code == 0, resumed.err
        ours, theirs = (
            torch.load(f"{path}.pt", weights_only=True)["weights"]
            for path in (name, tmp_path / "whole")
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_full_disk_ends_the_run_though_it_writes_in_the_background(
    run: Run, tmp_path: Path, as_on_a_gpu: CpuRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "corpus")

    def full(payload: object, file: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    result = run(*TINY, "--data", corpus, "--epochs", 1, "--save", tmp_path / "run.pt")
    assert result.code == 1
    last = result.err.splitlines()[-1]
    assert last == f"error: {tmp_path / 'run.pt'}: cannot write: No space left on device"
    assert not (tmp_path / "run.pt").exists()


def test_layers_that_cannot_overlap_are_refused(
    run: Run, tmp_path: Path, as_on_a_gpu: CpuRecorder
) -> None:
    flags = [*TINY, "--data", write_corpus(tmp_path / "corpus"), "--save", tmp_path / "run.pt"]
    result = run(*flags, "--wavefront", 2, "--grad-filter", 2)
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        "error: argument --wavefront: layers cannot overlap with gradient filters\n"
    )


def test_a_wavefront_goes_on_elsewhere(run: Run, tmp_path: Path, with_cudnn: None) -> None:
    """Where there is no cuDNN it says so; and it may be given up."""
    flags = [*TINY, "--data", write_corpus(tmp_path / "corpus"), "--save", tmp_path / "run.pt"]
    result = run(*flags, "--wavefront", 2, "--max-updates", 2)
    assert result.code == 0, result.err
    assert "plain kernel, a CPU has a faster one for bf16 only | no --wavefront" in result.err
    result = run("--resume", tmp_path / "run.pt", "--wavefront", 1, "--max-updates", 3)
    assert result.code == 0, result.err
    assert "--wavefront" not in result.err


def test_all_processes_do_what_one_is_asked_for(make_trainer: MakeTrainer) -> None:
    """A signal that comes while they agree waits for the next time, on each of them."""
    trainer = make_trainer("plain")
    answers = [[0, 0, 1], [1, 1, 0]]

    def largest(*values: int) -> list[int]:
        trainer.interrupt.requested = True  # the signal
        return answers.pop(0)

    trainer.ranks.largest = largest  # type: ignore[method-assign]
    trainer.share_requests()
    assert trainer.checkpoint_due
    assert trainer.stop_reason() is None
    assert trainer.interrupt.requested
    trainer.share_requests()
    assert not trainer.checkpoint_due
    assert trainer.stop_reason() == "interrupted"
    assert trainer.interrupt.terminated


def test_weights_are_held_no_longer_than_said() -> None:
    """Afterwards, also after an error, a changed weight counts."""
    rates: dict[str, Any] = dict(dict.fromkeys(RATES, 0.0), tie_weights=True)
    model = RNNModel("LSTM", 30, 5, 7, 2, **rates).double()
    model.compute_in(None, "cudnn")
    words, hidden = torch.randint(0, 30, (4, 3)), model.init_hidden(3)

    def loss() -> Tensor:
        result, _ = model(words[:-1], hidden)
        return model.loss(result, words[1:].flatten())

    with model.weights_held(model.draw_masks(3)):
        before = loss()
    with pytest.raises(KeyError), model.weights_held(model.draw_masks(3)):
        raise KeyError
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    changed = loss()
    model.compute_in(None)
    torch.testing.assert_close(changed, loss())
    assert not torch.allclose(changed, before)
