"""The picture of a table: validation perplexity per epoch."""

import statistics
from typing import Any

from pictures.canvas import (
    AVERAGING,
    COLOURS,
    DASHES,
    as_label,
    legend_below,
    logarithmic,
    new_figure,
    whole_numbers,
)

# Early epochs are far above the rest; a scale that shows them hides the differences.
MOST_SHOWN = 3.0


def draw_curves(figures: dict[str, Any]) -> Any:
    """Draw a line per row, the mean over its seeds, and a band from the lowest to the highest.

    A triangle marks the epoch at whose end a seed's averaging began.

    Args:
        figures: from results.collect.

    Returns:
        The figure, for pictures.canvas.write_figure; None: there is nothing to draw.

    Raises:
        ImportError: matplotlib is not installed.
    """
    drawn = [(i, row, _means(row)) for i, row in enumerate(figures["rows"])]
    drawn = [(i, row, curves) for i, row, curves in drawn if curves[0]]
    if not drawn:
        return None
    figure, [[axes]] = new_figure(1, 1, (9, 5))
    switched = False
    for i, row, (low, mean, high) in drawn:
        epochs = range(1, len(mean) + 1)
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        marker = "." if len(mean) < 30 else ""
        axes.plot(epochs, mean, dash, color=colour, label=as_label(row["name"]), marker=marker)
        axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
        switches = [run["averaging_epoch"] for run in row["runs"]]
        for epoch in (e for e in switches if e is not None and e <= len(mean)):
            axes.plot([epoch], [mean[epoch - 1]], color=colour, alpha=0.7, **AVERAGING)
            switched = True
    best = min(min(mean) for _, _, (_, mean, _) in drawn)
    worst = max(max(high) for _, _, (_, _, high) in drawn)
    logarithmic(axes, best, min(worst, MOST_SHOWN * best))
    whole_numbers(axes)
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation perplexity (log scale)")
    axes.set_title(f"{figures['title']}: mean and range over seeds", fontsize=10)
    axes.grid(alpha=0.3)
    if switched:
        axes.plot([], [], color="grey", label="averaging begins", **AVERAGING)
    legend_below(figure)
    return figure


def _means(row: dict[str, Any]) -> tuple[list[float], list[float], list[float]]:
    """Lowest, mean and highest perplexity of each epoch that all of the row's seeds reached.

    Seeds that are not done (diverged, failed) are left out, unless there are no others.
    """
    done = [run for run in row["runs"] if run["state"] == "done"]
    curves = [run["curve"] for run in done or row["runs"] if run["curve"]]
    epochs = [values for values in zip(*curves, strict=False) if None not in values]
    return [min(v) for v in epochs], [statistics.fmean(v) for v in epochs], [max(v) for v in epochs]
