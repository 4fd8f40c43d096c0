"""Options and progress of training."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bptt import Scheme, Window
from engine.interrupt import StopRequested
from training.callback import Callback


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options of the training loop; main.py's flags of the same names explain them."""

    epochs: int
    batch_size: int
    max_updates: int | None = None
    eval_batch_size: int = 10
    log_interval: int = 200
    checkpoint_every: int | None = None
    checkpoint_minutes: float = 10.0


@dataclass
class Position:
    """A run's progress: the plain values that an exact resume needs.

    epoch counts from 1 (0: a validation before training); row, batch and epoch_seconds count
    within the epoch; update, tokens, training_seconds, seconds and overflows (updates skipped) are
    totals over all sessions of a run; interval_* count within the current logging interval, and
    interval_loss is a sum in nats; grad_norm is the last update's; epoch_loss is the summed loss,
    in nats, of the epoch_tokens tokens in the epoch's finished intervals; best_loss is in nats per
    token; diverged says why the last validation or its epoch counts as diverged, see
    training.divergence.
    """

    epoch: int = 1
    row: int = 0
    batch: int = 0
    update: int = 0
    tokens: int = 0
    interval_loss: float = 0.0
    grad_norm: float = 0.0
    interval_tokens: int = 0
    interval_updates: int = 0
    interval_skipped_tokens: int = 0
    interval_seconds: float = 0.0
    epoch_seconds: float = 0.0
    epoch_loss: float = 0.0
    epoch_tokens: int = 0
    training_seconds: float = 0.0
    seconds: float = 0.0
    overflows: int = 0
    overflows_in_a_row: int = 0
    best_loss: float = math.inf
    best_epoch: int | None = None
    diverged: str = ""

    @property
    def epoch_mean(self) -> float:
        """Mean training loss of the epoch's finished intervals; nan if there are none."""
        return self.epoch_loss / self.epoch_tokens if self.epoch_tokens else math.nan

    def advance(self, rows: int, tokens: int) -> None:
        """Count an update of this many rows and tokens."""
        self.batch += 1
        self.update += 1
        self.row += rows
        self.tokens += tokens
        self.interval_tokens += tokens
        self.interval_updates += 1

    def begin_validated(self, rows: int) -> None:
        """Start with epoch 0, all of whose rows are done: only the validation is left of it."""
        self.epoch, self.row = 0, rows

    def begin_epoch(self) -> None:
        """Start the next epoch."""
        self.epoch += 1
        self.row = self.batch = 0
        self.epoch_seconds = self.epoch_loss = 0.0
        self.epoch_tokens = 0

    def end_interval(self, loss: float, tokens: int) -> None:
        """End a logging interval of this summed loss, in nats, and start the next one."""
        self.epoch_loss += loss
        self.epoch_tokens += tokens
        self.interval_tokens = self.interval_updates = 0
        self.interval_skipped_tokens = 0
        self.interval_loss = self.interval_seconds = 0.0


class Undo:
    """Undoes an update that was abandoned before its step, because a stop was requested.

    Args:
        at: the position.
        parts: other objects that an update changes before its step.
        optimizer: its learning rates may be changed by callbacks.
        generator: the run's random generator.
    """

    def __init__(
        self,
        at: Position,
        parts: Sequence[Scheme | Callback],
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
    ) -> None:
        self._at = at
        self._parts = parts
        self._optimizer = optimizer
        self._generator = generator
        self._before: tuple[dict[str, Any], list[dict[str, Any]], list[float], Tensor]

    def watch(self, windows: Iterator[Window]) -> Iterator[Window]:
        """Yield the same windows; before each is drawn, copy the state to return to."""
        while True:
            states = [part.state_dict() for part in self._parts]
            rates = [group["lr"] for group in self._optimizer.param_groups]
            self._before = (asdict(self._at), states, rates, self._generator.get_state())
            try:
                window = next(windows)
            except StopIteration:
                return
            yield window

    @contextmanager
    def if_stopped(self) -> Iterator[None]:
        """On StopRequested return to the state from before the last window was drawn."""
        try:
            yield
        except StopRequested:
            self._restore()
            raise

    def _restore(self) -> None:
        position, states, rates, generator = self._before
        vars(self._at).update(position)
        for part, state in zip(self._parts, states, strict=True):
            part.load_state_dict(state)
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._generator.set_state(generator)


class Stopwatch:
    """Adds the time that passes to the counters of a Position, in seconds."""

    def __init__(self, at: Position) -> None:
        self._at = at
        self._last = time.monotonic()

    def lap(self, training: bool = False) -> None:
        """Add the time since the last lap; training: also to the time of updates."""
        now = time.monotonic()
        passed, self._last = now - self._last, now
        self._at.seconds += passed
        self._at.epoch_seconds += passed
        if training:
            self._at.training_seconds += passed
            self._at.interval_seconds += passed
