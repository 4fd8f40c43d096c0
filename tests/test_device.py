"""What is particular to a device: which kernels fit, and what CUDA wants, stood in for here."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY, write_corpus
from cudnn_on_cpu import cudnn_on_cpu
from record_on_cpu import CpuGraphs
from torch import Tensor, nn

import assembly
from decoders.linear import Linear
from engine.device import available_memory, peak_memory, reset_peak_memory, select_device
from engine.errors import DivergenceError, UsageError
from engine.provenance import versions
from engine.ranks import Ranks
from flags.training import parse_training
from kernels import choose, fused_step, linear_cross_entropy, lstm_cpu, lstm_cudnn
from layers.gru import GRU
from layers.lstm import LSTM
from loss_scale import LogMax, LossScale
from nt_asgd import NTASGD
from training.state import Position
from training.tally import Tally
from training.update import Outcome

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
BF16, FP16 = torch.bfloat16, torch.float16


class FakeEvent:
    """Records the order of calls."""

    calls: list[str]

    def record(self, stream: object = None) -> None:
        self.calls.append("record")

    def synchronize(self) -> None:
        self.calls.append("synchronize")


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    monkeypatch.setattr(FakeEvent, "calls", calls, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 123)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return calls


def test_select_and_describe(fake_cuda: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert select_device("auto") == CUDA
    assert select_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="this machine has 2 CUDA devices"):
        select_device("cuda:2")
    assert select_device("cpu") == CPU
    assert peak_memory(CUDA) == 123
    assert peak_memory(CPU) > 10**7
    assert versions()["cuda"] == "13.0"
    monkeypatch.setattr(Path, "read_text", lambda _: "VmRSS: 1 kB")  # in some sandboxes
    assert peak_memory(CPU) > 10**7


def test_a_gpu_s_memory_is_read_though_nothing_has_used_it_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when ablate.py plans: torch refuses to reset what it has not initialised."""
    ready = list[bool]()

    def reset(device: torch.device) -> None:
        if not ready:
            raise RuntimeError("Invalid device argument 0: did you call init?")

    monkeypatch.setattr(torch.cuda, "init", lambda: ready.append(True))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * len(ready), 9))
    assert available_memory(CUDA) == 5
    ready.clear()
    assert reset_peak_memory(CUDA)


# An update's scalars are read after the next update has been queued


def outcome(loss: float, norm: float = 1.0, overflow: float | None = None) -> Outcome:
    flag = None if overflow is None else torch.tensor(overflow)
    return Outcome(torch.tensor(loss), torch.tensor(norm), [], flag, flag)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_scalars_are_read_one_update_late(fake_cuda: list[str], device: str) -> None:
    """Skipped updates enter neither the loss nor the norm; what is not finite is an error."""
    seen: list[tuple[int, bool, float | None]] = []
    at = Position()
    tally = Tally(CPU, at, lambda *found: seen.append(found), lambda what, n: f"{what} at {n}")
    tally.device = torch.device(device)
    tally.add(1, outcome(2.0, 3.0), 10)
    assert seen == []
    tally.add(2, outcome(5.0, float("inf"), overflow=1), 10)
    assert seen == [(1, False, None)]
    assert float(tally.grad_norm) == 3.0
    tally.add(3, outcome(4.0, 7.0, overflow=0), 20)
    tally.check()
    tally.check()
    assert seen[1:] == [(2, True, 1.0), (3, False, 0.0)]
    assert (float(tally.summed), float(tally.grad_norm), tally.skipped) == (100.0, 7.0, 2)
    assert (at.overflows, at.overflows_in_a_row, at.interval_skipped_tokens) == (1, 0, 10)
    tally.add(4, outcome(float("nan"), overflow=1), 10)  # a loss of nan is no overflow, says Step
    tally.add(5, outcome(float("nan")), 10)
    with pytest.raises(DivergenceError, match="loss is nan at 5"):
        tally.add(6, outcome(1.0), 10)
    expected = ["record", "record", "synchronize", "record", "synchronize", "synchronize"]
    assert fake_cuda[:6] == (expected if device == "cuda" else [])


# Which kernels fit


def test_each_kernel_says_why_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    lstm, gru = LSTM(4, 4), GRU(4, 4)
    assert lstm_cpu.why_not(lstm, BF16, CPU) == ""
    assert lstm_cpu.why_not(gru, BF16, CPU) == "GRU has no fast kernel on a CPU"
    for dtype, device in ((None, CPU), (FP16, CPU), (BF16, CUDA)):
        assert lstm_cpu.why_not(lstm, dtype, device) == "a CPU has a fast kernel for bf16 only"

    assert linear_cross_entropy.why_not(Linear(4, 9), BF16, CPU) == ""
    assert linear_cross_entropy.why_not(Linear(4, 9), None, CUDA) == ""
    bf16_only = "a CPU has a fast kernel for bf16 only"
    assert linear_cross_entropy.why_not(Linear(4, 9), FP16, CPU) == bf16_only
    own = type("Mixture", (Linear,), {})(4, 9)
    reason = linear_cross_entropy.why_not(own, BF16, CPU)
    assert reason == "Mixture has no fast kernel"

    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    sgd, why_not = NTASGD(params, 1.0), fused_step.why_not
    assert why_not(sgd, BF16, CPU, LossScale()) == why_not(sgd, None, CUDA) == ""
    assert why_not(sgd, FP16, CPU) == "a CPU has a fused step for bf16 only"
    assert why_not(torch.optim.Adam(params), BF16, CPU) == "Adam steps by itself"
    groups = NTASGD([{"params": [p]} for p in params], 1.0)
    assert why_not(groups, BF16, CPU) == "there are several groups of parameters"
    assert why_not(sgd, FP16, CUDA, LogMax()).startswith("--loss-scale logmax reads")

    assert lstm_cudnn.why_not(gru, None, CUDA) == "GRU has no kernel over cuDNN here"
    assert lstm_cudnn.why_not(lstm, None, CPU) == "this is no GPU"
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert lstm_cudnn.why_not(lstm, None, CUDA) == "this PyTorch has no cuDNN"


