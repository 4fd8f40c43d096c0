"""Dynamic evaluation (Krause, Kahembwe, Murray & Renals 2017, arXiv:1709.07432)."""

from collections.abc import Callable
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor

from data.corpus import batchify
from evaluation.plain import log_probs, mode, same_masks
from evaluation.predictor import Prediction, Predictor
from model import RNNModel, repackage_hidden


class Dynamic(Predictor):
    """Predicts by a copy of the model that learns, after each segment, from the segment:

        W = W + lambda (W_trained - W) - lr g                                       ("sgd"),
        W = W + min(lambda R, 1) (W_trained - W) - lr g / (sqrt(MS) + epsilon)      ("rms"),

    where g is the gradient of the segment's mean loss, MS the mean square of the gradient over the
    training text (see `mean_squares`) and R = sqrt(MS) / mean(sqrt(MS)). As in its authors' code
    that mean is the mean over the tensors of each tensor's mean. The copy has no dropout, unless
    `masks` is given.

    Args:
        model: is not changed.
        lr: learning rate.
        lamb: lambda, the decay towards the trained weights.
        segment: rows of a segment.
        root_mean_squares: sqrt(MS) of each parameter, in the order of model.parameters(), for
            "rms"; None: "sgd".
        epsilon: keeps the steps bounded where MS is small.
        masks: see Plain.
    """

    def __init__(
        self,
        model: RNNModel,
        lr: float,
        lamb: float,
        segment: int = 5,
        root_mean_squares: list[Tensor] | None = None,
        epsilon: float = 2e-5,
        masks: int | None = None,
    ) -> None:
        self.model = unfiltered(model)
        self.device = model.encoder.weight.device
        self.segment = segment
        self.masks = masks
        self._trained = [p.detach() for p in model.parameters()]
        self._weights: list[Tensor] = list(self.model.parameters())
        self._lr, self._lamb = lr, lamb
        self._rates: list[Tensor] | None = None
        self._pulls: list[Tensor] | None = None
        if root_mean_squares is not None:
            mean = torch.stack([root.mean() for root in root_mean_squares]).mean()
            self._rates = [lr / (root + epsilon) for root in root_mean_squares]
            self._pulls = [(lamb * root / mean).clamp(max=1) for root in root_mean_squares]

    @torch.no_grad()
    def start(self, columns: int) -> None:
        """Go back to the trained weights, and start on new texts."""
        for weight, trained in zip(self._weights, self._trained, strict=True):
            weight.copy_(trained)
        self._hidden = self.model.init_hidden(columns)
        self._segment: tuple[Tensor, Tensor] | None = None

    def read(self, words: Tensor) -> Prediction:
        """Learn from the segment before, whose last target is words' first row; see Predictor."""
        if self._segment is not None:
            logits, inputs = self._segment
            self._learn(logits, torch.cat([inputs[1:], words[:1]]).flatten())
        noise = same_masks(self.model, self.masks)
        with torch.enable_grad(), mode(self.model, training=noise is not None):
            outputs, hidden = self.model(words, self._hidden, noise=noise)
            logits = self.model.decoder(outputs, noise)
        self._hidden = repackage_hidden(hidden)
        self._segment = logits, words
        return _Known(outputs.detach(), log_probs(logits.detach()))

    def _learn(self, logits: Tensor, targets: Tensor) -> None:
        gradients = torch.autograd.grad(F.cross_entropy(logits, targets), self._weights)
        with torch.no_grad():
            if self._rates is None or self._pulls is None:
                torch._foreach_lerp_(self._weights, self._trained, self._lamb)
                torch._foreach_add_(self._weights, gradients, alpha=-self._lr)
            else:
                torch._foreach_lerp_(self._weights, self._trained, self._pulls)
                torch._foreach_addcmul_(self._weights, self._rates, gradients, value=-1)


class _Known(Prediction):
    """A prediction that holds its log-probabilities (N, V); a segment is short."""

    def __init__(self, outputs: Tensor, known: Tensor) -> None:
        super().__init__(outputs, known.shape[1])
        self._known = known

    def log_probs(self, places: slice) -> Tensor:
        return self._known[places]


def root_mean_squares(
    model: RNNModel,
    ids: Tensor,
    columns: int = 100,
    segment: int = 5,
    most: int | None = None,
    check: Callable[[int], None] = lambda segments: None,
) -> list[Tensor]:
    """sqrt(MS): root mean square, over the segments of a text, of each parameter's gradient.

    The gradients are those of a segment's mean loss, without dropout; the hidden state is carried
    along the text.

    Args:
        model: is not changed.
        ids: the training text, (N,); what remains of batchify is left out.
        columns: columns that the text is divided into.
        segment: rows of a segment.
        most: segments at most; None: all.
        check: called with the number of segments done; may raise an exception.

    Returns:
        A tensor for each of model.parameters().

    Raises:
        ValueError: the text is too short for one segment.
    """
    model = unfiltered(model)
    rows = batchify(ids, columns).to(model.encoder.weight.device)
    weights: list[Tensor] = list(model.parameters())
    squares = [torch.zeros_like(weight) for weight in weights]
    hidden = model.init_hidden(columns)
    starts = range(0, len(rows) - segment, segment)[:most]
    if not starts:
        raise ValueError(f"{len(ids)} tokens are too few for {columns} columns of {segment}")
    with mode(model, training=False):
        for done, start in enumerate(starts):
            check(done)
            inputs = rows[start : start + segment].long()
            targets = rows[start + 1 : start + 1 + segment].long().flatten()
            outputs, hidden = model(inputs, repackage_hidden(hidden))
            loss = F.cross_entropy(model.decoder(outputs), targets)
            gradients = torch.autograd.grad(loss, weights)
            torch._foreach_addcmul_(squares, gradients, gradients)
    return [square.div_(len(starts)).sqrt_() for square in squares]


def unfiltered(model: RNNModel) -> RNNModel:
    """A copy of the model without gradient filters."""
    model = deepcopy(model)
    for layer in model.layers:
        layer.gradient_filter = None
    return model
