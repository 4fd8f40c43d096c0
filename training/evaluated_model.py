"""The weights that are validated and saved: the current ones, or their average."""

from contextlib import AbstractContextManager, nullcontext, suppress

import torch

from data.corpus import Corpus
from engine.checkpoint import model_payload
from engine.checkpoint_writer import CheckpointWriter
from engine.device import release_freed_memory
from engine.interrupt import StopRequested
from engine.run_folder import RunFolder
from evaluation.evaluate import evaluate
from evaluation.plain import Plain
from model import RNNModel
from training.requests import Requests
from training.state import Position


class EvaluatedModel:
    """Evaluates a model in training, and writes it to files. Only the leader does either.

    Args:
        model: the model.
        optimizer: its optimizer. If it has `averaged_weights`, a context manager, the average is
            evaluated and saved; see nt_asgd.
        corpus: validation text and vocabulary.
        folder: where the best model is.
        writer: writes the files.
        requests: requests to stop, and the processes of the run.
        at: the run's position.
    """

    def __init__(
        self,
        model: RNNModel,
        optimizer: torch.optim.Optimizer,
        corpus: Corpus,
        folder: RunFolder,
        writer: CheckpointWriter,
        requests: Requests,
        at: Position,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._corpus = corpus
        self._folder = folder
        self._writer = writer
        self._requests = requests
        self._at = at

    @property
    def averaged(self) -> bool:
        """True once the weights are averaged."""
        return getattr(self._optimizer, "num_averaged", 0) > 0

    def _weights(self) -> AbstractContextManager[None]:
        """A context in which the model has the weights to evaluate: the average, if any."""
        lend = getattr(self._optimizer, "averaged_weights", nullcontext)
        context: AbstractContextManager[None] = lend()
        return context

    def valid_loss(self, columns: int) -> float:
        """Mean loss of the validation text, nats per token, in all processes.

        Args:
            columns: contiguous columns that the text is divided into.

        Raises:
            StopRequested: a stop was requested meanwhile.
        """
        requests, loss = self._requests, -1.0
        if requests.ranks.leader:
            with suppress(StopRequested), self._weights():
                text, check = self._corpus.valid, requests.interrupt.check
                release_freed_memory()
                loss = evaluate(Plain(self._model), text, columns, check=check)
                release_freed_memory()
        loss = requests.ranks.from_leader(loss)
        if loss < 0:
            requests.share()
            raise StopRequested
        return loss

    def save(self, loss: float | None, suffix: str = "") -> None:
        """Write the best model's file, or one with a suffix to its name; the old one is kept.

        Args:
            loss: validation loss of the weights; None: unknown.
        """
        if not self._requests.ranks.leader:
            return
        path = self._folder.model_path
        path = path.with_name(path.name + suffix)
        details = dict(epoch=self._at.epoch, update=self._at.update, valid_loss=loss)
        with self._weights():
            payload = model_payload(self._model, self._corpus.vocabulary, **details)
            self._writer.write(path, payload, self._folder.kept_path(path))
