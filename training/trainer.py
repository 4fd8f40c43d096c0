"""The training loop."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from bptt import Scheme, Window
from data.corpus import Corpus
from engine.checkpoint import training_payload
from engine.checkpoint_writer import CheckpointWriter
from engine.errors import DivergenceError
from engine.interrupt import Interrupt, StopRequested
from engine.ranks import Ranks
from engine.run_folder import RunFolder
from engine.tracking import Tracker, warn
from evaluation.evaluate import perplexity
from model import RNNModel, repackage_hidden
from training.callback import Callback, EpochEnd, StepEnd, UpdateEnd, UpdateStart
from training.display import Display
from training.divergence import divergence
from training.evaluated_model import EvaluatedModel
from training.recorded import RecordedUpdater
from training.requests import Requests
from training.state import Position, Stopwatch, TrainingOptions, Undo
from training.tally import Tally
from training.update import Updater


class Trainer:
    """Trains a model, validates it every epoch and keeps the best one.

    Args:
        model: the model, on the training device.
        optimizer: optimizer of the model's parameters.
        scheme: which tokens each update sees.
        corpus: texts and vocabulary.
        updater: makes the updates, from this process's columns of the training text.
        generator: the run's random generator, on the model's device; updates draw from no other.
        options: see TrainingOptions.
        folder: holds the best model and the checkpoints.
        interrupt: records requests to stop.
        identity: plain values that checkpoints store for the caller.
        callbacks: called in this order; see training.callback.
        ranks: the processes that share the batch's columns, each with a trainer; None: one process.
    """

    def __init__(
        self,
        model: RNNModel,
        optimizer: torch.optim.Optimizer,
        scheme: Scheme,
        corpus: Corpus,
        updater: Updater | RecordedUpdater,
        generator: torch.Generator,
        options: TrainingOptions,
        folder: RunFolder,
        interrupt: Interrupt,
        identity: dict[str, Any],
        callbacks: Sequence[Callback] = (),
        ranks: Ranks | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scheme = scheme
        self.corpus = corpus
        self.updater = updater
        self.generator = generator
        self.options = options
        self.folder = folder
        self.interrupt = interrupt
        self.tracker: Tracker  # given to train
        self.identity = identity
        self.callbacks = callbacks
        self.ranks = ranks = ranks or Ranks()
        self.device = model.encoder.weight.device
        self.num_steps = len(corpus.train) // options.batch_size - 1
        self.hidden = model.init_hidden(options.batch_size // ranks.size)
        self.at = at = Position()
        self.tally = Tally(self.device, at, self._end_step, self._describe_divergence)
        self.undo = Undo(at, [scheme, *callbacks], optimizer, generator)
        self.writer = writer = CheckpointWriter(background=self.device.type == "cuda")
        self.requests = requests = Requests(interrupt, options, ranks)
        self.evaluated = EvaluatedModel(model, optimizer, corpus, folder, writer, requests, at)
        self.display = Display(at, options, self.num_steps, scheme)
        self._stopwatch = Stopwatch(at)

    def train(self, tracker: Tracker) -> str:
        """Train until the epochs or updates are done or a stop is requested.

        Args:
            tracker: logs the metrics.

        Returns:
            Why training ended: "epochs", "updates", "interrupted" or a callback's stop_reason.

        Raises:
            DivergenceError: a loss or norm is not finite; the files are unchanged.
            WriteError: a checkpoint could not be written.
        """
        self.tracker = tracker
        self._stopwatch = Stopwatch(self.at)
        self.requests.checkpoint_written()
        self.display.begin()
        with self.writer:
            while self.at.epoch <= self.options.epochs:
                self.requests.share()
                try:
                    with self.display.epoch():
                        whole = self.at.row == self.num_steps  # only its validation is left
                        reason = None if whole else self.stop_reason() or self.train_epoch()
                        if reason is None:
                            self.end_epoch()
                except StopRequested:
                    reason = "interrupted"
                if reason is not None:
                    self.stop_early(reason)
                    return reason
        return "epochs"

    def train_epoch(self) -> str | None:
        """Make the (remaining) updates of an epoch.

        Returns:
            Why training stops within the epoch; None at its end.
        """
        self.model.train()
        for window in self.undo.watch(self.scheme.windows(self.num_steps, self.at.row)):
            self.update(window)
            self.display.updated()
            if self.at.batch % self.options.log_interval == 0 or self.at.row == self.num_steps:
                self.log_interval()
            if self.at.row == self.num_steps:
                break
            self.requests.share(self.at.update)
            if reason := self.stop_reason():
                return reason
            if self.requests.checkpoint:
                self.checkpoint()
        return None

    def update(self, window: Window) -> None:
        """Update the weights once, from one window of text.

        Raises:
            StopRequested: the update was abandoned and undone.
        """
        at, tokens = self.at, window.counted * self.options.batch_size
        progress = (at.epoch - 1 + at.row / self.num_steps) / self.options.epochs
        for callback in self.callbacks:
            callback.update_begins(UpdateStart(at.update + 1, progress, self.optimizer))
        at.advance(window.counted, tokens)
        looking = [c for c in self.callbacks if c.wants_gradients(at.update)]
        with self.undo.if_stopped():
            outcome = self.updater(window, self.hidden, bool(looking), self.requests.check)
        self.hidden = outcome.hidden
        self.tally.add(at.update, outcome, tokens)
        if self.updater.step.synchronizes:
            self.tally.check()
        self._stopwatch.lap(training=True)
        if looking:
            self.tally.check()
            if self.tally.skipped != at.update:
                end = UpdateEnd(at.update, at.epoch, self.tally.grad_norm, self._log)
                for callback in looking:
                    callback.update_ended(end)
            self._stopwatch.lap()  # callbacks do not count as training time

    def log_interval(self) -> None:
        """Report the updates since the last report."""
        self.tally.check()
        at, lr = self.at, self.optimizer.param_groups[0]["lr"]
        summed, counted = float(self.tally.summed), at.interval_tokens - at.interval_skipped_tokens
        loss = summed / counted if counted else math.nan
        self._stopwatch.lap(training=True)
        self.display.interval(loss, lr, "".join(callback.remark() for callback in self.callbacks))
        found = dict(loss=loss, ppl=perplexity(loss), lr=lr, grad_norm=float(self.tally.grad_norm))
        speed = at.interval_tokens / max(at.interval_seconds, 1e-9)
        found.update(tokens_per_second=speed, seconds=at.seconds)
        for callback in self.callbacks:
            found.update(callback.figures())
        self._log("train", epoch=at.epoch, **found)
        self.tally.summed.zero_()
        at.end_interval(summed, counted)

    def end_epoch(self) -> None:
        """Validate, keep the best model, let the callbacks act, checkpoint."""
        epoch, loss = self.at.epoch, self.validate()
        save_copy = partial(self.evaluated.save, loss)
        for callback in self.callbacks:
            callback.epoch_ended(EpochEnd(epoch, loss, self.optimizer, save_copy, self._log))
        self.hidden = self.model.init_hidden(self.options.batch_size // self.ranks.size)
        self.at.begin_epoch()
        self.checkpoint()

    def validate(self) -> float:
        """Validation loss of the weights, nats per token; reports it, and keeps the best weights.

        Raises:
            StopRequested: a stop was requested meanwhile; nothing has changed.
            DivergenceError: the loss is not finite.
        """
        self.tally.check()
        at, loss = self.at, self.evaluated.valid_loss(self.options.eval_batch_size)
        self._stopwatch.lap()
        if not math.isfinite(loss):
            what = f"validation loss is {loss}"
            raise DivergenceError(self._describe_divergence(what, at.update))
        best, before, lr = loss < at.best_loss, at.diverged, self.optimizer.param_groups[0]["lr"]
        self.display.validated(loss, lr, best)
        words, early, whole = len(self.corpus.vocabulary), at.epoch == 1, at.row == self.num_steps
        reason = divergence("validation", loss, words, early and not whole)
        at.diverged = reason or divergence("training", at.epoch_mean, words, early)
        if at.diverged and not before:
            warn(f"epoch {at.epoch} has diverged: {at.diverged}")
        figures = dict(loss=loss, ppl=perplexity(loss), averaged=self.evaluated.averaged)
        self._log("valid", epoch=at.epoch, **figures, seconds=at.seconds)
        if best:
            self.evaluated.save(loss)
            at.best_loss, at.best_epoch = loss, at.epoch
        return loss

    def _log(self, event: str, **values: Any) -> None:
        self.tracker.log(event, **{"step": self.at.update, **values})

    def _end_step(self, update: int, overflow: bool, largest: float | None) -> None:
        self.updater.step.note(overflow)
        for callback in self.callbacks:
            callback.step_ended(StepEnd(update, overflow, largest, self._log))

    def _describe_divergence(self, what: str, update: int) -> str:
        lr = self.optimizer.param_groups[0]["lr"]
        return f"{what} at update {update} (epoch {self.at.epoch}, lr {lr:g}): training stopped"

    def stop_reason(self) -> str | None:
        """Why training shall stop now; None: it continues."""
        if self.requests.stop:
            return "interrupted"
        if self.options.max_updates is not None and self.at.update >= self.options.max_updates:
            return "updates"
        return next(filter(None, (callback.stop_reason() for callback in self.callbacks)), None)

    def stop_early(self, reason: str) -> None:
        """Write a checkpoint, then make sure that a best model exists.

        A resumed run repeats all that comes after the checkpoint.
        """
        self.checkpoint()
        if reason == "updates" and self.at.row > 0:
            with suppress(StopRequested):
                self.validate()
        if self.at.best_epoch is None and not self.interrupt.terminated:
            self.evaluated.save(None)

    def checkpoint(self) -> None:
        """Write the state that an exact resume needs."""
        self.tally.check()
        self._stopwatch.lap()
        state = self.state_dict()
        if self.ranks.leader:
            path = self.folder.last_path
            self.writer.write(path, training_payload(state), self.folder.kept_path(path))
        self.requests.checkpoint_written()
        self._stopwatch.lap()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values for load_state_dict."""
        self.tally.store()
        return dict(
            self.identity,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scheme=self.scheme.state_dict(),
            hidden=self.ranks.gather_hidden(repackage_hidden(self.hidden)),
            position=asdict(self.at),
            callbacks={c.name: c.state_dict() for c in self.callbacks if c.name},
            random=dict(device=self.device.type, state=self.generator.get_state()),
            tracking=self.tracker.state_dict(),
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what state_dict returned; the caller resumes the tracker."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheme.load_state_dict(state["scheme"])
        hidden = self.ranks.share_hidden(state["hidden"])
        self.hidden = [tuple(part.to(self.device) for part in parts) for parts in hidden]
        for callback in self.callbacks:
            if callback.name:
                callback.load_state_dict(state["callbacks"][callback.name])
        self.updater.step.restore()
        vars(self.at).update(vars(Position(**state["position"])))
        self.tally.restore()
        if state["random"]["device"] == self.device.type:  # else another kind of generator
            self.generator.set_state(state["random"]["state"])
