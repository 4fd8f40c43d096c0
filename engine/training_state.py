"""What training is told, and how far it has come."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from bptt import Scheme, Window
from engine.device import random_state, restore_random_state
from model import RNNModel


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What the training loop is told; the flags of these names say what each means."""

    epochs: int
    batch_size: int
    bptt: int
    clip: float
    alpha: float
    beta: float
    max_updates: int | None = None
    when: tuple[int, ...] = ()
    eval_batch_size: int = 10
    log_interval: int = 200
    diagnostics: int | None = None
    checkpoint_every: int | None = None
    checkpoint_minutes: float = 10.0


@dataclass
class Position:
    """How far a run has come: the plain values that an exact resume needs.

    epoch counts from 1; row, batch and epoch_seconds are those of the epoch; update, tokens,
    training_seconds and seconds are totals over all sessions of a run; interval_* belong to the
    logging interval under way, whose summed loss is in nats; grad_norm is the last update's.
    Losses are in nats per token.
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
    interval_skipped: int = 0
    interval_skipped_tokens: int = 0
    interval_seconds: float = 0.0
    epoch_seconds: float = 0.0
    training_seconds: float = 0.0
    seconds: float = 0.0
    best_loss: float = math.inf
    best_epoch: int | None = None

    def begin_epoch(self) -> None:
        """Go on to the next epoch."""
        self.epoch += 1
        self.row = self.batch = 0
        self.epoch_seconds = 0.0

    def begin_interval(self) -> None:
        """Start a new logging interval."""
        self.interval_tokens = self.interval_updates = 0
        self.interval_skipped = self.interval_skipped_tokens = 0
        self.interval_loss = self.interval_seconds = 0.0


class Undo:
    """Takes an update back that was given up before its step.

    Until then it has changed the position, the scheme's generator, torch's generators and the
    statistics of the gradient filters.

    Args:
        at: the position.
        scheme: which the windows are drawn from.
        model: whose device's generators are meant.
    """

    def __init__(self, at: Position, scheme: Scheme, model: RNNModel) -> None:
        self._at = at
        self._scheme = scheme
        self._filters = model.gradient_filters
        self._device = model.encoder.weight.device
        self._before: dict[str, Any] = {}

    def watch(self, windows: Iterator[Window]) -> Iterator[Window]:
        """The same windows; before each is drawn, all that an update changes is noted."""
        while True:
            self._before = dict(
                position=asdict(self._at),
                scheme=self._scheme.state_dict(),
                random=random_state(self._device),
                filters=[gate.statistics.clone() for gate in self._filters],
            )
            try:
                window = next(windows)
            except StopIteration:
                return
            yield window

    def restore(self) -> None:
        """Go back to where the last window was not drawn yet."""
        vars(self._at).update(self._before["position"])
        self._scheme.load_state_dict(self._before["scheme"])
        restore_random_state(self._before["random"], self._device)
        for gate, statistics in zip(self._filters, self._before["filters"], strict=True):
            gate.statistics.copy_(statistics)


class Stopwatch:
    """Deals the time that passes out to the counts of a Position."""

    def __init__(self, at: Position) -> None:
        self._at = at
        self._last = time.monotonic()

    def lap(self, training: bool = False) -> None:
        """Book the time since the last lap; training: it went into updates."""
        now = time.monotonic()
        passed, self._last = now - self._last, now
        self._at.seconds += passed
        self._at.epoch_seconds += passed
        if training:
            self._at.training_seconds += passed
            self._at.interval_seconds += passed
