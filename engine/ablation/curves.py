"""The picture of a table: validation perplexity per epoch, drawn by matplotlib."""

import io
import statistics
from pathlib import Path
from typing import Any

from data.files import atomic_write

# Distinguishable by eye, also for most colour-blind eyes, and in grey by their dashes.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b")
DASHES = ("-", "--", "-.", ":")
# Early epochs are far above the rest; a scale that shows them hides the differences.
MOST_SHOWN = 3.0


def draw_curves(figures: dict[str, Any], path: Path) -> bool:
    """Draw a line per row, the mean over its seeds, and a band from the lowest to the highest.

    A triangle marks the epoch at whose end a seed's averaging began.

    Returns:
        Whether there was anything to draw.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state
    from matplotlib.ticker import MaxNLocator

    drawn = [(i, row, _means(row)) for i, row in enumerate(figures["rows"])]
    drawn = [(i, row, curves) for i, row, curves in drawn if curves[0]]
    if not drawn:
        return False
    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for i, row, (low, mean, high) in drawn:
        epochs = range(1, len(mean) + 1)
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        marker = "." if len(mean) < 30 else ""
        axes.plot(
            epochs,
            mean,
            dash,
            color=colour,
            label=_plain(row["name"]),
            linewidth=1.6,
            marker=marker,
        )
        axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
        switches = [run["averaging_epoch"] for run in row["runs"]]
        for epoch in (e for e in switches if e is not None and e <= len(mean)):
            axes.plot([epoch], [mean[epoch - 1]], "^", color=colour, markersize=9, alpha=0.7)
    best = min(min(mean) for _, _, (_, mean, _) in drawn)
    worst = max(max(high) for _, _, (_, _, high) in drawn)
    axes.set_ylim(0.98 * best, min(1.02 * worst, MOST_SHOWN * best))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.yaxis.set_minor_formatter("{x:.4g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch (▲ averaging begins)")
    axes.set_ylabel("validation perplexity (log scale)")
    axes.set_title(f"{_plain(figures['title'])}: mean and range over seeds", fontsize=10, wrap=True)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    with atomic_write(path) as file:
        file.write(buffer.getvalue())
    return True


def _plain(text: str) -> str:
    """Escapes $, and a leading _, by which matplotlib leaves a label out."""
    return " " * text.startswith("_") + text.replace("$", r"\$")


def _means(row: dict[str, Any]) -> tuple[list[float], list[float], list[float]]:
    """Lowest, mean and highest perplexity of each epoch that all of the row's seeds reached.

    Seeds that are not done (diverged, failed) are left out, unless there are no others.
    """
    done = [run for run in row["runs"] if run["state"] == "done"]
    curves = [run["curve"] for run in done or row["runs"] if run["curve"]]
    epochs = [values for values in zip(*curves, strict=False) if None not in values]
    return [min(v) for v in epochs], [statistics.fmean(v) for v in epochs], [max(v) for v in epochs]
