"""What a callback learns of an update, and what an update that is given up leaves."""

from dataclasses import replace
from pathlib import Path

import pytest
from row_by_row import build_trainer

from bptt import FixedWindows
from engine.interrupt import StopRequested
from training.callback import Callback, UpdateStart

BPTT = 10


def test_a_callback_is_told_of_an_update_before_it(tmp_path: Path) -> None:
    """Its number, and the part of all epochs' text that training has seen by then."""
    trainer, starts = build_trainer(tmp_path, FixedWindows(BPTT), BPTT), []

    class Watching(Callback):
        def update_begins(self, start: UpdateStart) -> None:
            starts.append((start.update, start.progress))

    trainer.callbacks = [Watching()]
    trainer.options = replace(trainer.options, epochs=2)
    with trainer.writer:
        for _ in range(2):
            trainer.train_epoch()
            trainer.end_epoch()
    rows = trainer.num_steps
    seen = [epoch / 2 + row / rows / 2 for epoch in (0, 1) for row in range(0, rows, BPTT)]
    assert [update for update, _ in starts] == list(range(1, len(seen) + 1))
    assert [progress for _, progress in starts] == pytest.approx(seen, abs=1e-12)


def test_a_learning_rate_is_put_back_where_an_update_is_given_up(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, FixedWindows(BPTT), BPTT)

    class Falling(Callback):
        def update_begins(self, start: UpdateStart) -> None:
            for group in start.optimizer.param_groups:
                group["lr"] *= 0.5

    trainer.callbacks = [Falling()]
    trainer.load_state_dict(trainer.state_dict())  # as in a run that was resumed
    before = trainer.optimizer.param_groups[0]["lr"]
    trainer.interrupt.requested = True
    window = next(trainer.undo.watch(trainer.scheme.windows(trainer.num_steps)))
    with pytest.raises(StopRequested):
        trainer.update(window)
    assert trainer.optimizer.param_groups[0]["lr"] == before
    assert trainer.at.update == 0
    trainer.interrupt.requested = False
    trainer.update(window)
    assert trainer.optimizer.param_groups[0]["lr"] == before / 2
