"""A diagnosis in words: what was found, and a Markdown page with a table of the figures."""

from statistics import fmean
from typing import Any

from diagnostics.lag_norms import EXPLOSION
from gradient_filter import median_mask
from layers.lstm import LSTM
from pictures.canvas import on_page

VANISHED_WITHIN = 10  # steps: a gradient that is down to a hundredth so soon vanishes
STATES = {"hidden": "h", "cells": "c"}
READING = """\
L_t is the loss of step t alone, in nats. The gradient by h or c at a lag is the norm of L_t's
derivative by the state that many steps earlier, along all paths (from a lower layer also through
those above it), for single sequences; figures are medians over {samples} samples ({sequences}
sequences at {positions} steps) of the {split} text of {data}, of the model as it is evaluated.
*explodes*: somewhere at least ten times as large as at lag 1; *vanishes*: down to 1 % of that
within ten steps; *fades*: down to 1 % later; *lasts*: not down to 1 % within {lags} steps. Near are
the lags up to 10, far the second half. The linear analysis takes each gate's W_hh for the
Jacobian of a step. A gate is saturated within 0.05 of an end of its range.

Gradients of whole windows ({windows} windows of {bptt} steps), shares and filters are those of
training, with its dropout, AR ({alpha:g}) and TAR ({beta:g}). A share is one of the squared norm, a
tied matrix counted once. A filter *singles out* a sequence that gets less than nine tenths of what
the median one gets."""


def verdict(state: dict[str, Any]) -> str:
    """One word for how the median gradient changes with the lag.

    Args:
        state: figures of lag_norms.describe.

    Returns:
        explodes: somewhere at least EXPLOSION times as large as at lag 1; vanishes: down to a
        hundredth within VANISHED_WITHIN steps; fades: down to a hundredth later; lasts: not
        down to a hundredth within the lags looked at.
    """
    if state["growth"] >= EXPLOSION:
        return "explodes"
    reach = state["reach"]["0.01"]
    if reach is None:
        return "lasts"
    return "vanishes" if reach <= VANISHED_WITHIN else "fades"


