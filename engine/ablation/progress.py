"""What is shown while a table runs: which runs are done, which are under way, the time left."""

import sys
import time
from dataclasses import replace

from engine.ablation.columns import number
from engine.ablation.runs import FINISHED, Run, counted, read_state
from engine.report import duration

LINE_SECONDS = 30.0  # between two lines about the runs under way
ENDED = (*FINISHED, "failed")


class Board:
    """Progress over all runs, on stderr: lines when one has ended, and every LINE_SECONDS.

    Args:
        runs: all runs of the table, finished ones too.
    """

    def __init__(self, runs: list[Run]) -> None:
        self._runs = {run.name: run for run in runs}
        self._states = {run.name: read_state(run) for run in runs}
        for name, state in self._states.items():
            if state.kind == "failed":  # it is tried again
                self._states[name] = replace(state, kind="started", cause="")
        self._begin = self._printed = time.monotonic()
        self._done_before = self._work_done()

    def tick(self, running: set[str], ended: set[str]) -> None:
        """Read the files of the runs under way and of those whose processes have just ended.

        The pools call this once a second.
        """
        for name in running | ended:
            self._states[name] = read_state(self._runs[name])
        now = time.monotonic()
        shown = {name for name in ended if self._states[name].kind in ENDED}
        if not shown and now - self._printed >= LINE_SECONDS:
            shown = running
        if shown:
            self._printed = now
            lines = [self._describe(name) for name in self._runs if name in shown]
            for line in (*lines, self._headline(running)):
                print(f"| {line}", file=sys.stderr, flush=True)

    def _headline(self, running: set[str]) -> str:
        """How many runs have ended, and the estimated time left."""
        # A run that has written its last figures is under way until its process has ended.
        states = [state for name, state in self._states.items() if name not in running]
        ended = [state for state in states if state.kind in ENDED]
        share = f"{len(ended)} of {len(self._states)} runs ended"
        if any(state.kind != "done" for state in ended):
            share += f" ({counted(ended)})"
        return f"{share}, {len(running)} under way{self._time_left()}"

    def _describe(self, name: str) -> str:
        state = self._states[name]
        if state.kind == "done":
            return f"{name}: done, test ppl {number(state.summary['test_ppl'])}"
        if state.cause:
            return f"{name}: {state.kind}: {state.cause}"
        done, planned, unit = self._progress(name)
        ppl = [f", valid ppl {number(line['ppl'])}" for line in state.of("valid")[-1:]]
        return f"{name}: {done} of {planned} {unit}{''.join(ppl)}"

    def _progress(self, name: str) -> tuple[int, int, str]:
        """How much of a run is done, of how much: epochs, or updates if these will end it."""
        state, flags = self._states[name], self._runs[name].flags
        ways = [(state.epochs, flags["epochs"], "epochs")]
        if state.events and flags["max_updates"] is not None:
            ways.append((state.events[-1].get("step", 0), flags["max_updates"], "updates"))
        return max(ways, key=lambda way: way[0] / way[1])

    def _work_done(self) -> float:
        """Runs that have ended, plus the share of each that has not."""
        total = 0.0
        for name, state in self._states.items():
            done, planned, _ = self._progress(name)
            total += 1.0 if state.kind in ENDED else min(1.0, done / planned)
        return total

    def _time_left(self) -> str:
        """From the work since the start of this program; empty before the first epoch's end."""
        done = self._work_done() - self._done_before
        left = len(self._runs) - self._done_before - done
        if done <= 0 or left <= 0:
            return ""
        return f", about {duration(left / done * (time.monotonic() - self._begin))} left"
