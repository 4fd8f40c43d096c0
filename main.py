"""Train an AWD-LSTM language model, then test it: python main.py @recipes/demo.txt"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

import cli
from bptt import FixedWindows, FullWindows, RandomizedWindows, Scheme, VariableWindows
from data.corpus import Corpus, load_corpus
from data.download import ensure_corpus
from diagnostics.probe import probe
from engine.checkpoint import damage_reported, load_model, load_training_state
from engine.device import available_memory, keep_freed_memory, peak_memory
from engine.errors import CheckpointError, DivergenceError, RunError
from engine.estimate import training_memory
from engine.interrupt import Interrupt
from engine.loss_scale import LossScale
from engine.precision import DTYPES, choose_precision, fast_kernel
from engine.provenance import git_commit, versions
from engine.ranks import Ranks, launched_ranks, leave
from engine.report import DOUBLE_RULE, final_line
from engine.run_folder import RunFolder, find_run
from engine.tracking import Silence, Tracker, WandbOptions, warn
from engine.trainer import Trainer
from engine.training_state import TrainingOptions
from evaluation.bigram import bigram_loss
from evaluation.plain import evaluate, perplexity
from evaluation.sampling import sample_sentences
from model import RNNModel, count_parameters
from nt_asgd import NTASGD


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    return cli.run_program(train_and_test, argv)


def train_and_test(argv: Sequence[str]) -> None:
    """What the program does, between its command line and its errors."""
    args, given = cli.parse_training(argv)
    args, state = find_state(args, given)
    cli.settle_scheme(args)
    device = cli.device_of(args)
    if device.type == "cpu":
        keep_freed_memory()
    with launched_ranks(device) as ranks, ExitStack() as stack:
        try:
            ranks.share(args.batch_size)
        except ValueError as error:
            raise cli.UsageError(f"argument --batch-size: {error}") from None
        if not ranks.leader:  # which speaks for all
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        start(args, argv, state, device, ranks)


def start(
    args: argparse.Namespace,
    argv: Sequence[str],
    state: dict[str, Any] | None,
    device: torch.device,
    ranks: Ranks,
) -> None:
    """Build everything that a run consists of, and run it."""
    corpus = read_corpus(args, ranks)
    if state is not None and state["fingerprint"] != corpus.fingerprint:
        raise CheckpointError(f"{args.data}: its text is not that of the run to be resumed")
    torch.manual_seed(args.seed)
    model = build_model(args, len(corpus.vocabulary)).to(device)
    if args.dry_run:
        print_plan(args, model, corpus)
        return
    check_memory(args, model, corpus)
    precision, computing = set_precision(args, model)
    with RunFolder(args.save, writes=ranks.leader) as folder, Interrupt() as interrupt:
        flags = {name: value for name, value in vars(args).items() if name != "dry_run"}
        trainer = Trainer(
            model,
            build_optimizer(args, model),
            build_scheme(args),
            corpus,
            training_options(args),
            folder,
            interrupt,
            identity=dict(flags=flags, fingerprint=corpus.fingerprint),
            loss_scale=build_loss_scale(args, precision),
            probe=probe if args.diagnostics else None,
            ranks=ranks,
        )
        if state is not None:  # before any file is touched: the state may be damaged
            with damage_reported(Path(args.resume)):
                trainer.load_state_dict(state)
        if not ranks.leader:
            run(args, trainer, Silence())
            return
        source = None if state is None else Path(args.resume).parent
        if aside := folder.begin(source, trainer.at.best_epoch):
            warn(f"the run that was in {folder.folder} is now in {aside}")
        commit = git_commit()
        session: dict[str, Any] = dict(argv=list(argv), from_update=trainer.at.update)
        session.update(precision=precision, kernel="fast" if model.fast else "plain")
        session.update(processes=ranks.size)
        session.update(versions=versions(), git_commit=commit)
        tracker = open_tracker(args, folder, dict(flags, git_commit=commit), state)
        exit_code = 1
        try:
            folder.write_config(flags, session, resumed=state is not None)
            print(computing, file=sys.stderr)
            run(args, trainer, tracker)
            exit_code = 0
        finally:
            tracker.close(exit_code)


def run(args: argparse.Namespace, trainer: Trainer, tracker: Tracker) -> None:
    """Train, test the best model, and write down what came out."""
    device, folder = trainer.device, trainer.folder
    parameters = count_parameters(trainer.model)
    summary: dict[str, Any] = dict(parameters=parameters)
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
        raise
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

    model, vocabulary = load_model(folder.model_path, device)
    ids = trainer.corpus.test
    loss = evaluate(model, ids, args.test_batch_size)
    results = dict(loss=loss, ppl=perplexity(loss), bpc=loss / math.log(2))
    tracker.log("test", step=trainer.at.update, **results)
    summary["test_ppl"] = results["ppl"]
    print(DOUBLE_RULE)
    if args.bigram:
        corpus = trainer.corpus
        texts = (corpus.train.numpy(), corpus.valid.numpy(), ids.numpy())
        bigram = perplexity(bigram_loss(*texts, len(vocabulary)))
        summary["bigram_ppl"] = bigram
        print(f"| Interpolated bigram model of the same text | test ppl {bigram:8.2f}")
    print(final_line(loss), flush=True)
    for sentence in sample_sentences(model, vocabulary, args.samples, args.seed):
        print(f"| It writes: {sentence}")
    conclude(trainer, tracker, dict(summary, diverged=False))


def conclude(trainer: Trainer, tracker: Tracker, summary: dict[str, Any]) -> None:
    """Write summary.json and W&B's summary."""
    at = trainer.at
    summary = dict(
        best_valid_ppl=perplexity(at.best_loss),
        test_ppl=summary.pop("test_ppl", None),
        best_epoch=at.best_epoch,
        epochs=at.epoch - 1,
        updates=at.update,
        seconds=at.seconds,
        tokens_per_second=at.tokens / max(at.training_seconds, 1e-9),
        peak_memory_bytes=peak_memory(trainer.device),
        **summary,
    )
    trainer.folder.write_json("summary.json", summary)
    tracker.summarize(**summary)


