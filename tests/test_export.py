"""export.py: folders that other programs can read, and models of the original."""

import json
import os
import pickle
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import TINY, Result, write_corpus
from safetensors.torch import load_file
from test_bad_input import only_line
from test_checkpoint import WORDS, small_model
from torch import Tensor, nn

import diagnose
import evaluate as evaluate_py
import export
import finetune
from data.corpus import load_corpus
from data.text import read_text
from engine.checkpoint import load_model, model_details, model_payload, write_checkpoint
from evaluation.evaluate import evaluate, perplexity
from evaluation.plain import Plain
from programs.export import read_vocabulary

Run = Callable[..., Result]


def test_an_exported_model_has_the_same_perplexity_to_the_last_bit(
    run: Run, call: Run, tmp_path: Path
) -> None:
    """Loaded by this code, and by the lines of the folder's README.md far from this code."""
    corpus, elsewhere = write_corpus(tmp_path / "corpus", lines=600), tmp_path / "elsewhere"
    expected = []
    for name, changes in {"a": [], "b": ["--model", "GRU", "--untied", "--wdrop", 0]}.items():
        path = tmp_path / f"run-{name}.pt"
        flags = [*TINY, "--data", corpus, "--max-updates", 3, *changes, "--save", path]
        assert run(*flags).code == 0
        result = call(export, path, "--output", tmp_path / name)
        assert (result.code, result.err) == (0, "")
        model, vocabulary = load_model(path)
        again, words = load_model(tmp_path / name)
        assert (words, again.config()) == (vocabulary, model.config())
        assert model_details(tmp_path / name) == model_details(path)
        ids = read_text(corpus / "train.txt", vocabulary).ids
        assert len(ids) > 2 * 2048  # three windows of the README's program
        expected.append(perplexity(evaluate(Plain(model), ids, 1)))
        assert perplexity(evaluate(Plain(again), ids, 1)) == expected[-1]
        stored = load_file(tmp_path / name / "model.safetensors")
        tied = json.loads((tmp_path / name / "config.json").read_text())["tie_weights"]
        assert tied == ("decoder.weight" not in stored) == (name == "a")
    flags = ["--batch-size", 4, "--lr", 1, "--max-updates", 3, "--device", "cpu"]
    assert call(finetune, "--save", tmp_path / "a", "--data", corpus, *flags).code == 0
    before, after = (load_model(tmp_path / name)[0] for name in ("a", "a.finetuned.pt"))
    assert before.config() == after.config()
    assert not torch.equal(before.encoder.weight, after.encoder.weight)

    elsewhere.mkdir()
    readme = (tmp_path / "a" / "README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    (elsewhere / "perplexity.py").write_text(program)
    both = "import runpy, sys\nfor sys.argv in {}: runpy.run_path(sys.argv[0])".format(
        [["perplexity.py", f"../{name}", "../corpus/train.txt"] for name in "ab"]
    )
    command = [sys.executable, "-I", "-c", both]
    printed = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=True)
    assert [float(line) for line in printed.stdout.split()] == expected


def test_programs_run_inside_an_exported_folder(
    call: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which has no run, also if one has the folder's name without what follows a dot."""
    words = load_corpus(write_corpus(tmp_path / "corpus")).vocabulary
    write_checkpoint(tmp_path / "m.pt", model_payload(small_model(ntoken=len(words)), words))
    folder = tmp_path / "m.exported"
    assert call(export, tmp_path / "m.pt", "--output", folder).code == 0
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"flags": {"data": "/nowhere"}}')
    monkeypatch.chdir(folder)
    text = ["--data", "../corpus", "--batch-size", 2]
    for program in (evaluate_py, diagnose):
        assert "argument --data: which corpus? " in only_line(call(program, "."), 2)
    sizes = ["--lags", 2, "--positions", 1, "--windows", 1, "--bptt", 4, "--masks", 0]
    assert call(diagnose, ".", *text, *sizes).code == 0
    assert call(finetune, "--save", ".", *text, "--max-updates", 1).code == 0
    names = {path.name for path in tmp_path.iterdir()}
    # What a folder or a copy by --when, m.pt.e25, is called after is all of its name.
    assert {"m.exported-diagnosis", "m.exported.finetuned.pt", "m.exported.finetuned"} <= names


