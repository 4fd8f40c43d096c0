"""Evaluation of a predictor over a whole text."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from evaluation.predictor import Check, Prediction, Predictor

# Approximate tokens of a window (more on a GPU, where a call costs more).
WINDOW_TOKENS, WINDOW_TOKENS_GPU = 2048, 8192


def evaluate(
    predictor: Predictor,
    ids: Tensor,
    columns: int,
    window: int | None = None,
    check: Check = lambda: None,
) -> float:
    """Mean negative log likelihood of a text, nats per token, over its N - 1 predictions.

    Arguments and errors are those of `score`. (The original leaves out the first prediction of
    each column and the remainder, and divides by N.)
    """
    return -float(score(predictor, ids, columns, window, check).mean())


def score(
    predictor: Predictor,
    ids: Tensor,
    columns: int,
    window: int | None = None,
    check: Check = lambda: None,
) -> Tensor:
    """Log-probabilities of the words of a text but its first, (N - 1,), float64, in its order.

    The N - 1 predictions are divided into contiguous columns whose lengths differ by at most one;
    the predictor reads the columns side by side and knows nothing before the start of each.

    Args:
        predictor: starts anew.
        ids: the text, (N,), on any device.
        columns: number of columns, B.
        window: rows per read, which do not change the result; None: enough to keep the device
            busy. A predictor's own `segment` goes first.
        check: called between reads and blocks of one; may raise an exception to end the
            evaluation.

    Raises:
        ValueError: fewer predictions than columns.
    """
    scores = [
        prediction.score(targets, check).double().view(-1, columns)
        for prediction, targets in read(predictor, ids, columns, window)
    ]
    return in_text_order(torch.cat(scores), len(ids) - 1)


def read(
    predictor: Predictor,
    ids: Tensor,
    columns: int,
    window: int | None = None,
) -> Iterator[tuple[Prediction, Tensor]]:
    """Read a text window by window; yields predictions and targets (T·B,). See `score`."""
    inputs, targets = stretches(ids, columns)
    device = predictor.device
    tokens = WINDOW_TOKENS_GPU if device.type == "cuda" else WINDOW_TOKENS
    rows = predictor.segment or window or max(1, tokens // columns)
    predictor.start(columns)
    for start in range(0, len(inputs), rows):
        words = inputs[start : start + rows].to(device).long()
        goal = targets[start : start + rows].to(device).long().flatten()
        yield predictor.read(words), goal


def stretches(ids: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Divide the N - 1 predictions of a text into B contiguous columns.

    Returns:
        inputs and targets, (T, B), T = ceil((N - 1) / B). Columns that are one shorter are padded
        at the end, with target -100 and input 0.

    Raises:
        ValueError: fewer predictions than columns.
    """
    if len(ids) - 1 < columns:
        raise ValueError(f"{len(ids)} tokens are too few for {columns} stretches")
    sizes = _sizes(len(ids) - 1, columns)
    targets = pad_sequence(ids[1:].split(sizes), padding_value=-100)
    return pad_sequence(ids[:-1].split(sizes)), targets


def in_text_order(values: Tensor, predictions: int) -> Tensor:
    """Values (T, B) of `stretches` in the text's order, (predictions,), without the padding."""
    sizes = _sizes(predictions, values.shape[1])
    return torch.cat([values[:size, column] for column, size in enumerate(sizes)])


def _sizes(predictions: int, columns: int) -> list[int]:
    """The columns' lengths; the longer ones come first."""
    length, longer = divmod(predictions, columns)
    return [length + 1] * longer + [length] * (columns - longer)


def perplexity(loss: float) -> float:
    """exp(loss) of a loss in nats per token; infinity if that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