def find_state(
    args: argparse.Namespace, given: set[str]
) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """The state to resume from, if any, and the flags that go with it."""
    if args.resume is None:
        return args, None
    if args.resume == "auto":
        path = Path(args.save).with_suffix("") / "last.pt"
        if not path.exists():
            return args, None
    else:
        path = find_run(args.resume)
    state = load_training_state(path)
    with damage_reported(path):
        args = cli.resume_flags(args, given, state["flags"])
        if "save" not in given:
            args.save = str(path.parent) + Path(state["flags"]["save"]).suffix
    args.resume = str(path)
    return args, state


# From flags to objects


def read_corpus(args: argparse.Namespace, ranks: Ranks) -> Corpus:
    """The corpus, fetched where need be, and long enough for the batch sizes."""
    if not ranks.leader:
        ranks.wait()  # until it is there
    ensure_corpus(args.data)
    corpus = load_corpus(args.data)
    if ranks.leader:
        ranks.wait()
    needs = [
        ("train", len(corpus.train) // 2, "--batch-size", args.batch_size),
        ("valid", len(corpus.valid) - 1, "--eval-batch-size", args.eval_batch_size),
        ("test", len(corpus.test) - 1, "--test-batch-size", args.test_batch_size),
    ]
    for split, most, flag, size in needs:
        if size > most:
            tokens = len(getattr(corpus, split))
            path = Path(args.data) / f"{split}.txt"
            raise RunError(
                f"{path}: {tokens} tokens are too few for {flag} {size} (at most {most})"
            )
    return corpus


def build_model(args: argparse.Namespace, ntoken: int) -> RNNModel:
    """The model that the flags describe, freshly initialised."""
    return RNNModel(
        args.model,
        ntoken,
        args.emsize,
        args.nhid,
        args.nlayers,
        args.dropout,
        args.dropouth,
        args.dropouti,
        args.dropoute,
        args.wdrop,
        tie_weights=not args.untied,
        grad_filter=args.grad_filter,
    )


def build_optimizer(args: argparse.Namespace, model: RNNModel) -> torch.optim.Optimizer:
    """The optimizer that the flags describe."""
    if args.optimizer == "adam":
        if args.lr >= 1:
            warn(f"--optimizer adam with --lr {args.lr:g}, which is a learning rate for sgd")
        return torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.wdecay)
    nonmono = None if args.no_asgd and not args.nonmono_decay else args.nonmono
    return NTASGD(model.parameters(), args.lr, args.wdecay, nonmono, args.nonmono_decay or None)


def set_precision(args: argparse.Namespace, model: RNNModel) -> tuple[str, str]:
    """Make the model train in --precision, by --kernel; returns it, and a line about both."""
    device = model.encoder.weight.device
    try:
        precision = choose_precision(args.precision, device)
    except ValueError as error:
        raise cli.UsageError(f"argument --precision: {error}") from None
    fast, reason = fast_kernel(precision, device)
    if args.kernel == "plain":
        fast, reason = False, "as asked"
    model.compute_in(DTYPES[precision], fast)
    kernel = "fast" if fast else "plain"
    return precision, f"| precision {precision} | {kernel} kernel, {reason}"


