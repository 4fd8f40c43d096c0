"""Times a few updates and pieces of evaluation, to say beforehand what a run takes."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from bptt import Window
from engine.device import release_freed_memory
from engine.tracking import Silence
from evaluation.evaluate import WINDOW_TOKENS, WINDOW_TOKENS_GPU, evaluate
from evaluation.plain import Plain
from training.recorded import RecordedUpdater
from training.trainer import Trainer

# Updates are timed for at least this long, and at least so many.
LEAST_SECONDS, LEAST_UPDATES = 1.5, 4
# Segments of bptt rows that the updates take turns on.
SEGMENTS = 6
TEST_ROWS = 128


class Pace(NamedTuple):
    """Seconds of a run's parts: an epoch's training, a validation, the test."""

    training: float
    validation: float
    test: float

    @property
    def epoch(self) -> float:
        """Seconds of an epoch, without the writing of files."""
        return self.training + self.validation

    def run(self, epochs: float) -> float:
        """Seconds of a run of that many epochs."""
        return epochs * self.epoch + self.test


def rehearse(trainer: Trainer, bptt: int, test_batch_size: int) -> Pace:
    """Make updates and evaluate pieces of text in memory; the trainer must not be used afterwards.

    The first update has the longest window that the scheme may draw, and the first evaluation a
    whole window, so that the process's peak memory is afterwards that of a run (except for the
    averaged weights, which come later).
    """
    trainer.model.train()
    trainer.tracker = Silence()  # callbacks log, also here
    rows, seconds = 0, 0.0
    for number, window in enumerate(_windows(trainer, bptt)):
        trainer.at.row = window.start
        for _ in range(3 if isinstance(trainer.updater, RecordedUpdater) else 1):
            start = time.perf_counter()
            trainer.update(window)
            trainer.tally.check()  # waits for the device
            took = time.perf_counter() - start
        if number >= 2:  # the first ones take memory that later ones find
            rows, seconds = rows + window.counted, seconds + took
        if number >= 1 + LEAST_UPDATES and seconds >= LEAST_SECONDS:
            break
    corpus, columns = trainer.corpus, trainer.options.eval_batch_size
    tokens = WINDOW_TOKENS_GPU if trainer.device.type == "cuda" else WINDOW_TOKENS
    per_read = max(1, tokens // columns)
    release_freed_memory()
    _evaluation_seconds(trainer, corpus.valid, columns, per_read)
    return Pace(
        training=trainer.num_steps * seconds / rows,
        validation=_evaluation_seconds(trainer, corpus.valid, columns, 2 * per_read),
        test=_evaluation_seconds(trainer, corpus.test, test_batch_size, TEST_ROWS),
    )


def _windows(trainer: Trainer, bptt: int) -> Iterator[Window]:
    """Windows of the beginning of the text, over and over, as training draws them."""
    longest = trainer.scheme.footprint(trainer.num_steps).rows
    steps = min(trainer.num_steps, SEGMENTS * bptt)
    yield from _lengthened(next(trainer.scheme.windows(steps)), longest, trainer.num_steps)
    while True:
        yield from trainer.undo.watch(trainer.scheme.windows(steps))


def _lengthened(window: Window, longest: int, num_steps: int) -> Iterator[Window]:
    if not window.pieces and not window.warmup and window.advance is None:
        yield replace(window, length=min(longest, num_steps))


def _evaluation_seconds(trainer: Trainer, ids: Tensor, columns: int, rows: int) -> float:
    """Seconds of an evaluation of a text, from its first rows."""
    piece = ids[: min(len(ids), rows * columns + 1)]
    start = time.perf_counter()
    evaluate(Plain(trainer.model), piece, columns)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    return (time.perf_counter() - start) * (len(ids) - 1) / (len(piece) - 1)
