"""What all pictures share: figures without a window system, labels that fit, PNG and PDF files.

The only module that imports matplotlib.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from data.files import atomic_write

DPI = 110
FORMATS = {"png": ("png",), "pdf": ("pdf",), "both": ("png", "pdf")}
# Distinguishable by eye, also for most colour-blind eyes, and in grey by their dashes.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b")
DASHES = ("-", "--", "-.", ":")
AVERAGING = dict(marker="^", markersize=8, linestyle="")  # where averaging begins
UNDER_TICKS = 0.5  # inches from an axis down to below its tick labels and its label
FILLED = 0.95  # of the room for a text; in a PDF the same text is up to 3 % wider than in a PNG
TICK_ROOM = 0.25  # least inches between two tick labels
# Candidates for ticks: every so many powers of ten, and first digits within each.
DECADES = (1, 2, 3, 5, 10, 20, 50, 100, 200)
DIGITS = ((1, 3), (1, 2, 5), (1, 2, 3, 5), (1, 1.5, 2, 3, 4, 5, 7))


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
    """Write path.png and path.pdf, atomically; path has no suffix.

    Raises:
        OSError: a file cannot be written.
    """
    paths = []
    for name, content in render(figure, formats).items():
        paths.append(path.with_name(f"{path.name}.{name}"))
        with atomic_write(paths[-1]) as file:
            file.write(content)
    return paths


def render(figure: Any, formats: Sequence[str] = FORMATS["both"]) -> dict[str, bytes]:
    """Draw a finished figure, once; returns the content of a file for each format.

    Titles and labels that do not fit are broken into lines. The same figure gives the same bytes.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_pdf import FigureCanvasPdf

    for axes in figure.axes:
        axes.set_visible(axes.has_data())
    settle(figure)
    contents = {}
    for name in formats:
        file = io.BytesIO()
        with matplotlib.rc_context({"pdf.fonttype": 42}):  # TrueType, as publishers want it
            # Not savefig, which draws twice.
            if name == "pdf":
                FigureCanvasPdf(figure).print_pdf(file, metadata={"CreationDate": None})
            else:
                FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
        contents[name] = file.getvalue()
    return contents


def on_page(caption: str, name: str) -> str:
    """Markdown that shows a picture, or links to one that a page cannot show (a PDF)."""
    return f"{'!' * (not name.endswith('.pdf'))}[{caption}]({name})"


def as_label(text: str) -> str:
    """A name as a label; matplotlib leaves out one that begins with _."""
    return " " * text.startswith("_") + text


# Legends


def legend_below(figure: Any, handles: list[Any], labels: list[str], fontsize: float = 8) -> None:
    """One legend below all panels, in as many columns as fit. The figure grows by its height."""
    place = dict(loc="outside lower center", fontsize=fontsize)
    height = _fitted_legend(figure, figure, handles, labels, FILLED * figure.bbox.width, place)
    figure.set_figheight(figure.get_figheight() + height)


def legends_under(rows: Any, fontsize: float = 7) -> None:
    """A legend under each panel that has labels. The figure grows by their heights.

    Args:
        rows: panels, an array (rows, columns).
    """
    from matplotlib.transforms import ScaledTranslation

    figure, grown = rows[0][0].figure, 0.0
    down = ScaledTranslation(0, -UNDER_TICKS, figure.dpi_scale_trans)
    for row in rows:
        heights = [0.0]
        for axes in row:
            handles, labels = axes.get_legend_handles_labels()
            place = dict(
                loc="upper center",
                fontsize=fontsize,
                bbox_to_anchor=(0.5, 0),
                bbox_transform=axes.transAxes + down,
                borderaxespad=0,
            )
            room = 0.8 * figure.bbox.width / len(row)
            if labels:
                heights.append(_fitted_legend(figure, axes, handles, labels, room, place))
        grown += max(heights)
    figure.set_figheight(figure.get_figheight() + grown)


def _fitted_legend(
    figure: Any, owner: Any, handles: list[Any], labels: list[str], room: float, place: Any
) -> float:
    """Add a legend to a figure or panel; returns its height, inches.

    Args:
        room: its largest width, pixels.
    """
    renderer = figure.canvas.get_renderer()
    for columns in range(min(5, len(labels)), 0, -1):
        legend = owner.legend(handles, labels, ncols=columns, **place)
        for text in legend.get_texts():
            text.set_parse_math(False)
            if columns == 1:
                handle = 4 * text.get_fontsize() * figure.dpi / 72  # with the space around it
                _wrap(text, text.get_text(), room - handle, renderer)
        extent = legend.get_window_extent(renderer)
        if extent.width <= room or columns == 1:
            return float(extent.height / figure.dpi)
        legend.remove()
    return 0.0


