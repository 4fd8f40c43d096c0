"""The gradient of one window of text, piece by piece."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from bptt import Window
from model import Hidden, repackage_hidden
from noise import Noise
from training.objective import Objective, Share


@dataclass(frozen=True)
class Piece:
    """Rows of a window that the model runs over in one call.

    start, stop: its rows in the window are start, …, stop - 1.
    share: its weights in the window's objective; None: none of its rows counts.
    """

    start: int
    stop: int
    share: Share | None


def pieces_of(window: Window) -> list[Piece]:
    """The pieces that a window is run in.

    Loss and penalties are means over the window's counted rows. A penalty over pairs of
    neighbouring rows is a mean over the window's pairs if window.crossing is 1. Otherwise no pair
    spans two pieces, and each piece's mean over its pairs has the weight of its loss, as if the
    piece were a window.
    """
    lengths = window.pieces or (window.length,)
    pieces = []
    for stop, length in zip(accumulate(lengths), lengths, strict=True):
        start = stop - length
        counted = min(max(start, window.warmup), stop)
        rows = (stop - counted) / window.counted
        linked = window.crossing == 1 and window.warmup < start
        pairs = stop - counted - 1 + linked
        by_pairs = 0.0
        if pairs > 0:
            by_pairs = pairs / (window.counted - 1) if window.crossing == 1 else rows
        share = Share(counted - start, rows, by_pairs, linked) if counted < stop else None
        pieces.append(Piece(start, stop, share))
    return pieces


@dataclass(frozen=True)
class _Call:
    """The result of one forward pass: states after it, and its share of loss and objective.

    loss and objective are None if no row counts.
    """

    after: Hidden
    loss: Tensor | None
    objective: Tensor | None

    def backward(self, arriving: list[Tensor], scale: float | Tensor) -> None:
        """Add the gradient to the parameters' grad.

        Args:
            arriving: gradients of `after`, times scale; empty if no gradient arrives.
            scale: factor on the objective.
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

    All pieces share the noise, so that a recomputed piece gives the same result. Backward runs
    piece by piece: the gradient of a piece's first state becomes the gradient of the last state of
    the piece before. A gradient filter filters each piece separately, once.

    Args:
        objective: the objective; its model must be in training mode.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.model = objective.model

    def __call__(
        self,
        window: Window,
        rows: Tensor,
        hidden: Hidden,
        noise: Noise,
        scale: float | Tensor = 1.0,
        check: Callable[[], None] = lambda: None,
    ) -> tuple[Tensor, Hidden]:
        """Compute the gradient of one window; no device synchronisation.

        Args:
            window: how the text is run.
            rows: word ids of the window and of one more row, (T + 1, B).
            hidden: states before the window; they are detached.
            noise: the update's random factors.
            scale: factor on the gradients; see loss_scale.
            check: called between pieces, and between forward and backward; may raise an exception
                to abandon the window.

        Returns:
            The mean cross-entropy without the penalties, nats per token, and the states that the
            next window starts from.
        """
        pieces = pieces_of(window)
        states, losses = [hidden], list[Tensor]()
        for chain in [pieces] if window.crossing else [[piece] for piece in pieces]:
            afters, chain_losses = self._chain(window, chain, rows, states[-1], noise, scale, check)
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
        noise: Noise,
        scale: float | Tensor,
        check: Callable[[], None],
    ) -> tuple[list[Hidden], list[Tensor]]:
        """Forward, then backward, through pieces that the gradient passes between.

        Returns:
            The states after each piece; the losses of the pieces with counted rows.
        """
        befores, calls = [repackage_hidden(hidden)], list[_Call]()
        afters: list[Hidden] = []
        for piece in pieces:
            if piece.start:
                check()
            if afters:
                befores.append(_leaves(afters[-1]))
            if len(afters) < len(pieces) - window.kept:
                with torch.no_grad():
                    part = rows[piece.start : piece.stop].long()
                    afters.append(self.model(part, befores[-1], noise=noise.at(piece.start))[1])
            else:
                calls.append(self._call(piece, rows, befores[-1], noise))
                afters.append(calls[-1].after)
        losses: list[Tensor] = []
        arriving: list[Tensor] = []
        for piece, before in zip(reversed(pieces), reversed(befores), strict=True):
            check()
            call = calls.pop() if calls else self._call(piece, rows, before, noise)
            call.backward(arriving, scale)
            if call.loss is not None:
                losses.append(call.loss)
            arriving = [state.grad for state in _flat(before) if state.grad is not None]
            if window.crossing != 1:
                arriving = [gradient * window.crossing for gradient in arriving]
        return afters, losses

    def _call(self, piece: Piece, rows: Tensor, before: Hidden, noise: Noise) -> _Call:
        """Forward through one piece."""
        part = rows[piece.start : piece.stop + 1].long()
        noise = noise.at(piece.start)
        if piece.share is None:
            return _Call(self.model(part[:-1], before, noise=noise)[1], None, None)
        loss, objective, after = self.objective(part[:-1], part[1:], before, noise, piece.share)
        return _Call(after, loss, objective)


def _flat(hidden: Hidden) -> list[Tensor]:
    return [part for state in hidden for part in state]


def _leaves(hidden: Hidden) -> Hidden:
    """Detached states that accumulate a gradient."""
    return [tuple(part.detach().requires_grad_() for part in state) for state in hidden]