def findings(figures: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """The sentences on one model, the most important one first.

    Args:
        figures: what examine returned.
        settings: its settings, as a dict.
    """
    return [
        headline(figures["layers"]),
        _clipping(figures["gradient"], settings["clip"]),
        *_filters(figures["filters"]),
    ]


def headline(layers: list[dict[str, Any]]) -> str:
    """Where the median gradient explodes, vanishes, fades and lasts."""
    where: dict[str, list[str]] = {}
    for n, layer in enumerate(layers):
        for state, letter in STATES.items():
            where.setdefault(verdict(layer[state]), []).append(f"{letter} of layer {n}")

    def sentences(verbs: dict[str, str]) -> list[str]:
        found = {verb: where[kind] for kind, verb in verbs.items() if kind in where}
        every = len(STATES) * len(layers)
        return [
            f"{verb}: {'h and c of every layer' if len(places) == every else ', '.join(places)}."
            for verb, places in found.items()
        ]

    sudden = sentences(dict(explodes="Gradients explode", vanishes="Gradients vanish"))
    slow = sentences(dict(fades="They fade", lasts="They last"))
    return " ".join((sudden or ["Gradients neither explode nor vanish at once."]) + slow)


def _clipping(gradient: dict[str, Any], clip: float) -> str:
    shares = gradient["shares"]
    order = sorted(shares, key=shares.__getitem__, reverse=True)
    most = ", ".join(f"`{name}` ({percent(shares[name])})" for name in order[:3])
    text = f"Most of the squared global norm is of {most}."
    if not clip:
        return f"{text} Nothing is clipped (--clip 0)."
    factors = gradient["clip_factors"]
    clipped = [factor for factor in factors if factor < 1]
    text += f" Clipping at {clip:g} acts on {len(clipped)} of {len(factors)} windows"
    if clipped:
        text += f", there multiplying by {fmean(clipped):.2f} in the mean"
    return text + "."


def _filters(figures: dict[str, Any]) -> list[str]:
    found = []
    for threshold, layers in figures["singled_out"].items():
        chosen = {sequence for layer in layers for sequence in layer}
        who = f"{len(chosen)} of {len(figures['norms'][0])} sequences" if chosen else "none"
        found.append(
            f"A filter at {threshold} would single out {who}; an ordinary sequence is multiplied "
            f"by {median_mask(float(threshold)):.2f} a layer."
        )
    factor = figures["clip_factor"]
    return [*found, f"Clipping multiplies all sequences of that batch alike, by {factor:.2f}."]


def comparison(models: list[dict[str, Any]]) -> list[str]:
    """What differs between two models, layer by layer where they have as many."""
    (one, other), figures = [m["name"] for m in models], [m["figures"] for m in models]
    layers = zip(*(found["layers"] for found in figures), strict=False)
    sentences = [
        f"Layer {n}, gradient by {letter}: {one} {verdict(a[state])}, {other} {verdict(b[state])}."
        for n, (a, b) in enumerate(layers)
        for state, letter in STATES.items()
    ]
    norms = [f"{fmean(found['gradient']['norms']):.3g}" for found in figures]
    return [*sentences, f"Global norm of a window's gradient: {' and '.join(norms)}."]


def markdown(diagnosis: dict[str, Any], pictures: dict[str, str]) -> str:
    """The page, from the diagnosis as it goes into the JSON file.

    Args:
        diagnosis: settings and models, see diagnose.py.
        pictures: file name and caption of each plot.
    """
    settings, models = diagnosis["settings"], diagnosis["models"]
    names = [model["name"] for model in models]
    lines = [f"# How gradients flow back: {' and '.join(names)}", ""]
    for model in models:
        lines += [f"## What was found in {model['name']}", ""]
        lines += [f"- {sentence}" for sentence in model["findings"]] + [""]
    if "comparison" in diagnosis:
        lines += ["## Side by side", "", *(f"- {s}" for s in diagnosis["comparison"]), ""]
    lines += ["## Figures", "", *_table(models, settings), ""]
    lines += ["## How to read this", "", READING.format(**settings), ""]
    if pictures:
        lines += ["## Pictures", ""]
        lines += [on_page(caption, name) + "\n" for name, caption in pictures.items()]
    return "\n".join(lines).rstrip() + "\n"


def _table(models: list[dict[str, Any]], settings: dict[str, Any]) -> list[str]:
    """A column for each layer of each model."""
    columns = {
        f"{model['name']}, layer {n}": _column(model["figures"], n, settings)
        for model in models
        for n in range(len(model["figures"]["layers"]))
    }
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        cells = [column.get(name, "") for column in columns.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _column(figures: dict[str, Any], n: int, settings: dict[str, Any]) -> dict[str, str]:
    """The cells of one layer, by the names of their lines."""
    layer, cells = figures["layers"][n], dict[str, str]()
    for state, letter in STATES.items():
        for key, masks in ((state, ""), (f"{state}_masked", ", masks of training")):
            if (found := layer.get(key)) is None:
                continue
            name = f"gradient by {letter}{masks}"
            reach = [lag or f"over {settings['lags']}" for lag in found["reach"].values()]
            cells[name] = verdict(found)
            cells[f"{name}: down to 10 %, 1 % at lag"] = "{}, {}".format(*reach)
            cells[f"{name}: factor a step, near, far"] = f"{found['near']:.3g}, {found['far']:.3g}"
            if found["at_bptt"] is not None:
                cells[f"{name}: left at lag {settings['bptt']}"] = percent(found["at_bptt"])
            cells[f"{name}: samples in which it grows tenfold"] = percent(found["exploding"])
    for gate in LSTM.gates:
        text = _spectrum(layer["spectrum"][gate])
        if "spectrum_masked" in layer:
            text += f" (masked {_spectrum(layer['spectrum_masked'][gate])})"
        cells[f"W_hh of the {gate} gate: largest singular value, spectral radius"] = text
    for gate in LSTM.gates:
        cells[f"{gate} gate saturated"] = percent(layer["gates"][gate]["saturated"])
    kept = layer["gates"]["forget"]["kept_per_step"]
    cells["left of a cell's gradient per step by the forget gate alone"] = percent(kept)
    for state, letter in STATES.items():
        cells[f"root mean square of {letter}"] = f"{layer['states'][state]['rms']:.3g}"
    norm = fmean(figures["gradient"]["parts"][f"layer {n}"])
    cells["gradient norm of the layer's parameters, mean"] = f"{norm:.3g}"
    return cells


def _spectrum(found: dict[str, Any]) -> str:
    return f"{found['singular_values'][0]:.2f}, {found['radius']:.2f}"


def percent(share: float) -> str:
    """A share as a percentage of two significant digits."""
    if 0 < share < 1e-4:
        return "under 0.01 %"
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"
