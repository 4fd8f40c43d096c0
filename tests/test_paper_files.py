"""The files that carry the paper's names hold the code that runs: where one fails, all stops."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from conftest import TINY, Result

from activation_regularize import activation_regularization, temporal_activation_regularization
from data.corpus import load_corpus
from embed_regularize import embedded_dropout
from evaluation.evaluate import evaluate
from evaluation.plain import Plain
from gradient_filter import GradientFilter, sequence_norms
from locked_dropout import LockedDropout
from model import RNNModel
from noise import drop_factors
from weight_drop import WeightDrop

Run = Callable[..., Result]
FORWARD = [WeightDrop.forward, LockedDropout.forward, embedded_dropout]
PENALTIES = [activation_regularization, temporal_activation_regularization]
FILES = {
    "--wdrop": "weight_drop.py",
    "--dropoute": "embed_regularize.py",
    **dict.fromkeys(("--dropouti", "--dropouth", "--dropout"), "locked_dropout.py"),
}
# The filter's equations are in its backward pass.
FILTER = [GradientFilter.forward, sequence_norms]


def fail(*args: object, **kwargs: object) -> NoReturn:
    raise RuntimeError("planted")


def plant(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """Have a function raise, by whatever name it was imported."""
    monkeypatch.setattr(function, "__code__", fail.__code__)


def files_below(error: BaseException) -> list[str]:
    """What had been entered when it was raised."""
    return [Path(frame.filename).name for frame in traceback.extract_tb(error.__traceback__)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("function", [*PENALTIES, *FILTER], ids=lambda f: f.__qualname__)
def test_training_stops_in_its_first_update(
    run: Run,
    corpus_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: Any,
    precision: str,
) -> None:
    flags = [*TINY, "--data", corpus_folder, "--save", tmp_path / "m.pt", "--log-interval", 1]
    flags += ["--grad-filter", "--precision", precision, "--max-updates", 1]
    plant(monkeypatch, function)
    with pytest.raises(RuntimeError, match="planted") as caught:
        run(*flags)
    assert "update.py" in files_below(caught.value)
    assert "train" not in (tmp_path / "m" / "metrics.jsonl").read_text()
    monkeypatch.undo()
    assert run(*flags).code == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_dropout_is_drawn_for_in_its_own_file(
    run: Run,
    corpus_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
) -> None:
    flags = [*TINY, "--data", corpus_folder, "--save", tmp_path / "m.pt", "--precision", precision]
    flags += [word for flag in FILES for word in (flag, 0)]
    plant(monkeypatch, drop_factors)
    for flag, file in FILES.items():
        with pytest.raises(RuntimeError, match="planted") as caught:
            run(*flags, flag, 0.3)
        assert {"update.py", file} <= set(files_below(caught.value))


@pytest.fixture
def model(corpus_folder: Path) -> RNNModel:
    words = len(load_corpus(corpus_folder).vocabulary)
    rates: dict[str, Any] = dict(dropout=0.2, dropouth=0.1, dropouti=0.1, dropoute=0.1, wdrop=0.3)
    return RNNModel("LSTM", words, 6, 8, 2, **rates, tie_weights=True)


@pytest.mark.parametrize("function", FORWARD, ids=lambda f: f.__qualname__)
def test_evaluation_stops(model: RNNModel, monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    text = torch.randint(0, model.ntoken, (50,))
    evaluate(Plain(model), text, 3)
    plant(monkeypatch, function)
    with pytest.raises(RuntimeError, match="planted"):
        evaluate(Plain(model), text, 3)
