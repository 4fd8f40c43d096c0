"""Train an AWD-LSTM language model, then test it: python main.py @recipes/demo.txt"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from assembly import build_model, build_trainer, read_corpus
from engine.checkpoint import (
    check_unchanged,
    check_vocabulary,
    damage_reported,
    file_version,
    load_training_state,
)
from engine.device import keep_freed_memory, select_device, use_threads
from engine.errors import CheckpointError, DivergenceError, RunError, UsageError
from engine.launch import local_rank
from engine.model_folder import model_of_run
from engine.origin import Origin
from engine.provenance import cpu_name, git_commit, gpu_name, versions
from engine.ranks import Ranks, launched_ranks
from engine.report import DOUBLE_RULE
from engine.run_folder import find_run
from engine.tracking import Silence, Tracker, WandbOptions, sync_command, warn
from flags.resume import resume_flags
from flags.training import parse_training, settle_scheme
from kernels.choose import Choice, in_words
from model import count_parameters
from programs.conclusion import conclude, test_best
from programs.plan import check_memory, give_advice, print_full_plan, print_plan
from training.trainer import Trainer


def run(argv: Sequence[str]) -> None:
    """Run the program.

    Raises:
        UsageError, RunError, DataError: errors that a user can cause; see engine.program.
    """
    args, given = parse_training(argv)
    state = find_state(args)
    if state is not None:
        if "origin" in state:
            raise RunError(f"{args.resume}: a run of finetune.py, whose --resume continues it")
        args = resumed(args, given, state)
    launch(args, argv, state)


def launch(
    args: argparse.Namespace,
    argv: Sequence[str],
    state: dict[str, Any] | None,
    origin: Origin | None = None,
) -> None:
    """Train and test, in this process or in each of those that torchrun started.

    Args:
        state: training state to resume from; None: a new run.
        origin: trained model that a new run starts from; None: random weights.
    """
    settle_scheme(args)
    device = select_device(args.device, local_rank())
    if device.type == "cpu":
        keep_freed_memory()
    elif device.index is not None:
        torch.cuda.set_device(device)
    with launched_ranks(device) as ranks, ExitStack() as stack:
        try:
            ranks.share(args.batch_size)
        except ValueError as error:
            raise UsageError(f"argument --batch-size: {error}") from None
        if not ranks.leader:  # only the leader prints
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        start(args, argv, state, origin, device, ranks)


def start(
    args: argparse.Namespace,
    argv: Sequence[str],
    state: dict[str, Any] | None,
    origin: Origin | None,
    device: torch.device,
    ranks: Ranks,
) -> None:
    """Build the objects of a run, and run it."""
    use_threads(args.threads)
    corpus = read_corpus(args, ranks)
    if state is not None and state.get("fingerprint", "") != corpus.fingerprint:
        raise CheckpointError(f"{args.data}: its text is not that of the run to be resumed")
    if origin is not None:
        check_vocabulary(origin.path, origin.vocabulary, args.data, corpus)
    with torch.device("meta"):  # shapes only, no memory
        plan = build_model(args, len(corpus.vocabulary))
    if args.dry_run:
        if ranks.leader:
            print_plan(args, plan, corpus, device)
            give_advice(args, plan, corpus)
        return
    devices = ranks.size if device.type == "cuda" else 1
    check_memory(args, plan, corpus, device, devices)
    print_full_plan(args, plan, corpus, device, devices)
    if origin is not None:
        print(origin.note, file=sys.stderr)
    named = (state or {}).get("origin") if origin is None else origin.named()
    trainer, precision, kernels = build_trainer(args, corpus, device, ranks, origin, named)
    with trainer.folder, trainer.interrupt:
        if state is not None or args.resume == "auto":
            last = trainer.folder.last_path if state is None else Path(args.resume)
            check_unchanged(last, (state or {}).get("version"))
        if state is not None:  # before any file changes, since the state may be damaged
            with damage_reported(Path(args.resume)):
                trainer.load_state_dict(state)
                state["tracking"]["metrics_bytes"]  # the tracker needs it
            del state["model"]  # a second copy of the weights
        elif origin is not None:
            trainer.at.begin_validated(trainer.num_steps)
        if not ranks.leader:
            train_and_test(args, trainer, Silence())
            return
        lead(args, argv, state, trainer, precision, kernels)


def lead(
    args: argparse.Namespace,
    argv: Sequence[str],
    state: dict[str, Any] | None,
    trainer: Trainer,
    precision: str,
    kernels: dict[str, Choice],
) -> None:
    """Run the trainer in the leader, with the run's files and tracker."""
    folder, flags = trainer.folder, trainer.identity["flags"]
    source = None if state is None else model_of_run(Path(args.resume).parent, state["flags"])
    if aside := folder.begin(source, trainer.at.best_epoch, trainer.at.best_loss):
        warn(f"the run that was in {folder.folder} is now in {aside}")
    if state is None:
        give_advice(args, trainer.model, trainer.corpus)
    commit = git_commit()
    session = dict(
        argv=list(argv),
        origin=trainer.identity.get("origin"),
        from_update=trainer.at.update,
        precision=precision,
        kernel=kernels["layers"].kernel,
        kernels={part: str(choice) for part, choice in kernels.items()},
        processes=trainer.ranks.size,
        threads=torch.get_num_threads(),
        cpu=cpu_name(),
        gpu=gpu_name(trainer.device),
        fingerprint=trainer.corpus.fingerprint,
        versions=versions(),
        git_commit=commit,
    )
    config = dict(flags, git_commit=commit)
    tracker = Tracker(folder.folder, config, wandb_options(args), state and state["tracking"])
    exit_code = 1
    try:
        if tracker.damage is not None:
            warn(f"{tracker.damage}; a gap marks what is missing")
            tracker.log("gap", step=trainer.at.update)
        folder.write_config(flags, session)
        print(f"| precision {precision} | {in_words(kernels)}", file=sys.stderr)
        train_and_test(args, trainer, tracker)
        exit_code = 0
    finally:
        tracker.close(exit_code)
        if args.wandb == "offline" and (command := sync_command(folder.folder)):
            print(f"W&B: to upload the run: {command}", file=sys.stderr)


