"""Several processes train as one would: as threads, and by torchrun, connected by gloo."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import MEASURED, ROOT, TINY, Result, write_corpus
from torch import Tensor

import programs.train
from bptt import FixedWindows, FullWindows, RandomizedWindows, Scheme, VariableWindows
from engine.ranks import Ranks
from engine.run_folder import is_in_use
from kernels.fused_step import FusedStep
from model import RNNModel
from noise import Noise
from nt_asgd import NTASGD
from training.objective import Objective, paper_penalties
from training.requests import Requests
from training.state import TrainingOptions
from training.step import PlainStep
from training.update import Updater

# Everything that has to be agreed on is on: all dropouts, the filter's median, clipping,
# averaging, windows of random length.
FLAGS = [*TINY, "--epochs", "2", "--nonmono", "0", "--grad-filter", "1", "--checkpoint-every", "9"]


def command(ranks: int, *flags: object) -> list[str]:
    """main.py under torchrun, which finds a free port by itself."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launch, "--nproc-per-node", str(ranks), str(ROOT / "main.py"), *map(str, flags)]


def train(ranks: int, *flags: object) -> None:
    done = subprocess.run(command(ranks, *flags), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("End of training") == 1  # one of them speaks


def wait_for(process: subprocess.Popen[Any], folder: Path, text: str) -> Path:
    """Wait until a run has logged a text; returns its metrics.jsonl."""
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and text in metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    return metrics


def children_of(process: subprocess.Popen[Any]) -> list[int]:
    """torchrun's processes, by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(number) for number in children.read_text().split()]


def figures(folder: Path) -> list[list[Any]]:
    """Of each event its name, step and figures, without measured times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = [[line["event"], line["step"]] for line in lines]
    drop = ("event", "step", *MEASURED)
    return [
        [*name, *(v for k, v in line.items() if k not in drop)]
        for name, line in zip(names, lines, strict=True)
    ]


def assert_same_run(folder: Path, reference: Path) -> None:
    found, expected = figures(folder), figures(reference)
    assert [line[:2] for line in found] == [line[:2] for line in expected]
    for line, other in zip(found, expected, strict=True):
        assert line[2:] == pytest.approx(other[2:], rel=2e-4), line[:2]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus", lines=120)


def test_two_processes_then_one_train_as_one(
    run: Callable[..., Result], tmp_path: Path, corpus: Path
) -> None:
    """Stopped after an epoch and a half, a run of two goes on with one."""
    flags = [*FLAGS, "--data", corpus]
    assert run(*flags, "--save", tmp_path / "one.pt").code == 0
    train(2, *flags, "--save", tmp_path / "part.pt", "--max-updates", "30")
    config = json.loads((tmp_path / "part" / "config.json").read_text())
    assert config["processes"] == 2
    assert run("--resume", tmp_path / "part").code == 0
    assert_same_run(tmp_path / "part", tmp_path / "one")


@pytest.mark.slow
def test_a_process_that_dies_stops_the_others_and_a_restart_resumes(
    run: Callable[..., Result], tmp_path: Path, corpus: Path
) -> None:
    flags = [*FLAGS, "--epochs", "40", "--data", corpus, "--resume", "auto"]
    launch = command(2, *flags, "--save", tmp_path / "two.pt")
    launch[launch.index("--standalone") + 1 : launch.index("--standalone") + 1] = [
        "--max-restarts", "1", "--monitor-interval", "1",
    ]  # fmt: skip
    process = subprocess.Popen(launch, stderr=subprocess.PIPE, text=True)
    wait_for(process, tmp_path / "two", '"epoch": 3')
    os.kill(children_of(process)[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    lines = [line for line in err.splitlines() if "error: rank" in line]
    assert len(lines) == 1
    assert "another process of this run is gone" in lines[0]
    assert "Traceback" not in err
    assert run(*flags, "--save", tmp_path / "one.pt").code == 0
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_processes_end_with_their_agent_and_the_same_command_goes_on(
    run: Callable[..., Result], tmp_path: Path, corpus: Path
) -> None:
    """torchrun killed: its processes write a checkpoint and free the run."""
    flags = [*FLAGS, "--epochs", "40", "--data", corpus, "--resume", "auto"]
    process = subprocess.Popen(command(2, *flags, "--save", tmp_path / "two.pt"))
    metrics = wait_for(process, tmp_path / "two", '"epoch": 3')
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while is_in_use(tmp_path / "two.pt"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert '"epoch": 40' not in metrics.read_text()
    train(2, *flags, "--save", tmp_path / "two.pt")
    assert run(*flags, "--save", tmp_path / "one.pt").code == 0
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_a_batch_that_does_not_divide_is_refused(
    run: Callable[..., Result], tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def three(device: torch.device) -> Iterator[Ranks]:
        yield Ranks(0, 3)

    monkeypatch.setattr(programs.train, "launched_ranks", three)
    result = run(*FLAGS, "--data", corpus, "--save", tmp_path / "a.pt")
    message = "4 columns cannot be shared equally by 3 processes"
    assert (result.code, result.err) == (2, f"error: argument --batch-size: {message}\n")
    assert not (tmp_path / "a").exists()


def test_all_processes_do_what_one_is_asked_for() -> None:
    """A signal that comes while they agree waits for the next time, on each of them."""
    interrupt = SimpleNamespace(requested=False, terminated=False)
    answers = [[0, 0, 1], [1, 1, 0]]

    def largest(*values: int) -> list[int]:
        interrupt.requested = True  # the signal
        return answers.pop(0)

    options = TrainingOptions(epochs=1, batch_size=4, checkpoint_every=1)
    ranks: Any = SimpleNamespace(largest=largest)
    signals: Any = interrupt
    requests = Requests(signals, options, ranks)
    requests.share(update=1)
    assert (requests.stop, requests.checkpoint, interrupt.requested) == (False, True, True)
    requests.share(update=2)
    assert (requests.stop, requests.checkpoint, interrupt.terminated) == (True, False, True)


def test_the_leader_s_loss_arrives_to_the_last_digit() -> None:
    """Validations are compared with the best one, of which two may be very near."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert Ranks(0, 2).from_leader(4.123456789012345) == 4.123456789012345
    finally:
        dist.destroy_process_group()


# As threads of one process


class Threads:
    """Where threads meet to exchange values."""

    def __init__(self, size: int) -> None:
        self.barrier = Barrier(size, timeout=60)
        self.values: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        everyones = list(self.values)
        self.barrier.wait()
        return everyones


class Thread(Ranks):
    """One of them."""

    def __init__(self, rank: int, threads: Threads) -> None:
        super().__init__(rank, len(threads.values))
        self.threads = threads

    def average(self, tensors: list[Tensor]) -> None:
        everyones = self.threads.exchange(self.rank, [t.detach().clone() for t in tensors])
        for tensor, *parts in zip(tensors, *everyones, strict=True):
            tensor.detach().copy_(sum(parts) / self.size)

    def gather(self, columns: Tensor, dim: int) -> Tensor:
        return torch.cat(self.threads.exchange(self.rank, columns), dim)


WINDOWS: dict[str, Callable[[], Scheme]] = {
    "variable": lambda: VariableWindows(8, 1),
    "overlapping": lambda: FixedWindows(8, 3),
    "in pieces": lambda: FixedWindows(3, 8),
    "randomized": lambda: RandomizedWindows(4, 0.5, 1),
    "full": lambda: FullWindows(9),
}


def updates(scheme: str, fused: bool, settings: dict[str, Any], ranks: Ranks) -> dict[str, Tensor]:
    """What ten updates leave: losses, norms, weights, averages, states, the filters' counts."""
    model = RNNModel("LSTM", 30, 5, 7, 2, **settings).double()
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.copy_(torch.linspace(-1, 1, p.numel()).mul(9 + number).sin().view_as(p) / 3)
    filters = [f for layer in model.layers if (f := layer.gradient_filter) is not None]
    for gradient_filter in filters:
        gradient_filter.gather = lambda norms: ranks.gather(norms, 0)
    optimizer = NTASGD(model.parameters(), 0.5, 0.01)
    optimizer.averaging = True
    rows = (torch.arange(60 * 4) ** 2 % 29).view(60, 4)[:, ranks.share(4)]
    generator = torch.Generator().manual_seed(3)
    make_step = FusedStep if fused else PlainStep
    updater = Updater(
        Objective(model, paper_penalties(2, 1)), rows, make_step(optimizer, 0.25), bptt=8,
        make_noise=partial(Noise, generator, ranks.rank, ranks.size), ranks=ranks,
    )  # fmt: skip
    hidden, found = model.init_hidden(4 // ranks.size), dict[str, Tensor]()
    for number, window in enumerate(WINDOWS[scheme]().windows(59)):
        if number == 10:
            break
        outcome = updater(window, hidden)
        updater.step.note(overflow=False)
        hidden = outcome.hidden
        found.update(
            {f"loss {number}": outcome.loss.clone(), f"norm {number}": outcome.norm.clone()}
        )
    found |= {name: p.detach().clone() for name, p in model.named_parameters()}
    with optimizer.averaged_weights():
        found |= {f"mean {name}": p.detach().clone() for name, p in model.named_parameters()}
    states = [part for state in ranks.gather_hidden(hidden) for part in state]
    found |= {f"state {number}": part for number, part in enumerate(states)}
    return found | {f"filter {number}": f.statistics for number, f in enumerate(filters)}


ALL = dict(dropout=0.4, dropouth=0.25, dropouti=0.3, dropoute=0.1, wdrop=0.5, tie_weights=True)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("scheme", "size", "changes"),
    [
        *((scheme, 2, dict(grad_filter=1.0)) for scheme in WINDOWS),
        ("variable", 4, dict(grad_filter=1.0)),
        ("variable", 2, dict(grad_filter=1.0, grad_filter_normalize=True)),
        ("variable", 2, dict(tie_weights=False, wdrop=0)),
    ],
)
def test_two_and_four_ranks_are_one(
    scheme: str, size: int, changes: dict[str, Any], fused: bool
) -> None:
    settings = ALL | changes
    expected = updates(scheme, fused, settings, Ranks())
    threads = Threads(size)
    with ThreadPoolExecutor(size) as pool:
        ranks = [Thread(rank, threads) for rank in range(size)]
        everyones = list(pool.map(partial(updates, scheme, fused, settings), ranks))
    for found in everyones:
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9, msg=name)
