"""The loss of one window of text and its gradient, piece by piece."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from activation_regularize import activation_regularization, temporal_activation_regularization
from bptt import Window
from engine.ranks import Ranks
from model import Hidden, Masks, RNNModel, repackage_hidden


@dataclass(frozen=True)
class Piece:
    """A stretch of a window that the model runs over in one call; rows are those of the window.

    start, stop: its rows are start, …, stop - 1.
    counted: the first of them whose loss counts; stop, if none does.
    share: what its mean loss and AR weigh in the window's.
    pair_share: what the mean of its TAR weighs.
    linked: TAR also compares its first row with the one before, which is in another piece.
    """

    start: int
    stop: int
    counted: int
    share: float
    pair_share: float
    linked: bool


def pieces_of(window: Window) -> list[Piece]:
    """The pieces that a window is run in.

    Loss and AR are means over the window's counted rows. So is TAR, over the pairs of
    neighbouring counted rows, where the history is passed on whole between pieces. Where it is
    cut, or its gradient multiplied, no pair reaches from one piece into another and each piece's
    TAR weighs what its loss weighs, as if it were a window of its own.
    """
    lengths = window.pieces or (window.length,)
    pieces = []
    for stop, length in zip(accumulate(lengths), lengths, strict=True):
        start = stop - length
        counted = min(max(start, window.warmup), stop)
        share = (stop - counted) / window.counted
        linked = window.crossing == 1 and window.warmup < start
        pairs = stop - counted - 1 + linked
        pair_share = 0.0
        if pairs > 0:
            pair_share = pairs / (window.counted - 1) if window.crossing == 1 else share
        pieces.append(Piece(start, stop, counted, share, pair_share, linked))
    return pieces


@dataclass(frozen=True)
class Run:
    """One call of the model, with its graph.

    before, after: its states; loss: its share of the window's mean cross-entropy, detached;
    objective: its share of what the gradient is taken of. None where no row counts.
    """

    before: Hidden
    after: Hidden
    loss: Tensor | None
    objective: Tensor | None

    def backward(self, arriving: list[Tensor], scale: float | Tensor) -> None:
        """Add to the parameters' grad.

        Args:
            arriving: gradients of after, scale times the real ones; empty where cut off.
            scale: factor on the objective, and so on all gradients.
        """
        tensors, gradients = [], list[Tensor]()
        if self.objective is not None:
            tensors.append(self.objective)
            gradients.append(torch.ones_like(self.objective) * scale)
        if arriving:
            tensors += _flat(self.after)
            gradients += arriving
        torch.autograd.backward(tensors, gradients)


class WindowGradient:
    """Adds the gradient of a window's objective to the parameters' grad.

    The objective is the mean cross-entropy of the window's counted rows, AR and TAR. All pieces
    are run under the same masks, drawn once a window before anything is computed, so that a piece
    that is run twice is the same twice. The gradient goes back piece by piece: that of a piece's
    first state is handed to the piece before as the gradient of its last one. A gradient filter
    sees each piece by itself, once.

    Args:
        model: in training mode when called.
        alpha: weight of AR, 0: off.
        beta: weight of TAR, 0: off.
        ranks: the processes that share the batch; masks are drawn for all of it, the gradient is
            of this process's columns. None: there is one.
    """

    def __init__(
        self, model: RNNModel, *, alpha: float, beta: float, ranks: Ranks | None = None
    ) -> None:
        self.model = model
        self.ranks = ranks or Ranks()
        self.alpha = alpha
        self.beta = beta

    def __call__(
        self,
        window: Window,
        rows: Tensor,
        hidden: Hidden,
        scale: float | Tensor = 1.0,
        check: Callable[[], None] = lambda: None,
    ) -> tuple[Tensor, Hidden]:
        """Take the gradient of one window.

        Args:
            window: how it is run.
            rows: its word ids and those of one row more, (T + 1, B).
            hidden: states before it; their history is cut off.
            scale: factor on the gradients; see loss_scale.
            check: called between pieces, and between forward and backward; gives the window up by
                raising an exception.

        Returns:
            The mean cross-entropy without the penalties, nats per token, and the states that the
            next window starts from. Nothing is read back from the device.
        """
        columns = rows.size(1) * self.ranks.size
        masks = self.model.draw_masks(columns)
        if self.ranks.size > 1:
            masks = masks.columns(self.ranks.share(columns))
        pieces = pieces_of(window)
        states, losses = [hidden], []
        with self.model.weights_held(masks):
            for chain in [pieces] if window.crossing else [[piece] for piece in pieces]:
                afters, chain_losses = self._chain(
                    window, chain, rows, states[-1], masks, scale, check
                )
                states += afters
                losses += chain_losses
        ends = [0, *(piece.stop for piece in pieces)]
        advance = window.length if window.advance is None else window.advance
        return sum(losses[1:], start=losses[0]), states[ends.index(advance)]

    def _chain(
        self,
        window: Window,
        pieces: list[Piece],
        rows: Tensor,
        hidden: Hidden,
        masks: Masks,
        scale: float | Tensor,
        check: Callable[[], None],
    ) -> tuple[list[Hidden], list[Tensor]]:
        """Forward, then backward, through pieces none of which is cut off from the one before.

        Returns:
            The states after each piece; the losses of those that have one.
        """
        befores, runs = [repackage_hidden(hidden)], []
        afters: list[Hidden] = []
        for piece in pieces:
            if piece.start:
                check()
            if afters:
                befores.append(_leaves(afters[-1]))
            if len(afters) < len(pieces) - window.kept:
                with torch.no_grad():
                    part = rows[piece.start : piece.stop].long()
                    afters.append(self.model(part, befores[-1], masks=masks)[1])
            else:
                runs.append(self._run(piece, rows, befores[-1], masks))
                afters.append(runs[-1].after)
        losses: list[Tensor] = []
        arriving: list[Tensor] = []
        for piece, before in zip(reversed(pieces), reversed(befores), strict=True):
            check()
            run = runs.pop() if runs else self._run(piece, rows, before, masks)
            run.backward(arriving, scale)
            if run.loss is not None:
                losses.append(run.loss)
            arriving = [state.grad for state in _flat(before) if state.grad is not None]
            if window.crossing != 1:
                arriving = [gradient * window.crossing for gradient in arriving]
        return afters, losses

    def _run(self, piece: Piece, rows: Tensor, before: Hidden, masks: Masks) -> Run:
        """Forward through one piece, and what its counted rows add to loss and objective."""
        part = rows[piece.start : piece.stop + 1].long()
        inputs, targets = part[:-1], part[1:]
        result, after, raw_outputs, outputs = self.model(inputs, before, return_h=True, masks=masks)
        if piece.counted == piece.stop:
            return Run(before, after, None, None)
        raw_output, dropped_output = raw_outputs[-1], outputs[-1]
        if skip := piece.counted - piece.start:
            raw_output, dropped_output = raw_output[skip:], dropped_output[skip:]
            result, targets = dropped_output.flatten(0, 1), targets[skip:]
        loss = self.model.loss(result, targets.flatten())
        if piece.share != 1:
            loss = loss * piece.share
        objective = loss
        if self.alpha:
            weight = self.alpha * piece.share
            objective = objective + activation_regularization(dropped_output, weight)
        if self.beta and piece.pair_share:
            if piece.linked:  # the last layer's state is its output in the row before
                raw_output = torch.cat([before[-1][0], raw_output])
            weight = self.beta * piece.pair_share
            objective = objective + temporal_activation_regularization(raw_output, weight)
        return Run(before, after, loss.detach(), objective)


def _flat(hidden: Hidden) -> list[Tensor]:
    return [state for pair in hidden for state in pair]


def _leaves(hidden: Hidden) -> Hidden:
    """The same states, from which a gradient can be taken."""
    return [(h.detach().requires_grad_(), c.detach().requires_grad_()) for h, c in hidden]
