"""Updates on a GPU as CUDA graphs: one launch for all the kernels of an update."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bptt import Window
from kernels.graphs import Graphs
from model import Hidden
from training.gradient import pieces_of
from training.update import Outcome, Updater

# A window of more pieces runs eagerly: its graph would be large, and there are too many kinds.
MOST_PIECES = 8


class RecordedUpdater:
    """An updater whose updates are captured as CUDA graphs, one for each kind of window.

    A graph holds a whole update: noise, forward, backward, norm, step, average. Windows are of one
    kind if they differ only in where they start. What differs between updates of a kind is read
    from fixed memory on the device: the text, the states before it, and the step's own scalars.

    Args:
        updater: of a single process, whose step never synchronises.
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
            keep_gradients: run eagerly, so that the parameters' grad is this update's afterwards.

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
        """Copy states to the memory that graphs read them from."""
        if not self.hidden:
            self.hidden = [tuple(torch.empty_like(part) for part in state) for state in hidden]
        if hidden is not self.hidden:
            for fixed, state in zip(self.hidden, hidden, strict=True):
                for target, part in zip(fixed, state, strict=True):
                    target.copy_(part)
