"""Checkpoints come back as they were; what is not one is refused without running it."""

import json
import math
import os
import pickle
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import nn

from data.corpus import Vocabulary
from data.errors import WriteError
from engine.checkpoint import (
    load_model,
    load_training_state,
    model_payload,
    training_payload,
    write_checkpoint,
)
from engine.checkpoint_writer import CheckpointWriter
from engine.errors import CheckpointError
from evaluation.evaluate import evaluate
from evaluation.plain import Plain
from model import RNNModel

WORDS = Vocabulary(["the", "naïve", "<unk>", "<eos>"])


def small_model(**changes: Any) -> RNNModel:
    keywords: dict[str, Any] = dict(
        rnn_type="LSTM", ntoken=4, ninp=3, nhid=5, nlayers=2, wdrop=0.5, tie_weights=True
    )
    return RNNModel(**{**keywords, **changes})


@pytest.mark.parametrize(
    "changes", [{}, {"wdrop": 0}, {"tie_weights": False}, {"nlayers": 1, "rnn_type": "GRU"}]
)
def test_model_comes_back(tmp_path: Path, changes: dict, device: torch.device) -> None:
    model = small_model(**changes)
    write_checkpoint(tmp_path / "m.pt", model_payload(model, WORDS, epoch=3))
    again, words = load_model(tmp_path / "m.pt", device)
    assert words == WORDS
    assert again.config() == model.config()
    assert not again.training
    x = torch.tensor([[0], [1]])
    expected = model.eval()(x, model.init_hidden(1))[0]
    torch.testing.assert_close(again(x.to(device), again.init_hidden(1))[0].cpu(), expected)
    tied = again.decoder.weight is again.encoder.weight
    assert tied == changes.get("tie_weights", True)


def test_parameters_are_named_as_in_the_original() -> None:
    names = set(small_model().state_dict())
    layers = ["weight_ih_l0", "weight_hh_l0_raw", "bias_ih_l0", "bias_hh_l0"]
    assert names == {"encoder.weight", "decoder.weight", "decoder.bias"} | {
        f"rnns.{layer}.module.{name}" for layer in (0, 1) for name in layers
    }
    assert "rnns.1.weight_hh_l0" in small_model(wdrop=0).state_dict()


class _System:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple:
        return (os.system, (f"touch {self.flag}",))


def bad_file(kind: str, folder: Path) -> Path:
    path = folder / "bad.pt"
    good = folder / "good.pt"
    write_checkpoint(good, model_payload(small_model(), WORDS))
    payload = torch.load(good, weights_only=True)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    elif kind == "text":
        path.write_text("the cat sat on the mat\n" * 50)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(_System(folder / "ran")))
    elif kind == "old pickle":
        path.write_bytes(pickle.dumps(_System(folder / "ran"), protocol=2))
    elif kind == "malicious":
        torch.save({**payload, "details": _System(folder / "ran")}, path)
    elif kind == "original":  # [model, criterion, optimizer], as the original's model_save
        torch.save([nn.LSTM(2, 2), nn.Linear(2, 2), None], path)
    elif kind == "tensor":
        torch.save(torch.ones(3), path)
    elif kind == "foreign":
        torch.save({"weights": {}, "config": {}}, path)
    elif kind == "other shape":
        torch.save({**payload, "config": {**payload["config"], "nhid": 6}}, path)
    elif kind == "no config":
        torch.save({**payload, "config": 3}, path)
    elif kind == "vocabulary":
        torch.save({**payload, "vocabulary": "the\nnaïve"}, path)
    elif kind == "training state":
        write_checkpoint(path, training_payload({"model": {}}))
    return path


