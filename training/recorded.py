"""Updates on a GPU recorded as CUDA graphs: one launch for all the kernels of an update."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bptt import Window
from kernels.graphs import Graphs
from model import Hidden
from training.gradient import pieces_of
from training.update import Outcome, Updater

# Windows of more pieces are too long, or of too many shapes, to be recorded each.
MOST_PIECES = 8


class RecordedUpdater:
    """The same update, a CUDA graph for each kind of window.

    A graph holds a whole update: noise, forward, backward, norm, step, average. Everything that
    differs between updates of a kind is read from memory of the device: the window's text, its
    states, and what the step keeps there.

    Args:
        updater: of one process, whose step never synchronises.
        graphs: captures and replays them.
    """

    def __init__(self, updater: Updater, graphs: Graphs) -> None:
        self.updater = updater
        self.step = updater.step
        self.graphs = graphs
        self.loss = torch.zeros((), device=updater.rows.device)
        self.hidden: Hidden = []
        self.texts: dict[int, Tensor] = {}
        self.last: Outcome | None = None

    def __call__(
        self,
        window: Window,
        hidden: Hidden,
        keep_gradients: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """Update the weights once; as Updater's.

        The tensors of the Outcome are overwritten by the next update. Where gradients are looked at
        the update is not replayed, so that the parameters' grad is that of this update.
        """
        self.step.prepare(window.counted / self.updater.bptt)
        self._keep(hidden)
        text = self.updater.rows[window.start : window.start + window.length + 1]
        place = self.texts.setdefault(len(text), torch.empty_like(text))
        place.copy_(text)
        anywhere = replace(window, start=0)

        def work(check: Callable[[], None] = lambda: None) -> None:
            outcome = self.updater.compute(anywhere, place, self.hidden, check)
            self.loss.copy_(outcome.loss)
            self._keep(outcome.hidden)
            self.last = replace(outcome, loss=self.loss, hidden=self.hidden)

        if keep_gradients or len(pieces_of(window)) > MOST_PIECES:
            work(check)
        else:
            self.graphs.run((anywhere, self.step.averaging), work)
        assert self.last is not None
        return self.last

    @torch.no_grad()
    def _keep(self, hidden: Hidden) -> None:
        """Copy states to where graphs read them."""
        if not self.hidden:
            self.hidden = [tuple(torch.empty_like(part) for part in state) for state in hidden]
        if hidden is not self.hidden:
            for kept, new in zip(self.hidden, hidden, strict=True):
                for place, part in zip(kept, new, strict=True):
                    place.copy_(part)
