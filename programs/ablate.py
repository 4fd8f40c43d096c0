"""Run an ablation table and print it: python ablate.py ablations/demo.toml --jobs 2"""

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from assembly import build_model
from data.corpus import Corpus, load_corpus
from data.download import ensure_corpus
from engine.ablation.curves import draw_curves
from engine.ablation.pool import run_locally, slots
from engine.ablation.progress import Board
from engine.ablation.ray_pool import run_on_ray
from engine.ablation.report import flat, markdown, on_terminal, write_report
from engine.ablation.results import collect
from engine.ablation.runs import FINISHED, Run, counted, read_state
from engine.ablation.stages import steps_after
from engine.ablation.table import Row, Table, load_table
from engine.ablation.tracked import log_table
from engine.device import select_device
from engine.errors import RunError, UsageError
from engine.interrupt import Interrupt
from engine.program import is_memory
from engine.run_folder import lock_folder
from engine.tracking import WandbOptions, sync_command, warn
from flags.ablation import parse_ablation
from flags.flag import dashed
from flags.resume import other_flags
from flags.stages import check_stage
from flags.training import given_flags, parse_training, settle_scheme
from pictures.canvas import FORMATS, write_figure
from programs.plan import check_memory
from programs.table_plan import print_plan, sharing, time_needed, where

PROJECT = Path(__file__).resolve().parent.parent
# Flags that ablate.py sets, and rows may not.
OURS = {
    *("seed", "save", "resume", "dry_run", "threads"),
    *("wandb_name", "wandb_group", "wandb_job_type"),
}


def run(argv: Sequence[str]) -> None:
    """Run the program.

    Raises:
        UsageError, RunError, DataError: errors that a user can cause; see engine.program.
    """
    args = parse_ablation(argv)
    table = select(load_table(args.table, PROJECT), args)
    output = Path(args.output or Path("results") / table.name)
    runs = plan(table, args, output)
    if args.report_only:
        check_folders(runs)
        if all(read_state(run).kind in ("new", "started") for run in runs):
            raise RunError(
                f"{output}: no run has ended with these flags, so there is nothing to report; "
                "--flags has to be as it was"
            )
        report(table, runs, output, args)
        return
    for gpu in args.gpus or []:
        if gpu >= (there := torch.cuda.device_count()):
            raise UsageError(f"argument --gpus: there is no GPU {gpu} ({there} in all)")
    if args.gpus:  # whose memory and speed this process measures
        torch.cuda.set_device(args.gpus[0])
    ensure_corpus(runs[0].flags["data"])
    corpus = load_corpus(runs[0].flags["data"])
    check_folders(runs, corpus.fingerprint)
    if args.ray is None:
        check_sizes(table, runs, corpus)
    if args.dry_run:
        print_plan(table, runs, corpus, args)
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{output}: cannot write: {error.strerror or error}") from None
    lock = lock_folder(output)
    try:
        unfinished = any(read_state(run).kind not in FINISHED for run in runs)
        if unfinished and args.ray is None:  # a cluster's machines may be others
            for line in (where(args), time_needed(runs, corpus, args)):
                print(f"| {line}", file=sys.stderr, flush=True)
        run_all(runs, args)
        report(table, runs, output, args)
    finally:
        lock.release()
    if failed := [run.name for run in runs if read_state(run).kind == "failed"]:
        raise RunError(f"{len(failed)} of {len(runs)} runs failed ({'; '.join(failed)})")


# The plan


def select(table: Table, args: argparse.Namespace) -> Table:
    """Apply the command line's rows, flags and seeds to the table."""
    rows = table.rows
    if args.rows is not None:
        words = [word.lower() for word in args.rows]
        chosen = [row for row in rows if any(word in row.name.lower() for word in words)]
        if not chosen:
            raise UsageError(f"argument --rows: {args.table} has no such row")
        rows = [rows[0], *(row for row in chosen if row is not rows[0])]
    try:
        flags = [*table.flags, *shlex.split(args.flags)]
    except ValueError as error:
        raise UsageError(f"argument --flags: {error}") from None
    return replace(table, rows=rows, flags=flags, seeds=args.seeds or table.seeds)


def plan(table: Table, args: argparse.Namespace, output: Path) -> list[Run]:
    """Make a run for each seed and row, in starting order: seed by seed.

    Raises:
        UsageError: main.py would refuse a row's flags.
    """
    runs = [make_run(table, row, s, args, output) for s in table.seeds for row in table.rows]
    if len(texts := {run.flags["data"] for run in runs}) > 1:
        raise UsageError(f"{table.path}: rows of different --data: {', '.join(sorted(texts))}")
    return runs


