"""What is particular to CUDA, with stand-ins for the device where there is none."""

import warnings
from functools import partial

import pytest
import torch
from cudnn_on_cpu import cudnn_on_cpu
from engine.late_look import LateLook

import assembly
from engine import precision
from engine.device import peak_memory, random_state, restore_random_state, select_device
from engine.errors import UsageError
from engine.precision import choose_kernel, cudnn_failure
from engine.ranks import Ranks
from flags import parse_training
from model import RNNModel

CUDA = torch.device("cuda")


def test_select(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with warnings.catch_warnings():
        assert select_device("auto") == CUDA
        assert select_device("cuda:1") == torch.device("cuda", 1)
        # what cuDNN has to say of a masked weight is not shown to the user
        warnings.warn("RNN module weights are not part of single contiguous chunk", stacklevel=1)
    with pytest.raises(UsageError, match="this machine has 2 CUDA devices"):
        select_device("cuda:2")
    assert select_device("cpu") == torch.device("cpu")


def test_random_states_and_memory(device: torch.device) -> None:
    state = random_state(device)
    assert (state["cuda"] is None) == (device.type == "cpu")
    first = torch.rand(3, device=device)
    restore_random_state(state, device)
    assert torch.equal(torch.rand(3, device=device), first)
    restore_random_state(dict(state, cuda=None), device)  # a run that began on a CPU
    assert peak_memory(device) > (10**7 if device.type == "cpu" else 0)


def test_an_updates_values_are_looked_at_one_update_later(device: torch.device) -> None:
    seen: list[tuple[int, list[float]]] = []
    look = LateLook[int](lambda what, values: seen.append((what, values)), device)
    tensor = partial(torch.tensor, device=device)
    look.push(1, [tensor(2.0), tensor(1.0)])
    assert seen == []
    look.push(2, [tensor(2.0), tensor(float("inf")), tensor(True)])
    assert seen == [(1, [2.0, 1.0])]
    look.push(3, [tensor(5.0)])
    look.check()
    look.check()
    assert seen[1:] == [(2, [2.0, float("inf"), 1.0]), (3, [5.0])]


@pytest.mark.parametrize(
    ("flags", "processes", "expected"),
    [
        ("", 1, "cudnn kernel, over weights of its own | updates are recorded as CUDA graphs"),
        ("--kernel eager", 1, "of its own | updates are not recorded: as asked"),
        (
            "--optimizer adam --lr 0.1",
            1,
            "of its own | updates are not recorded: --optimizer adam steps by itself",
        ),
        (
            "--bptt-scheme full",
            1,
            "updates are not recorded: --bptt-scheme full makes one an epoch",
        ),
        ("", 2, "of its own | updates are not recorded: there are 2 processes"),
        ("--kernel plain", 1, "plain kernel, as asked"),
    ],
)
def test_what_a_gpu_computes_with_is_said(
    monkeypatch: pytest.MonkeyPatch, flags: str, processes: int, expected: str
) -> None:
    args, _ = parse_training(flags.split())
    model = RNNModel("LSTM", 9, 4, 4, 1, tie_weights=True)
    monkeypatch.setattr(assembly, "choose_precision", lambda *_: "tf32")
    monkeypatch.setattr(assembly, "choose_kernel", lambda *_: choose_kernel("tf32", CUDA))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(precision, "cudnn_failure", lambda *_: "")
    monkeypatch.setattr(assembly, "CudaRecorder", lambda device: device)
    with cudnn_on_cpu():
        _, line = assembly.set_precision(args, model)
    recorder, more = assembly.build_recorder(args, model, CUDA, Ranks(0, processes))
    assert (line + more).endswith(expected)
    assert (recorder is not None) == expected.endswith("CUDA graphs")
    assert assembly.build_recorder(args, model, torch.device("cpu"), Ranks()) == (None, "")


def test_without_cudnn_the_kernel_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert choose_kernel("bf16", CUDA) == ("plain", "this PyTorch has no cuDNN")


def test_where_cudnn_fails_the_kernel_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it does, unless its operators are written out."""
    cpu, failure = torch.device("cpu"), cudnn_failure
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(precision, "cudnn_failure", lambda dtype, _: failure(dtype, cpu))
    kernel, reason = choose_kernel("fp16", CUDA)
    assert kernel == "plain"
    assert reason.startswith("cuDNN's layer fails: Could not run 'aten::_cudnn_rnn")
    with cudnn_on_cpu():
        assert choose_kernel("tf32", CUDA) == ("cudnn", "over weights of its own")
