"""Builds the objects of a run from main.py's flags."""

import argparse
import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bptt import FixedWindows, FullWindows, RandomizedWindows, Scheme, VariableWindows
from data.corpus import Corpus, batchify, load_corpus
from data.download import ensure_corpus
from decoders import DECODERS
from diagnostics.probe import probe
from engine.errors import RunError, UsageError
from engine.interrupt import Interrupt
from engine.origin import Origin
from engine.ranks import Ranks
from engine.run_folder import RunFolder
from engine.tracking import warn
from kernels.choose import Choice, choose_step, install
from kernels.fused_step import FusedStep
from kernels.graphs import Graphs
from kernels.precision import DTYPES, choose_precision, set_products
from layers import LAYERS
from loss_scale import AnyLossScale, LogMax, LossScale
from model import RNNModel
from noise import Noise
from nt_asgd import NTASGD
from training.callback import Callback
from training.callbacks import (
    FilterFigures,
    GradientFigures,
    LearningRateDrops,
    LossScaling,
    MemoryRelease,
    NonMonotonicTrigger,
    StopAtTrigger,
)
from training.objective import Objective, Penalty, paper_penalties
from training.recorded import RecordedUpdater
from training.state import TrainingOptions
from training.step import PlainStep, Step
from training.trainer import Trainer
from training.update import Updater


def read_corpus(args: argparse.Namespace, ranks: Ranks) -> Corpus:
    """Load the corpus, downloading it if missing; check its length against the batch sizes.

    Raises:
        RunError: a text is too short.
    """
    if not ranks.leader:
        ranks.wait()  # until the leader has downloaded it
    ensure_corpus(args.data)
    if ranks.leader:
        ranks.wait()
    corpus = load_corpus(args.data)
    check_lengths(args, corpus)
    return first_windows(args, corpus) if args.quick else corpus


def check_lengths(args: argparse.Namespace, corpus: Corpus) -> None:
    """Check that each text has enough tokens for its batch size.

    Raises:
        RunError: a text is too short.
    """
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


def first_windows(args: argparse.Namespace, corpus: Corpus) -> Corpus:
    """The beginnings of the texts, as long as --quick needs: a window per update that it makes."""
    longest = build_scheme(args).footprint(len(corpus.train) // args.batch_size - 1).rows
    number = args.max_updates
    train = number * max(longest, args.k1 or 0) * args.batch_size + args.batch_size
    valid, test = (
        number * args.bptt * columns + 1 for columns in (args.eval_batch_size, args.test_batch_size)
    )
    parts = corpus.train[:train], corpus.valid[:valid], corpus.test[:test]
    return Corpus(corpus.vocabulary, *parts, corpus.fingerprint)


def build_trainer(
    args: argparse.Namespace,
    corpus: Corpus,
    device: torch.device,
    ranks: Ranks,
    start: Origin | None = None,
    origin: dict[str, Any] | None = None,
) -> tuple[Trainer, str, dict[str, Choice]]:
    """Build the trainer of a run, with all its parts; nothing is written or locked.

    Args:
        start: the trained model whose weights it starts from; None: random weights.
        origin: what checkpoints say of the model that the run has started from; None: it has
            started from random weights. Else NT-ASGD averages from the first step on.

    Returns:
        The trainer, the precision, and the kernel of each part.
    """
    torch.manual_seed(args.seed)
    model = build_model(args, len(corpus.vocabulary))
    identity: dict[str, Any] = dict(flags=dict(vars(args)), fingerprint=corpus.fingerprint)
    if start is not None:
        start.give_weights(model)
    if origin is not None:
        identity["origin"] = origin
    model = model.to(device)
    precision = resolve_precision(args, device)
    set_products(precision, device)
    optimizer = build_optimizer(args, model, averaging=origin is not None)
    loss_scale = build_loss_scale(args, precision)
    rows = batchify(corpus.train, args.batch_size)[:, ranks.share(args.batch_size)].to(device)
    generator = torch.Generator(device).manual_seed(args.seed)
    updater, kernels = build_updater(
        args, model, optimizer, rows, generator, precision, loss_scale, ranks
    )
    trainer = Trainer(
        model,
        optimizer,
        build_scheme(args),
        corpus,
        updater,
        generator,
        training_options(args),
        RunFolder(args.save, writes=ranks.leader),
        Interrupt(),
        identity=identity,
        callbacks=build_callbacks(args, model, optimizer, loss_scale, ranks),
        ranks=ranks,
    )
    return trainer, precision, kernels


def build_model(args: argparse.Namespace, ntoken: int) -> RNNModel:
    """Build and initialise the model.

    Keywords of RNNModel and of the constructors of its layers and decoder get the flags of the
    same names, except those that the original names differently.
    """
    return RNNModel(
        args.model,
        ntoken,
        args.emsize,
        tie_weights=not args.untied,
        layer_options=keywords_from(args, LAYERS[args.model]),
        decoder_options=keywords_from(args, DECODERS[args.decoder]),
        **keywords_from(args, RNNModel),
    )


def keywords_from(args: argparse.Namespace, constructor: Callable[..., Any]) -> dict[str, Any]:
    """The flags whose names are keywords of a constructor."""
    names = inspect.signature(constructor).parameters
    return {name: value for name, value in vars(args).items() if name in names}


def build_optimizer(
    args: argparse.Namespace, model: RNNModel, averaging: bool = False
) -> torch.optim.Optimizer:
    """Build the optimizer; averaging: NT-ASGD averages from its first step on."""
    if args.optimizer != "sgd" and args.lr >= 1:
        name, lr = args.optimizer, args.lr
        warn(f"--optimizer {name} with --lr {lr:g}, which is a learning rate for sgd")
    if args.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.wdecay)
    nonmono = None if args.no_asgd and not args.nonmono_decay else args.nonmono
    decay = args.nonmono_decay or None
    return NTASGD(model.parameters(), args.lr, args.wdecay, nonmono, decay, averaging)