def test_a_folder_is_complete_or_absent(call: Run, tmp_path: Path) -> None:
    path, folder = tmp_path / "m.pt", tmp_path / "out"
    write_checkpoint(path, model_payload(small_model(), WORDS))
    folder.mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert (
        only_line(call(export, path, "--output", folder), 1)
        == f"{folder}: cannot write: exists already"
    )
    assert "nowhere/out: cannot write" in only_line(
        call(export, path, "--output", tmp_path / "nowhere" / "out"), 1
    )
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, unlimited[1]))  # bytes; as on a full disk
    try:
        full = call(export, path, "--output", tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert only_line(full, 1).startswith(f"{tmp_path / 'full'}: cannot write: File too large (at ")
    assert sorted(tmp_path.rglob("*")) == before


def replace_in(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1]), "damaged"),
    ("model.safetensors", lambda path: replace_in(path, b'"F32"', b'"F99"'), "damaged"),
    ("model.safetensors", Path.unlink, "model.safetensors: cannot read"),
    ("config.json", lambda path: path.write_text("["), "damaged"),
    ("config.json", lambda path: replace_in(path, b'"nhid": 5', b'"nhid": 6'), "size mismatch"),
    ("config.json", lambda path: path.write_text("{}"), "not a folder that export.py wrote"),
    ("config.json", Path.unlink, "not a folder that export.py wrote"),
    (
        "config.json",
        lambda path: path.write_text('{"flags": {"save": "/elsewhere/out.pt"}}'),
        "out: a run's folder; the model of this run is ",
    ),
    ("vocab.txt", lambda path: path.write_bytes(b"\xff\n"), "decode"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES)
def test_damaged_folders_are_refused(
    call: Run, tmp_path: Path, name: str, damage: Callable[[Path], object], message: str
) -> None:
    write_checkpoint(tmp_path / "m.pt", model_payload(small_model(), WORDS))
    assert call(export, tmp_path / "m.pt", "--output", tmp_path / "out").code == 0
    damage(tmp_path / "out" / name)
    line = only_line(call(export, tmp_path / "out", "--output", tmp_path / "again"), 1)
    assert str(tmp_path / "out") in line
    assert message in line
    assert not (tmp_path / "again").exists()


class RNNModel(nn.Module):
    """The attributes that pickles of the original have."""

    __module__ = "model"

    def __init__(self, rnn_type: str, ntoken: int, ninp: int, nhid: int, nlayers: int) -> None:
        super().__init__()
        self.lockdrop, self.hdrop = nn.Module(), nn.Dropout(0.3)
        self.encoder = nn.Embedding(ntoken, ninp)
        sizes = [ninp, *[nhid] * (nlayers - 1), ninp]
        layers = [
            getattr(nn, rnn_type)(sizes[n], sizes[n + 1], 1, dropout=0) for n in range(nlayers)
        ]
        self.rnns = nn.ModuleList(WeightDrop(layer) for layer in layers)
        self.decoder = nn.Linear(ninp, ntoken)
        self.decoder.weight = self.encoder.weight
        self.rnn_type, self.dropout, self.wdrop = rnn_type, 0.4, 0.5


class WeightDrop(nn.Module):
    __module__ = "weight_drop"
    module: Any

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.weights, self.dropout = ["weight_hh_l0"], 0.5
        raw: Any = module._parameters.pop("weight_hh_l0")
        self.module.register_parameter("weight_hh_l0_raw", raw)
        # a masked copy, as its evaluation leaves one
        self.module.register_parameter("weight_hh_l0", nn.Parameter(torch.zeros_like(raw)))
        self.module.flatten_parameters = self.widget_demagnetizer_y2k_edition

    def widget_demagnetizer_y2k_edition(self, *args: object) -> None:
        pass


class SplitCrossEntropyLoss(nn.Module):
    __module__ = "splitcross"

    def __init__(self, splits: int = 0) -> None:
        super().__init__()
        if splits:
            self.tail_vectors = nn.Parameter(torch.zeros(splits, 3))


@pytest.fixture
def originals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickles name the original's modules, some of which this project has, too."""
    for cls in (RNNModel, WeightDrop, SplitCrossEntropyLoss):
        module = ModuleType(cls.__module__)
        module.__file__ = __file__  # old pickles hold the source
        setattr(module, cls.__qualname__, cls)
        monkeypatch.setitem(sys.modules, cls.__module__, module)


@torch.no_grad()
def loss_of(original: RNNModel, ids: Tensor) -> float:
    """Nats per token, by nn.LSTM or nn.GRU."""
    x = original.encoder(ids[:-1, None].long())
    for wrapped in original.rnns:
        theirs: Any = wrapped.module
        layer: Any = type(theirs)(theirs.input_size, theirs.hidden_size)
        weights = {name.removesuffix("_raw"): p for name, p in theirs.named_parameters()}
        layer.load_state_dict({**weights, "weight_hh_l0": theirs.weight_hh_l0_raw})
        x, _ = layer(x)
    return float(nn.functional.cross_entropy(original.decoder(x[:, 0]), ids[1:].long()))