KINDS = {
    "missing": "no such file",
    "folder": "not a folder that export.py wrote",
    "empty": "empty or truncated",
    "truncated": "truncated or not a checkpoint",
    "text": "truncated or not a checkpoint",
    "pickle": "a pickle that may hold more than plain values: refused",
    "old pickle": r"refused, because loading it would run code \(.*system\)",
    "malicious": r"refused, because loading it would run code \(.*system\)",
    "original": r"refused, because loading it would run code \(.*LSTM\)",
    "tensor": "not a checkpoint of this project",
    "foreign": "not a checkpoint of this project",
    "other shape": "damaged checkpoint: .*size mismatch",
    "no config": "damaged checkpoint",
    "vocabulary": "damaged checkpoint: 2 words for 4 embeddings",
    "training state": "'awd-lstm training state 2' file",
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_model_is_refused(tmp_path: Path, kind: str) -> None:
    path = bad_file(kind, tmp_path)
    with pytest.raises(CheckpointError, match=KINDS[kind]) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_model_that_was_saved_long_ago() -> None:
    """By commit 47e0d14, whose training states have another format."""
    folder = ROOT / "tests" / "data" / "format-1"
    model, vocabulary = load_model(folder / "run.pt")
    words = (folder / "test.txt").read_text().replace("\n", " <eos> ").split()
    loss = evaluate(Plain(model), torch.tensor([vocabulary.index(word) for word in words]), 1)
    reported = json.loads((folder / "run" / "summary.json").read_text())["test_ppl"]
    assert math.exp(loss) == pytest.approx(reported, rel=1e-6)
    with pytest.raises(CheckpointError, match=r"training state 1' file \(the commit that"):
        load_training_state(folder / "run" / "last.pt")


def test_load_state_dict_of_the_original() -> None:
    """With the masked weight registered beside the raw one, as its WeightDrop left it."""
    model = small_model()
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    state["decoder.weight"] = state["encoder.weight"]
    for layer, rnn in enumerate(model.rnns):
        raw = rnn.get_parameter("module.weight_hh_l0_raw")
        state[f"rnns.{layer}.module.weight_hh_l0"] = torch.zeros_like(raw)
    model.load_state_dict(state)
    raw = model.get_parameter("rnns.0.module.weight_hh_l0_raw")
    assert torch.equal(raw, state["rnns.0.module.weight_hh_l0_raw"])


def test_in_the_background_it_writes_what_there_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Whatever becomes of the tensors meanwhile; a third file waits for the first."""
    may, save, writer = threading.Event(), torch.save, CheckpointWriter(True)

    def slow(payload: object, file: Any) -> None:
        assert may.wait(60)
        save(payload, file)

    monkeypatch.setattr(torch, "save", slow)
    model, position = small_model().to(device), {"n": 0}
    expected = {name: value.cpu().clone() for name, value in model.state_dict().items()}
    writer.write(tmp_path / "m.pt", model_payload(model, WORDS, position=position))
    writer.write(tmp_path / "last.pt", training_payload(dict(position=position)))
    position["n"] = -1
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    threading.Timer(0.1, may.set).start()
    writer.write(tmp_path / "third.pt", model_payload(model, WORDS))
    assert may.is_set()
    writer.wait()
    payload = torch.load(tmp_path / "m.pt", weights_only=True)
    assert payload["details"] == {"position": {"n": 0}}
    assert payload["weights"].keys() == expected.keys()
    assert all(torch.equal(payload["weights"][name], value) for name, value in expected.items())
    write_checkpoint(tmp_path / "now.pt", model_payload(model, WORDS, position=position))
    sizes = [(tmp_path / name).stat().st_size for name in ("m.pt", "now.pt")]
    assert sizes[0] <= sizes[1]  # a tied matrix once


def test_after_a_file_that_could_not_be_written_none_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A best model and the state that knows of it belong together; what ended training counts."""
    model, state = model_payload(small_model(), WORDS), training_payload({"hidden": []})

    def train(diverges: bool) -> None:
        with CheckpointWriter(True) as writer:
            writer.write(tmp_path / "gone" / "m.pt", model)
            assert not diverges
            writer.write(tmp_path / "last.pt", state)

    with pytest.raises(WriteError, match=r"m\.pt: cannot write: No such file"):
        train(diverges=False)
    with pytest.raises(AssertionError):
        train(diverges=True)
    assert "gone/m.pt: cannot write: No such file" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_write_that_failed_ends_the_run_at_the_next_one(tmp_path: Path) -> None:
    model = model_payload(small_model(), WORDS)

    def train() -> None:
        with CheckpointWriter(True) as writer:
            writer.write(tmp_path / "gone" / "m.pt", model)
            deadline = time.monotonic() + 60
            while not writer._pending[0].done():
                assert time.monotonic() < deadline
            writer.write(tmp_path / "next.pt", model)
            pytest.fail("it goes on")

    with pytest.raises(WriteError, match=r"m\.pt: cannot write: No such file"):
        train()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("background", [False, True])
def test_ctrl_c_leaves_no_file_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    save, model = torch.save, model_payload(small_model(), WORDS)

    begun = threading.Event()

    def slow(payload: object, file: Any) -> None:
        begun.set()
        time.sleep(0.3)
        save(payload, file)

    def write_three() -> None:
        with CheckpointWriter(background) as writer:
            writer.write(tmp_path / "0.pt", model)
            if background:
                assert begun.wait(60)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            writer.write(tmp_path / "1.pt", model)
            writer.write(tmp_path / "2.pt", model)  # waits for the first

    monkeypatch.setattr(torch, "save", slow)
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            write_three()
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.pt", "1.pt"]
