"""What a table runs on the model of each run: programs, and how to read their results."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.files import atomic_write
from engine.history import read_json

SPLITS = ("valid", "test")
NOT_FINITE = "its perplexity is not finite"


@dataclass(frozen=True)
class Stage:
    """A program that works on a trained model and writes a JSON file with perplexities.

    In flags and summary, {model} stands for the model's file, {data} and {device} for the run's
    flags, {output} for a file to write, and {folder} for that without its suffix.

    program: its file's name.
    flags: its command line, before the table's flags.
    summary: path of the JSON file; a result counts unless its "ended" is "interrupted".
    keys: key of the perplexity of each split that it measures.
    makes_model: {output} is a model, which the stages after this one work on.
    """

    program: str
    flags: str
    summary: str
    keys: dict[str, str]
    makes_model: bool = False


SUMMARY = "{folder}.summary.json"
EVALUATE = f"{{model}} --data {{data}} --device {{device}} --split test --summary {SUMMARY}"
# By the names that a table's `after` takes.
STAGES: dict[str, Stage] = {
    "finetune": Stage(
        "finetune.py",
        "--save {model} --output {output} --resume auto",
        "{folder}/summary.json",
        dict(valid="best_valid_ppl", test="test_ppl"),
        makes_model=True,
    ),
    "cache": Stage("evaluate.py", f"{EVALUATE} --cache", SUMMARY, dict(test="ppl")),
    "dynamic": Stage("evaluate.py", f"{EVALUATE} --dynamic rms", SUMMARY, dict(test="ppl")),
}


@dataclass(frozen=True)
class After:
    """A stage that a table asks for: its name in STAGES, and further flags."""

    name: str
    flags: list[str] = field(default_factory=list)

    @property
    def stage(self) -> Stage:
        """The stage of that name."""
        return STAGES[self.name]


@dataclass(frozen=True)
class StepState:
    """A step's progress.

    kind: "new", "started", "done", "diverged" or "failed".
    cause: why it diverged or failed, one line.
    ppl: the perplexities, if it is done, by split.
    flags: the table's flags with which it was run; None: it has not ended yet.
    """

    kind: str
    cause: str = ""
    ppl: dict[str, float] = field(default_factory=dict)
    flags: list[str] | None = None


class Job:
    """A run of a program, whose log and failure stand beside the model that it saves."""

    save: Path

    @property
    def log_path(self) -> Path:
        """File with the program's output, of all its starts."""
        return self.save.with_suffix(".log")

    @property
    def failure_path(self) -> Path:
        """The cause, if its last start failed; beside its folder, which may not exist."""
        return self.save.with_suffix(".failed")

    def failure(self) -> str:
        """Why its last start failed, one line; empty if it did not."""
        with suppress(OSError):
            return self.failure_path.read_text(encoding="utf-8").strip()
        return ""


@dataclass(frozen=True)
class Step(Job):
    """One stage on the model of one run.

    model: the model it works on.
    data, device: the run's flags.
    save: {output}; the log and the other files have its name with other suffixes.
    quick: the run is a trial, and so is what trains its model further.
    """

    after: After
    model: Path
    data: str
    device: str
    save: Path
    quick: bool = False

    @property
    def program(self) -> str:
        """Its program's file."""
        return self.after.stage.program

    @property
    def own_argv(self) -> list[str]:
        """The part of its command line that the table does not give."""
        trial = ["--quick"] * (self.quick and self.after.stage.makes_model)
        return [*map(self._placed, self.after.stage.flags.split()), *trial]

    @property
    def argv(self) -> list[str]:
        """Its command line."""
        return [*self.own_argv, *self.after.flags]

    @property
    def record_path(self) -> Path:
        """Its result; beside what the program itself writes, which another model may replace."""
        return self.save.with_suffix(".json")

    @property
    def summary_path(self) -> Path:
        """The JSON file that its program writes."""
        return Path(self._placed(self.after.stage.summary))

    def _placed(self, word: str) -> str:
        places = dict(model=self.model, data=self.data, device=self.device, output=self.save)
        return word.format(folder=self.save.with_suffix(""), **places)

    def read(self, source: list[Any]) -> StepState:
        """Its state; source: what identifies the run's model. Another model's result is none."""
        record = read_json(self.record_path)
        model = record.get("model", self.model.name)  # older records have none
        if record.get("source") == source and model == self.model.name:
            return StepState(record["kind"], record["cause"], record["ppl"], record["flags"])
        if cause := self.failure():
            return StepState("failed", cause)
        return StepState("started" if self.log_path.exists() else "new")

    def keep(self, code: int, source: list[Any]) -> bool:
        """Record the result of a program that ended with this exit code; False: there is none."""
        summary = read_json(self.summary_path)
        ppl = {split: summary.get(key) for split, key in self.after.stage.keys.items()}
        kind, cause = "done", ""
        if summary.get("diverged"):
            kind, cause, ppl = "diverged", str(summary.get("cause") or ""), {}
        elif code or not summary or summary.get("ended") == "interrupted":
            return False
        elif None in ppl.values():
            kind, cause, ppl = "diverged", NOT_FINITE, {}
        told = dict(source=source, model=self.model.name, flags=self.after.flags)
        record = dict(told, kind=kind, cause=cause, ppl=ppl)
        with atomic_write(self.record_path, "w") as file:
            file.write(json.dumps(record, indent=1, allow_nan=False) + "\n")
        return True


def steps_after(save: Path, flags: dict[str, Any], after: Sequence[After]) -> list[Step]:
    """The steps after the run with these flags whose best model is at save.

    Each works on the run's model or, if a step before it made one, on that.
    """
    steps, model = list[Step](), save
    for one in after:
        output = save.with_suffix(f".{one.name}.pt")
        quick = flags.get("quick", False)
        steps.append(Step(one, model, flags["data"], flags["device"], output, quick))
        if one.stage.makes_model:
            model = steps[-1].save
    return steps
