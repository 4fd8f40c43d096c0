"""Captures updates on a GPU as CUDA graphs and replays them."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bptt import Window
from kernels.graphs import Graphs
from model import Hidden
from training.gradient import pieces_of
from training.update import Outcome, Updater

# A window of more pieces runs eagerly: its graph would be large, and rarely be used again.
MOST_PIECES = 8


class RecordedUpdater:
    """An updater that captures one CUDA graph per kind of window, and replays it.

    A graph holds a whole update: noise, forward, backward, norm, step, average. Windows are of one
    kind if they differ only in their start. A graph reads what differs between updates of one kind
    (text, first states, the step's scalars) from fixed memory on the device.

    Args:
        updater: updater of a single process, whose step never synchronises.
        graphs: captures and replays.
    """

    def __init__(self, updater: Updater, graphs: Graphs) -> None:
        self.updater = updater
        self.step = updater.step
        self.graphs = graphs
        self.loss = next(updater.model.parameters()).detach().new_zeros(())
        self.hidden: Hidden = []
        self.texts: dict[int, Tensor] = {}  # by number of rows
        self.outcome: Outcome | None = None

    def __call__(
        self,
        window: Window,
        hidden: Hidden,
        keep_gradients: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """Update the weights once; see Updater.

        Args:
            keep_gradients: run eagerly, so that p.grad holds this update's gradients afterwards.

        Returns:
            An Outcome whose tensors the next update overwrites.
        """
        self.step.prepare(window.counted / self.updater.bptt)
        self._write_hidden(hidden)
        rows = self.updater.rows[window.start : window.start + window.length + 1]
        text = self.texts.setdefault(len(rows), torch.empty_like(rows))
        text.copy_(rows)
        kind = replace(window, start=0)

        def work(check: Callable[[], None] = lambda: None) -> None:
            outcome = self.updater.compute(kind, text, self.hidden, check)
            self.loss.copy_(outcome.loss)
            self._write_hidden(outcome.hidden)
            self.outcome = replace(outcome, loss=self.loss, hidden=self.hidden)

        if keep_gradients or len(pieces_of(window)) > MOST_PIECES:
            work(check)
        else:
            self.graphs.run((kind, self.step.averaging), work)
        assert self.outcome is not None
        return self.outcome

    @torch.no_grad()
    def _write_hidden(self, hidden: Hidden) -> None:
        """Copy states to the fixed memory that graphs read them from."""
        if not self.hidden:
            self.hidden = [tuple(torch.empty_like(part) for part in state) for state in hidden]
        if hidden is not self.hidden:
            for fixed, state in zip(self.hidden, hidden, strict=True):
                for target, part in zip(fixed, state, strict=True):
                    target.copy_(part)
