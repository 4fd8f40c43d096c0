"""Runs in one process: an update of one after an update of the other changes neither.

On this many models at once on one device will stand.
"""

import copy
import importlib
import os
import random
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from test_resume import assert_same

import assembly
from data.corpus import load_corpus
from engine.ranks import Ranks
from engine.tracking import Silence
from flags.training import parse_training, settle_scheme
from nt_asgd import NTASGD
from training.trainer import Trainer

# Each with all regularisers, windows of variable length unless it says otherwise, and averaging.
PLAIN = shlex.split("--nonmono 0 --lr 10 --alpha 2 --beta 1 --wdecay 1e-3 --kernel plain")
RUNS = {
    "plain": PLAIN,
    "another seed": [*PLAIN, "--seed", "8"],
    "other sizes": [*PLAIN, *shlex.split("--nhid 11 --nlayers 3 --untied --bptt 7")],
    "bf16": [*PLAIN, *shlex.split("--kernel auto --precision bf16 --loss-scale dynamic")],
    "GRU": [*PLAIN, *shlex.split("--kernel auto --model GRU")],
    "random cuts": [
        *PLAIN,
        *shlex.split("--bptt-scheme randomized --bptt 5 --keep-prob 0.6 --lr 2 --grad-filter 2"),
    ],
    "adam": [*PLAIN, *shlex.split("--optimizer adam --lr 0.01 --when 1 --diagnostics 3")],
}


def build(flags: list[str], corpus_folder: Path, save: Path) -> Trainer:
    """What programs/train.py builds."""
    args, _ = parse_training([*TINY, *flags, "--data", str(corpus_folder), "--save", str(save)])
    settle_scheme(args)
    with torch.random.fork_rng():
        corpus = load_corpus(args.data)
        trainer, precision, kernels = assembly.build_trainer(
            args, corpus, torch.device("cpu"), Ranks()
        )
    fast = precision == "bf16"
    assert [kernels[part].kernel != "plain" for part in ("layers", "step")] == [fast, fast]
    trainer.folder.folder.mkdir()
    trainer.tracker = Silence()
    return trainer


def train(flags: list[str], corpus_folder: Path, save: Path) -> Iterator[Any]:
    """A run of which each next is an update, or an epoch's end; last comes its state."""
    trainer = build(flags, corpus_folder, save)
    for epoch in (1, 2):
        trainer.model.train()
        for window in trainer.scheme.windows(trainer.num_steps, 0):
            trainer.update(window)
            yield None
        trainer.end_epoch()
        if epoch == 1 and isinstance(trainer.optimizer, NTASGD):
            assert trainer.optimizer.observe(1e9)  # averaging starts
        yield None
    yield trainer.state_dict()


def alternating(*runs: Iterator[Any]) -> list[Any]:
    """What each run comes to; every next one starts two updates after the one before it."""
    last: list[Any] = [None] * len(runs)
    going, turn = set(range(len(runs))), 0
    while going:
        for number in sorted(going):
            if turn >= 2 * number:
                try:
                    last[number] = next(runs[number])
                except StopIteration:
                    going.remove(number)
        turn += 1
    return last


def process_state() -> dict[str, Any]:
    """What belongs to the whole process, and to no run."""
    backends: Any = torch.backends
    return dict(
        random=(torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
        products=(
            torch.get_float32_matmul_precision(),
            backends.cudnn.allow_tf32,
            backends.cudnn.deterministic,
            backends.cudnn.benchmark,
            backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
            backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
            torch.are_deterministic_algorithms_enabled(),
            torch.get_default_dtype(),
        ),
        modes=(torch.get_num_threads(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
        streams=(sys.stdout, sys.stderr, sys.stdin),
        warnings=list(warnings.filters),
        place=(Path.cwd(), dict(os.environ)),
        signals=[signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
    )


@pytest.mark.parametrize(
    "names",
    [
        ("another seed", "bf16", "other sizes"),
        ("GRU", "random cuts", "adam"),
    ],
    ids=" and ".join,
)
def test_alternating_runs_end_as_each_does_alone(
    names: tuple[str, ...], corpus_folder: Path, tmp_path: Path
) -> None:
    """Bit for bit: weights, averages, moments, states, masks to come, windows to come."""
    importlib.import_module("torch._dynamo")  # as the first optimizer does; it adds a filter
    before = process_state()
    flags = [RUNS[name] for name in names]
    alone = [
        alternating(train(one, corpus_folder, tmp_path / f"alone{n}.pt"))[0]
        for n, one in enumerate(flags)
    ]
    together = alternating(
        *(train(one, corpus_folder, tmp_path / f"beside{n}.pt") for n, one in enumerate(flags))
    )
    assert_same(alone, together)
    for n, state in enumerate(together):
        assert state["position"]["update"] > 12
        paths = tmp_path / f"alone{n}.pt", tmp_path / f"beside{n}.pt"
        one, other = (torch.load(path, weights_only=True) for path in paths)
        assert_same(one["weights"], other["weights"])
    assert process_state() == before


@pytest.mark.parametrize("name", ["plain", "bf16", "random cuts", "adam"])
def test_a_state_that_was_loaded_is_the_one_that_is_saved(
    corpus_folder: Path, tmp_path: Path, name: str
) -> None:
    """In mid-epoch, while averaging, and with an interval under way that has skipped an update."""
    flags = [*RUNS[name], "--loss-scale", "dynamic", "--log-interval", "1000"]
    trainer = build(flags, corpus_folder, tmp_path / "one.pt")
    overflowing = iter([False, True, False])
    bias = trainer.model.decoder.bias
    assert isinstance(bias, torch.Tensor)
    bias.register_hook(lambda g: g * torch.inf if next(overflowing, False) else g)
    if isinstance(trainer.optimizer, NTASGD):
        trainer.optimizer.averaging = True
    windows = trainer.scheme.windows(trainer.num_steps)
    for _ in range(4):
        trainer.update(next(windows))
    trainer.tally.check()
    state = copy.deepcopy(trainer.state_dict())
    assert state["position"]["overflows"] == state["callbacks"]["loss_scale"]["skipped"] == 1
    assert state["position"]["grad_norm"] > 0
    other = build(flags, corpus_folder, tmp_path / "other.pt")
    other.load_state_dict(copy.deepcopy(state))
    assert_same(other.state_dict(), state)


def test_the_seed_is_that_of_the_masks_too(corpus_folder: Path, tmp_path: Path) -> None:
    """From the same weights, and in a window of the same rows."""
    losses, weights = list[float](), dict[str, Any]()
    for number, seed in enumerate(("7", "8", "7")):
        flags = [*PLAIN, "--bptt-scheme", "fixed", "--seed", seed]
        trainer = build(flags, corpus_folder, tmp_path / f"{number}.pt")
        weights = weights or copy.deepcopy(trainer.model.state_dict())
        trainer.model.load_state_dict(weights)
        trainer.update(next(trainer.scheme.windows(trainer.num_steps)))
        losses.append(float(trainer.tally.summed))
    assert losses[0] == losses[2] != losses[1]
