"""Every picture: each label inside it and apart from the others, in PNG and PDF; files."""

import math
from collections.abc import Callable
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
from pictures.canvas import broken, on_page, render, round_numbers, write_figure
from pictures.run_curves import RunCurves, draw_runs

pytest.importorskip("matplotlib")

LONG = "awd-lstm_wikitext-2_wdrop-0.5_dropouti-0.65_dropoute-0.1_seed-1882_the-first-of-$5-runs"
Seen = dict[str, tuple[Any, list[tuple[str, Any]]]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """By renderer: the box of the last figure, and each text in it with its box."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    found: Seen = {}
    draw_figure, draw_text = Figure.draw, Text.draw

    def name_of(renderer: Any) -> str:
        return type(getattr(renderer, "_renderer", renderer)).__name__

    def figure(self: Any, renderer: Any) -> None:
        found[name_of(renderer)] = (self.bbox.frozen(), [])
        draw_figure(self, renderer)

    def text(self: Any, renderer: Any, *rest: Any) -> None:
        if self.get_visible() and self.get_text().strip():
            box = self.get_window_extent(renderer)
            found[name_of(renderer)][1].append((self.get_text(), box))
        draw_text(self, renderer, *rest)

    monkeypatch.setattr(Figure, "draw", figure)
    monkeypatch.setattr(Text, "draw", text)
    return found


def assert_legible(seen: Seen, figure: Any, *words: str) -> None:
    """Nothing leaves the picture, nothing covers anything else, and all words are there."""
    seen.clear()
    files = render(figure)
    assert files["png"].startswith(b"\x89PNG\r\n\x1a\n")
    assert files["pdf"].startswith(b"%PDF")
    assert b"/CIDFontType2" in files["pdf"]  # TrueType
    assert b"/Type3" not in files["pdf"]
    assert set(seen) == {"RendererAgg", "RendererPdf"}
    for whole, texts in seen.values():
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
        assert min(axes.bbox.width, axes.bbox.height) > 0.5 * 72  # room is left for the curves


# Diagnosis


def diagnosis(layers: int, names: list[str]) -> dict[str, Any]:
    settings = Settings(lags=24, positions=2, windows=2, bptt=10, masks=1, thresholds=(1.0, 10.0))
    models = []
    for n, name in enumerate(names):
        model = RNNModel("LSTM", 12, 8, 8, max(1, layers - n), 0.2, 0.1, 0.1, 0.1, 0.3)
        rows = torch.randint(12, (settings.rows, 3))
        models.append(dict(name=name, figures=examine(model, rows, settings, [])))
    return dict(settings=asdict(settings), models=models)


CASES = [(n, names) for n in (1, 2, 3, 5) for names in (["PTB"], [LONG, f"{LONG} (fresh)"])]
FAST = {("overview", 2, 1), ("lag_norms", 1, 2), ("spectra", 1, 1)}


@pytest.mark.parametrize(
    ("layers", "names", "picture"),
    [
        pytest.param(
            layers, names, picture, id=f"{picture}-{layers}-{len(names)}",
            marks=[] if (picture, layers, len(names)) in FAST else pytest.mark.slow,
        )
        for layers, names in CASES
        for picture in ("overview", "lag_norms", "prediction", "spectra", "gates", "gradients",
                        "filters")
    ],
)  # fmt: skip
def test_diagnosis(seen: Seen, layers: int, names: list[str], picture: str) -> None:
    found = diagnosis(layers, names)
    draw: Callable[..., Any] = getattr(plots, picture)
    both = picture in ("overview", "lag_norms", "gradients")
    figure = draw(found["models"], found["settings"]) if both else draw(found["models"])
    words = names if picture != "gates" or len(names) > 1 else []
    assert_legible(seen, figure, *words)


# Tables


def table_figures(rows: int, epochs: int, switch: int | None) -> dict[str, Any]:
    names = ["_base $x_1$", *(f"- {LONG}, row {n}" for n in range(1, rows))]
    found = []
    for n, name in enumerate(names):
        curve: list[float | None] = [60 + n + 700 / e for e in range(1, epochs + 1)]
        runs = [dict(state="done", curve=curve, averaging_epoch=switch)]
        found.append(dict(name=name, runs=runs))
    return dict(title=f"A table of {LONG}", rows=found)


@pytest.mark.parametrize(("rows", "epochs", "switch"), [(12, 6, None), (2, 40, 30)])
def test_table(seen: Seen, rows: int, epochs: int, switch: int | None) -> None:
    figures = table_figures(rows, epochs, switch)
    assert_legible(seen, draw_curves(figures), *(row["name"] for row in figures["rows"]))
    [*_, (_, texts)] = seen.values()
    assert ("averaging begins" in [text for text, _ in texts]) == (switch is not None)


def test_nothing_to_draw() -> None:
    assert draw_curves(table_figures(1, 0, None)) is None


# Runs


def curves(label: str, top: float, best: float) -> RunCurves:
    x = [float(n) for n in range(1, 41)]
    ys = [best * (top / best) ** (1 - n / 40) for n in range(1, 41)]
    ys[20] = math.nan
    return RunCurves(label, (x, ys), (x, ys), (x, [30.0] * 40), (x, ys), (40, 40.0, best),
                     (30, 30.0, ys[29]), 0.25)  # fmt: skip


@pytest.mark.parametrize("runs", [1, 10])
def test_runs(seen: Seen, runs: int) -> None:
    found = [curves(f"{LONG} --seed {n}", 10.0 ** (n + 3), 60.0) for n in range(runs)]
    assert_legible(seen, draw_runs(found, "epoch"), *(run.label for run in found))


def test_a_run_without_figures(seen: Seen) -> None:
    """All are nan, 0 or beyond what is shown."""
    x = [1.0, 2.0]
    run = RunCurves("diverged", (x, [math.nan] * 2), (x, [1e9] * 2), (x, [0.0] * 2),
                    ([], []), None, None, 0.0)  # fmt: skip
    assert_legible(seen, draw_runs([run], "update"))


# What they share


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (59, 1300),
        (60, 61.5),
        (95, 105),
        (4.5, 30),
        (66, 128),
        (1e-8, 1e10),
        (0.07, 0.31),
        (1e-300, 1e300),
    ],
)
def test_round_numbers(low: float, high: float) -> None:
    for room in (0.05, 0.1, 0.2):
        found = round_numbers(low, high, room)
        span = math.log(high) - math.log(low)
        assert len(found) >= 2
        assert low <= found[0] < found[-1] <= high
        assert all(math.log(b / a) / span >= room * 0.99 for a, b in pairwise(found))


def test_broken() -> None:
    def fits(line: str) -> bool:
        return len(line.strip()) <= 12

    found = broken("Gradient of 25-75 % awd-lstm-wikitext-2 abcdefghijklmnop", fits)
    assert found == ["Gradient of", "25-75 % awd-", "lstm-", "wikitext-2 a", "bcdefghijklm", "nop"]
    assert broken("", fits) == []


def test_a_page_shows_a_png_and_links_to_a_pdf() -> None:
    assert on_page("A", "a.png") == "![A](a.png)"
    assert on_page("A", "a.pdf") == "[A](a.pdf)"


def test_files_are_the_same_each_time(tmp_path: Path) -> None:
    written = []
    for name in ("a.b", "c"):
        paths = write_figure(draw_curves(table_figures(1, 3, None)), tmp_path / name)
        assert [path.name for path in paths] == [f"{name}.png", f"{name}.pdf"]
        written.append([path.read_bytes() for path in paths])
    assert written[0] == written[1]
