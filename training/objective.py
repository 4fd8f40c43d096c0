"""The training objective: cross-entropy plus penalties, of a window or a piece of one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from activation_regularize import activation_regularization, temporal_activation_regularization
from model import Hidden, RNNModel
from noise import Noise


@dataclass(frozen=True)
class Trace:
    """The tensors of a forward pass over a piece of a window, for penalties.

    raw_outputs, outputs: each layer's output before and after locked dropout, (T, B, units), at
        the rows whose loss counts. For a penalty over pairs of rows, raw_outputs[-1] begins with
        the row before the piece if the history is passed on from an earlier piece.
    before, after: the states before the piece and after it.
    """

    raw_outputs: list[Tensor]
    outputs: list[Tensor]
    before: Hidden
    after: Hidden


@dataclass(frozen=True)
class Penalty:
    """A penalty term of the objective.

    function: computes the weighted penalty, a scalar in nats per token, from a trace and a weight.
        It must be a mean over rows (time steps), so that the means of pieces can be combined.
    weight: weight of the term; 0 switches it off.
    over_pairs: the mean is over pairs of neighbouring rows.
    """

    function: Callable[[Trace, float], Tensor]
    weight: float
    over_pairs: bool = False


def activation(trace: Trace, weight: float) -> Tensor:
    """AR; see activation_regularize."""
    return activation_regularization(trace.outputs[-1], weight)


def temporal_activation(trace: Trace, weight: float) -> Tensor:
    """TAR, over pairs; see activation_regularize."""
    return temporal_activation_regularization(trace.raw_outputs[-1], weight)


def paper_penalties(alpha: float, beta: float) -> list[Penalty]:
    """The paper's penalties: AR with weight alpha, and TAR with weight beta."""
    return [Penalty(activation, alpha), Penalty(temporal_activation, beta, over_pairs=True)]


@dataclass(frozen=True)
class Share:
    """The weights of a piece in its window's objective.

    skipped: leading rows of the piece that are run but whose loss does not count.
    rows: weight of means over its counted rows.
    pairs: weight of means over its pairs of neighbouring rows.
    linked: its first row also makes a pair with the last row of the piece before.
    """

    skipped: int = 0
    rows: float = 1.0
    pairs: float = 1.0
    linked: bool = False


class Objective:
    """Mean cross-entropy plus penalties.

    Args:
        model: the model, whose decoder computes the cross-entropy.
        penalties: terms to add; those of weight 0 are left out.
    """

    def __init__(self, model: RNNModel, penalties: Sequence[Penalty]) -> None:
        self.model = model
        self.penalties = [penalty for penalty in penalties if penalty.weight]

    def __call__(
        self,
        inputs: Tensor,
        targets: Tensor,
        before: Hidden,
        noise: Noise | None = None,
        share: Share | None = None,
    ) -> tuple[Tensor, Tensor, Hidden]:
        """Run the model over a window or a piece of one.

        Args:
            inputs: word ids, (T, B).
            targets: ids of the next words, (T, B).
            before: states before the first row.
            noise: see RNNModel.forward.
            share: weights of the piece; None: a whole window.

        Returns:
            The share of the window's mean cross-entropy, detached; the share of the objective; and
            the states after the last row. Losses are in nats per token.
        """
        share = share or Share()
        result, after, raw_outputs, outputs = self.model(inputs, before, return_h=True, noise=noise)
        if share.skipped:
            raw_outputs = [raw[share.skipped :] for raw in raw_outputs]
            outputs = [output[share.skipped :] for output in outputs]
            result, targets = outputs[-1].flatten(0, 1), targets[share.skipped :]
        factors = None if noise is None else noise.of("decoder")
        loss = self.model.decoder.loss(result, targets.flatten(), factors)
        if share.rows != 1:
            loss = loss * share.rows
        objective = loss
        trace = Trace(raw_outputs, outputs, before, after)
        for penalty in self.penalties:
            weight = share.pairs if penalty.over_pairs else share.rows
            if weight:
                seen = _linked(trace) if penalty.over_pairs and share.linked else trace
                objective = objective + penalty.function(seen, penalty.weight * weight)
        return loss.detach(), objective, after


def _linked(trace: Trace) -> Trace:
    """Prepend the last layer's output of the row before, which is its first state, to the trace."""
    last = torch.cat([trace.before[-1][0], trace.raw_outputs[-1]])
    return Trace([*trace.raw_outputs[:-1], last], trace.outputs, trace.before, trace.after)
