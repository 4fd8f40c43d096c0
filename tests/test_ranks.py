"""Several processes train as one would: torchrun on this machine, connected by gloo."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY, Result, write_corpus

import main
from engine.ranks import Ranks
from model import RNNModel

# Everything that has to be agreed on is on: all dropouts, the filter's median, clipping,
# averaging, windows of random length.
FLAGS = [*TINY, "--epochs", "2", "--nonmono", "0", "--grad-filter", "1", "--checkpoint-every", "9"]
SCHEMES = {
    "variable": [],
    "overlapping": ["--bptt-scheme", "fixed", "--k1", "4"],
    "randomized": ["--bptt-scheme", "randomized"],
    "full": ["--bptt-scheme", "full"],
}


def command(ranks: int, *flags: object) -> list[str]:
    """main.py under torchrun, which finds a free port by itself."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launch, "--nproc-per-node", str(ranks), str(ROOT / "main.py"), *map(str, flags)]


def train(ranks: int, *flags: object) -> None:
    done = subprocess.run(command(ranks, *flags), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("End of training") == 1  # one of them speaks


def figures(folder: Path) -> list[list[Any]]:
    """Of each event its name, step and figures, without measured times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = [[line["event"], line["step"]] for line in lines]
    drop = ("event", "step", "tokens_per_second")
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


@pytest.mark.parametrize(
    ("scheme", "sizes"),
    [
        ("variable", (2,)),
        *[pytest.param(name, (2, 4), marks=pytest.mark.slow) for name in SCHEMES],
    ],
)
def test_two_and_four_processes_train_as_one(
    run: Callable[..., Result], tmp_path: Path, corpus: Path, scheme: str, sizes: tuple[int, ...]
) -> None:
    flags = [*FLAGS, *SCHEMES[scheme], "--data", corpus]
    assert run(*flags, "--save", tmp_path / "one.pt").code == 0
    for ranks in sizes:
        train(ranks, *flags, "--save", tmp_path / f"r{ranks}.pt")
        assert_same_run(tmp_path / f"r{ranks}", tmp_path / "one")
        config = json.loads((tmp_path / f"r{ranks}" / "config.json").read_text())
        assert config["processes"] == ranks
    # A run of several goes on with one, and ends as if it had been one all the time.
    train(sizes[0], *flags, "--save", tmp_path / "part.pt", "--max-updates", "1")
    assert run("--resume", tmp_path / "part").code == 0
    assert_same_run(tmp_path / "part", tmp_path / "one")


@pytest.mark.slow
def test_one_process_goes_on_with_four(
    run: Callable[..., Result], tmp_path: Path, corpus: Path
) -> None:
    flags = [*FLAGS, "--data", corpus]
    assert run(*flags, "--save", tmp_path / "one.pt").code == 0
    assert run(*flags, "--save", tmp_path / "part.pt", "--max-updates", "20").code == 0
    train(4, "--resume", tmp_path / "part")
    assert_same_run(tmp_path / "part", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("extra", [["--precision", "fp16"], ["--precision", "bf16"]])
def test_sixteen_bits_and_the_loss_scale_agree(
    run: Callable[..., Result], tmp_path: Path, corpus: Path, extra: list[str]
) -> None:
    bounds = ["--loss-scale-bounds", "1", "1e6", "--loss-scale-window", "5"]
    flags = [*FLAGS, *extra, *bounds, "--data", corpus, "--grad-filter", "0"]
    assert run(*flags, "--save", tmp_path / "one.pt").code == 0
    train(2, *flags, "--save", tmp_path / "two.pt")
    found, expected = figures(tmp_path / "two"), figures(tmp_path / "one")
    assert found[-1][2:] == pytest.approx(expected[-1][2:], rel=0.01)


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
    metrics = tmp_path / "two" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"epoch": 3' in metrics.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    lines = [line for line in err.splitlines() if "error: rank" in line]
    assert len(lines) == 1
    assert "another process of this run is gone" in lines[0]
    assert "Traceback" not in err
    assert run(*flags, "--save", tmp_path / "one.pt").code == 0
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_a_batch_that_does_not_divide_is_refused(
    run: Callable[..., Result], tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def three(device: torch.device) -> Iterator[Ranks]:
        yield Ranks(0, 3)

    monkeypatch.setattr(main, "launched_ranks", three)
    result = run(*FLAGS, "--data", corpus, "--save", tmp_path / "a.pt")
    message = "4 columns cannot be shared equally by 3 processes"
    assert (result.code, result.err) == (2, f"error: argument --batch-size: {message}\n")
    assert not (tmp_path / "a").exists()


def test_masks_are_shared_out_by_columns() -> None:
    model = RNNModel("LSTM", 9, 4, 5, 2, wdrop=0.5, tie_weights=True)
    masks = model.draw_masks(6)
    parts = [masks.columns(Ranks(rank, 3).share(6)) for rank in range(3)]
    for i, mask in enumerate(masks.locked):
        assert mask is not None
        shared = [part.locked[i] for part in parts]
        assert torch.equal(torch.cat([m for m in shared if m is not None], 1), mask)
    assert all(part.words is masks.words and part.weights is masks.weights for part in parts)
