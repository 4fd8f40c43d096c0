"""The pictures of a diagnosis."""

from collections.abc import Callable
from typing import Any

from layers.lstm import LSTM
from pictures.canvas import COLOURS, as_label, legend_below, new_figure, whole_numbers

GATE_COLOURS = dict(zip(LSTM.gates, COLOURS, strict=False))
STATES = {"cells": "c", "hidden": "h"}
LAG = "lag, time steps"
NORM = "norm, nats per unit of the state"
RATIO = "gradient by h over that at lag 0"
FACTOR = "factor on the gradient (no unit)"
SINGULAR = "singular value of W_hh (no unit)"
SHARE = "share of the squared global norm, %"
MOST_BARS = 10

# Draws the figures of one model's layer, by its number, into a panel.
Panel = Callable[[Any, dict[str, Any], int], None]


def draw(diagnosis: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """All pictures.

    Args:
        diagnosis: settings and one or two models, see diagnose.py.

    Returns:
        Name: (caption, figure), for pictures.canvas.write_figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    models = [dict(model, name=as_label(model["name"])) for model in diagnosis["models"]]
    settings = diagnosis["settings"]

    def lag_panel(axes: Any, figures: dict[str, Any], n: int) -> None:
        layer = figures["layers"][n]
        for (state, letter), colour in zip(STATES.items(), COLOURS, strict=False):
            _lag_curves(axes, layer[state], colour, f"by {letter}")
            if masked := layer.get(f"{state}_masked"):
                axes.plot(masked["quantiles"]["0.5"], color=colour, linestyle="--", linewidth=1)
        _bptt_line(axes, settings)

    lags = _by_layer(models, lag_panel, LAG, NORM, sharex=True, sharey=True)
    lags.suptitle("Median over samples, 25-75 % and 5-95 %; dashed: under the masks of training")
    prediction = _by_layer(models, _prediction, LAG, RATIO, sharex=True)
    prediction.suptitle("Powers of each gate's W_hh (dashed) against measurement (solid)")
    spectra = _by_layer(models, _spectra, "index, largest first", SINGULAR, sharey=True)
    spectra.suptitle("Singular values; dotted: under the mask of weight drop")
    gates = _by_layer(models, _gates, "value (no unit)", "% of values")
    filters = _by_layer(models, _filters, "sequence of the batch", FACTOR, sharey=True)
    filters.suptitle("What a gradient filter would leave of each sequence, by threshold")
    for figure in (lags, prediction, filters):
        legend_below(figure)
    return {
        "overview": ("Overview", overview(models, settings)),
        "lag-norms": ("Gradient norm by lag and layer", lags),
        "linear-prediction": ("Powers of W_hh against measurement", prediction),
        "spectra": ("Singular values of each gate's W_hh", spectra),
        "gates": ("What the gates let through", gates),
        "gradients": ("Who holds the gradient's norm", gradients(models, settings)),
        "filter": ("Masks of gradient filters, and clipping", filters),
    }


def overview(models: list[dict[str, Any]], settings: dict[str, Any]) -> Any:
    """The most telling panels on one picture: a row for each model."""
    figure, grid = new_figure(len(models), 3, (4.6, 3.6))
    for (lags, linear, shares), model in zip(grid, models, strict=True):
        layers = model["figures"]["layers"]
        for n, layer in enumerate(layers):
            colour = COLOURS[n % len(COLOURS)]
            _lag_curves(lags, layer["cells"], colour, f"by c of layer {n}")
            middle = layer["hidden"]["quantiles"]["0.5"]
            lags.plot(middle, color=colour, linestyle=":", label=f"by h of layer {n}")
        _bptt_line(lags, settings)
        _prediction(linear, model["figures"], len(layers) - 1)
        _shares(shares, model["figures"]["gradient"]["shares"])
        for axes, title, x, y in (
            (lags, f"{model['name']}: gradient of one step's loss", LAG, NORM),
            (linear, f"layer {len(layers) - 1}: powers of W_hh against measurement", LAG, RATIO),
            (shares, "who holds the gradient's norm", SHARE, ""),
        ):
            axes.set_title(title, fontsize=10)
            axes.set_xlabel(x)
            axes.set_ylabel(y)
    legend_below(figure)
    return figure


def gradients(models: list[dict[str, Any]], settings: dict[str, Any]) -> Any:
    """Norms of windows, whole and by part, and shares by parameter: a row for each model."""
    figure, grid = new_figure(len(models), 2, (5, 3.6))
    for (norms, shares), model in zip(grid, models, strict=True):
        gradient = model["figures"]["gradient"]
        norms.plot(gradient["norms"], "o-", color="black", label="whole model")
        for n, (part, values) in enumerate(gradient["parts"].items()):
            norms.plot(values, ".--", color=COLOURS[n % len(COLOURS)], linewidth=0.8, label=part)
        if clip := settings["clip"]:
            norms.axhline(clip, color="grey", linewidth=1, linestyle=":", label=f"--clip {clip:g}")
        norms.set_yscale("log")
        norms.set_title(f"{model['name']}: gradient norms", fontsize=10)
        norms.set_xlabel(f"window of {settings['bptt']} steps")
        whole_numbers(norms)
        norms.set_ylabel("norm of the gradient, nats per unit of a parameter")
        _shares(shares, gradient["shares"])
        shares.set_xlabel(SHARE)
    legend_below(figure)
    return figure


def _by_layer(
    models: list[dict[str, Any]], panel: Panel, xlabel: str, ylabel: str, **share: Any
) -> Any:
    """A figure with a row for each model and a column for each layer."""
    columns = max(len(model["figures"]["layers"]) for model in models)
    figure, grid = new_figure(len(models), columns, **share)
    for row, model in zip(grid, models, strict=True):
        row[0].set_ylabel(ylabel)
        for n in range(len(model["figures"]["layers"])):
            panel(row[n], model["figures"], n)
            row[n].set_title(f"{model['name']}, layer {n}", fontsize=10)
            row[n].set_xlabel(xlabel)
    return figure


# Panels


def _lag_curves(axes: Any, state: dict[str, Any], colour: str, label: str) -> None:
    """Median and bands over samples against the lag."""
    # A logarithmic axis has no place for 0.
    curves = {
        quantile: [v if v and v > 0 else float("nan") for v in values]
        for quantile, values in state["quantiles"].items()
    }
    lags = range(len(curves["0.5"]))
    axes.fill_between(lags, curves["0.05"], curves["0.95"], color=colour, alpha=0.12, linewidth=0)
    axes.fill_between(lags, curves["0.25"], curves["0.75"], color=colour, alpha=0.25, linewidth=0)
    axes.plot(lags, curves["0.5"], color=colour, label=label)
    axes.set_yscale("log")
    axes.minorticks_off()


def _bptt_line(axes: Any, settings: dict[str, Any]) -> None:
    if settings["bptt"] <= settings["lags"]:
        label = f"--bptt {settings['bptt']}"
        axes.axvline(settings["bptt"], color="grey", linewidth=0.8, linestyle=":", label=label)


def _prediction(axes: Any, figures: dict[str, Any], n: int) -> None:
    layer = figures["layers"][n]
    measured = layer["hidden"]["quantiles"]["0.5"]
    known = [v / measured[0] for v in measured] if measured[0] else []
    axes.plot(known, color="black", label="measured, median")
    for gate, found in layer["prediction"].items():
        label = f"powers of the {gate} gate's W_hh"
        axes.plot(found["sizes"], color=GATE_COLOURS[gate], linestyle="--", label=label)
    axes.set_yscale("log")
    axes.minorticks_off()
    # Room for what is measured; a prediction may leave the picture.
    lowest = min([v for v in known if v], default=1e-6)
    axes.set_ylim(max(min(lowest, 1e-6), 1e-24) / 3, max([*known, 1e6]) * 3)


def _spectra(axes: Any, figures: dict[str, Any], n: int) -> None:
    layer = figures["layers"][n]
    for gate, found in layer["spectrum"].items():
        label = f"{gate}, spectral radius {found['radius']:.2f}"
        axes.plot(found["singular_values"], color=GATE_COLOURS[gate], label=label)
        if "spectrum_masked" in layer:
            masked = layer["spectrum_masked"][gate]["singular_values"]
            axes.plot(masked, color=GATE_COLOURS[gate], linestyle=":", linewidth=1.2)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.legend(fontsize=7)


def _gates(axes: Any, figures: dict[str, Any], n: int) -> None:
    for gate, found in figures["layers"][n]["gates"].items():
        shares = [100 * share for share in found["histogram"]]
        low = -1.0 if gate == "cell" else 0.0
        edges = [low + (1 - low) * i / len(shares) for i in range(len(shares) + 1)]
        label = f"{gate}, saturated {100 * found['saturated']:.0f} %"
        axes.stairs(shares, edges, color=GATE_COLOURS[gate], label=label)
    axes.set_xticks([-1, -0.5, 0, 0.5, 1])
    axes.legend(fontsize=7)


def _filters(axes: Any, figures: dict[str, Any], n: int) -> None:
    found = figures["filters"]
    for i, (threshold, masks) in enumerate(found["masks"].items()):
        shade = str(0.75 - 0.7 * i / len(found["masks"]))
        axes.plot(masks[n], "o-", markersize=3, color=shade, label=f"filter at {threshold}")
    axes.axhline(found["clip_factor"], color=COLOURS[1], label="clipping")
    axes.set_ylim(0, 1.05)
    whole_numbers(axes)


def _shares(axes: Any, shares: dict[str, float]) -> None:
    order = sorted(shares, key=shares.__getitem__)[-MOST_BARS:]
    short = [name.replace("rnns.", "").replace("module.", "").replace("_l0", "") for name in order]
    axes.barh(short, [100 * shares[name] for name in order], color=COLOURS[0])
    axes.tick_params(axis="y", labelsize=7)
