"""The plan of a table: what is to be run, and how long it takes."""

import argparse
import gc
import os
import shlex
import time

import torch

from assembly import check_lengths, first_windows
from data.corpus import Corpus
from engine.ablation.runs import FINISHED, Run, State, counted, read_state
from engine.ablation.table import Table
from engine.device import reset_peak_memory, select_device
from engine.errors import RunError, UsageError
from engine.report import duration
from engine.tracking import warn
from programs.plan import Forecast, forecast, planned_epochs


def sharing(args: argparse.Namespace) -> tuple[int, int]:
    """Number of parallel jobs, and CPU threads of each."""
    jobs = args.jobs or len(args.gpus or [0])
    return jobs, args.threads or max(1, (os.cpu_count() or 1) // jobs)


def print_plan(table: Table, runs: list[Run], corpus: Corpus, args: argparse.Namespace) -> None:
    """Print the plan of --dry-run: runs, progress, and the cost of the rest."""
    states = {run.name: read_state(run) for run in runs}
    width = max(len(row.name) for row in table.rows)
    for row in table.rows:
        mine = [states[run.name] for run in runs if run.row == row]
        print(f"| {row.name:{width}} | {counted(mine):20} | {shlex.join(row.flags)}")
    left = sum(epochs_left(run, states[run.name], corpus) for run in runs)
    print(f"| flags of every row: {shlex.join(table.flags)}")
    steps = [shlex.join([s.after.name, *s.after.flags]) for run in runs for s in run.steps]
    for step in dict.fromkeys(steps):
        print(f"| after {steps.count(step)} of {len(runs)} runs: {step}; its time is not counted")
    seeds = ", ".join(map(str, table.seeds))
    print(f"| {len(runs)} runs with seeds {seeds}; {where(args)}")
    print(f"| to train: {left:,.4g} epochs, {left * len(corpus.train):,.0f} tokens")
    print(f"| {time_needed(runs, corpus, args)}")


def where(args: argparse.Namespace) -> str:
    """How many runs there are at a time, in words."""
    jobs, threads = sharing(args)
    if args.ray is not None:
        return "as many at a time as the cluster holds"
    return f"{jobs} at a time, {threads} CPU thread{'s' * (threads > 1)} each"


def time_needed(runs: list[Run], corpus: Corpus, args: argparse.Namespace) -> str:
    """How long the runs that are left will take, in words.

    Known from the runs that are done; before that measured, by a few updates of each row in this
    process (see programs.plan).
    """
    states = [read_state(run) for run in runs]
    left = {run.name: epochs_left(run, s, corpus) for run, s in zip(runs, states, strict=True)}
    open_runs = [run for run in runs if left[run.name]]
    jobs, threads = sharing(args)
    jobs = max(1, min(jobs, len(open_runs)))
    known = [
        (s.summary["seconds"], planned(run, corpus) if s.trained else s.summary["epochs"])
        for run, s in zip(runs, states, strict=True)
        if s.trained or s.summary.get("epochs")
    ]
    start = time.process_time()  # to load torch, mainly, as each run has to
    if known:
        pace = sum(seconds for seconds, _ in known) / sum(epochs for _, epochs in known)
        seconds = sum(left.values()) * pace + len(open_runs) * start
        return f"about {duration(seconds / jobs)}, at {pace:.1f} s an epoch so far"
    if args.ray is not None:
        return "how long that takes is known once a first run is done"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows = {run.row.slug: run for run in reversed(open_runs)}
    found = {slug: forecast_of(run, corpus) for slug, run in rows.items()}
    torch.set_num_threads(before)
    forecasts = [(left[run.name], found[run.row.slug]) for run in open_runs]
    seconds = sum(start + one.pace.run(epochs) for epochs, one in forecasts if one)
    memory = max((one.memory or 0 for _, one in forecasts if one), default=0)
    size = f"; up to {memory / 2**20:,.0f} MiB a run" if memory else ""
    return f"about {duration(seconds / jobs)}, by a few updates of each row{size}"


def forecast_of(run: Run, corpus: Corpus) -> Forecast | None:
    """Make a few updates of a run, in memory; None, with a warning, if it cannot be run."""
    args = argparse.Namespace(**run.flags)
    device = select_device(args.device)
    try:
        check_lengths(args, corpus)
        part = first_windows(args, corpus) if args.quick else corpus
        return forecast(args, part, device)
    except (UsageError, RunError) as error:
        warn(f"{run.name}: its time is not counted: {error}")
        return None
    finally:  # nothing is kept, on a GPU least of all, which the runs share with this process
        gc.collect()  # a trainer and its tally refer to each other
        reset_peak_memory(device)


def epochs_left(run: Run, state: State, corpus: Corpus) -> float:
    """Epochs that a run has left; see planned."""
    return 0 if state.kind in FINISHED else max(0.0, planned(run, corpus) - state.epochs)


def planned(run: Run, corpus: Corpus) -> float:
    """Epochs of a run by its flags; fractional with --max-updates."""
    return planned_epochs(argparse.Namespace(**run.flags), corpus)
