"""The weights that are validated and saved: the current ones, or their average."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from data.corpus import Corpus
from engine.checkpoint import model_payload
from engine.checkpoint_writer import CheckpointWriter
from engine.run_folder import RunFolder
from evaluation.evaluate import evaluate
from evaluation.plain import Plain
from model import RNNModel
from training.state import Position


class EvaluatedModel:
    """Evaluates a model in training, and writes it to files.

    Args:
        model: the model.
        optimizer: its optimizer. If it has `averaged_weights`, a context manager, the average is
            evaluated and saved; see nt_asgd.
        corpus: validation text and vocabulary.
        folder: where the best model is.
        writer: writes the files.
    """

    def __init__(
        self,
        model: RNNModel,
        optimizer: torch.optim.Optimizer,
        corpus: Corpus,
        folder: RunFolder,
        writer: CheckpointWriter,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._corpus = corpus
        self._folder = folder
        self._writer = writer

    @property
    def averaged(self) -> bool:
        """True once the weights are averaged."""
        return getattr(self._optimizer, "num_averaged", 0) > 0

    def weights(self) -> AbstractContextManager[None]:
        """A context in which the model has the weights to evaluate: the average, if any."""
        lend = getattr(self._optimizer, "averaged_weights", nullcontext)
        context: AbstractContextManager[None] = lend()
        return context

    def valid_loss(self, columns: int, check: Callable[[], None]) -> float:
        """Mean loss of the validation text, nats per token.

        Args:
            columns: contiguous columns that the text is divided into.
            check: called between windows; what it raises ends the evaluation.
        """
        with self.weights():
            return evaluate(Plain(self._model), self._corpus.valid, columns, check=check)

    def save(self, at: Position, loss: float | None, suffix: str = "") -> None:
        """Write the best model's file, or one with a suffix to its name; the old one is kept."""
        path = self._folder.model_path
        path = path.with_name(path.name + suffix)
        details = dict(epoch=at.epoch, update=at.update, valid_loss=loss)
        with self.weights():
            payload = model_payload(self._model, self._corpus.vocabulary, **details)
            self._writer.write(path, payload, self._folder.kept_path(path))
