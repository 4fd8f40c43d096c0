"""The Markdown page of a diagnosis."""

from typing import Any

from diagnostics import words
from layers.lstm import LSTM
from pictures.canvas import on_page

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
    several = len(models) > 1
    columns = [
        (f"{model['name']}, layer {n}" if several else f"layer {n}", model["figures"], n)
        for model in models
        for n in range(len(model["figures"]["layers"]))
    ]
    layers = [figures["layers"][n] for _, figures, n in columns]
    rows: list[tuple[str, list[str]]] = []
    for state, letter in words.STATES.items():
        for key, label in ((state, ""), (f"{state}_masked", ", masks of training")):
            if not any(key in layer for layer in layers):
                continue
            found = [layer.get(key) for layer in layers]
            name = f"gradient by {letter}{label}"
            rows.append((name, [words.verdict(f) if f else "" for f in found]))
            rows.append(
                (
                    f"{name}: down to 10 %, 1 % at lag",
                    [_reach(f, settings["lags"]) if f else "" for f in found],
                )
            )
            rows.append(
                (
                    f"{name}: factor a step, near, far",
                    [f"{_short(f['near'])}, {_short(f['far'])}" if f else "" for f in found],
                )
            )
    for gate in LSTM.gates:
        cells = [_spectrum(layer, gate) for layer in layers]
        rows.append((f"W_hh of the {gate} gate: largest singular value, spectral radius", cells))
    for gate in LSTM.gates:
        saturated = [words.percent(layer["gates"][gate]["saturated"]) for layer in layers]
        rows.append((f"{gate} gate saturated", saturated))
    for state, letter in words.STATES.items():
        rows.append(
            (f"root mean square of {letter}", [_short(x["states"][state]["rms"]) for x in layers])
        )
    rows.append(
        (
            "gradient norm of the layer's parameters, mean",
            [_short(words.mean(f["gradient"]["parts"][f"layer {n}"])) for _, f, n in columns],
        )
    )
    head = ["", *(name for name, _, _ in columns)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows]


def _reach(state: dict[str, Any], lags: int) -> str:
    return ", ".join(f"over {lags}" if lag is None else str(lag) for lag in state["reach"].values())


def _spectrum(layer: dict[str, Any], gate: str) -> str:
    def both(found: dict[str, Any]) -> str:
        return f"{found['singular_values'][0]:.2f}, {found['radius']:.2f}"

    text = both(layer["spectrum"][gate])
    if "spectrum_masked" in layer:
        text += f" (masked {both(layer['spectrum_masked'][gate])})"
    return text


def _short(value: float) -> str:
    return f"{value:.3g}"
