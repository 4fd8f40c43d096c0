"""The picture of one or several training runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pictures.canvas import (
    AVERAGING,
    COLOURS,
    DASHES,
    as_label,
    legend_below,
    logarithmic,
    new_figure,
)

HUGE = 1e6  # perplexities above this, of a run that diverges, leave the picture
BEST = dict(marker="*", markersize=11, linestyle="")
TRAINING = dict(linewidth=0.8, alpha=0.7)

Points = tuple[list[float], list[float]]  # x and y; nan: a gap


@dataclass(frozen=True)
class RunCurves:
    """What is drawn of a run.

    label: its name in the legend.
    train, valid: perplexity of training and validation.
    lr: learning rate.
    grad_norm: norm of the gradient before clipping.
    best: epoch, x and perplexity of the best validation.
    averaging: epoch, x and perplexity of the validation after which averaging began.
    clip: largest norm that clipping leaves; 0: no clipping.
    """

    label: str
    train: Points
    valid: Points
    lr: Points
    grad_norm: Points
    best: tuple[int, float, float] | None
    averaging: tuple[int, float, float] | None
    clip: float


def draw_runs(runs: Sequence[RunCurves], xlabel: str) -> Any:
    """Draw perplexity, learning rate and gradient norm below each other.

    Args:
        runs: at least one.
        xlabel: what x is.

    Returns:
        The figure, for pictures.canvas.write_figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, grid = new_figure(3, 1, (8, 2.4), sharex=True, height_ratios=[3, 1, 1])
    top, middle, bottom = grid[:, 0]
    for i, run in enumerate(runs):
        style = dict(color=COLOURS[i % len(COLOURS)], linestyle=DASHES[i // len(COLOURS) % 4])
        top.plot(*run.train, **style, **TRAINING)
        top.plot(*run.valid, **style, marker="." if len(run.valid[0]) < 30 else "")
        for mark, place in ((BEST, run.best), (AVERAGING, run.averaging)):
            if place is not None:
                top.plot([place[1]], [place[2]], color=style["color"], **mark)
        middle.plot(*run.lr, **style)
        bottom.plot(*run.grad_norm, **style, linewidth=0.8)
    clips = {run.clip for run in runs}
    if len(clips) == 1 and (clip := clips.pop()):
        bottom.axhline(clip, color="grey", linewidth=1, linestyle=":", label=f"--clip {clip:g}")
    for axes, what, most, series in (
        (top, "perplexity", HUGE, [ys for run in runs for ys in (run.train[1], run.valid[1])]),
        (middle, "learning rate", math.inf, [run.lr[1] for run in runs]),
        (bottom, "gradient norm", math.inf, [run.grad_norm[1] for run in runs]),
    ):
        values = [y for ys in series for y in ys if 0 < y <= most]
        if values:
            logarithmic(axes, min(values), max(values))
        axes.set_ylabel(what)
        axes.grid(alpha=0.3)
    bottom.set_xlabel(xlabel)
    if len(runs) == 1:
        top.set_title(as_label(runs[0].label), fontsize=10)
    _add_legend(top, runs)
    legend_below(figure)
    return figure


def _add_legend(axes: Any, runs: Sequence[RunCurves]) -> None:
    """Add the entries that the picture needs: a run each, then kinds of lines and marks."""
    colour = COLOURS[0] if len(runs) == 1 else "grey"

    def add(label: str, **style: Any) -> None:
        axes.plot([], [], label=as_label(label), **style)

    if len(runs) > 1:
        for i, run in enumerate(runs):
            best = f": {run.best[2]:.4g} in epoch {run.best[0]}" if run.best else ""
            dash = DASHES[i // len(COLOURS) % 4]
            add(run.label + best, color=COLOURS[i % len(COLOURS)], linestyle=dash)
    if any(run.train[0] for run in runs):
        add("training", color=colour, **TRAINING)
    if any(run.valid[0] for run in runs):
        add("validation", color=colour)
    for mark, what, places in (
        (BEST, "best validation", [run.best for run in runs]),
        (AVERAGING, "averaging begins", [run.averaging for run in runs]),
    ):
        if known := [place for place in places if place is not None]:
            epoch, _, ppl = known[0]
            where = f": {ppl:.4g} in epoch {epoch}" if mark is BEST else f" after epoch {epoch}"
            add(what + where * (len(runs) == 1), color=colour, **mark)
