"""Every picture: each label inside it and apart from the others, in PNG and PDF; files."""

import math
from collections.abc import Iterable
from dataclasses import asdict
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from diagnostics import plots
from diagnostics.examine import Settings, examine
from engine.ablation.curves import draw_curves
from model import RNNModel
from pictures.canvas import logarithmic, new_figure, on_page, write_figure
from pictures.run_curves import RunCurves, draw_runs

pytest.importorskip("matplotlib")

LONG = "awd-lstm_wikitext-2_wdrop-0.5_dropouti-0.65_dropoute-0.1_seed-1882_the-first-of-$5-runs"
# Each figure that was drawn, its box, and each text in it with its box.
Seen = list[tuple[Any, Any, list[tuple[str, Any]]]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    found: Seen = []
    draw_figure, draw_text = Figure.draw, Text.draw

    def figure(self: Any, renderer: Any) -> None:
        found.append((self, self.bbox.frozen(), []))
        draw_figure(self, renderer)

    def text(self: Any, renderer: Any, *rest: Any) -> None:
        if self.get_visible() and self.get_text().strip():
            found[-1][2].append((self.get_text(), self.get_window_extent(renderer)))
        draw_text(self, renderer, *rest)

    monkeypatch.setattr(Figure, "draw", figure)
    monkeypatch.setattr(Text, "draw", text)
    return found


def assert_legible(seen: Seen, words: Iterable[str]) -> None:
    """Nothing leaves a picture, nothing covers anything else, and all words are in each."""
    assert seen
    for figure, whole, texts in seen:
        for text, box in texts:
            assert whole.x0 <= box.x0 < box.x1 <= whole.x1, text
            assert whole.y0 <= box.y0 < box.y1 <= whole.y1, text
        for (one, a), (other, b) in combinations(texts, 2):
            apart = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert min(apart) < 0.5, (one, other)
        shown = "".join("".join(text.split()) for text, _ in texts)
        for word in words:
            assert "".join(word.split()) in shown
        for axes in (axes for axes in figure.axes if axes.get_visible()):
            assert min(axes.bbox.width, axes.bbox.height) > 0.5 * 72  # room for the curves


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 2, 3, 5])
@pytest.mark.parametrize("names", [["PTB"], [LONG, f"{LONG} (fresh)"]], ids=len)
def test_diagnosis(seen: Seen, tmp_path: Path, layers: int, names: list[str]) -> None:
    settings = Settings(lags=24, positions=2, windows=2, bptt=10, masks=1, thresholds=(1.0, 10.0))
    models = []
    for n, name in enumerate(names):
        model = RNNModel("LSTM", 12, 8, 8, max(1, layers - n), 0.2, 0.1, 0.1, 0.1, 0.3)
        rows = torch.randint(12, (settings.rows, 3))
        models.append(dict(name=name, figures=examine(model, rows, settings, [])))
    drawn = plots.draw(dict(settings=asdict(settings), models=models))
    seen.clear()
    for name, (_, figure) in drawn.items():
        write_figure(figure, tmp_path / name)
    assert len(seen) == 2 * len(drawn) == 14
    assert_legible(seen, names)


def table_figures(rows: int, epochs: int, switch: int | None) -> dict[str, Any]:
    names = ["_base $x_1$", *(f"- {LONG}, row {n}" for n in range(1, rows))]
    found = []
    for n, name in enumerate(names):
        curve: list[float | None] = [60 + n + 700 / e for e in range(1, epochs + 1)]
        runs = [dict(state="done", curve=curve, averaging_epoch=switch)]
        found.append(dict(name=name, runs=runs))
    return dict(title=f"A table of {LONG}", rows=found)


@pytest.mark.parametrize(("rows", "epochs", "switch"), [(12, 6, None), (2, 40, 30)])
def test_table(seen: Seen, tmp_path: Path, rows: int, epochs: int, switch: int | None) -> None:
    figures = table_figures(rows, epochs, switch)
    write_figure(draw_curves(figures), tmp_path / "curves")
    assert_legible(seen, [row["name"] for row in figures["rows"]])
    assert ("averaging begins" in [text for text, _ in seen[-1][2]]) == (switch is not None)


def test_an_epoch_that_was_not_finite_leaves_the_others_in_their_places() -> None:
    figures = table_figures(1, 4, 3)
    figures["rows"][0]["runs"][0]["curve"][1] = None
    [axes] = draw_curves(figures).axes
    curve, switch = axes.lines[:2]
    assert list(curve.get_xdata()) == [1, 3, 4]
    assert list(switch.get_ydata()) == [curve.get_ydata()[1]]


def test_nothing_to_draw() -> None:
    assert draw_curves(table_figures(1, 0, None)) is None


def curves(label: str, top: float, best: float) -> RunCurves:
    x = [float(n) for n in range(1, 41)]
    ys = [best * (top / best) ** (1 - n / 40) for n in range(1, 41)]
    ys[20] = math.nan
    return RunCurves(label, (x, ys), (x, ys), (x, [30.0] * 40), (x, ys), (40, 40.0, best),
                     (30, 30.0, ys[29]), 0.25)  # fmt: skip


@pytest.mark.parametrize("runs", [1, 10])
def test_runs(seen: Seen, tmp_path: Path, runs: int) -> None:
    found = [curves(f"{LONG} --seed {n}", 10.0 ** (n + 3), 60.0) for n in range(runs)]
    write_figure(draw_runs(found, "epoch"), tmp_path / "curves")
    assert_legible(seen, [run.label for run in found])


def test_a_run_without_figures(seen: Seen, tmp_path: Path) -> None:
    """All are nan, 0 or beyond what is shown."""
    x = [1.0, 2.0]
    run = RunCurves("diverged", (x, [math.nan] * 2), (x, [1e9] * 2), (x, [0.0] * 2),
                    ([], []), None, None, 0.0)  # fmt: skip
    write_figure(draw_runs([run], "update"), tmp_path / "curves", ["png"])
    assert_legible(seen, ["diverged"])


@pytest.mark.parametrize("inches", [1.2, 4.0])
def test_ticks_are_round_and_apart(inches: float) -> None:
    _, [[axes]] = new_figure(1, 1, (4, inches))
    for low, high in ((60, 61.5), (95, 105), (66, 128), (0.07, 0.31), (4.5, 30), (59, 1300),
                      (1e-8, 1e10), (1e-38, 1e38)):  # fmt: skip
        logarithmic(axes, low, high)
        low, high = axes.get_ylim()
        found = [tick for tick in axes.get_yticks() if low <= tick <= high]
        assert len(found) >= 2
        assert all(float(f"{tick:.4g}") == pytest.approx(tick, rel=1e-9) for tick in found)
        places = [axes.transData.transform((0, tick))[1] / axes.figure.dpi for tick in found]
        assert min(b - a for a, b in pairwise(places)) > 10 / 72


def test_files_are_the_same_each_time(tmp_path: Path) -> None:
    written = []
    for name in ("a.b", "c"):
        paths = write_figure(draw_curves(table_figures(1, 3, None)), tmp_path / name)
        assert [path.name for path in paths] == [f"{name}.png", f"{name}.pdf"]
        written.append([path.read_bytes() for path in paths])
    assert written[0] == written[1]
    png, pdf = written[0]
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert pdf.startswith(b"%PDF")
    assert b"/CIDFontType2" in pdf  # TrueType
    assert b"/Type3" not in pdf


def test_a_page_shows_a_png_and_links_to_a_pdf() -> None:
    assert on_page("A", "a.png") == "![A](a.png)"
    assert on_page("A", "a.pdf") == "[A](a.pdf)"