def resolve_precision(args: argparse.Namespace, device: torch.device) -> str:
    """Resolve --precision on the device."""
    try:
        return choose_precision(args.precision, device)
    except ValueError as error:
        raise UsageError(f"argument --precision: {error}") from None


def build_updater(
    args: argparse.Namespace,
    model: RNNModel,
    optimizer: torch.optim.Optimizer,
    rows: Tensor,
    generator: torch.Generator,
    precision: str,
    loss_scale: AnyLossScale | None,
    ranks: Ranks,
) -> tuple[Updater | RecordedUpdater, dict[str, Choice]]:
    """Build the updater with the fastest kernels that fit; returns it and the choices."""
    device, dtype, fast = rows.device, DTYPES[precision], args.kernel != "plain"
    choices = install(model, dtype, device, fast)
    choices["step"] = choose_step(optimizer, dtype, device, fast, loss_scale)
    step: Step = PlainStep(optimizer, args.clip, loss_scale)
    if choices["step"].kernel != "plain":
        assert isinstance(optimizer, NTASGD)
        assert not isinstance(loss_scale, LogMax)
        step = FusedStep(optimizer, args.clip, loss_scale)
    objective = Objective(model, build_penalties(args))
    make_noise = partial(Noise, generator, ranks.rank, ranks.size)
    updater = Updater(objective, rows, step, bptt=args.bptt, make_noise=make_noise, ranks=ranks)
    if device.type != "cuda":
        return updater, choices
    for no, reason in (
        (args.kernel != "auto", "as asked"),
        (choices["step"].kernel == "plain", "the step is plain"),
        (args.bptt_scheme == "full", "--bptt-scheme full makes one an epoch"),
        (ranks.size > 1, f"there are {ranks.size} processes"),
    ):
        if no:
            choices["recording"] = Choice("none", reason)
            return updater, choices
    choices["recording"] = Choice("CUDA graphs")
    return RecordedUpdater(updater, Graphs(device, generator)), choices


def build_penalties(args: argparse.Namespace) -> list[Penalty]:
    """The terms that the flags add to the cross-entropy."""
    return paper_penalties(args.alpha, args.beta)


def build_callbacks(
    args: argparse.Namespace,
    model: RNNModel,
    optimizer: torch.optim.Optimizer,
    loss_scale: AnyLossScale | None,
    ranks: Ranks,
) -> list[Callback]:
    """Build the callbacks."""
    callbacks: list[Callback] = []
    if isinstance(optimizer, NTASGD):
        averaging = optimizer.averaging  # from the first step on
        callbacks.append(StopAtTrigger(optimizer) if averaging else NonMonotonicTrigger())
    callbacks.append(LearningRateDrops(tuple(args.when)))
    if loss_scale is not None:
        callbacks.append(LossScaling(loss_scale))
    filters = [layer.gradient_filter for layer in model.layers if layer.gradient_filter is not None]
    if filters:
        callbacks.append(FilterFigures(filters))
        if ranks.size > 1:
            for gradient_filter in filters:
                gradient_filter.gather = lambda norms: ranks.gather(norms, 0)
    if model.encoder.weight.device.type == "cpu":
        callbacks.append(MemoryRelease())
    if args.diagnostics:
        callbacks.append(GradientFigures(partial(probe, model), args.diagnostics))
    return callbacks


def build_loss_scale(args: argparse.Namespace, precision: str) -> AnyLossScale | None:
    """Build the loss scale, if any."""
    scale: Any = args.loss_scale or ("dynamic" if precision == "fp16" else None)
    if scale is None:
        return None
    low, high = args.loss_scale_bounds
    if scale == "logmax":
        return LogMax(low=low, high=high)
    if scale != "dynamic":
        return LossScale(scale, dynamic=False)
    return LossScale(low=low, high=high, window=args.loss_scale_window)


def build_scheme(args: argparse.Namespace) -> Scheme:
    """Build the scheme that divides the text into windows."""
    if args.bptt_scheme == "fixed":
        return FixedWindows(args.bptt, args.k1)
    if args.bptt_scheme == "randomized":
        return RandomizedWindows(args.bptt, args.keep_prob, args.seed)
    if args.bptt_scheme == "full":
        return FullWindows(args.bptt)
    return VariableWindows(args.bptt, args.seed)


def training_options(args: argparse.Namespace) -> TrainingOptions:
    """The training loop's options."""
    names = [field.name for field in fields(TrainingOptions)]
    return TrainingOptions(**{name: getattr(args, name) for name in names})
