"""Every flag of main.py --help changes what it should, and leaves what it should not touch.

A run is seen from outside: its metrics, summary, files, output and best model. Each line of FLAGS
has two values of a flag, what is different between the two runs, and what is the same. A flag
that is declared and not handed on, or a new one without a line here, fails.
"""

import functools
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from conftest import Result, command_line, read_events, read_summary, read_weights, write_corpus

import main

Run = Callable[..., Result]
Flags = dict[str, Any]

# All regularisers on, an update a line; nothing that a flag's own line does not ask for.
BASE: Flags = {
    "emsize": 6, "nhid": 8, "nlayers": 2, "batch-size": 4, "bptt": 8, "lr": 2.0, "clip": 0.25,
    "alpha": 2.0, "beta": 1.0, "wdecay": 0.01, "dropout": 0.2, "dropouth": 0.15, "dropouti": 0.2,
    "dropoute": 0.05, "wdrop": 0.3, "seed": 7, "eval-batch-size": 3, "epochs": 2,
    "log-interval": 1, "device": "cpu",
}  # fmt: skip


class Seen:
    """What one run left behind, facet by facet; None where it has none."""

    def __init__(self, folder: Path, result: Result, wandb: MagicMock) -> None:
        self.folder, self.code, self.out = folder, result.code, re.sub(r"time:.*?s", "", result.out)
        self.err = result.err.replace(str(folder), "")
        self.err = re.sub(r"ms/batch *[\d.]+", "", self.err)
        paths = [path for path in folder.rglob("*") if not path.name.startswith(".")]
        self.files = sorted(str(path.relative_to(folder)) for path in paths)
        self.save = next((path for path in folder.glob("*.pt")), folder / "run.pt")
        metrics = self.save.with_suffix("") / "metrics.jsonl"
        self.events = read_events(self.save) if metrics.exists() else []
        wandb_calls = wandb.init.call_args_list
        names = ("mode", "project", "name", "group", "job_type", "tags")
        self.wandb = [{name: call.kwargs[name] for name in names} for call in wandb_calls]

    def of(self, event: str, name: str) -> list[Any]:
        return [line[name] for line in self.events if line["event"] == event]

    def nth(self, event: str, name: str, index: int) -> Any:
        values = self.of(event, name)
        return values[index] if index < len(values) else None

    def facet(self, name: str) -> Any:
        """One of FACETS or an attribute."""
        if name in FACETS:
            return FACETS[name](self)
        return getattr(self, name)

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        return read_summary(self.save)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.save.with_suffix("") / "config.json").read_text())
        return config

    @property
    def flags(self) -> dict[str, Any]:
        """As config.json has them."""
        flags: dict[str, Any] = self.config["flags"]
        return flags

    @functools.cached_property
    def weights(self) -> dict[str, list[float]]:
        return {name: weight.tolist() for name, weight in read_weights(self.save).items()}


FACETS: dict[str, Callable[[Seen], Any]] = {
    "first loss": lambda seen: seen.nth("train", "loss", 0),
    "first norm": lambda seen: seen.nth("train", "grad_norm", 0),
    "second loss": lambda seen: seen.nth("train", "loss", 1),
    "losses": lambda seen: seen.of("train", "loss"),
    "rates": lambda seen: seen.of("train", "lr"),
    "updates": lambda seen: seen.of("valid", "step"),
    "lines": lambda seen: seen.of("train", "step"),
    "fields": lambda seen: [sorted(line) for line in seen.events if line["event"] == "train"],
    "scales": lambda seen: [line.get("loss_scale") for line in seen.events],
    "kinds": lambda seen: {line["event"] for line in seen.events},
    "valid": lambda seen: seen.of("valid", "loss"),
    "averaged": lambda seen: seen.of("valid", "averaged"),
    "test": lambda seen: seen.of("test", "loss"),
    "parameters": lambda seen: seen.summary["parameters"],
    "threads": lambda seen: seen.config["threads"],
    "bigram": lambda seen: seen.summary.get("bigram_ppl"),
}


@dataclass(frozen=True)
class Line:
    """Two values of a flag, None: not given; what tells the runs apart, and what does not.

    beside: other flags of both runs.
    """

    one: Any
    other: Any
    differs: str
    same: str = ""
    beside: Flags = field(default_factory=dict)


