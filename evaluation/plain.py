"""Evaluation of a model over a whole text."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model import RNNModel

# Approximate tokens of a window (more on a GPU, where a call costs more), and values of a block of
# logits (32 MB).
WINDOW_TOKENS, WINDOW_TOKENS_GPU = 2048, 8192
BLOCK_LOGITS = 2**23


@torch.no_grad()
def evaluate(
    model: RNNModel,
    ids: Tensor,
    batch_size: int,
    window: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> float:
    """Mean negative log likelihood of a text, nats per token.

    The N - 1 predictions of a text of N tokens are divided into batch_size contiguous columns whose
    lengths differ by at most one; the hidden state is zero at the start of each column and carried
    along it. Each prediction counts once. (The original leaves out the first of each column and
    the remainder, and divides by N.)

    Args:
        model: its mode, training or evaluation, is restored afterwards.
        ids: the text, (N,), on any device.
        batch_size: number of columns, B.
        window: time steps per call, which do not change the result; None: enough to keep the
            device busy.
        check: called between calls of the model and blocks of logits; may raise an exception to
            end the evaluation.

    Raises:
        ValueError: fewer predictions than columns.
    """
    device = model.encoder.weight.device
    inputs, targets = stretches(ids, batch_size)
    if window is None:
        tokens = WINDOW_TOKENS_GPU if device.type == "cuda" else WINDOW_TOKENS
        window = max(1, tokens // batch_size)
    training = model.training
    model.eval()
    try:
        hidden = model.init_hidden(batch_size)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for start in range(0, len(inputs), window):
            part = inputs[start : start + window].to(device).long()
            output, hidden = model(part, hidden)
            goal = targets[start : start + window].to(device).long().flatten()
            total += _summed_loss(model, output, goal, check)
    finally:
        model.train(training)
    return float(total) / (len(ids) - 1)


def stretches(ids: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Divide the N - 1 predictions of a text into batch_size contiguous columns.

    Returns:
        inputs and targets, (T, B), T = ceil((N - 1) / B). Columns that are one shorter are padded
        at the end, with target -100 and input 0.

    Raises:
        ValueError: fewer predictions than columns.
    """
    predictions = len(ids) - 1
    if predictions < batch_size:
        raise ValueError(f"{len(ids)} tokens are too few for {batch_size} stretches")
    length, longer = divmod(predictions, batch_size)
    sizes = [length + 1] * longer + [length] * (batch_size - longer)
    rows = length + bool(longer)
    inputs = ids.new_zeros(rows, batch_size)
    targets = ids.new_full((rows, batch_size), -100)
    start = 0
    for column, size in enumerate(sizes):
        inputs[:size, column] = ids[start : start + size]
        targets[:size, column] = ids[start + 1 : start + size + 1]
        start += size
    return inputs, targets


def _summed_loss(
    model: RNNModel, output: Tensor, targets: Tensor, check: Callable[[], None]
) -> Tensor:
    """Summed loss of outputs (T·B, E), decoded in blocks, so that no (T·B, V) is allocated."""
    rows = max(1, BLOCK_LOGITS // model.ntoken)
    total = torch.zeros((), dtype=torch.float64, device=output.device)
    for part, goal in zip(output.split(rows), targets.split(rows), strict=True):
        check()
        logits = model.decoder(part)
        if logits.itemsize < 4:
            logits = logits.float()
        total += F.cross_entropy(logits, goal, reduction="sum", ignore_index=-100).double()
    return total


def perplexity(loss: float) -> float:
    """exp(loss) of a loss in nats per token; infinity if that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
