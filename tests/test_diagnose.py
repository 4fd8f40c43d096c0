"""diagnose.py from its command line to its files, and --diagnostics in training."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Result, read_events, write_corpus
from test_bad_input import only_line
from test_resume import assert_same_run

import assembly
import diagnose
from data.corpus import Corpus, load_corpus
from engine.checkpoint import load_model, model_payload, write_checkpoint
from flags.training import parse_training
from layers import LAYERS
from layers.lstm import LSTM
from model import RNNModel
from programs.diagnose import fresh

Run = Callable[..., Result]
SMALL = shlex.split("--batch-size 4 --lags 12 --positions 3 --windows 2 --bptt 8 --device cpu")


@pytest.fixture
def look(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run diagnose.py in this process."""

    def call(*argv: object) -> Result:
        capsys.readouterr()
        code = diagnose.main([*SMALL, *map(str, argv)])  # later flags win
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib is not installed."""
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture
def corpus(corpus_folder: Path) -> Corpus:
    return load_corpus(corpus_folder)


def planted(
    path: Path, corpus: Corpus, scale: float, forget_bias: float, **changes: Any
) -> RNNModel:
    """A model whose recurrent weights are multiplied by scale, saved at path."""
    keywords: dict[str, Any] = dict(
        rnn_type="LSTM", ninp=32, nhid=32, nlayers=2, dropout=0.2, dropouth=0.1, dropouti=0.1,
        dropoute=0.1, wdrop=0.3, tie_weights=True,
    )  # fmt: skip
    model = RNNModel(ntoken=len(corpus.vocabulary), **{**keywords, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "weight_hh" in name:
                parameter.mul_(scale)
            if "bias_hh" in name:
                units = len(parameter) // 4
                parameter[units : 2 * units] += forget_bias
    write_checkpoint(path, model_payload(model, corpus.vocabulary))
    return model


def read(folder: Path) -> dict[str, Any]:
    diagnosis: dict[str, Any] = json.loads((folder / "diagnosis.json").read_text())
    return diagnosis


def test_a_run_s_own_corpus_and_its_training_state(
    run: Run, look: Run, no_plots: None, corpus_folder: Path, tmp_path: Path
) -> None:
    save = tmp_path / "run.pt"
    assert run(*TINY, "--data", corpus_folder, "--save", save, "--max-updates", 1).code == 0
    result = look(save)
    assert result.code == 0
    assert f"| {save} was trained on {corpus_folder}\n" in result.err
    assert read(tmp_path / "run-diagnosis")["settings"]["data"] == str(corpus_folder)
    last = tmp_path / "run" / "last.pt"
    assert only_line(look(last), 1) == f"{last}: a training state; the model of this run is {save}"
    save.rename(tmp_path / "alone.pt")
    assert "argument --data: which corpus?" in only_line(look(tmp_path / "alone.pt"), 2)


def test_the_objective_is_that_of_the_model_s_run(
    run: Run, look: Run, no_plots: None, corpus_folder: Path, tmp_path: Path
) -> None:
    """Its penalties too; what is given on the command line wins, and other models have defaults."""
    save = tmp_path / "run.pt"
    flags = ["--alpha", 500, "--beta", 3, "--clip", 0.5]
    data = ["--data", corpus_folder]
    assert run(*TINY, *data, "--save", save, "--max-updates", 1, *flags).code == 0

    def gradient(path: Path, *argv: object) -> tuple[dict[str, Any], list[float]]:
        assert look(path, *data, *argv, "--output", tmp_path / "out").code == 0
        found = read(tmp_path / "out")
        [model] = found["models"]
        return found["settings"], model["figures"]["gradient"]["norms"]

    settings, norms = gradient(save)
    assert [settings[name] for name in ("alpha", "beta", "clip", "bptt")] == [500, 3, 0.5, 8]
    alone = save.rename(tmp_path / "alone.pt")
    settings, plain = gradient(alone)
    assert [settings[name] for name in ("alpha", "beta", "clip")] == [2, 1, 0.25]
    assert norms[0] > 2 * plain[0]
    assert gradient(alone, *flags)[1] == norms


def test_two_models_with_everything(
    look: Run, corpus: Corpus, corpus_folder: Path, tmp_path: Path
) -> None:
    one, other = tmp_path / "one.pt", tmp_path / "other.pt"
    planted(one, corpus, 1, 0)
    planted(other, corpus, 2, 1, nlayers=1, wdrop=0, tie_weights=False, dropout=0.0)
    result = look("--compare", one, other, "--data", corpus_folder, "--thresholds", 5, 1, 5)
    assert result.code == 0, result
    folder = tmp_path / "one-other-diagnosis"
    diagnosis = read(folder)
    assert [m["name"] for m in diagnosis["models"]] == ["one", "other"]
    figures = diagnosis["models"][0]["figures"]
    assert len(figures["layers"]) == 2
    assert list(figures["filters"]["masks"]) == ["1", "5"]
    assert len(figures["filters"]["masks"]["1"][1]) == 4
    assert len(figures["layers"][1]["hidden"]["quantiles"]["0.5"]) == 13
    assert len(figures["layers"][0]["spectrum"]["forget"]["singular_values"]) == 32
    page = (folder / "summary.md").read_text()
    for sentence in [s for m in diagnosis["models"] for s in m["findings"]]:
        assert sentence in page
        assert sentence in result.out
    assert diagnosis["comparison"][0] in page
    pictures = sorted(folder.glob("*.png"))
    assert len(pictures) == 7
    for picture in pictures:
        assert picture.name in page
        assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert picture.stat().st_size > 5000
        assert picture.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("scale", "forget_bias", "headline"),
    [
        (1.0, 2.0, "Gradients neither explode nor vanish at once."),
        (30.0, 0.0, "Gradients explode: h and c of every layer."),
        (0.01, -4.0, "Gradients vanish: h and c of every layer."),
    ],
)
@pytest.mark.usefixtures("no_plots")
def test_what_was_planted_is_found(
    look: Run, corpus: Corpus, corpus_folder: Path, tmp_path: Path,
    scale: float, forget_bias: float, headline: str,
) -> None:  # fmt: skip
    """And without matplotlib everything but the pictures is there."""
    planted(tmp_path / "planted.pt", corpus, scale, forget_bias)
    result = look(tmp_path / "planted.pt", "--data", corpus_folder)
    assert result.code == 0, result
    folder = tmp_path / "planted-diagnosis"
    assert {path.name for path in folder.iterdir()} == {"diagnosis.json", "summary.md"}
    assert [line for line in result.err.splitlines() if "plots are left out" in line]
    assert read(folder)["models"][0]["findings"][0].startswith(headline)
    page = (folder / "summary.md").read_text()
    assert headline in page
    assert ".png" not in page


@pytest.mark.usefixtures("no_plots")
def test_fresh_weights_are_those_that_training_starts_from(
    look: Run, run: Run, corpus: Corpus, corpus_folder: Path, tmp_path: Path
) -> None:
    save = tmp_path / "run.pt"
    assert run(*TINY, "--data", corpus_folder, "--save", save, "--max-updates", 3).code == 0
    args, _ = parse_training(TINY)
    torch.manual_seed(args.seed)
    start = assembly.build_model(args, len(corpus.vocabulary))
    again = fresh(load_model(save)[0], args.seed)
    assert start.config() == again.config()
    for one, other in zip(start.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    write_checkpoint(tmp_path / "start.pt", model_payload(start, corpus.vocabulary))
    flags = ["--data", corpus_folder, "--seed", args.seed]
    assert look("--compare", save, save, "--fresh", *flags).code == 0
    assert look(tmp_path / "start.pt", *flags).code == 0
    assert look(save, "--fresh", *flags).code == 0
    both = read(tmp_path / "run-run-fresh-diagnosis")["models"]
    alone = read(tmp_path / "start-diagnosis")["models"][0]
    assert [m["name"] for m in both] == ["run", "run (fresh)"]
    assert both[1]["figures"] == alone["figures"] != both[0]["figures"]
    assert read(tmp_path / "run-fresh-diagnosis")["models"] == [both[1]]


# Training


def without_diagnostics(folder: Path) -> list[dict[str, Any]]:
    return [e for e in read_events(folder) if e["event"] != "diagnostics"]


@pytest.mark.parametrize("clip", [0.25, 0])
def test_diagnostics_change_nothing_and_resume_exactly(
    run: Run, corpus_folder: Path, tmp_path: Path, clip: float
) -> None:
    flags = [*TINY, "--data", corpus_folder, "--nonmono", 0, "--lr", 20, "--epochs", 3]
    flags += ["--clip", clip]
    off, whole, parts = (tmp_path / f"{name}.pt" for name in ("off", "whole", "parts"))
    assert run(*flags, "--save", off).code == 0
    flags += ["--resume", "auto", "--diagnostics", 2]
    assert run(*flags, "--save", whole).code == 0
    for updates in (3, 8, 100):
        assert run(*flags, "--save", parts, "--max-updates", updates).code == 0
    assert_same_run(whole, parts)
    assert read_events(tmp_path / "off") == without_diagnostics(tmp_path / "whole")
    one, other = (torch.load(p, weights_only=True)["weights"] for p in (off, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)

    events = [e for e in read_events(tmp_path / "whole") if e["event"] == "diagnostics"]
    last = read_events(tmp_path / "whole")[-1]["step"]
    assert [e["step"] for e in events] == list(range(2, last + 1, 2))
    train = {e["step"]: e for e in read_events(tmp_path / "whole") if e["event"] == "train"}
    assert train.keys() & {e["step"] for e in events}
    for event in events:
        held = [value for key, value in event.items() if key.startswith("grad_share_")]
        assert len(held) == 4
        assert sum(held) == pytest.approx(1)
        expected = min(1, clip / event["grad_norm"]) if clip else 1
        assert event["clip_factor"] == pytest.approx(expected, rel=1e-3)
        if event["step"] in train:
            assert event["grad_norm"] == train[event["step"]]["grad_norm"]
    assert run("--resume", tmp_path / "off", "--epochs", 4, "--diagnostics", 2).code == 0
    assert "diagnostics" in {e["event"] for e in read_events(tmp_path / "off")}


# Bad input


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "MODEL"),
        (["model.pt", "--compare", "model.pt", "model.pt"], "MODEL"),
        (["--compare", "model.pt"], "--compare"),
        (["model.pt", "--lags", "0"], "--lags"),
        (["model.pt", "--thresholds", "0"], "--thresholds"),
        (["model.pt", "--split", "all"], "--split"),
        (["model.pt", "--masks", "-1"], "--masks"),
        (["model.pt", "--device", "cuda:99"], "--device"),
        (["model.pt", "--nhid", "7"], "--nhid"),
    ],
)
def test_flags_that_cannot_be(look: Run, flags: list[str], words: str) -> None:
    assert words in only_line(look(*flags), 2)


def test_files_that_cannot_be(
    look: Run, corpus: Corpus, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model.pt"
    planted(model, corpus, 1, 0)
    data = ["--data", corpus_folder]
    assert "no.pt: no such file" in only_line(look(tmp_path / "no.pt", *data), 1)
    (tmp_path / "text.pt").write_text("not a model")
    assert "text.pt" in only_line(look(tmp_path / "text.pt", *data), 1)
    assert "no such folder" in only_line(look(model, "--data", tmp_path / "nowhere"), 1)

    other = write_corpus(tmp_path / "other", words=20)
    line = only_line(look(model, "--data", other), 1)
    assert str(other) in line
    assert "its words" in line
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "in", tmp_path / "nowhere" / "in"):
        assert f"{output}: cannot write there" in only_line(
            look(model, *data, "--output", output), 1
        )
    assert (tmp_path / "file").read_text() == "mine"
    line = only_line(look(model, *data, "--split", "valid"), 1)
    assert f"{corpus_folder}/valid.txt: " in line
    assert "are too few" in line

    monkeypatch.setitem(LAYERS, "Own", type("Own", (LSTM,), {}))  # whose steps nobody here knows
    for kind in ("GRU", "Own"):
        planted(tmp_path / "other.pt", corpus, 1, 0, rnn_type=kind)
        line = only_line(look(tmp_path / "other.pt", *data), 1)
        assert f"other.pt: its layers are {kind}" in line

    broken = planted(tmp_path / "broken.pt", corpus, 1, 0)
    with torch.no_grad():
        broken.get_parameter("decoder.bias")[3] = torch.nan
    write_checkpoint(tmp_path / "broken.pt", model_payload(broken, corpus.vocabulary))
    assert "its weights are not finite" in only_line(look(tmp_path / "broken.pt", *data), 1)
    assert not list(tmp_path.glob("*-diagnosis"))
