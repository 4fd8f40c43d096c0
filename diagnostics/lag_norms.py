"""Norms of the gradient of one step's loss by the states up to L steps earlier."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diagnostics.unrolled import Unrolled
from model import RNNModel

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# A gradient explodes in one sample where it is this many times as large as one step back.
EXPLOSION = 10.0
NEAR = 10  # lags 1, …, NEAR are near, those from L / 2 on are far


class LagNorms(NamedTuple):
    """Norms of gradients by layer and lag, one for each of S samples.

    A sample is one sequence at one time step t. L is the largest lag.

    Attributes:
        hidden: |dL_t / dh_(t-lag)|, (layers, L + 1, S), nats per unit of h.
        cells: |dL_t / dc_(t-lag)|, the same.
        arriving: dL_t / dh_t itself, of each layer (S, H).
    """

    hidden: Tensor
    cells: Tensor
    arriving: list[Tensor]


def lag_norms(
    model: RNNModel, unrolled: Unrolled, targets: Tensor, lags: int, positions: int
) -> LagNorms:
    """Back-propagate the losses of single steps; measure the gradient at every state.

    L_t is the cross-entropy of step t alone, in nats. The derivatives are total: by c_(t-lag)
    along every path, by h_(t-lag) along every path that reads h (the next step's gates and the
    layer above; c passes it by). Sequences do not touch each other, so that one backward pass
    serves a step of all B of them.

    Args:
        model: whose decoder makes the loss.
        unrolled: a window of T > lags steps.
        targets: the words to be predicted, (T, B).
        lags: largest lag, L.
        positions: steps t to start from, spread evenly over lags, …, T - 1.

    Raises:
        OverflowError: a gradient is not finite.
    """
    steps = len(unrolled.outputs)
    layers = len(unrolled.hidden)
    starts = torch.linspace(lags, steps - 1, min(positions, steps - lags)).round().long()
    norms: list[Tensor] = []
    arriving: list[list[Tensor]] = [[] for _ in range(layers)]
    for t in starts.tolist():
        scores = model.decoder(unrolled.outputs[t])
        loss = F.cross_entropy(scores, targets[t], reduction="sum")
        states = [
            states[s]
            for kind in (unrolled.hidden, unrolled.cells)
            for states in kind
            for s in range(t, t - lags - 1, -1)
        ]
        gradients = torch.autograd.grad(loss, states, retain_graph=True)
        sizes = torch.stack([g.norm(dim=1) for g in gradients])  # (2 · layers · (L + 1), B)
        norms.append(sizes.unflatten(0, (2, layers, lags + 1)))
        for layer in range(layers):
            arriving[layer].append(gradients[layer * (lags + 1)])
    hidden, cells = torch.cat(norms, dim=-1)
    if not (hidden.isfinite().all() and cells.isfinite().all()):
        raise OverflowError("the gradient of a single step's loss is not finite")
    return LagNorms(hidden, cells, [torch.cat(parts) for parts in arriving])


def describe(norms: Tensor, bptt: int) -> dict[str, Any]:
    """The figures of one state of one layer.

    Args:
        norms: (L + 1, S).
        bptt: length of the windows that training cuts the text into.

    Returns:
        quantiles: over samples, by lag. near and far: what a step further back multiplies the
        median by, over the lags 1, …, NEAR and L / 2, …, L. reach: the first lag at which the
        median has fallen to a tenth and to a hundredth of that at lag 1, None where it does not.
        growth: the largest median over that at lag 1. exploding: share of samples whose norm is
        somewhere at least EXPLOSION times that at lag 1. at_bptt: median at lag bptt over that
        at lag 1, None beyond L.
    """
    levels = torch.tensor(QUANTILES, dtype=norms.dtype, device=norms.device)
    quantiles = norms.quantile(levels, dim=1)
    median = quantiles[QUANTILES.index(0.5)]
    first, largest = median[1], norms[1:].amax(0)
    return dict(
        quantiles={str(q): values for q, values in zip(QUANTILES, quantiles, strict=True)},
        near=factor_per_step(median[1 : NEAR + 1]),
        far=factor_per_step(median[len(median) // 2 :]),
        reach={str(share): _first_below(median, share * first) for share in (0.1, 0.01)},
        growth=float(median[1:].max() / first) if first > 0 else 0.0,
        # A gradient of 0 is ten times 0, but does not grow.
        exploding=float(((largest > 0) & (largest >= EXPLOSION * norms[1])).double().mean()),
        at_bptt=float(median[bptt] / first) if bptt < len(median) and first > 0 else None,
    )


def factor_per_step(sizes: Tensor) -> float:
    """exp of the slope of log size over its index, by least squares; sizes of 0 are left out.

    0 where fewer than two sizes are positive.
    """
    index = torch.arange(len(sizes), dtype=torch.float64)
    values = sizes.double().cpu()
    index, values = index[values > 0], values[values > 0].log()
    if len(values) < 2:
        return 0.0
    index = index - index.mean()
    return math.exp(float((index * values).sum() / index.square().sum()))


def _first_below(median: Tensor, level: Tensor) -> int | None:
    below = (median[1:] <= level).nonzero()
    return int(below[0]) + 1 if len(below) else None