def build_loss_scale(args: argparse.Namespace, precision: str) -> LossScale | None:
    """How the flags scale the loss."""
    scale: Any = args.loss_scale or ("dynamic" if precision == "fp16" else None)
    if scale is None:
        return None
    if scale != "dynamic":
        return LossScale(scale, dynamic=False)
    low, high = args.loss_scale_bounds
    return LossScale(low=low, high=high, window=args.loss_scale_window)


def build_scheme(args: argparse.Namespace) -> Scheme:
    """How the flags divide the text into windows."""
    if args.bptt_scheme == "fixed":
        return FixedWindows(args.bptt, args.k1)
    if args.bptt_scheme == "randomized":
        return RandomizedWindows(args.bptt, args.keep_prob, args.seed)
    if args.bptt_scheme == "full":
        return FullWindows(args.bptt)
    return VariableWindows(args.bptt, args.seed)


def training_options(args: argparse.Namespace) -> TrainingOptions:
    """The flags that the training loop looks at."""
    names = [field.name for field in fields(TrainingOptions)]
    options = {name: getattr(args, name) for name in names}
    return TrainingOptions(**dict(options, when=tuple(args.when)))


def open_tracker(
    args: argparse.Namespace,
    folder: RunFolder,
    config: dict[str, Any],
    state: dict[str, Any] | None,
) -> Tracker:
    """Where the numbers go; for a resumed run, where they went."""
    wandb = WandbOptions(
        mode=args.wandb,
        project=args.wandb_project,
        name=args.wandb_name,
        group=args.wandb_group,
        job_type=args.wandb_job_type,
        tags=None if args.wandb_tags is None else tuple(args.wandb_tags),
    )
    if state is None:
        return Tracker(folder.folder, config, wandb)
    with damage_reported(Path(args.resume)):
        return Tracker(folder.folder, config, wandb, state["tracking"])


def memory_needed(args: argparse.Namespace, model: RNNModel, corpus: Corpus) -> int:
    """Bytes that an update will need, about."""
    averages = args.optimizer == "adam" or not args.no_asgd
    steps = steps_per_epoch(args, corpus)
    return training_memory(model, args.batch_size, build_scheme(args), steps, averages)


def steps_per_epoch(args: argparse.Namespace, corpus: Corpus) -> int:
    """Rows that an epoch trains on."""
    columns: int = args.batch_size
    return len(corpus.train) // columns - 1


def check_memory(args: argparse.Namespace, model: RNNModel, corpus: Corpus) -> None:
    """Refuse windows that cannot fit; say what full BPTT takes and does.

    Raises:
        UsageError: an update needs more than there is.
    """
    needed = memory_needed(args, model, corpus) / 2**20
    # The weights are counted in what is needed, and have been allocated already.
    weights = 4 * count_parameters(model)
    there = (available_memory(model.encoder.weight.device) + weights) / 2**20
    if needed > there:
        flag = "--bptt-scheme" if args.bptt_scheme == "full" else "--bptt"
        raise cli.UsageError(
            f"argument {flag}: an update would need about {needed:,.0f} MiB and {there:,.0f} MiB "
            "are available; a smaller model, --batch-size or --bptt needs less"
        )
    if args.bptt_scheme == "full":
        steps = steps_per_epoch(args, corpus)
        print(
            f"| full BPTT | one update an epoch, over {steps:,} time steps, {args.bptt:,} at a "
            f"time | lr {args.lr * steps / args.bptt:g} (--lr x {steps} / {args.bptt}) | about "
            f"{needed:,.0f} MiB of tensors, {there:,.0f} MiB are available",
            file=sys.stderr,
        )


def print_plan(args: argparse.Namespace, model: RNNModel, corpus: Corpus) -> None:
    """What --dry-run prints."""
    updates = build_scheme(args).expected_windows(steps_per_epoch(args, corpus))
    memory = memory_needed(args, model, corpus)
    tokens = [len(text) for text in (corpus.train, corpus.valid, corpus.test)]
    print(f"| tokens            | {tokens[0]:,} train, {tokens[1]:,} valid, {tokens[2]:,} test")
    print(f"| vocabulary        | {len(corpus.vocabulary):,} words")
    print(f"| parameters        | {count_parameters(model):,}")
    print(f"| updates per epoch | about {updates:,.0f}")
    print(f"| memory            | about {memory / 2**20:,.0f} MiB of tensors in an update, besides")
    print("|                   | the process itself (some 300 MiB on a CPU)")


if __name__ == "__main__":
    leave(main())
