"""The pictures of a diagnosis."""

from typing import Any

from layers.lstm import LSTM
from pictures.canvas import as_label, legend_below, legends_under, new_figure, whole_numbers

COLOURS = ("#1f77b4", "#d62728")  # of the first and the second model
LAYER_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#e377c2")
GATE_COLOURS = dict(zip(LSTM.gates, ("#2ca02c", "#ff7f0e", "#9467bd", "#8c564b"), strict=True))
LABELS = {"hidden": "|∂L_t / ∂h_(t-lag)|", "cells": "|∂L_t / ∂c_(t-lag)|"}


def draw(diagnosis: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """All pictures.

    Args:
        diagnosis: settings and one or two models, see diagnose.py.

    Returns:
        Name: (caption, figure), for pictures.canvas.render.

    Raises:
        ImportError: matplotlib is not installed.
    """
    models = [dict(model, name=as_label(model["name"])) for model in diagnosis["models"]]
    settings = diagnosis["settings"]
    return {
        "overview": ("Overview", overview(models, settings)),
        "lag-norms": ("Gradient norm by lag and layer", lag_norms(models, settings)),
        "linear-prediction": ("Powers of W_hh against measurement", prediction(models)),
        "spectra": ("Singular values of each gate's W_hh", spectra(models)),
        "gates": ("What the gates let through", gates(models)),
        "gradients": ("Who holds the gradient's norm", gradients(models, settings)),
        "filter": ("Masks of gradient filters, and clipping", filters(models)),
    }


def _most_layers(models: list[dict[str, Any]]) -> int:
    return max(len(model["figures"]["layers"]) for model in models)


def _each_layer(models: list[dict[str, Any]]) -> Any:
    """Number of the model, its name, number of the layer and its figures."""
    for m, model in enumerate(models):
        for n, layer in enumerate(model["figures"]["layers"]):
            yield m, model["name"], n, layer


def _lag_panel(axes: Any, state: dict[str, Any], colour: str, label: str) -> None:
    """Median and bands over samples against the lag."""
    quantiles = state["quantiles"]
    lags = range(len(quantiles["0.5"]))
    # A logarithmic axis has no place for 0.
    curves = {q: [v if v and v > 0 else float("nan") for v in quantiles[q]] for q in quantiles}
    axes.fill_between(lags, curves["0.05"], curves["0.95"], color=colour, alpha=0.12, linewidth=0)
    axes.fill_between(lags, curves["0.25"], curves["0.75"], color=colour, alpha=0.25, linewidth=0)
    axes.plot(lags, curves["0.5"], color=colour, label=label)
    axes.set_yscale("log")


def _bptt_line(axes: Any, settings: dict[str, Any]) -> None:
    if settings["bptt"] <= settings["lags"]:
        label = f"--bptt {settings['bptt']}"
        axes.axvline(settings["bptt"], color="grey", linewidth=0.8, linestyle=":", label=label)


def lag_norms(models: list[dict[str, Any]], settings: dict[str, Any]) -> Any:
    """A row for each state, a column for each layer."""
    figure, grid = new_figure(2, _most_layers(models), sharex=True, sharey="row")
    for m, name, n, layer in _each_layer(models):
        for row, state in enumerate(LABELS):
            axes = grid[row][n]
            _lag_panel(axes, layer[state], COLOURS[m], name)
            if (masked := layer.get(f"{state}_masked")) is not None:
                middle = masked["quantiles"]["0.5"]
                axes.plot(
                    middle, color=COLOURS[m], linestyle="--", linewidth=1,
                    label=f"{name}, masks of training",
                )  # fmt: skip
            axes.set_title(f"layer {n}", fontsize=10)
            if n == 0:
                axes.set_ylabel(f"{LABELS[state]}, nats per unit")
            if row == 1:
                axes.set_xlabel("lag, time steps")
    for axes in grid.flat:
        if axes.has_data():
            _bptt_line(axes, settings)
    _legend_of(figure, grid[0][0])
    figure.suptitle("Gradient of one step's loss by lag: median, 25-75 % and 5-95 % of samples")
    return figure


def prediction(models: list[dict[str, Any]]) -> Any:
    """A row for each model, a column for each layer."""
    figure, grid = new_figure(len(models), _most_layers(models), sharex=True)
    for m, name, n, layer in _each_layer(models):
        axes = grid[m][n]
        _prediction_panel(axes, layer, n)
        axes.set_title(f"{name}, layer {n}", fontsize=10)
        axes.set_xlabel("lag, time steps")
        if n == 0:
            axes.set_ylabel("gradient by h over that at lag 0")
    _legend_of(figure, grid[0][0])
    figure.suptitle("Powers of each gate's W_hh (dashed) against measurement (solid)")
    return figure


def _prediction_panel(axes: Any, layer: dict[str, Any], n: int) -> None:
    measured = layer["hidden"]["quantiles"]["0.5"]
    if measured[0]:
        axes.plot([v / measured[0] for v in measured], color="black", label="measured, median")
    for gate, found in layer["prediction"].items():
        axes.plot(
            found["sizes"], color=GATE_COLOURS[gate], linestyle="--",
            label=f"powers of the {gate} gate's W_hh",
        )  # fmt: skip
    axes.set_yscale("log")
    # Room for what is measured; a prediction may leave the picture.
    known = [v / measured[0] for v in measured if v and measured[0]]
    axes.set_ylim(max(min([*known, 1e-6]), 1e-24) / 3, max([*known, 1e6]) * 3)


def spectra(models: list[dict[str, Any]]) -> Any:
    """A row for each model, a column for each layer, a colour for each gate."""
    figure, grid = new_figure(len(models), _most_layers(models), sharey=True)
    for m, name, n, layer in _each_layer(models):
        axes = grid[m][n]
        for gate in LSTM.gates:
            found = layer["spectrum"][gate]
            label = f"{gate}, spectral radius {found['radius']:.2f}"
            axes.plot(found["singular_values"], color=GATE_COLOURS[gate], label=label)
            if "spectrum_masked" in layer:
                masked = layer["spectrum_masked"][gate]["singular_values"]
                axes.plot(masked, color=GATE_COLOURS[gate], linestyle=":", linewidth=1.2)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_title(f"{name}, layer {n}", fontsize=10)
        axes.set_xlabel("index, largest first")
        axes.legend(fontsize=7)
        if n == 0:
            axes.set_ylabel("singular value of W_hh (no unit)")
    figure.suptitle("Singular values of each gate's W_hh; dotted: under the mask of weight drop")
    return figure


def gates(models: list[dict[str, Any]]) -> Any:
    """A row for each gate, a column for each layer."""
    figure, grid = new_figure(len(LSTM.gates), _most_layers(models), (4.2, 2.2))
    for row, gate in enumerate(LSTM.gates):
        for axes in grid[row]:
            axes.set_xlabel("value (no unit)", fontsize=8)
            axes.set_xticks([-1, -0.5, 0, 0.5, 1] if gate == "cell" else [0, 0.25, 0.5, 0.75, 1])
        grid[row][0].set_ylabel("% of values", fontsize=8)
    for m, name, n, layer in _each_layer(models):
        for row, gate in enumerate(LSTM.gates):
            axes, found = grid[row][n], layer["gates"][gate]
            shares = found["histogram"]
            low = -1.0 if gate == "cell" else 0.0
            edges = [low + (1 - low) * i / len(shares) for i in range(len(shares) + 1)]
            percents = [100 * s for s in shares]
            axes.stairs(percents, edges, fill=True, alpha=0.5, color=COLOURS[m], label=name)
            before = f"{axes.get_title()}, " if m else f"layer {n}, {gate} gate, saturated: "
            axes.set_title(f"{before}{100 * found['saturated']:.0f} %", fontsize=9)
    _legend_of(figure, grid[0][0])
    return figure


def gradients(models: list[dict[str, Any]], settings: dict[str, Any]) -> Any:
    """Shares by parameter, and for each model the norms of windows."""
    names = list(dict.fromkeys(p for m in models for p in m["figures"]["gradient"]["shares"]))
    figure, grid = new_figure(1, 1 + len(models), (5, 1.5 + 0.28 * len(names)))
    left = grid[0][0]
    width = 0.8 / len(models)
    for m, model in enumerate(models):
        gradient = model["figures"]["gradient"]
        shares = [100 * gradient["shares"].get(name, 0) for name in names]
        places = [i + m * width for i in range(len(names))]
        left.barh(places, shares, height=width, color=COLOURS[m], label=model["name"])
        _norm_panel(grid[0][1 + m], model["name"], gradient, settings)
    middles = [i + width * (len(models) - 1) / 2 for i in range(len(names))]
    left.set_yticks(middles, names, fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("share of the squared global norm, %")
    legends_under(grid)
    return figure


def _norm_panel(axes: Any, name: str, gradient: dict[str, Any], settings: dict[str, Any]) -> None:
    """Norm of each window's gradient: the whole and by part of the model."""
    axes.plot(gradient["norms"], "o-", color="black", label="whole model")
    for n, (part, norms) in enumerate(gradient["parts"].items()):
        colour = LAYER_COLOURS[n % len(LAYER_COLOURS)]
        axes.plot(norms, ".--", color=colour, linewidth=0.8, label=part)
    if clip := settings["clip"]:
        axes.axhline(clip, color="grey", linewidth=1, linestyle=":", label=f"--clip {clip:g}")
    axes.set_yscale("log")
    axes.set_title(f"{name}: gradient norms", fontsize=10)
    axes.set_xlabel(f"window of {settings['bptt']} steps")
    whole_numbers(axes)
    axes.set_ylabel("norm of the gradient, nats per unit of a parameter")


def filters(models: list[dict[str, Any]]) -> Any:
    """Masks by sequence; a row for each model, a column for each layer."""
    figure, grid = new_figure(len(models), _most_layers(models), sharey=True)
    for m, name, n, _ in _each_layer(models):
        found = models[m]["figures"]["filters"]
        axes = grid[m][n]
        for i, (threshold, masks) in enumerate(found["masks"].items()):
            shade = str(0.75 - 0.7 * i / max(1, len(found["masks"])))
            axes.plot(
                masks[n],
                "o-",
                markersize=3,
                linewidth=0.8,
                color=shade,
                label=f"filter at {threshold}",
            )
        axes.axhline(found["clip_factor"], color=COLOURS[1], label="clipping")
        axes.set_ylim(0, 1.05)
        axes.set_title(f"{name}, layer {n}", fontsize=10)
        axes.set_xlabel("sequence of the batch")
        whole_numbers(axes)
        if n == 0:
            axes.set_ylabel("factor on the gradient (no unit)")
    _legend_of(figure, grid[0][0])
    figure.suptitle("What a gradient filter would leave of each sequence, by threshold")
    return figure


def overview(models: list[dict[str, Any]], settings: dict[str, Any]) -> Any:
    """The most telling panels on one picture: a row for each model."""
    figure, grid = new_figure(len(models), 3, (4.6, 3.6))
    for m, model in enumerate(models):
        lags, linear, shares = grid[m]
        for n, layer in enumerate(model["figures"]["layers"]):
            shade = LAYER_COLOURS[n % len(LAYER_COLOURS)]
            _lag_panel(lags, layer["cells"], shade, f"by c of layer {n}")
            hidden = layer["hidden"]["quantiles"]["0.5"]
            lags.plot(hidden, color=shade, linestyle="--", linewidth=1, label=f"by h of layer {n}")
        _bptt_line(lags, settings)
        lags.set_title(f"{model['name']}: gradient of one step's loss, median", fontsize=10)
        lags.set_xlabel("lag, time steps")
        lags.set_ylabel("norm, nats per unit of the state")
        last = len(model["figures"]["layers"]) - 1
        _prediction_panel(linear, model["figures"]["layers"][last], last)
        linear.set_title(f"layer {last}: powers of W_hh against measurement", fontsize=10)
        linear.set_xlabel("lag, time steps")
        linear.set_ylabel("gradient by h over that at lag 0")
        _share_panel(shares, model["figures"]["gradient"]["shares"])
    legends_under(grid)
    return figure


def _share_panel(axes: Any, shares: dict[str, float]) -> None:
    order = sorted(shares, key=shares.__getitem__)[-10:]
    short = [name.replace("rnns.", "").replace("module.", "").replace("_l0", "") for name in order]
    axes.barh(short, [100 * shares[name] for name in order], color=COLOURS[0])
    axes.tick_params(axis="y", labelsize=7)
    axes.set_title("who holds the gradient's norm", fontsize=10)
    axes.set_xlabel("share of the squared global norm, %")


def _legend_of(figure: Any, axes: Any) -> None:
    """One legend below all panels, from the entries of one of them."""
    legend_below(figure, *axes.get_legend_handles_labels())
