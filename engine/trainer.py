"""The training loop."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from bptt import Scheme, Window
from data.corpus import Corpus, batchify
from engine.checkpoint import model_payload, training_payload
from engine.checkpoint_writer import CheckpointWriter
from engine.device import random_state, restore_random_state
from engine.errors import DivergenceError
from engine.fused_update import make_updater
from engine.graphs import Recorder
from engine.interrupt import Interrupt, StopRequested
from engine.loss_scale import LossScale
from engine.ranks import Ranks
from engine.report import RULE, epoch_line, interval_line
from engine.run_folder import RunFolder
from engine.tally import Tally
from engine.tracking import Progress, Tracker
from engine.training_state import Position, Stopwatch, TrainingOptions, Undo
from evaluation.plain import evaluate, perplexity
from model import RNNModel, repackage_hidden
from nt_asgd import NTASGD


class Trainer:
    """Trains a model, validates it every epoch and keeps the best one.

    Args:
        model: on the device to train on.
        optimizer: over the model's parameters; an NTASGD is told the validation losses.
        scheme: which tokens each update sees.
        corpus: texts and vocabulary; batchify's columns of the training text are kept on the
            model's device.
        options: see TrainingOptions.
        folder: where the best model and the checkpoints go.
        interrupt: asks for an early end.
        identity: plain values that a checkpoint carries along for the caller.
        loss_scale: for gradients in float16; None: the loss is not scaled.
        probe: looks at the model every options.diagnostics updates, given the gradient's norm
            before clipping; what it returns is logged.
        ranks: the processes that share the batch's columns, all of which have to train; only the
            leader writes to the folder. None: there is one.
        recorder: records updates on a GPU that are then replayed, where the model's kernel is
            cuDNN's and the optimizer an NTASGD; None: each is launched kernel by kernel.

    Raises:
        ValueError: the training text is too short for the batch.
    """

    def __init__(
        self,
        model: RNNModel,
        optimizer: torch.optim.Optimizer,
        scheme: Scheme,
        corpus: Corpus,
        options: TrainingOptions,
        folder: RunFolder,
        interrupt: Interrupt,
        identity: dict[str, Any],
        loss_scale: LossScale | None = None,
        probe: Callable[[RNNModel, Tensor], dict[str, float]] | None = None,
        ranks: Ranks | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scheme = scheme
        self.corpus = corpus
        self.options = options
        self.folder = folder
        self.interrupt = interrupt
        self.tracker: Tracker  # given to train
        self.identity = identity
        self.loss_scale = loss_scale
        self.probe = probe
        self.ranks = ranks = ranks or Ranks()
        if ranks.size > 1:
            for gate in model.gradient_filters:
                gate.gather = lambda norms: ranks.gather(norms, 0)
        self.device = model.encoder.weight.device
        rows = batchify(corpus.train, options.batch_size)  # (N // B, B)
        self.rows = rows[:, ranks.share(options.batch_size)].to(self.device)
        self.num_steps = len(self.rows) - 1
        self.hidden = model.init_hidden(self.rows.size(1))
        self.at = Position()
        self.updater = make_updater(
            model,
            self.rows,
            optimizer,
            recorder,
            bptt=options.bptt,
            clip=options.clip,
            alpha=options.alpha,
            beta=options.beta,
            loss_scale=loss_scale,
            ranks=ranks,
            check=self.check,
        )
        self.undo = Undo(self.at, scheme, model)
        self.tally = Tally(
            self.device,
            self.at,
            loss_scale,
            self.updater.settle,
            lambda event, **values: self.tracker.log(event, **values),
            self._describe_divergence,
        )
        self.writer = CheckpointWriter(background=self.device.type == "cuda")
        self.stop_requested = self.checkpoint_due = False
        self._stopwatch = Stopwatch(self.at)
        self._last_checkpoint = time.monotonic()

    # The loop

    def train(self, tracker: Tracker) -> str:
        """Train until the epochs or updates are done or an early end is asked for.

        Args:
            tracker: where the numbers go.

        Returns:
            "epochs", "updates" or "interrupted".

        Raises:
            DivergenceError: something is not finite any more; the files stay as they were.
            CheckpointError: a checkpoint could not be written.
        """
        self.tracker = tracker
        self._stopwatch = Stopwatch(self.at)
        self._last_checkpoint = time.monotonic()
        with self.writer:
            while self.at.epoch <= self.options.epochs:
                self.share_requests()
                try:
                    whole = self.at.row == self.num_steps  # its validation was given up
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
        """The updates of an epoch, or what is left of them.

        Returns:
            Why it was left in the middle; None at its end.
        """
        self.model.train()
        description = f"epoch {self.at.epoch}"
        with Progress(self.num_steps, initial=self.at.row, description=description) as progress:
            for window in self.undo.watch(self.scheme.windows(self.num_steps, self.at.row)):
                self.update(window)
                progress.update(window.counted)
                if self.is_logged(self.at.batch):
                    self.log_interval(progress)
                if self.at.row == self.num_steps:
                    break
                self.share_requests()
                if reason := self.stop_reason():
                    return reason
                if self.checkpoint_due:
                    self.checkpoint()
        return None

    def update(self, window: Window) -> None:
        """One update of the weights from one window of text.

        Raises:
            StopRequested: it was given up, and nothing has changed.
        """
        tokens = window.counted * self.options.batch_size
        self.at.batch += 1
        self.at.update += 1
        self.at.row += window.counted

        probed = self.is_probed(self.at.update)
        wanted = probed or self.is_logged(self.at.batch)
        try:
            step = self.updater(window, self.hidden, wanted, probed)
        except StopRequested:
            self.undo.restore()
            raise
        self.hidden = step.hidden
        self.tally.add(self.at.update, step, tokens)
        if self.updater.waits:
            self.tally.check()
        self.at.tokens += tokens
        self.at.interval_tokens += tokens
        self.at.interval_updates += 1
        self._stopwatch.lap(training=True)
        if probed:
            self.log_probe()

    # Around the loop

    def is_probed(self, update: int) -> bool:
        """This update is one that the probe looks at."""
        every = self.options.diagnostics
        return self.probe is not None and every is not None and update % every == 0

    def log_probe(self) -> None:
        """Log what the probe finds, unless the update was skipped; its time is not training's."""
        assert self.probe is not None
        self.tally.check()
        if self.tally.skipped == self.at.update:
            return
        figures = self.probe(self.model, self.tally.grad_norm)
        self.tracker.log("diagnostics", step=self.at.update, epoch=self.at.epoch, **figures)
        self._stopwatch.lap()

    def is_logged(self, batch: int) -> bool:
        """This update, the epoch's batch-th, ends a logging interval."""
        return batch % self.options.log_interval == 0 or self.at.row == self.num_steps

    def log_interval(self, progress: Progress) -> None:
        """Report the updates since the last report."""
        self.tally.check()
        at, lr = self.at, self.optimizer.param_groups[0]["lr"]
        counted = at.interval_tokens - at.interval_skipped_tokens
        loss = float(self.tally.summed) / counted if counted else math.nan
        self._stopwatch.lap(training=True)
        line = interval_line(
            epoch=at.epoch,
            batch=at.batch,
            batches=max(at.batch, round(self.scheme.expected_windows(self.num_steps))),
            lr=lr,
            milliseconds=1000 * at.interval_seconds / at.interval_updates,
            loss=loss,
        )
        acting: dict[str, float] = {}
        if self.loss_scale:
            acting.update(loss_scale=self.loss_scale.value, overflows=at.interval_skipped)
            line += f" | loss scale {self.loss_scale.value:g}, {at.interval_skipped} skipped"
        progress.report(line, loss=f"{loss:.2f}", ppl=f"{perplexity(loss):.2f}")
        for layer, gate in enumerate(self.model.gradient_filters):
            for what, value in gate.summary().items():
                acting[f"grad_filter_{what}_l{layer}"] = value
        self.tracker.log(
            "train",
            step=at.update,
            epoch=at.epoch,
            loss=loss,
            ppl=perplexity(loss),
            lr=lr,
            grad_norm=float(self.tally.grad_norm),
            tokens_per_second=at.interval_tokens / max(at.interval_seconds, 1e-9),
            **acting,
        )
        for gate in self.model.gradient_filters:
            gate.reset_statistics()
        self.tally.summed.zero_()
        at.begin_interval()

    def end_epoch(self) -> None:
        """Validate, keep the best model, let NT-ASGD and --when act, checkpoint."""
        epoch = self.at.epoch
        loss = self.validate()
        if loss < self.at.best_loss:
            self.save_best(loss)
        if isinstance(self.optimizer, NTASGD) and self.optimizer.observe(loss):
            print("Switching to ASGD", flush=True)
            self.tracker.log("averaging", step=self.at.update, epoch=epoch)
        if epoch in self.options.when:
            print("Saving model before learning rate decreased", flush=True)
            path = self.folder.model_path
            self.save_model(path.with_name(f"{path.name}.e{epoch}"), loss)
            for group in self.optimizer.param_groups:
                group["lr"] /= 10
        self.hidden = self.model.init_hidden(self.rows.size(1))
        self.at.begin_epoch()
        self.checkpoint()

    def validate(self) -> float:
        """Measure the weights as they would be saved, print and log it; nats per token.

        Raises:
            StopRequested: it was given up, and nothing has changed.
        """
        self.tally.check()
        with self.evaluated_weights():
            loss = self.ranks.from_leader(self._evaluate() if self.ranks.leader else 0.0)
        self._stopwatch.lap()
        if loss < 0:
            self.share_requests()
            raise StopRequested
        if not math.isfinite(loss):
            what = f"validation loss is {loss}"
            raise DivergenceError(self._describe_divergence(what, self.at.update))
        print(RULE)
        at = self.at
        whole = at.row == self.num_steps
        print(epoch_line(epoch=at.epoch, seconds=at.epoch_seconds, loss=loss, whole=whole))
        print(RULE, flush=True)
        self.tracker.log(
            "valid",
            step=self.at.update,
            epoch=self.at.epoch,
            loss=loss,
            ppl=perplexity(loss),
            averaged=isinstance(self.optimizer, NTASGD) and self.optimizer.num_averaged > 0,
        )
        return loss

    def _evaluate(self) -> float:
        """The validation loss; below 0, where a stop was asked for meanwhile."""
        valid, batch_size = self.corpus.valid, self.options.eval_batch_size
        try:
            return evaluate(self.model, valid, batch_size, check=self.interrupt.check)
        except StopRequested:
            return -1.0

    def evaluated_weights(self) -> AbstractContextManager[None]:
        """A context in which the model has the weights that count: the average if there is one."""
        if isinstance(self.optimizer, NTASGD):
            return self.optimizer.averaged_weights()
        return nullcontext()

    def save_best(self, loss: float) -> None:
        """Keep these weights as the best so far."""
        self.save_model(self.folder.model_path, loss)
        self.at.best_loss = loss
        self.at.best_epoch = self.at.epoch

    def save_model(self, path: Any, loss: float | None) -> None:
        """Write the weights that count to path."""
        if not self.ranks.leader:
            return
        details = dict(epoch=self.at.epoch, update=self.at.update, valid_loss=loss)
        with self.evaluated_weights():
            payload = model_payload(self.model, self.corpus.vocabulary, **details)
            self.writer.write(path, payload, self.folder.kept_path(path))

    def share_requests(self) -> None:
        """Tell all processes that one is asked for an early end, or that its checkpoint is due.

        What comes in afterwards waits for the next time, so that all do the same. A checkpoint is
        due every so many updates and every so many minutes.
        """
        every, minutes = self.options.checkpoint_every, self.options.checkpoint_minutes
        waited = time.monotonic() - self._last_checkpoint
        due = (every and self.at.update % every == 0) or waited >= 60 * minutes
        asked = self.interrupt.requested, self.interrupt.terminated
        stop, terminate, checkpoint = self.ranks.largest(*asked, bool(due))
        self.stop_requested, self.checkpoint_due = bool(stop), bool(checkpoint)
        self.interrupt.requested |= bool(stop)
        self.interrupt.terminated |= bool(terminate)

    def check(self) -> None:
        """Raise StopRequested in all processes where one is asked for an early end."""
        self.share_requests()
        if self.stop_requested:
            raise StopRequested

    def stop_reason(self) -> str | None:
        """Why training should end here, if it should; see share_requests."""
        if self.stop_requested:
            return "interrupted"
        if self.options.max_updates is not None and self.at.update >= self.options.max_updates:
            return "updates"
        return None

    def stop_early(self, reason: str) -> None:
        """Checkpoint, and see to it that there is a best model to test.

        What is done after the checkpoint is not part of the run that may be resumed from it.
        """
        self.checkpoint()
        if reason == "updates" and self.at.row > 0:
            with suppress(StopRequested):
                loss = self.validate()
                if loss < self.at.best_loss:
                    self.save_best(loss)
        if self.at.best_epoch is None and not self.interrupt.terminated:
            self.save_model(self.folder.model_path, None)

    # Checkpoints

    def checkpoint(self) -> None:
        """Write all that an exact resume needs."""
        self.tally.check()
        self._stopwatch.lap()
        state = self.state_dict()
        if self.ranks.leader:
            path = self.folder.last_path
            self.writer.write(path, training_payload(state), self.folder.kept_path(path))
        self._last_checkpoint = time.monotonic()
        self._stopwatch.lap()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values from which load_state_dict continues."""
        self.at.interval_loss = float(self.tally.summed)
        self.at.grad_norm = float(self.tally.grad_norm)
        return dict(
            self.identity,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scheme=self.scheme.state_dict(),
            hidden=self.ranks.gather_hidden(repackage_hidden(self.hidden)),
            position=asdict(self.at),
            loss_scale=self.loss_scale.state_dict() if self.loss_scale else {},
            filters=[gate.statistics.clone() for gate in self.model.gradient_filters],
            random=random_state(self.device),
            tracking=self.tracker.state_dict(),
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what state_dict returned; the tracker is resumed by its maker."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheme.load_state_dict(state["scheme"])
        hidden = self.ranks.share_hidden(state["hidden"])
        self.hidden = [(h.to(self.device), c.to(self.device)) for h, c in hidden]
        for gate, statistics in zip(self.model.gradient_filters, state["filters"], strict=True):
            gate.statistics.copy_(statistics)
        if self.loss_scale:
            self.loss_scale.load_state_dict(state["loss_scale"])
        self.updater.restore()
        vars(self.at).update(vars(Position(**state["position"])))
        self.tally.summed.fill_(self.at.interval_loss)
        self.tally.grad_norm = torch.full_like(self.tally.grad_norm, self.at.grad_norm)
        restore_random_state(state["random"], self.device)

    def _describe_divergence(self, what: str, update: int) -> str:
        lr = self.optimizer.param_groups[0]["lr"]
        return f"{what} at update {update} (epoch {self.at.epoch}, lr {lr:g}): training stopped"