# Labels


def settle(figure: Any) -> None:
    """Lay the figure out; break titles and labels into lines that fit their panels."""
    renderer = figure.canvas.get_renderer()
    texts = [(figure, figure._suptitle, "width")] if figure._suptitle else []
    for axes in [axes for axes in figure.axes if axes.get_visible()]:
        texts += [(axes, text, "width") for text in (axes.title, axes.xaxis.label)]
        texts.append((axes, axes.yaxis.label, "height"))
    originals = [text.get_text() for _, text, _ in texts]
    layout = figure.get_layout_engine()
    layout.execute(figure)
    for _ in range(3):  # a label that needs more lines takes room from others
        changed = False
        for (owner, text, side), original in zip(texts, originals, strict=True):
            text.set_parse_math(False)
            changed |= _wrap(text, original, FILLED * getattr(owner.bbox, side), renderer)
        if not changed:
            break
        layout.execute(figure)
    figure.set_layout_engine("none")  # every format gets the same layout


def _wrap(text: Any, words: str, room: float, renderer: Any) -> bool:
    """Break words into lines of at most `room` pixels; returns whether the text changed."""
    properties = text.get_fontproperties()

    def width(line: str) -> float:
        return float(renderer.get_text_width_height_descent(line.strip(), properties, False)[0])

    before = text.get_text()
    text.set_text("\n".join(broken(words, lambda line: width(line) <= room)))
    return bool(text.get_text() != before)


def broken(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Break a text into lines that fit: at spaces, in a longer word after - _ / , or anywhere."""
    lines = [""]

    def add(pieces: Sequence[str], *finer: Callable[[str], Sequence[str]]) -> None:
        for piece in pieces:
            if fits(lines[-1] + piece):
                lines[-1] += piece
            elif fits(piece) or not finer:
                lines.append(piece)
            else:
                add(finer[0](piece), *finer[1:])

    add(re.findall(r"\S+\s*", text), lambda word: re.split(r"(?<=[_/,-])", word), list)
    return [line.strip() for line in lines if line.strip()]


# Axes


def logarithmic(axes: Any, low: float, high: float) -> None:
    """A logarithmic y axis from low to high, with round ticks written out, as 60, 80, 100."""
    from matplotlib.ticker import FixedLocator, NullLocator

    margin = max(1.03, (high / low) ** 0.04)
    low, high = max(low / margin, 1e-300), min(high * margin, 1e300)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    room = TICK_ROOM * axes.figure.dpi / axes.bbox.height
    axes.yaxis.set_major_locator(FixedLocator(round_numbers(low, high, room)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:.4g}")


def round_numbers(low: float, high: float, room: float) -> list[float]:
    """Round numbers from low to high that cover a logarithmic axis most evenly.

    Args:
        room: least distance of two of them, as a share of the axis.
    """
    span = math.log10(high) - math.log10(low)

    def distances(numbers: list[float]) -> list[float]:
        return [(math.log10(b) - math.log10(a)) / span for a, b in pairwise(numbers)]

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    sequences = [[10.0**d for d in decades if d % step == 0] for step in DECADES]
    if len(decades) < 10:
        sequences += [[m * 10.0**d for d in decades for m in digits] for digits in DIGITS]
    for power in range(3):  # equal steps
        for unit in (m * 10.0 ** (math.floor(math.log10(high - low)) - power) for m in (1, 2, 5)):
            if (high - low) / unit <= 1 / room:
                steps = range(math.ceil(low / unit), math.floor(high / unit) + 1)
                sequences.append([n * unit for n in steps])
    inside = [[x for x in numbers if low <= x <= high] for numbers in sequences]
    fitting = [numbers for numbers in inside if min(distances(numbers), default=1.0) >= room]
    several = [numbers for numbers in fitting if len(numbers) > 1] or fitting
    return min(several, key=lambda numbers: max(distances([low, *numbers, high])))


def whole_numbers(axes: Any) -> None:
    """Ticks of the x axis at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
