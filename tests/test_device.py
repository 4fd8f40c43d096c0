"""What is particular to CUDA, with stand-ins for the device where there is none."""

import warnings

import pytest
import torch

from engine.device import peak_memory, random_state, restore_random_state, select_device
from engine.late_look import LateLook
from engine.provenance import versions

CUDA = torch.device("cuda")


class FakeEvent:
    """Records the order of calls."""

    calls: list[str]

    def record(self) -> None:
        self.calls.append("record")

    def synchronize(self) -> None:
        self.calls.append("synchronize")


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    monkeypatch.setattr(FakeEvent, "calls", calls, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.tensor([7]))
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: calls.append(f"{state} {device}")
    )
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return calls


def test_select(fake_cuda: list[str]) -> None:
    with warnings.catch_warnings():
        assert select_device("auto") == CUDA
        assert select_device("cuda:1") == torch.device("cuda", 1)
        # what cuDNN has to say of a masked weight is not shown to the user
        warnings.warn("RNN module weights are not part of single contiguous chunk", stacklevel=1)
    with pytest.raises(ValueError, match="this machine has 2 CUDA devices"):
        select_device("cuda:2")
    assert select_device("cpu") == torch.device("cpu")


def test_random_states_and_memory(fake_cuda: list[str]) -> None:
    state = random_state(CUDA)
    assert state["cuda"].tolist() == [7]
    restore_random_state(state, CUDA)
    restore_random_state(dict(state, cuda=None), CUDA)  # a run that began on a CPU
    assert fake_cuda == ["tensor([7]) cuda"]
    assert random_state(torch.device("cpu"))["cuda"] is None
    assert peak_memory(CUDA) == 123
    assert peak_memory(torch.device("cpu")) > 10**7
    assert versions()["cuda"] == "13.0"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_updates_values_are_looked_at_one_update_later(
    fake_cuda: list[str], device: str
) -> None:
    seen: list[tuple[int, list[float]]] = []
    look = LateLook[int](lambda what, values: seen.append((what, values)), torch.device(device))
    look.push(1, [torch.tensor(2.0), torch.tensor(1.0)])
    assert seen == []
    look.push(2, [torch.tensor(2.0), torch.tensor(float("inf")), torch.tensor(True)])
    assert seen == [(1, [2.0, 1.0])]
    look.push(3, [torch.tensor(5.0)])
    look.check()
    look.check()
    assert seen[1:] == [(2, [2.0, float("inf"), 1.0]), (3, [5.0])]
    # the wait for an update comes after the next one has been recorded
    expected = ["record", "record", "synchronize", "record", "synchronize"]
    assert fake_cuda == ([*expected, "synchronize"] if device == "cuda" else [])
