"""Losses of a cache at all settings of a grid."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from evaluation.cache import Cache, Mixture
from evaluation.evaluate import read
from evaluation.predictor import Predictor


def cache_losses(
    base: Predictor,
    ids: Tensor,
    columns: int,
    window: int,
    thetas: Sequence[float],
    lambdas: Sequence[float],
    done: Callable[[int], None] = lambda rows: None,
) -> Tensor:
    """Losses of caches over a predictor, nats per token, (number of thetas, of lambdas), float64.

    They are those of `evaluate` with Cache(base, window, theta, lambda), but the base reads the
    text only once.

    Args:
        done: called with the number of rows that were read since the last call.
    """
    totals = torch.zeros(len(thetas), len(lambdas), dtype=torch.float64, device=base.device)
    for prediction, targets in read(Cache(base, window, 0, 0), ids, columns):
        assert isinstance(prediction, Mixture)
        real = targets != -100
        for n, scores in enumerate(prediction.grid(targets, thetas, lambdas)):
            totals[n] -= scores[:, real].double().sum(1)
        done(len(targets) // columns)
    return totals.cpu() / (len(ids) - 1)