def wandb_options(args: argparse.Namespace) -> WandbOptions:
    """The flags of W&B."""
    return WandbOptions(
        mode=args.wandb,
        project=args.wandb_project,
        name=args.wandb_name,
        group=args.wandb_group,
        job_type=args.wandb_job_type,
        tags=args.wandb_tags,
    )


def train_and_test(args: argparse.Namespace, trainer: Trainer, tracker: Tracker) -> None:
    """Train, test the best model, write the summary."""
    device, folder = trainer.device, trainer.folder
    parameters = count_parameters(trainer.model)
    summary: dict[str, Any] = dict(parameters=parameters)
    if args.quick:
        summary["quick"] = "three updates; perplexities of the first words of each text"
    words = len(trainer.corpus.vocabulary)
    if tracker.wandb_url is not None:
        print(f"W&B: {tracker.wandb_url}", file=sys.stderr)
    print(
        f"| {folder.model_path} | {parameters:,} parameters | {words:,} words | {device}"
        f"{f' x {trainer.ranks.size} processes' * (trainer.ranks.size > 1)} "
        f"| from update {trainer.at.update}",
        file=sys.stderr,
    )
    try:
        ended = trainer.train(tracker)
    except DivergenceError as error:
        if trainer.ranks.leader:
            conclude(trainer, tracker, dict(summary, diverged=True, cause=str(error)))
        raise DivergenceError(f"{error}; a smaller --lr, or --clip, may help") from error
    summary["ended"] = ended
    trainer.interrupt.release()
    if trainer.interrupt.terminated:
        raise RunError(f"terminated; --resume {folder.last_path} goes on from here")
    if ended == "interrupted":
        best = trainer.at.best_epoch
        which = f"the best model is of epoch {best}"
        if best is None:
            which = "nothing was validated yet, so the model as it is now counts"
        print(DOUBLE_RULE)
        print(
            f"Exiting from training early: {which}; --resume {folder.last_path} goes on from here"
        )
    if not trainer.ranks.leader:
        return

    test_best(args, trainer, tracker, summary)


def find_state(args: argparse.Namespace) -> dict[str, Any] | None:
    """Load the state to resume from, if any; args.resume becomes its path."""
    if args.resume is None:
        return None
    if args.resume == "auto":
        path = Path(args.save).with_suffix("") / "last.pt"
        if not path.exists():
            return None
    else:
        path = find_run(args.resume)
    args.resume = str(path)
    return {"version": file_version(path), **load_training_state(path)}


def resumed(args: argparse.Namespace, given: set[str], state: dict[str, Any]) -> argparse.Namespace:
    """The flags of a resumed run, from what find_state found."""
    path = Path(args.resume)
    with damage_reported(path):
        args = resume_flags(args, given, state["flags"])
        model = model_of_run(path.parent, state["flags"])
    if "save" not in given:
        args.save = str(model)
    return args
