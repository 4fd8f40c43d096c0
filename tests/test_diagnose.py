"""diagnose.py from its command line to its files, and --diagnostics in training."""

import io
import json
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Result, read_events, write_corpus
from test_bad_input import only_line
from test_pictures import LONG, Seen, assert_legible, seen  # noqa: F401
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


def test_corpus_and_objective_are_those_of_the_model_s_run(
    run: Run, look: Run, no_plots: None, corpus_folder: Path, tmp_path: Path
) -> None:
    """Its penalties too; what is given on the command line wins, and other models have defaults."""
    save, data = tmp_path / "run.pt", ["--data", corpus_folder]
    flags = ["--alpha", 500, "--beta", 3, "--clip", 0.5]
    assert run(*TINY, *data, "--save", save, "--max-updates", 1, *flags).code == 0

    def gradient(path: Path, *argv: object) -> tuple[dict[str, Any], list[float]]:
        assert look(path, *argv, "--output", tmp_path / "out").code == 0
        found = read(tmp_path / "out")
        [model] = found["models"]
        return found["settings"], model["figures"]["gradient"]["norms"]

    settings, norms = gradient(save)
    own = dict(data=str(corpus_folder), alpha=500, beta=3, clip=0.5, bptt=8)
    assert own.items() <= settings.items()
    last = tmp_path / "run" / "last.pt"
    assert only_line(look(last), 1) == f"{last}: a training state; the model of this run is {save}"
    alone = save.rename(tmp_path / "alone.pt")
    assert "argument --data: which corpus?" in only_line(look(alone), 2)
    settings, plain = gradient(alone, *data)
    assert [settings[name] for name in ("alpha", "beta", "clip")] == [2, 1, 0.25]
    assert norms[0] > 2 * plain[0]
    assert gradient(alone, *data, *flags)[1] == norms


def test_two_models_with_everything(
    look: Run, corpus: Corpus, corpus_folder: Path, tmp_path: Path, seen: Seen  # noqa: F811
) -> None:  # fmt: skip
    one, other = tmp_path / f"{LONG}.pt", tmp_path / "other.pt"
    planted(one, corpus, 1, 0)
    planted(other, corpus, 2, 1, nlayers=1, wdrop=0, tie_weights=False, dropout=0.0)
    flags = ("--data", corpus_folder, "--thresholds", 5, 1, 5, "--format", "png")
    result = look("--compare", one, other, "--output", tmp_path / "out", *flags)
    assert result.code == 0, result
    assert_legible(seen, [LONG, "other"])
    diagnosis = read(tmp_path / "out")
    assert [m["name"] for m in diagnosis["models"]] == [LONG, "other"]
    figures = diagnosis["models"][0]["figures"]
    assert len(figures["layers"]) == 2
    assert list(figures["filters"]["masks"]) == ["1", "5"]
    assert len(figures["filters"]["masks"]["1"][1]) == 4
    assert len(figures["layers"][1]["hidden"]["quantiles"]["0.5"]) == 13
    assert len(figures["layers"][0]["spectrum"]["forget"]["singular_values"]) == 32
    page = (tmp_path / "out" / "summary.md").read_text()
    sentences = [s for m in diagnosis["models"] for s in m["findings"]] + diagnosis["comparison"]
    for sentence in sentences:
        assert sentence in page
        assert sentence in result.out
    columns = [line.split(" | ") for line in page.splitlines() if line.startswith("|")]
    assert {len(cells) for cells in columns if "---" not in cells[0]} == {4}
    files = {path.name for path in (tmp_path / "out").iterdir()}
    pictures = {name for name in files if name.endswith(".png")}
    assert len(pictures) == 7
    assert files == {"diagnosis.json", "summary.md", *pictures}
    assert all(name in page for name in pictures)


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


def test_a_name_that_is_no_utf_8(corpus: Corpus, corpus_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / os.fsdecode(b"m\xff.pt")
    planted(path, corpus, 1, 0, nlayers=1)
    argv = [*SMALL, str(path), "--data", str(corpus_folder), "--format", "png"]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        assert diagnose.main(argv) == 0
    folder = tmp_path / os.fsdecode(b"m\xff-diagnosis")
    assert len(list(folder.glob("*.png"))) == 7
    assert r"What was found in m\udcff" in (folder / "summary.md").read_text()


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


def test_diagnostics_change_nothing_and_resume_exactly(
    run: Run, corpus_folder: Path, tmp_path: Path
) -> None:
    flags = [*TINY, "--data", corpus_folder, "--nonmono", 0, "--lr", 20, "--epochs", 3]
    off, whole, parts = (tmp_path / f"{name}.pt" for name in ("off", "whole", "parts"))
    assert run(*flags, "--save", off).code == 0
    flags += ["--resume", "auto", "--diagnostics", 2]
    assert run(*flags, "--save", whole).code == 0
    for updates in (3, 8, 100):
        assert run(*flags, "--save", parts, "--max-updates", updates).code == 0
    assert_same_run(whole, parts)
    found = read_events(whole)
    events = [e for e in found if e["event"] == "diagnostics"]
    assert read_events(off) == [e for e in found if e["event"] != "diagnostics"]
    one, other = (torch.load(p, weights_only=True)["weights"] for p in (off, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)

    assert [e["step"] for e in events] == list(range(2, found[-1]["step"] + 1, 2))
    norms = {e["step"]: e["grad_norm"] for e in found if e["event"] == "train"}
    assert norms.keys() & {e["step"] for e in events}
    for event in events:
        held = [value for key, value in event.items() if key.startswith("grad_share_")]
        assert len(held) == 4
        assert sum(held) == pytest.approx(1)
        assert event["clip_factor"] == pytest.approx(min(1, 0.25 / event["grad_norm"]), rel=1e-3)
        assert event["grad_norm"] == norms.get(event["step"], event["grad_norm"])
    assert run("--resume", tmp_path / "off", "--epochs", 4, "--diagnostics", 2).code == 0
    assert "diagnostics" in {e["event"] for e in read_events(off)}


# Bad input


def test_flags_that_cannot_be(look: Run) -> None:
    for flags, words in (
        ([], "MODEL"),
        (["model.pt", "--compare", "model.pt", "model.pt"], "MODEL"),
        (["model.pt", "--lags", "0"], "--lags"),
        (["model.pt", "--masks", "-1"], "--masks"),
        (["model.pt", "--device", "cuda:99"], "--device"),
    ):
        assert words in only_line(look(*flags), 2)


def test_files_that_cannot_be(
    look: Run, corpus: Corpus, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = tmp_path / "model.pt", ["--data", corpus_folder]
    planted(model, corpus, 1, 0)
    assert "no.pt: no such file" in only_line(look(tmp_path / "no.pt", *data), 1)
    other = write_corpus(tmp_path / "other", words=20)
    assert "its words" in only_line(look(model, "--data", other), 1)
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "nowhere" / "in"):
        line = only_line(look(model, *data, "--output", output), 1)
        assert f"{output}: cannot write there" in line
    assert (tmp_path / "file").read_text() == "mine"
    assert "valid.txt: " in only_line(look(model, *data, "--split", "valid"), 1)

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
