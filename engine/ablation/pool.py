"""Runs a table's runs on this machine: a process of main.py each, several in parallel."""

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from io import FileIO
from pathlib import Path
from queue import SimpleQueue

from data.files import atomic_write, write_all
from engine.ablation.runs import FINISHED, Run, State, read_state, source_of
from engine.ablation.stages import Step
from engine.interrupt import Interrupt
from engine.launch import LAUNCH
from engine.run_folder import is_in_use

PROGRAM = Path(__file__).resolve().parents[2] / "main.py"
POLL_SECONDS = 0.2
GRACE_SECONDS = 1.5

# Called once a second with the names of the runs under way, and of those that have just ended.
Tick = Callable[[set[str], set[str]], None]


def slots(jobs: int, threads: int, gpus: Sequence[int] | None) -> list[dict[str, str]]:
    """Environment variables for each of `jobs` parallel runs.

    Args:
        jobs: parallel runs.
        threads: CPU threads of each.
        gpus: dealt out to the jobs in turn, several jobs to a GPU if need be; None: not set.
    """
    shared = dict(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    if gpus is None:
        return [dict(shared) for _ in range(jobs)]
    # Numbers count the GPUs that this process sees.
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(gpu) if seen is None else seen.split(",")[gpu].strip() for gpu in gpus]
    return [dict(shared, CUDA_VISIBLE_DEVICES=names[j % len(names)]) for j in range(jobs)]


def run_locally(
    runs: list[Run], places: list[dict[str, str]], interrupt: Interrupt, tick: Tick
) -> None:
    """Run them on this machine, one at a time with each environment of `places`.

    Returns when all have ended, or after an interrupt, once those under way have written a
    checkpoint.
    """
    free: SimpleQueue[dict[str, str]] = SimpleQueue()
    for place in places:
        free.put(place)
    stop, running = threading.Event(), set[str]()

    def work(run: Run) -> None:
        if stop.is_set():
            return
        place = free.get()
        running.add(run.name)
        try:
            execute(run, place, stop)
        finally:
            running.discard(run.name)
            free.put(place)

    with ThreadPoolExecutor(len(places)) as pool:
        names = {pool.submit(work, run): run.name for run in runs}
        pending = set(names)
        try:
            while pending:
                done, pending = wait(pending, timeout=1.0)
                for future in done:
                    future.result()
                tick(set(running), {names[future] for future in done})
                if interrupt.requested:
                    stop.set()
        finally:  # also on a second Ctrl-C
            stop.set()


def execute(run: Run, environment: Mapping[str, str], stop: threading.Event) -> None:
    """Start main.py for a run, or let it resume, and wait for its end; then the same for its steps.

    A step starts only once all before it are done.

    Args:
        environment: variables besides this process's own.
        stop: when set, the program under way is told to write a checkpoint and exit.
    """
    _wait_for_others(run, stop)
    if not _is_over(read_state(run)):
        _work(run, environment, stop, lambda _: _is_over(read_state(run)))
    for step in run.steps:
        _wait_for_others(step, stop)
        state = read_state(run)
        if state.kind in FINISHED or not state.trained or stop.is_set():
            return
        if state.steps[step.after.name].kind == "done":
            continue
        step.summary_path.unlink(missing_ok=True)  # that of an earlier start
        _work(step, environment, stop, partial(step.keep, source=source_of(state.summary)))
        if read_state(run).steps[step.after.name].kind != "done":
            return


def _wait_for_others(job: Run | Step, stop: threading.Event) -> None:
    """Wait while another process works on the job (of a table that was killed)."""
    while is_in_use(job.save) and not stop.wait(POLL_SECONDS):
        pass


def _is_over(state: State) -> bool:
    return state.trained or state.kind == "diverged"


def _work(
    job: Run | Step,
    environment: Mapping[str, str],
    stop: threading.Event,
    is_over: Callable[[int], bool],
) -> None:
    """Start a program and wait for its end; write a failure to the job's failure_path.

    Args:
        is_over: whether a program that ended with this exit code has left a result.
    """
    if stop.is_set():
        return
    job.save.parent.mkdir(parents=True, exist_ok=True)
    job.failure_path.unlink(missing_ok=True)
    command = [sys.executable, str(PROGRAM.with_name(job.program)), *job.argv]
    line = f"$ {shlex.join(['python', job.program, *job.argv])}\n"
    with FileIO(job.log_path, "a") as log:
        write_all(log, line.encode(errors="surrogateescape"))  # a path need not be UTF-8
        begin = log.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={k: v for k, v in os.environ.items() if k not in LAUNCH} | dict(environment),
        )
        code = _wait(process, stop)
    # Ctrl-C may reach the run before `stop` is set: that is no failure.
    if not is_over(code) and not stop.wait(GRACE_SECONDS):
        with atomic_write(job.failure_path, "w") as file:
            file.write(_cause(code, job.log_path, begin) + "\n")


def _wait(process: "subprocess.Popen[bytes]", stop: threading.Event) -> int:
    """The exit code; if this wait is interrupted, the process is ended first."""
    try:
        while process.poll() is None:
            if stop.wait(POLL_SECONDS):
                process.terminate()  # it writes a checkpoint
                process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            process.kill()
    return process.wait()


def _cause(code: int, log: Path, begin: int) -> str:
    """Why a run failed: its error line, else its signal, else its last line."""
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").replace("\r", "\n").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1]
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return f"exit code {code}: {last}"
