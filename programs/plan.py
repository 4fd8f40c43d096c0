"""What a run will need, before it starts: sizes, time and memory."""

import argparse
import gc
import sys
from typing import NamedTuple

import torch

from assembly import build_scheme, build_trainer
from data.corpus import Corpus
from engine.device import (
    available_memory,
    keep_freed_memory,
    peak_memory,
    reset_peak_memory,
)
from engine.errors import UsageError
from engine.ranks import Ranks
from engine.report import duration
from engine.tracking import warn
from model import RNNModel, count_parameters
from nt_asgd import NTASGD
from training.advice import few_updates, large_model, raw_text
from training.estimate import training_memory
from training.rehearsal import Pace, rehearse

# The memory of a CPU's updates grows by this factor over the first 20 updates or so, whose windows
# differ in length: malloc keeps what they leave, in pieces that do not always fit.
KEPT_IN_PIECES = 1.3


class Forecast(NamedTuple):
    """What a few updates of a run, in memory, say about it.

    precision: fp32, tf32, bf16 or fp16.
    pace: seconds of its parts.
    memory: bytes at its peak, see engine.device.peak_memory; None: unknown.
    """

    precision: str
    pace: Pace
    memory: float | None

    def in_words(self, epochs: float) -> str:
        """Time of an epoch and of a run of that many, and memory."""
        memory = "" if self.memory is None else f"; {self.memory / 2**20:,.0f} MiB at the peak"
        return (
            f"{self.pace.epoch:,.4g} s an epoch ({self.pace.validation:.3g} s of it validation), "
            f"{duration(self.pace.run(epochs))} for {epochs:,.4g} epochs and the test{memory}"
        )


def forecast(
    args: argparse.Namespace, corpus: Corpus, device: torch.device, precision: str | None = None
) -> Forecast | None:
    """Make a few updates and pieces of evaluation in memory; see training.rehearsal.

    Args:
        precision: another one than --precision; None is returned if the layers have no fast kernel
            for it here.
    """
    own = argparse.Namespace(**{**vars(args), "precision": precision or args.precision})
    if device.type == "cpu":
        keep_freed_memory()
    gc.collect()  # an earlier trainer and its tally refer to each other
    alone = reset_peak_memory(device)
    before = peak_memory(device)
    try:
        trainer, resolved, kernels = build_trainer(own, corpus, device, Ranks())
    except UsageError:  # the device cannot compute in it
        if precision is None:
            raise
        return None
    if precision is not None and (kernels["layers"].kernel == "plain" or kernels["layers"].reason):
        return None
    pace = rehearse(trainer, args.bptt, args.test_batch_size)
    factor = 1.0 if device.type == "cuda" else KEPT_IN_PIECES
    memory = before + factor * (peak_memory(device) - before)
    if isinstance(trainer.optimizer, NTASGD) and not args.no_asgd:
        memory += 4 * count_parameters(trainer.model)  # the average, which starts later
    return Forecast(resolved, pace, memory if alone else None)


def print_plan(
    args: argparse.Namespace, model: RNNModel, corpus: Corpus, device: torch.device
) -> None:
    """Print the plan of --dry-run.

    Raises:
        UsageError: an update needs more memory than is available.
    """
    updates = build_scheme(args).expected_windows(steps_per_epoch(args, corpus))
    needed = memory_needed(args, model, corpus) / 2**20
    tokens = [len(text) for text in (corpus.train, corpus.valid, corpus.test)]
    print(f"| tokens            | {tokens[0]:,} train, {tokens[1]:,} valid, {tokens[2]:,} test")
    print(f"| vocabulary        | {len(corpus.vocabulary):,} words")
    print(f"| parameters        | {count_parameters(model):,}")
    print(f"| updates per epoch | about {updates:,.0f}")
    print(f"| memory            | about {needed:,.0f} MiB of tensors in an update", flush=True)
    check_memory(args, model, corpus, device)
    print_full_plan(args, model, corpus, device)
    own = forecast(args, corpus, device)
    assert own is not None
    epochs = planned_epochs(args, corpus)
    print(f"| {own.precision:17} | {own.in_words(epochs)}", flush=True)
    if args.precision == "auto" and (other := forecast(args, corpus, device, "bf16")):
        ratio = own.pace.training / other.pace.training
        print(f"| --precision bf16  | {other.in_words(epochs)}")
        print(f"|                   | {ratio:.1f} times the speed in training")


def planned_epochs(args: argparse.Namespace, corpus: Corpus) -> float:
    """Epochs of a run by its flags; fractional with --max-updates."""
    updates = build_scheme(args).expected_windows(steps_per_epoch(args, corpus))
    if args.max_updates is None or updates <= 0:
        return float(args.epochs)
    return float(min(args.epochs, args.max_updates / updates))


def memory_needed(
    args: argparse.Namespace, model: RNNModel, corpus: Corpus, devices: int = 1
) -> int:
    """Estimated bytes of an update's tensors, on each of the devices that share the batch."""
    kept = 2 if args.optimizer != "sgd" else int(not args.no_asgd)
    steps = steps_per_epoch(args, corpus)
    return training_memory(model, args.batch_size // devices, build_scheme(args), steps, kept)


def steps_per_epoch(args: argparse.Namespace, corpus: Corpus) -> int:
    """Rows that an epoch trains on."""
    columns: int = args.batch_size
    return len(corpus.train) // columns - 1


def check_memory(
    args: argparse.Namespace,
    model: RNNModel,
    corpus: Corpus,
    device: torch.device,
    devices: int = 1,
) -> None:
    """Check that an update fits into the device's memory.

    Args:
        devices: number of devices that share the batch.

    Raises:
        UsageError: an update needs more memory than is available.
    """
    needed = memory_needed(args, model, corpus, devices) / 2**20
    there = available_memory(device) / 2**20
    if needed > there:
        flag = "--bptt-scheme" if args.bptt_scheme == "full" else "--bptt"
        raise UsageError(
            f"argument {flag}: an update would need about {needed:,.0f} MiB and {there:,.0f} MiB "
            "are available; a smaller model, --batch-size or --bptt needs less"
        )


def print_full_plan(
    args: argparse.Namespace,
    model: RNNModel,
    corpus: Corpus,
    device: torch.device,
    devices: int = 1,
) -> None:
    """Print the plan of full BPTT; no-op for another scheme."""
    if args.bptt_scheme != "full":
        return
    steps = steps_per_epoch(args, corpus)
    needed = memory_needed(args, model, corpus, devices) / 2**20
    there = available_memory(device) / 2**20
    print(
        f"| full BPTT | one update an epoch, over {steps:,} time steps, {args.bptt:,} at a "
        f"time | lr {args.lr * steps / args.bptt:g} (--lr x {steps} / {args.bptt}) | about "
        f"{needed:,.0f} MiB of tensors, {there:,.0f} MiB are available",
        file=sys.stderr,
    )


def give_advice(args: argparse.Namespace, model: RNNModel, corpus: Corpus) -> None:
    """Warn of a text or of sizes that cannot work well; see training.advice.

    No-op with --quick, whose text is only a part.
    """
    if args.quick:
        return
    found = raw_text(corpus) + large_model(count_parameters(model), corpus, args.nlayers)
    if args.bptt_scheme != "full":
        found += few_updates(build_scheme(args), len(corpus.train), args.batch_size)
    for text in found:
        warn(text)
