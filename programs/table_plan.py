"""The plan of a table: what is to be run, and how long it takes."""

import argparse
import os
import shlex
import time

import torch

from assembly import build_scheme, check_lengths, first_windows
from data.corpus import Corpus
from engine.ablation.runs import FINISHED, Run, State, counted, read_state
from engine.ablation.table import Table
from engine.device import reset_peak_memory, select_device
from engine.errors import RunError, UsageError
from engine.report import duration
from engine.tracking import warn
from programs.plan import Forecast, forecast


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
    states = {run.name: read_state(run) for run in runs}
    epochs = {run.name: epochs_left(run, states[run.name], corpus) for run in runs}
    jobs = max(1, min(sharing(args)[0], sum(n > 0 for n in epochs.values())))
    known = [s.summary for s in states.values() if s.summary.get("epochs")]
    if known:
        pace = sum(s["seconds"] for s in known) / sum(s["epochs"] for s in known)
        seconds = sum(epochs.values()) * pace
        return f"about {duration(seconds / jobs)}, at {pace:.1f} s an epoch so far"
    if args.ray is not None:
        return "how long that takes is known once a first run is done"
    start = time.process_time()  # to load torch, mainly, as each run has to
    threads = torch.get_num_threads()
    torch.set_num_threads(sharing(args)[1])
    found = {run.row.slug: forecast_of(run, corpus) for run in reversed(runs) if epochs[run.name]}
    torch.set_num_threads(threads)
    seconds, memory, left_out = 0.0, 0.0, 0
    for run in runs:
        if epochs[run.name] and (one := found[run.row.slug]):
            seconds += start + one.seconds(epochs[run.name])
            memory = max(memory, one.memory or 0)
        else:
            left_out += epochs[run.name] > 0
    but = f", without {left_out} runs that cannot be measured" * (left_out > 0)
    size = f"; up to {memory / 2**20:,.0f} MiB a run" * (memory > 0)
    return f"about {duration(seconds / jobs)}, by a few updates of each row{but}{size}"


def forecast_of(run: Run, corpus: Corpus) -> Forecast | None:
    """Make a few updates of a run, in memory; None, with a warning, if it cannot be run."""
    args = argparse.Namespace(**run.flags)
    device = select_device(args.device)
    try:
        check_lengths(args, corpus)
        part = first_windows(args, corpus) if args.quick else corpus
        return forecast(args, part, device)
    except (UsageError, RunError) as error:
        warn(f"{run.name}: {error}")
        return None
    finally:
        reset_peak_memory(device)  # nothing is kept from the runs


def epochs_left(run: Run, state: State, corpus: Corpus) -> float:
    """Epochs that a run has left, by its flags; fractional with --max-updates."""
    if state.kind in FINISHED:
        return 0
    args = argparse.Namespace(**run.flags)
    steps = len(corpus.train) // args.batch_size - 1
    planned = float(args.epochs)
    if args.max_updates is not None and steps > 0:
        planned = min(planned, args.max_updates / build_scheme(args).expected_windows(steps))
    return max(0.0, planned - state.epochs)
