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
    drawn = [(i, row, found) for i, row in enumerate(figures["rows"]) if (found := _ranges(row))]
    if not drawn:
        return None
    figure, [[axes]] = new_figure(1, 1, (9, 5))
    switched = False
    for i, row, ranges in drawn:
        epochs, (low, mean, high) = list(ranges), zip(*ranges.values(), strict=True)
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        marker = "." if len(mean) < 30 else ""
        axes.plot(epochs, mean, dash, color=colour, label=as_label(row["name"]), marker=marker)
        axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
        switches = [run["averaging_epoch"] for run in row["runs"]]
        for epoch in (e for e in switches if e in ranges):
            axes.plot([epoch], [ranges[epoch][1]], color=colour, alpha=0.7, **AVERAGING)
            switched = True
    best = min(mean for _, _, ranges in drawn for _, mean, _ in ranges.values())
    worst = max(high for _, _, ranges in drawn for _, _, high in ranges.values())
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


def _ranges(row: dict[str, Any]) -> dict[int, tuple[float, float, float]]:
    """Lowest, mean and highest perplexity of each epoch that all of the row's seeds reached.

    Seeds that are not done (diverged, failed) are left out, unless there are no others; and so are
    epochs at which a perplexity was not finite.
    """
    done = [run for run in row["runs"] if run["state"] == "done"]
    curves = [run["curve"] for run in done or row["runs"] if run["curve"]]
    return {
        epoch: (min(values), statistics.fmean(values), max(values))
        for epoch, values in enumerate(zip(*curves, strict=False), start=1)
        if None not in values
    }
