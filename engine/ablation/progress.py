"""What is shown while a table runs: which runs are done, which are under way, how long it takes."""

import shutil
import sys
import time
from typing import TextIO

from engine.ablation.report import number
from engine.ablation.runs import FINISHED, Run, State, counted, read_state


class Board:
    """Progress over all runs, on stderr.

    On a terminal a block of lines that is written over once a second; elsewhere a line whenever a
    run has validated an epoch or has ended.

    Args:
        runs: all runs of the table, finished ones too.
        stream: where to; None: stderr.
    """

    def __init__(self, runs: list[Run], stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._runs = {run.name: run for run in runs}
        self._states = {run.name: read_state(run) for run in runs}
        self._reported = {name: state.kind for name, state in self._states.items()}
        self._begin = time.monotonic()
        self._done_before = self._work_done()
        self._lines = 0

    def tick(self, running: set[str]) -> None:
        """Look at what changed; the pools call this once a second."""
        for name, run in self._runs.items():
            if name in running or self._states[name].kind not in (*FINISHED, "failed"):
                state = read_state(run)
                if name not in running and state.kind in ("started", "new"):
                    state = self._states[name]
                self._states[name] = state
        if self._stream.isatty():
            self._redraw(running)
        else:
            self._report(running)

    def _redraw(self, running: set[str]) -> None:
        lines = [self.headline(running)]
        lines += [f"  {self._describe(name)}" for name in self._runs if name in running]
        width = shutil.get_terminal_size().columns - 1
        lines = [line[:width] for line in lines]  # a line that wraps would be two to go back over
        up = f"\x1b[{self._lines}A" if self._lines else ""
        self._stream.write(up + "".join(f"\x1b[2K{line}\n" for line in lines) + "\x1b[J")
        self._stream.flush()
        self._lines = len(lines)

    def _report(self, running: set[str]) -> None:
        for name, state in self._states.items():
            ended = name not in running or state.kind in FINISHED
            mark = state.kind if ended else f"epoch {state.epochs}"
            if mark not in (self._reported[name], "new", "started", "epoch 0"):
                line = f"| {self._describe(name)} | {self.headline(running)}"
                print(line, file=self._stream, flush=True)
                self._reported[name] = mark

    def headline(self, running: set[str]) -> str:
        """How many runs are done, and the estimated time left."""
        states = list(self._states.values())
        ended = [state for state in states if state.kind in FINISHED or state.kind == "failed"]
        share = f"{len(ended)} of {len(states)} runs ended"
        if any(state.kind != "done" for state in ended):
            share += f" ({counted(ended)})"
        return f"{share}, {len(running)} under way{self._time_left()}"

    def _describe(self, name: str) -> str:
        state, planned = self._states[name], self._runs[name].flags["epochs"]
        if state.kind == "done":
            return f"{name}: done, test ppl {number(state.summary['test_ppl'])}"
        if state.cause:
            return f"{name}: {state.kind}: {state.cause}"
        validations = state.of("valid")
        if not validations:
            return f"{name}: epoch 1 of {planned}"
        ppl = validations[-1]["ppl"]
        known = "not finite" if ppl is None else f"{ppl:.2f}"
        return f"{name}: {state.epochs} of {planned} epochs, valid ppl {known}"

    def _work_done(self) -> float:
        """Runs done, a run under way as its share of epochs."""
        return sum(map(self._share, self._runs.values(), self._states.values()))

    def _share(self, run: Run, state: State) -> float:
        if state.kind in FINISHED or state.kind == "failed":
            return 1.0
        updates = run.flags.get("max_updates")
        if updates is not None and state.events:
            return min(1.0, float(state.events[-1]["step"] / updates))
        return min(1.0, float(state.epochs / run.flags["epochs"]))

    def _time_left(self) -> str:
        """From the work of this start so far; nothing before an epoch has ended."""
        done = self._work_done()
        if done <= self._done_before:
            return ""
        rate = (done - self._done_before) / (time.monotonic() - self._begin)
        return f", about {duration((len(self._runs) - done) / rate)} left"


def duration(seconds: float) -> str:
    """For instance "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