SIZE = "parameters, first loss"
DROPPED, KEPT = "first loss, weights", "parameters, updates"
STEPPED, GIVEN = "second loss, weights", "first loss, first norm"
PENALTY = "first norm, second loss, weights"
TRAINED = "losses, weights"
RESTLESS = {"lr": 30.0, "nonmono": 0, "epochs": 8}  # validation goes up and down
DYNAMIC = {"loss-scale": "dynamic"}
OFFLINE = {"wandb": "offline"}
EXPLODING = {"lr": 1e30, "clip": 0}  # not finite from the second update on

FLAGS: dict[str, Line] = {
    "data": Line("{corpus}", "{other}", "parameters, first loss, test"),
    "model": Line("LSTM", "GRU", SIZE),
    "decoder": Line("linear", "none", "code"),
    "emsize": Line(6, 7, SIZE),
    "nhid": Line(8, 9, SIZE),
    "nlayers": Line(2, 3, SIZE),
    "untied": Line(None, True, SIZE),
    "dropout": Line(0.2, 0.6, DROPPED, KEPT),
    "dropouth": Line(0.15, 0.6, DROPPED, KEPT),
    "dropouti": Line(0.2, 0.6, DROPPED, KEPT),
    "dropoute": Line(0.05, 0.6, DROPPED, KEPT),
    "wdrop": Line(0.3, 0.6, DROPPED, KEPT),
    "alpha": Line(2.0, 20.0, PENALTY, "first loss"),
    "beta": Line(1.0, 50.0, PENALTY, "first loss"),
    "wdecay": Line(0.01, 0.02, STEPPED, GIVEN),
    "optimizer": Line("sgd", "adam", STEPPED, GIVEN, {"lr": 0.01}),
    "lr": Line(2.0, 3.0, f"rates, {STEPPED}", GIVEN),
    "clip": Line(0.25, 0.05, STEPPED, GIVEN),
    "grad-filter": Line(None, 0.5, "first norm, fields", "first loss"),
    "grad-filter-normalize": Line(
        None, True, "first norm, weights", "first loss, fields", {"grad-filter": 0.5}
    ),
    "batch-size": Line(4, 5, "first loss, updates"),
    "bptt": Line(8, 20, "losses, updates"),
    "bptt-scheme": Line("variable", "full", "updates, losses", "parameters"),
    "k1": Line(8, 3, "updates, losses", "rates", {"bptt-scheme": "fixed", "max-updates": 12}),
    "keep-prob": Line(0.1, 0.9, "updates, losses", "", {"bptt-scheme": "randomized"}),
    "epochs": Line(2, 3, "updates, losses", GIVEN),
    "max-updates": Line(None, 3, "lines, test", GIVEN),
    "nonmono": Line(0, 20, "averaged, kinds, test", "first loss, second loss", RESTLESS),
    "no-asgd": Line(None, True, "averaged, kinds, test", "first loss, second loss", RESTLESS),
    "nonmono-decay": Line(0, 2.0, "rates", "averaged", {**RESTLESS, "no-asgd": True}),
    "when": Line(-1, 1, "rates, files, losses", "first loss, second loss"),
    "seed": Line(7, 8, "first loss, weights", "parameters"),
    "precision": Line("fp32", "bf16", "first loss, first norm, weights, err", KEPT),
    "kernel": Line("auto", "plain", "weights, err", KEPT, {"precision": "bf16"}),
    "loss-scale": Line(None, 1024.0, "fields", TRAINED),
    "loss-scale-bounds": Line([1.0, 2.0**24], [2.0, 4.0], "scales", "losses", DYNAMIC),
    "loss-scale-window": Line(2000, 3, "scales", "losses", DYNAMIC),
    "device": Line("cpu", "cuda:99", "code"),
    "threads": Line(1, 2, "threads", "code"),
    "save": Line("{folder}/run.pt", "{folder}/other.pt", "files", TRAINED),
    "checkpoint-every": Line(None, 1, "files", "code, events", EXPLODING),
    "checkpoint-minutes": Line(10.0, 1e-9, "files", "code, events", EXPLODING),
    "dry-run": Line(None, True, "files, out", "code"),
    "quick": Line(None, True, "test, valid, lines, out", "code", {"max-updates": None}),
    "eval-batch-size": Line(3, 4, "valid", "losses"),
    "test-batch-size": Line(1, 2, "test", "losses, valid"),
    "bigram": Line(None, True, "bigram, out", "test, weights"),
    "samples": Line(0, 2, "out", "test, weights"),
    "log-interval": Line(1, 4, "lines", "valid, weights"),
    "diagnostics": Line(None, 2, "kinds", "losses, valid, weights"),
    "wandb": Line("disabled", "offline", "wandb", "weights"),
    "wandb-project": Line("one", "other", "wandb", "weights", OFFLINE),
    "wandb-name": Line("one", "other", "wandb", "weights", OFFLINE),
    "wandb-group": Line("one", "other", "wandb", "weights", OFFLINE),
    "wandb-job-type": Line("one", "other", "wandb", "weights", OFFLINE),
    "wandb-tags": Line(["one"], ["one", "other"], "wandb", "weights", OFFLINE),
}
APART = {"help", "resume"}  # the tests below


