"""The runs of a table, and their states as read from their folders."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.ablation.stages import NOT_FINITE, Job, Step, StepState
from engine.ablation.table import Row
from engine.history import METRICS, History, read_events, read_json

FINISHED = ("done", "diverged")


@dataclass(frozen=True)
class Run(Job):
    """One row with one seed.

    argv: main.py's command line.
    flags: what that resolves to.
    save: path of the best model; the run's folder and its log stand beside it.
    steps: what is run on its model once it is done, in this order.
    """

    row: Row
    seed: int
    argv: list[str]
    flags: dict[str, Any]
    save: Path
    steps: list[Step] = field(default_factory=list)

    program = "main.py"

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"{self.row.name}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.save.with_suffix("")


@dataclass(frozen=True)
class State(History):
    """A run's progress.

    kind: "new", "started", "done", "diverged" or "failed": that of main.py or, once that is done,
        of the first step that is not.
    cause: why it diverged or failed, one line.
    trained: main.py's part is done.
    steps: the states of the steps by name; empty unless trained.
    """

    kind: str
    cause: str
    trained: bool
    steps: dict[str, StepState]

    @property
    def epochs(self) -> int:
        """Epochs that were validated."""
        return len({line["epoch"] for line in self.of("valid")})


def read_state(run: Run) -> State:
    """Read a run's files.

    A run whose --epochs were raised since is not done. Nor has it diverged, unless it had to end:
    one that was only worse than guessing when it was tested goes on.
    """
    summary = read_json(run.folder / "summary.json")
    config = read_json(run.folder / "config.json")
    events = read_events(run.folder / METRICS)
    cause, reached = run.failure(), _reached(summary, run.flags)
    if summary.get("diverged") and (reached or summary.get("test_ppl") is None):
        kind, cause = "diverged", str(summary.get("cause") or "")
    elif reached:
        finite = None not in (summary["test_ppl"], summary["best_valid_ppl"])
        kind, cause = ("done", "") if finite else ("diverged", NOT_FINITE)
    elif cause:
        kind = "failed"
    else:
        kind = "started" if run.folder.is_dir() and (config or events) else "new"
    trained, steps = kind == "done", dict[str, StepState]()
    if trained:
        source = source_of(summary)
        steps = {step.after.name: step.read(source) for step in run.steps}
    for name, step in steps.items():
        if step.kind != "done":
            kind = "started" if step.kind == "new" else step.kind
            cause = f"{name}: {step.cause}" if step.cause else name
            break
    return State(run.folder, config, events, summary, kind, cause, trained, steps)


def source_of(summary: dict[str, Any]) -> list[Any]:
    """Identifies a run's best model; after more epochs the same run may have another."""
    return [summary.get("best_epoch"), summary.get("best_valid_ppl")]


def _reached(summary: dict[str, Any], flags: dict[str, Any]) -> bool:
    """True if the run trained as long as its flags say, and was tested."""
    updates = flags.get("max_updates")
    enough = updates is not None and summary.get("updates", 0) >= updates
    return bool(enough or summary.get("epochs", 0) >= flags["epochs"])


def counted(states: list[State]) -> str:
    """For instance "3 done, 1 diverged, 2 new"."""
    kinds = Counter(state.kind for state in states)
    order = [*FINISHED, "failed", "started", "new"]
    return ", ".join(f"{kinds[kind]} {kind}" for kind in order if kinds[kind])
