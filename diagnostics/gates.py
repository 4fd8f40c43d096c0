"""Statistics of the gates and states of a layer, and how much of them is saturated."""

from typing import Any

import torch
from torch import Tensor

from diagnostics.lag_norms import QUANTILES
from diagnostics.unrolled import Unrolled
from layers.lstm import LSTM

SATURATED = 0.05  # a sigmoid this close to 0 or 1, a tanh as close to -1 or 1
BINS = 40


def gate_figures(unrolled: Unrolled, layer: int) -> dict[str, dict[str, Any]]:
    """Statistics of each gate of a layer over all steps, sequences and units.

    Returns:
        For each of LSTM.gates: closed and open (for "cell", a tanh: negative and positive), the
        shares of values within SATURATED of either end; saturated, their sum; mean; quantiles;
        histogram (shares in BINS equal bins over the gate's range).
    """
    figures = {}
    for index, name in enumerate(LSTM.gates):
        values = unrolled.gates[layer][:, :, index].flatten()
        sigmoid = name != "cell"
        low = 0.0 if sigmoid else -1.0
        ends = ("closed", "open") if sigmoid else ("negative", "positive")
        shares = [
            float((values < low + SATURATED).double().mean()),
            float((values > 1 - SATURATED).double().mean()),
        ]
        figures[name] = dict(
            zip(ends, shares, strict=True),
            saturated=sum(shares),
            mean=float(values.mean()),
            quantiles=quantiles(values),
            histogram=torch.histc(values, BINS, low, 1.0) / len(values),
        )
    # What the forget gate alone leaves of a cell's gradient per step, in the geometric mean.
    kept = unrolled.gates[layer][:, :, LSTM.gates.index("forget")]
    figures["forget"]["kept_per_step"] = float(kept.clamp_min(1e-300).log().mean().exp())
    return figures


def state_figures(unrolled: Unrolled, layer: int) -> dict[str, dict[str, Any]]:
    """Mean, root mean square and quantiles of h and c of a layer.

    saturated is the share of c whose tanh is within SATURATED of -1 or 1; idle that of h within
    SATURATED of 0.
    """
    figures: dict[str, dict[str, Any]] = {}
    for name, states in (("hidden", unrolled.hidden[layer]), ("cells", unrolled.cells[layer])):
        values = torch.stack(states).detach().flatten()
        figures[name] = dict(
            mean=float(values.mean()),
            rms=float(values.square().mean().sqrt()),
            largest=float(values.abs().max()),
            quantiles=quantiles(values),
        )
        if name == "cells":
            share = (values.tanh().abs() > 1 - SATURATED).double().mean()
            figures[name]["saturated"] = float(share)
        else:
            figures[name]["idle"] = float((values.abs() < SATURATED).double().mean())
    return figures


def quantiles(values: Tensor) -> dict[str, float]:
    """QUANTILES of values, (N,); by sorting, since torch.quantile takes 2**24 values at most."""
    ordered = values.sort().values
    return {str(q): float(ordered[round(q * (len(ordered) - 1))]) for q in QUANTILES}
