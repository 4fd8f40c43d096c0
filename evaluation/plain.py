"""Prediction by the model alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from evaluation.predictor import Prediction, Predictor
from model import RNNModel
from noise import Noise


class Plain(Predictor):
    """The model's own distribution.

    Args:
        model: its mode, training or evaluation, is restored after each read.
        masks: seed of dropout masks that stay the same for the whole text; None: no dropout.
    """

    def __init__(self, model: RNNModel, masks: int | None = None) -> None:
        self.model = model
        self.masks = masks
        self.device = model.encoder.weight.device

    def start(self, columns: int) -> None:
        """See Predictor."""
        self._hidden = self.model.init_hidden(columns)

    @torch.no_grad()
    def read(self, words: Tensor) -> Prediction:
        """See Predictor."""
        noise = same_masks(self.model, self.masks)
        with mode(self.model, training=noise is not None):
            outputs, self._hidden = self.model(words, self._hidden, noise=noise)
        return _Decoded(self.model, outputs, noise)


class _Decoded(Prediction):
    def __init__(self, model: RNNModel, outputs: Tensor, noise: Noise | None) -> None:
        super().__init__(outputs, model.ntoken)
        self._model = model
        self._noise = noise

    @torch.no_grad()
    def log_probs(self, places: slice) -> Tensor:
        with mode(self._model, training=self._noise is not None):
            return log_probs(self._model.decoder(self.outputs[places], self._noise))


def log_probs(logits: Tensor) -> Tensor:
    """Log-probabilities, float32 or wider."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def same_masks(model: RNNModel, seed: int | None) -> Noise | None:
    """Noise that draws the same masks in each window of a text; None without a seed."""
    if seed is None:
        return None
    return Noise(torch.Generator(model.encoder.weight.device).manual_seed(seed))


@contextmanager
def mode(model: RNNModel, *, training: bool) -> Iterator[None]:
    """Put a model into training or evaluation mode; restore its mode afterwards."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)