class Laboratory:
    """Runs by their flags, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.corpora = {
            "corpus": str(write_corpus(folder / "corpus", lines=40)),
            "other": str(write_corpus(folder / "other", lines=60, seed=1, words=25)),
        }
        self.known: dict[str, Seen] = {}

    def see(self, run: Run, monkeypatch: pytest.MonkeyPatch, flags: Flags) -> Seen:
        key = repr(sorted(flags.items(), key=str))
        if key not in self.known:
            folder = self.folder / f"run{len(self.known)}"
            folder.mkdir()
            wandb = MagicMock()
            wandb.init.return_value.configure_mock(id="id", url="address", step=0)
            monkeypatch.setitem(sys.modules, "wandb", wandb)
            argv = command_line(
                {"data": "{corpus}", "save": "{folder}/run.pt", "max-updates": 6, **flags}
            )
            places = {**self.corpora, "folder": str(folder)}
            argv = [word.format(**places) if "{" in word else word for word in argv]
            self.known[key] = Seen(folder, run(*argv), wandb)
        return self.known[key]


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("laboratory"))


def listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_acts(
    laboratory: Laboratory, run: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    line = FLAGS[name]
    shared = {**BASE, "max-updates": None, **line.beside}
    one, other = (
        laboratory.see(run, monkeypatch, {**shared, name: value})
        for value in (line.one, line.other)
    )
    assert one.code == (1 if line.beside == EXPLODING else 0), one.err
    for facet in listed(line.differs):
        assert one.facet(facet) != other.facet(facet), facet
    for facet in listed(line.same):
        assert one.facet(facet) == other.facet(facet), facet
    if "code" not in listed(line.differs) and name not in ("dry-run", "quick"):
        key = name.replace("-", "_")
        assert one.flags.keys() == other.flags.keys()
        different = {flag for flag in one.flags if one.flags[flag] != other.flags[flag]}
        # the folder is another one for each run
        assert different - {"save"} == {key} - {"save"}


def test_no_flag_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    flags = re.findall(r"^  (?:-h, )?--([a-z0-9_-]+)", text, re.MULTILINE)
    assert {flag.replace("_", "-") for flag in flags} == FLAGS.keys() | APART


def test_resume_goes_on_where_the_run_was(laboratory: Laboratory, run: Run, tmp_path: Path) -> None:
    """--resume auto and by path; without it a run starts anew."""
    flags = {**BASE, "data": laboratory.corpora["corpus"]}
    first = {}
    for name, resume in {"auto": "auto", "path": tmp_path / "path", "anew": None}.items():
        save = tmp_path / f"{name}.pt"
        argv = command_line({**flags, "save": save})
        assert run(*argv, "--max-updates", 3).code == 0
        result = run(*argv, *command_line({"resume": resume, "max-updates": 5}))
        assert result.code == 0
        first[name] = re.findall(r"from update (\d+)", result.err)
        assert [e["step"] for e in read_events(save) if e["event"] == "train"] == [1, 2, 3, 4, 5]
        assert (tmp_path / f"{name}.1.pt").exists() == (name == "anew")
    assert first == {"auto": ["3"], "path": ["3"], "anew": ["0"]}
