"""Reads the flags and events in a run's folder, also while the run is under way."""

import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import RunError
from pictures.run_curves import Points, RunCurves

METRICS = "metrics.jsonl"
# What the events that curves need must have: whole numbers.
NEEDED = {"train": ("step", "epoch"), "valid": ("step", "epoch"), "averaging": ("epoch",)}
AXES = {"update": "update", "epoch": "epoch", "time": "hours, without those between sessions"}


@dataclass(frozen=True)
class History:
    """A run's configuration and events.

    folder: the run's folder.
    config: its config.json, or empty.
    events: the lines of its metrics.jsonl.
    summary: its summary.json, or empty.
    """

    folder: Path
    config: dict[str, Any]
    events: list[dict[str, Any]]
    summary: dict[str, Any]

    @property
    def flags(self) -> dict[str, Any]:
        """The flags in force; empty without config.json."""
        flags = self.config.get("flags")
        return flags if isinstance(flags, dict) else {}

    def of(self, event: str) -> list[dict[str, Any]]:
        """The events of one kind."""
        return [line for line in self.events if line["event"] == event]

    def lacks(self, x: str) -> str:
        """Why there are no curves over x, one of AXES; empty if there are."""
        path = self.folder / METRICS
        if not self.of("train") + self.of("valid"):
            return f"{path}: nothing was logged yet"
        if x == "epoch" and not any(self._epoch_ends().values()):  # fine-tuning has an epoch 0
            return f"{path}: no epoch has ended yet; --x update shows what there is"
        if x == "time" and not any("seconds" in line for line in self.events):
            return f"{path}: has no times, which older runs did not log; --x update shows it"
        return ""

    def curves(self, x: str, label: str) -> RunCurves:
        """What to draw over x, one of AXES; needs an x of which nothing `lacks`."""
        place = self._placer(x)
        valid = {line["epoch"]: line for line in self.of("valid")}
        best = min(valid.values(), key=lambda line: _number(line.get("ppl"), math.inf), default={})
        switch = next((valid.get(line["epoch"]) for line in self.of("averaging")), None) or {}

        def mark(line: dict[str, Any]) -> tuple[int, float, float] | None:
            found = math.nan if not line else place(line), _number(line.get("ppl"))
            return None if any(map(math.isnan, found)) else (line["epoch"], *found)

        return RunCurves(
            label=label,
            train=self._points("train", "ppl", place),
            valid=self._points("valid", "ppl", place),
            lr=self._points("train", "lr", place),
            grad_norm=self._points("train", "grad_norm", place),
            best=mark(best),
            averaging=mark(switch),
            clip=_number(self.flags.get("clip"), 0.0),
        )

    def _points(self, event: str, name: str, place: Callable[[dict[str, Any]], float]) -> Points:
        """A field of the events of one kind; nan where the file has a gap."""
        lines = [line for line in self.events if line["event"] in (event, "gap")]
        places = [math.nan if line["event"] == "gap" else place(line) for line in lines]
        return places, [_number(line.get(name)) for line in lines]

    def _placer(self, x: str) -> Callable[[dict[str, Any]], float]:
        """The function that gives an event its x; nan where that is unknown."""
        if x == "update":
            return lambda line: float(line["step"])
        if x == "time":
            return lambda line: _number(line.get("seconds")) / 3600
        ends = self._epoch_ends()
        steps, epochs = [0, *ends], [0, *ends.values()]
        # An epoch under way is taken to be as long as the mean of those before it.
        steps, epochs = [*steps, 3 * steps[-1]], [*epochs, 3 * epochs[-1]]
        return lambda line: float(np.interp(line["step"], steps, epochs))

    def _epoch_ends(self) -> dict[int, int]:
        """Epochs that have ended, by their last update."""
        cut = self.flags.get("max_updates")  # the run may then have been validated within an epoch
        whole = self.summary.get("epochs", 0)
        return {
            line["step"]: line["epoch"]
            for line in self.of("valid")
            if cut is None or line["step"] < cut or line["epoch"] <= whole
        }


def _number(value: Any, otherwise: float = math.nan) -> float:
    """A logged figure; `otherwise` for null, which stands for one that is not finite."""
    return float(value) if isinstance(value, int | float) else otherwise


def read_history(path: str | Path) -> History:
    """Read a run, given its folder, its best model or its last.pt.

    Raises:
        RunError: no such run.
    """
    path = Path(path).absolute()  # so that "." has a name
    folder = path
    if not path.is_dir() and path.name in ("last.pt", METRICS):
        folder = path.parent
    elif path.is_file() or (path.suffix == ".pt" and not path.is_dir()):
        folder = path.with_suffix("")
    if not (folder / METRICS).is_file():
        raise RunError(f"{path}: no such run (looked for {folder / METRICS})")
    events = [
        event
        for event in read_events(folder / METRICS)
        if all(isinstance(event.get(name), int) for name in NEEDED.get(str(event["event"]), ()))
    ]
    found = [read_json(folder / f"{name}.json") for name in ("config", "summary")]
    return History(folder, found[0], events, found[1])


def corpus_of_run(model: str | Path) -> str | None:
    """The --data of the run that wrote a model; None if its config.json cannot be read."""
    data = flags_of_run(model).get("data")
    return data if isinstance(data, str) else None


def flags_of_run(model: str | Path) -> dict[str, Any]:
    """The flags of the run that wrote a model; empty if its config.json cannot be read."""
    if Path(model).is_dir():  # an exported one has no run
        return {}
    run = Path(model).with_suffix("")
    return History(run, read_json(run / "config.json"), [], {}).flags


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is missing or not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events in the complete lines of a metrics.jsonl, to which a run may be writing."""
    events = []
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and "event" in event:
                    events.append(event)
    return events