def test_where_cudnn_fails_a_small_trial_the_kernel_is_plain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here it does, unless its operators are written out."""
    trial, lstm = lstm_cudnn._try_out, LSTM(4, 4)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(lstm_cudnn, "_try_out", lambda dtype, _: trial(dtype, CPU))
    reason = lstm_cudnn.why_not(lstm, FP16, CUDA)
    assert reason.startswith("cuDNN's layer fails: Could not run 'aten::_cudnn_rnn")
    with cudnn_on_cpu():
        assert lstm_cudnn.why_not(lstm, None, CUDA) == ""
        fill = lstm_cudnn.CudnnLSTM.fill

        def fill_wrongly(self: Any, weights: list[Tensor]) -> None:
            fill(self, [2 * weight for weight in weights])

        monkeypatch.setattr(lstm_cudnn.CudnnLSTM, "fill", fill_wrongly)
        assert "outputs differ from plain torch's by" in lstm_cudnn.why_not(lstm, None, CUDA)


@pytest.mark.parametrize(
    ("flags", "processes", "expected"),
    [
        ("", 1, ["cudnn", "linear_cross_entropy", "fused", "CUDA graphs"]),
        ("--kernel eager", 1, ["cudnn", "linear_cross_entropy", "fused", "none (as asked)"]),
        ("--kernel plain", 1, ["plain (as asked)"] * 3 + ["none (as asked)"]),
        (
            "--model GRU", 1,
            ["plain (GRU has no kernel over cuDNN here)", "linear_cross_entropy", "fused",
             "CUDA graphs"],
        ),
        (
            "--optimizer adam --lr 0.1", 1,
            ["cudnn", "linear_cross_entropy", "plain (Adam steps by itself)",
             "none (the step is plain)"],
        ),
        (
            "--bptt-scheme full", 1,
            ["cudnn", "linear_cross_entropy", "fused",
             "none (--bptt-scheme full makes one an epoch)"],
        ),
        ("", 2, ["cudnn", "linear_cross_entropy", "fused", "none (there are 2 processes)"]),
    ],
)  # fmt: skip
def test_what_a_gpu_computes_with(
    monkeypatch: pytest.MonkeyPatch, flags: str, processes: int, expected: list[str]
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(lstm_cudnn, "_try_out", lambda *_: None)
    monkeypatch.setattr(
        choose, "CudnnLSTM", type("Fake", (), {"name": "cudnn", "__init__": lambda *_: None})
    )
    monkeypatch.setattr(assembly, "Graphs", lambda device, generator: CpuGraphs(generator))
    args, _ = parse_training([*flags.split(), "--emsize", "4", "--nhid", "4"])
    model = assembly.build_model(args, 9)
    rows: Any = SimpleNamespace(device=CUDA)
    optimizer, ranks = assembly.build_optimizer(args, model), Ranks(0, processes)
    _, choices = assembly.build_updater(
        args, model, optimizer, rows, torch.Generator(), "tf32", None, ranks
    )
    assert [str(choice) for choice in choices.values()] == expected
    assert list(choices) == ["layers", "decoder", "step", "recording"]


def test_what_a_cpu_computes_with_is_said(run: Any, tmp_path: Any) -> None:
    """A layer without a fast kernel keeps the decoder's and the step's."""
    flags = [*TINY, "--data", write_corpus(tmp_path / "corpus"), "--max-updates", 2]
    lines = {
        ("GRU", "bf16"): [
            "plain (GRU has no fast kernel on a CPU)",
            "linear_cross_entropy",
            "fused",
        ],
        ("LSTM", "bf16"): ["cpu", "linear_cross_entropy", "fused"],
    }
    for (model, precision), kernels in lines.items():
        more = ["--model", model, "--precision", precision, "--save", tmp_path / f"{model}.pt"]
        err = run(*flags, *more).err
        assert f"| precision {precision} | " in err
        for part, kernel in zip(("layers", "decoder", "step"), kernels, strict=True):
            assert f"| {part}: {kernel}" in err
    err = run(*flags, "--precision", "fp32", "--save", tmp_path / "plain.pt").err
    assert "| precision fp32 | plain kernels (a CPU has a fast kernel for bf16 only)\n" in err


def test_freed_memory_is_kept_until_it_is_released() -> None:
    code = (
        "import torch\nfrom pathlib import Path\n"
        "from engine.device import keep_freed_memory, release_freed_memory\n"
        "def resident():\n    return int(Path('/proc/self/statm').read_text().split()[1]) * 4096\n"
        "assert keep_freed_memory()\nbefore = resident()\n"
        "parts = [torch.ones(2**18) for _ in range(100)]\ndel parts\nkept = resident()\n"
        "release_freed_memory()\nprint(kept - before, resident() - before)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stderr == ""
    kept, left = map(int, result.stdout.split())
    assert kept > 90 * 2**20 > 20 * 2**20 > left