@pytest.mark.parametrize(
    ("saved", "rnn_type", "nlayers"),
    [("state dict", "LSTM", 3), ("state dict", "GRU", 1), ("checkpoint", "LSTM", 2),
     ("old checkpoint", "LSTM", 2), ("old checkpoint", "GRU", 2), ("model", "LSTM", 1)],
)  # fmt: skip
def test_models_of_the_original(
    saved: str, rnn_type: str, nlayers: int, call: Run, originals: None, corpus_folder: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    corpus, path = load_corpus(corpus_folder), tmp_path / "theirs.pt"
    theirs = RNNModel(rnn_type, len(corpus.vocabulary), 3, 5, nlayers)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=1)
    payload: Any = [theirs, SplitCrossEntropyLoss(), optimizer]
    payload = {"state dict": theirs.state_dict(), "model": theirs}.get(saved, payload)
    torch.save(payload, path, _use_new_zipfile_serialization="old" not in saved)
    flags = [path, "--from-original", "--data", corpus_folder, "--output", tmp_path / "ours"]
    if saved != "state dict":
        line = only_line(call(export, *flags), 1)
        assert "would run code" in line
        assert "--trust-pickle" in line
        flags.append("--trust-pickle")
    result = call(export, *flags)
    assert result.code == 0, result.err
    assert ("has to be trusted" in result.err) == (saved != "state dict")
    ours, vocabulary = load_model(tmp_path / "ours")
    assert vocabulary == corpus.vocabulary
    assert (ours.config()["tie_weights"], ours.wdrop) == (True, 0.5)
    loss = evaluate(Plain(ours), corpus.test, 1)
    assert loss == pytest.approx(loss_of(theirs, corpus.test), rel=1e-6)
    # and once more, from the folder's vocabulary, trained without weight drop
    words = ["--vocab", tmp_path / "ours" / "vocab.txt", "--wdrop", 0]
    flags = [*flags[:2], *flags[6:], *words, "--output", tmp_path / "more"]
    assert call(export, *flags).code == 0
    more, again = load_model(tmp_path / "more")
    assert (again, more.wdrop) == (vocabulary, 0)
    assert evaluate(Plain(more), corpus.test, 1) == loss


class Harm:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_what_is_not_a_model_of_the_original(
    call: Run, originals: None, corpus_folder: Path, tmp_path: Path
) -> None:
    V = len(load_corpus(corpus_folder).vocabulary)  # noqa: N806
    theirs = RNNModel("LSTM", V, 3, 5, 2)
    state = theirs.state_dict()
    untied = {**state, "decoder.weight": state["decoder.weight"] + 1}
    qrnn = {"encoder.weight": torch.ones(4, 3), "rnns.0.linear.module.weight_raw": torch.ones(3, 3)}
    cases: list[tuple[Any, list[object], str]] = [
        (torch.ones(3), [], "not an LSTM or GRU of the original"),
        (qrnn, [], "not an LSTM or GRU of the original"),
        (model_payload(small_model(), WORDS), [], "not an LSTM or GRU of the original"),
        ({**state, "rnns.0.module.weight_hh_l0_raw": torch.ones(5, 5)}, [], "not an LSTM or GRU"),
        ({**state, "extra": torch.ones(1)}, [], "unknown weights: extra"),
        (untied, [], "size mismatch"),  # without tying its last layer would have 5 units
        (dict(list(state.items())[1:]), [], "not an LSTM or GRU"),
        (RNNModel("LSTM", V + 1, 3, 5, 1).state_dict(), [], f"{V + 1} embeddings, but"),
        ([theirs, SplitCrossEntropyLoss(2), None], ["--trust-pickle"], "adaptive softmax"),
        ([nn.LSTM(2, 2)], ["--trust-pickle"], "holds no RNNModel"),
        (Harm(tmp_path / "ran"), ["--trust-pickle"], "holds no RNNModel"),
        ([theirs, Harm(tmp_path / "ran")], [], "would run code"),
    ]
    path, folder = tmp_path / "theirs.pt", tmp_path / "out"
    for payload, flags, expected in cases:
        torch.save(payload, path)
        told = call(
            export, path, "--from-original", "--data", corpus_folder, "--output", folder, *flags
        )
        assert told.code == 1, expected
        assert f"error: {path}" in told.err
        assert expected in told.err.splitlines()[-1]
        assert not folder.exists()
    for words, expected in (b"a\nb\n", "has no <eos>"), (b"a\na\n", "twice"), (b"\xff", "not a"):
        (tmp_path / "words").write_bytes(words)
        torch.save(RNNModel("LSTM", 2, 3, 5, 2).state_dict(), path)
        flags = ["--vocab", tmp_path / "words", "--output", folder]
        line = only_line(call(export, path, "--from-original", *flags), 1)
        assert line.startswith(f"{tmp_path / 'words'}: ")
        assert expected in line
    (tmp_path / "words").write_bytes(b"\xef\xbb\xbfa\r\n<eos>\r\n")
    assert list(read_vocabulary(None, str(tmp_path / "words"))) == ["a", "<eos>"]
    path.write_bytes(pickle.dumps(Harm(tmp_path / "ran")))
    harm = call(export, path, "--from-original", "--trust-pickle", *flags)
    assert harm.code == 1
    assert not (tmp_path / "ran").exists()


def test_invalid_flags(call: Run) -> None:
    for flags, expected in [
        ("m.pt", "--output"),
        ("m.pt --output o --vocab v", "--vocab: goes with --from-original only"),
        ("m.pt --output o --from-original", "--data or --vocab"),
        ("m.pt --output o --from-original --data d --vocab v", "--data or --vocab"),
        ("--output o", "MODEL"),
    ]:
        assert expected in only_line(call(export, *flags.split()), 2)
