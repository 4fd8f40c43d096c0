"""The update of the fast kernels: the fused step; on a GPU recorded, a graph a kind of window."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bptt import Window
from engine.fused_step import FusedStep
from engine.gradient import pieces_of
from engine.graphs import Graphs, Recorder
from engine.ranks import Ranks
from engine.tracking import warn
from engine.update import Step, Updater
from model import Hidden, RNNModel
from nt_asgd import NTASGD

# Windows of more pieces are too long, or of too many shapes, to be recorded each.
MOST_PIECES = 8


class FusedUpdater(Updater):
    """The same update by FusedStep, so that nothing is waited for.

    Where graphs are given, a whole update is one of them: masks, forward, backward, norm, step,
    average. Everything that differs between updates of a kind is read from memory of the device:
    the window's first row, its states, the learning rate, and what FusedStep keeps there.

    Args:
        model, rows: as Updater's.
        optimizer: over the model's parameters, which are moved into a flat buffer.
        graphs: how updates are recorded; None: not at all. Not for several processes.
        options: as Updater's.
    """

    def __init__(
        self,
        model: RNNModel,
        rows: Tensor,
        optimizer: NTASGD,
        *,
        graphs: Graphs | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, rows, optimizer, **options)
        self.graphs = graphs
        self.step = FusedStep(optimizer, self.clip, self.loss_scale)
        weight = model.encoder.weight
        self.start = torch.zeros((), dtype=torch.int64, device=weight.device)
        self.loss = torch.zeros((), dtype=weight.dtype, device=weight.device)
        self.hidden: Hidden = []

    @property
    def waits(self) -> bool:
        """No update is waited for."""
        return False

    def __call__(
        self,
        window: Window,
        hidden: Hidden,
        want_norm: bool = False,
        want_gradients: bool = False,
    ) -> Step:
        """Update the weights once; as Updater's.

        The tensors of the Step that is returned are overwritten by the next update. Where
        gradients are wanted the update is not replayed, so that the parameters' grad is that of
        this update.
        """
        if self.step.averaging != self.step.optimizer.averaging:
            self.step.restore_averages()
        if not self.hidden:
            self.hidden = [(torch.empty_like(h), torch.empty_like(c)) for h, c in hidden]
        if hidden is not self.hidden:
            self._keep(hidden)
        self.start.fill_(window.start)
        self.step.set_rate(self.optimizer.param_groups[0]["lr"] * (window.counted / self.bptt))
        anywhere = replace(window, start=0)

        def work() -> None:
            self._update(anywhere, lambda: None)  # a recording is not given up

        if self.graphs is None or want_gradients or len(pieces_of(window)) > MOST_PIECES:
            self._update(anywhere, self.check)
        else:
            self.graphs.run((anywhere, self.step.averaging), work)
        return Step(self.loss, self.step.norm, self.hidden, self.step.overflow)

    def _update(self, window: Window, check: Callable[[], None]) -> None:
        """What is recorded."""
        self.optimizer.zero_grad(set_to_none=True)
        lines = torch.arange(window.length + 1, device=self.rows.device) + self.start
        text = self.rows.index_select(0, lines)
        loss, hidden = self.gradient(window, text, self.hidden, self.step.scale, check)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.ranks.average([loss, *gradients])
        self.step(loss)
        self.loss.copy_(loss)
        self._keep(hidden)

    @torch.no_grad()
    def _keep(self, hidden: Hidden) -> None:
        for kept, new in zip(self.hidden, hidden, strict=True):
            for place, state in zip(kept, new, strict=True):
                place.copy_(state)

    def settle(self, overflow: bool) -> None:
        """Learn what became of an update, in order."""
        self.step.settle(overflow)

    def restore(self) -> None:
        """Take over what was loaded into the optimizer and the loss scale."""
        self.step.restore()


def make_updater(
    model: RNNModel,
    rows: Tensor,
    optimizer: torch.optim.Optimizer,
    recorder: Recorder | None,
    *,
    ranks: Ranks,
    **options: Any,
) -> Updater:
    """The updater that goes with the model's kernel and the optimizer.

    Args:
        recorder: None: updates are not recorded; nor are they where several processes share them.
        options: what both updaters take.
    """
    one_group = len(optimizer.param_groups) == 1
    if model.kernel == "plain" or not (isinstance(optimizer, NTASGD) and one_group):
        return Updater(model, rows, optimizer, ranks=ranks, **options)
    graphs = None
    if recorder is not None and ranks.size == 1:
        graphs = Graphs(recorder, lambda why: warn(f"updates are not recorded: {why}"))
    return FusedUpdater(model, rows, optimizer, ranks=ranks, graphs=graphs, **options)