def make_run(table: Table, row: Row, seed: int, args: argparse.Namespace, output: Path) -> Run:
    """Make the run of one row and seed, and check its flags."""
    save = output / "runs" / f"{row.slug}-seed{seed}.pt"
    argv = [*table.flags, *row.flags]
    argv += ["--seed", str(seed), "--save", str(save), "--resume", "auto"]
    if args.gpus is not None:
        argv += ["--device", "cuda"]
    if args.wandb != "disabled":
        argv += ["--wandb", args.wandb, "--wandb-group", table.name, "--wandb-job-type", row.slug]
        argv += ["--wandb-name", f"{table.name}/{row.slug}/{seed}"]
        argv += ["--wandb-project", args.wandb_project] if args.wandb_project else []
    place = f"{table.path}: row {row.name!r}"
    try:
        for flags in (row.flags, [flag for flag in table.flags if not flag.startswith("@")]):
            if taken := given_flags(flags) & OURS:
                raise UsageError(f"argument {dashed(min(taken))}: the table sets it")
        parsed = parse_training(argv)[0]
        settle_scheme(parsed)
        if parsed.dry_run:  # by the table's recipe
            raise UsageError("argument --dry-run: nothing would be run")
        steps = steps_after(save, vars(parsed), table.after_of(row))
        for step in steps:
            place = f"{table.path}: row {row.name!r}: {step.after.name}"
            check_stage(step.program, step.own_argv, step.argv)
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from None
    except SystemExit:  # from -h
        raise UsageError(f"{place}: -h runs nothing") from None
    return Run(row, seed, argv, vars(parsed), save, steps)


def check_folders(runs: list[Run], fingerprint: str | None = None) -> None:
    """Check that runs already in these folders had the same flags and text.

    Args:
        fingerprint: fingerprint of the text; None: not compared.

    Raises:
        UsageError: a run had other flags or another text.
    """
    for run in runs:
        state = read_state(run)
        differences = ""
        if state.flags:
            differences = other_flags(run.flags, state.flags, also=("test_batch_size", "bigram"))
        for name, done in (("epochs", "epochs"), ("max_updates", "updates")):
            most, reached = run.flags[name], state.summary.get(done, 0)
            if most is not None and reached > most:
                differences = differences or f"{reached} {done} are done, and {most} are asked for"
        if fingerprint not in (None, state.config.get("fingerprint", fingerprint)):
            differences = differences or f"another text was in {run.flags['data']}"
        for step in run.steps:
            before = state.steps[step.after.name].flags if state.trained else None
            if before not in (None, step.after.flags):
                ours = shlex.join(step.after.flags) or "none"
                what = f"{step.after.name} {ours} (was {shlex.join(before or []) or 'none'})"
                differences = differences or what
        if differences:
            raise UsageError(
                f"{run.folder}: was run with other flags: {differences}; give another --output, "
                "or move it away"
            )


def check_sizes(table: Table, runs: list[Run], corpus: Corpus) -> None:
    """Check that an update of each row fits into this machine's memory.

    Raises:
        UsageError: it does not.
    """
    for run in runs[: len(table.rows)]:  # those of the first seed
        args = argparse.Namespace(**run.flags)
        try:
            with torch.device("meta"):  # shapes only, no memory
                model = build_model(args, len(corpus.vocabulary))
            check_memory(args, model, corpus, select_device(args.device))
        except (UsageError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_memory(error):
                raise
            raise UsageError(f"{table.path}: row {run.row.name!r}: {error}") from None


# Running and reporting


def run_all(runs: list[Run], args: argparse.Namespace) -> None:
    """Run all runs that are not finished.

    Raises:
        RunError: interrupted; the same command continues.
    """
    board = Board(runs)
    left = [run for run in runs if read_state(run).kind not in FINISHED]
    jobs, threads = sharing(args)
    with Interrupt() as interrupt:
        if args.ray is not None:
            run_on_ray(
                left,
                args.ray or None,
                threads=args.threads or 1,
                gpus=args.ray_gpus,
                interrupt=interrupt,
                tick=board.tick,
            )
        else:
            run_locally(left, slots(jobs, threads, args.gpus), interrupt, board.tick)
    if interrupt.requested:
        states = counted([read_state(run) for run in runs])
        raise RunError(f"interrupted ({states}); the same command goes on")


def report(table: Table, runs: list[Run], output: Path, args: argparse.Namespace) -> None:
    """Write the report, and print it."""
    figures = collect(table, runs, output)
    if not any(row["runs"] and row["valid"]["n"] for row in figures["rows"]):
        warn(f"{output}: no run is done yet")
    output.mkdir(parents=True, exist_ok=True)
    pictures = draw(figures, output, FORMATS[args.format])
    paths = write_report(figures, output, pictures[0].name if pictures else "")
    text = markdown(figures)
    if sys.stdout.isatty():
        text = on_terminal(figures, shutil.get_terminal_size().columns, paths[0])
    print(text, end="", flush=True)
    print(f"| {', '.join(map(str, paths + pictures))}", file=sys.stderr)
    wandb = WandbOptions(args.wandb, args.wandb_project, table.name, table.name, "table")
    shown = next((path for path in pictures if path.suffix == ".png"), None)
    log_table(output, wandb, [flat(row) for row in figures["rows"]], shown)
    if args.wandb == "offline" and (command := sync_command(output, "runs/*")):
        print(f"| to upload the runs and the table: {command}", file=sys.stderr)


def draw(figures: dict[str, Any], output: Path, formats: Sequence[str]) -> list[Path]:
    """Draw the curves, if there are any, in place of those of an earlier report."""
    curves = output / "curves"
    try:
        figure = draw_curves(figures)
    except ImportError:
        warn("matplotlib is not installed: no curves")
        figure = None
    for name in FORMATS["both"]:
        if figure is None or name not in formats:
            curves.with_suffix(f".{name}").unlink(missing_ok=True)
    return [] if figure is None else write_figure(figure, curves, formats)
