"""What a run shows while it trains."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from bptt import Scheme
from engine.progress import Progress
from engine.report import RULE, duration, epoch_line, interval_line, short_epoch_line, short_number
from evaluation.evaluate import perplexity
from training.state import Position, TrainingOptions


class Display:
    """Shows a run's progress: the original's lines and, on a terminal, a bar and a line an epoch.

    In files stderr has a line per logging interval, and stdout the validation of each epoch between
    two rules. Where stderr is a terminal, a bar counts the epoch's updates instead, and where
    either is one, it gets one line an epoch.

    Args:
        at: the run's position.
        options: how long the run is.
        num_steps: rows of an epoch.
        scheme: divides them into updates.
    """

    def __init__(
        self, at: Position, options: TrainingOptions, num_steps: int, scheme: Scheme
    ) -> None:
        self._at = at
        self._options = options
        self._num_steps = num_steps
        self._expected_updates = scheme.expected_windows(num_steps)
        self._bar: Progress | None = None
        self._loss = math.nan  # of the last logging interval
        self._begin_seconds, self._begin_epochs = at.seconds, self._epochs_done()

    def begin(self) -> None:
        """Print where a session begins, if the run is resumed."""
        at, options = self._at, self._options
        self._begin_seconds, self._begin_epochs = at.seconds, self._epochs_done()
        if at.update == 0:
            return
        best = ""
        if at.best_epoch is not None:
            ppl = short_number(perplexity(at.best_loss))
            best = f" | best so far: epoch {at.best_epoch}, valid ppl {ppl}"
        line = f"| resumed in epoch {at.epoch} of {options.epochs}{best}"
        if at.epoch > options.epochs:
            line = f"| finished: {at.epoch - 1} epochs are done{best} | --epochs N prolongs the run"
        elif options.max_updates is not None and at.update >= options.max_updates:
            line = f"| finished: {at.update} updates are done{best} | --max-updates N prolongs it"
        print(line, file=sys.stderr, flush=True)

    @contextmanager
    def epoch(self) -> Iterator[None]:
        """Show the bar, until the epoch's validation is reported or training stops."""
        at = self._at
        total = max(at.batch, round(self._expected_updates))
        description = f"epoch {at.epoch}/{self._options.epochs}"
        with Progress(total, at.batch, description, "update", timed=False) as self._bar:
            yield

    def updated(self) -> None:
        """Count an update."""
        if self._bar is not None and self._bar.visible:
            ppl = "" if math.isnan(self._loss) else f"ppl {short_number(perplexity(self._loss))}"
            self._bar.update(note=", ".join(filter(None, [ppl, self._left()])))

    def interval(self, loss: float, lr: float, remarks: str) -> None:
        """Report a logging interval: its mean loss, the rate, and the callbacks' remarks."""
        at, self._loss = self._at, loss
        line = interval_line(
            epoch=at.epoch,
            batch=at.batch,
            batches=max(at.batch, round(self._expected_updates)),
            lr=lr,
            milliseconds=1000 * at.interval_seconds / at.interval_updates,
            loss=loss,
        )
        if self._bar is not None:
            self._bar.report(line + remarks)

    def validated(self, loss: float, lr: float, best: bool) -> None:
        """Report a validation; the bar makes room for its line.

        Args:
            loss: validation loss.
            lr: learning rate.
            best: it is the run's best.
        """
        if self._bar is not None:
            self._bar.close()
        at = self._at
        whole = at.row == self._num_steps
        width = len(str(self._options.epochs))
        short = short_epoch_line(
            place=f"{'' if whole else 'within '}epoch {at.epoch:{width}}/{self._options.epochs}",
            train_loss=at.epoch_mean,
            loss=loss,
            best=best,
            seconds=at.epoch_seconds,
            lr=lr,
            left=self._left(),
        )
        if sys.stdout.isatty():
            print(short, flush=True)
            return
        line = epoch_line(epoch=at.epoch, seconds=at.epoch_seconds, loss=loss, whole=whole)
        print(RULE, line, RULE, sep="\n", flush=True)
        if sys.stderr.isatty():
            print(short, file=sys.stderr, flush=True)

    def _epochs_done(self) -> float:
        return self._at.epoch - 1 + self._at.row / self._num_steps

    def _left(self) -> str:
        """The time that the run will still take, at this session's speed; empty if unknown."""
        at, options = self._at, self._options
        done = self._epochs_done()
        left = options.epochs - done
        if options.max_updates is not None:
            left = min(left, (options.max_updates - at.update) / self._expected_updates)
        if done <= self._begin_epochs or left <= 0:
            return ""
        pace = (at.seconds - self._begin_seconds) / (done - self._begin_epochs)
        return f"{duration(left * pace)} left"
