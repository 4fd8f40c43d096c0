"""What all pictures share: figures without a window system, labels that fit, PNG and PDF files.

The only module that imports matplotlib.
"""

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.files import atomic_write

DPI = 110
FORMATS = {"png": ("png",), "pdf": ("pdf",), "both": ("png", "pdf")}
# Distinguishable by eye, also for most colour-blind eyes, and in grey by their dashes.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b")
DASHES = ("-", "--", "-.", ":")
AVERAGING = dict(marker="^", markersize=8, linestyle="")  # where averaging begins
LETTER = 0.58  # width of a letter, as a share of the size of its font
HANDLE = 6  # letters that a line of a legend takes besides its text


def new_figure(
    rows: int, columns: int, size: tuple[float, float] = (4.2, 3.2), **share: Any
) -> tuple[Any, Any]:
    """A figure and its panels, an array (rows, columns).

    Args:
        size: width and height of a panel, inches.
        share: sharex, sharey, height_ratios, …

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot: no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1] * rows), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)  # measures text
    return figure, figure.subplots(rows, columns, squeeze=False, **share)


def write_figure(figure: Any, path: Path, formats: Sequence[str] = FORMATS["both"]) -> list[Path]:
    """Lay out a finished figure and write path.png and path.pdf, atomically.

    Titles and labels that do not fit are broken into lines. The same figure gives the same bytes.

    Args:
        path: without a suffix.

    Raises:
        OSError: a file cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_pdf import FigureCanvasPdf

    _lay_out(figure)
    paths = []
    for name in formats:
        content = io.BytesIO()
        with matplotlib.rc_context({"pdf.fonttype": 42}):  # TrueType, as publishers want it
            # Not savefig, which draws twice.
            if name == "pdf":
                FigureCanvasPdf(figure).print_pdf(content, metadata={"CreationDate": None})
            else:
                FigureCanvasAgg(figure).print_png(content, metadata={"Software": None})
        paths.append(path.with_name(f"{path.name}.{name}"))
        with atomic_write(paths[-1]) as file:
            file.write(content.getvalue())
    return paths


def on_page(caption: str, name: str) -> str:
    """Markdown that shows a picture, or links to one that a page cannot show (a PDF)."""
    return f"{'!' * (not name.endswith('.pdf'))}[{caption}]({name})"


# Labels


def as_label(text: str) -> str:
    """A name as a label; matplotlib leaves out one that begins with _, and fails at bytes of file
    names that are no UTF-8."""
    return " " * text.startswith("_") + text.encode(errors="backslashreplace").decode()


def legend_below(figure: Any, fontsize: float = 8) -> None:
    """One legend of all labels below all panels. The figure grows by its height."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries.update(zip(labels, handles, strict=True))
    if not entries:
        return
    room = _letters(figure.get_figwidth(), fontsize)
    columns = room // (max(map(len, entries)) + HANDLE)
    legend = figure.legend(
        entries.values(),
        [textwrap.fill(label, room - HANDLE) for label in entries],
        loc="outside lower center",
        fontsize=fontsize,
        ncols=max(1, min(5, columns, len(entries))),
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    height = legend.get_window_extent(figure.canvas.get_renderer()).height / figure.dpi
    figure.set_figheight(figure.get_figheight() + height)


def _lay_out(figure: Any) -> None:
    """Fix the layout; break titles and labels into lines that fit their panels."""
    layout = figure.get_layout_engine()
    for axes in figure.axes:
        axes.set_visible(axes.has_data())
    layout.execute(figure)
    texts = [(figure._suptitle, figure.bbox.width)] if figure._suptitle else []
    for axes in figure.axes:
        texts += [(text, axes.bbox.width) for text in (axes.title, axes.xaxis.label)]
        texts.append((axes.yaxis.label, axes.bbox.height))
    changed = False
    for text, room in texts:
        text.set_parse_math(False)
        letters = _letters(room / figure.dpi, text.get_fontsize())
        lines = textwrap.fill(text.get_text(), letters)
        changed |= lines != text.get_text()
        text.set_text(lines)
    if changed:
        layout.execute(figure)
    figure.set_layout_engine("none")  # every format gets the same layout


def _letters(inches: float, fontsize: float) -> int:
    """How many letters of this size, in points, fit beside each other."""
    return max(HANDLE + 1, int(72 * inches / (LETTER * fontsize)))


# Axes


def logarithmic(axes: Any, low: float, high: float) -> None:
    """A logarithmic y axis from low to high, with round ticks written out, as 50, 100, 200."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    margin = max(1.03, (high / low) ** 0.04)
    low, high = max(low / margin, 1e-100), min(high * margin, 1e100)
    inches = axes.bbox.height / axes.figure.dpi
    decades = math.log10(high) - math.log10(low)
    ticks: Any = LogLocator(subs=(1, 2, 5), numticks=99)
    if high < 5 * low:  # holds one of those only
        ticks = MaxNLocator(4, steps=[1, 2, 5, 10])
    elif inches > 3 * decades:  # room for more than these
        ticks = LogLocator(subs=(1, 1.5, 2, 3, 5, 7), numticks=99)
    elif decades > 1.7 * inches:  # those would be too close
        ticks = LogLocator(numticks=max(2, int(3 * inches)))
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(ticks)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:.4g}")


def whole_numbers(axes: Any) -> None:
    """Ticks of the x axis at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
