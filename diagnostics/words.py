"""What the figures of a diagnosis mean, in sentences."""

from typing import Any

from diagnostics.lag_norms import EXPLOSION, NEAR
from gradient_filter import median_mask
from layers.lstm import LSTM

VANISHED_WITHIN = 10  # steps: a gradient that is down to a hundredth so soon vanishes
DOMINANT = 0.5  # a share of the squared norm that settles what clipping does
STATES = {"hidden": "h", "cells": "c"}


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
    """The sentences on one model, the most important ones first.

    Args:
        figures: what examine returned.
        settings: its settings, as a dict.
    """
    layers = list(enumerate(figures["layers"]))
    return [
        headline(figures["layers"]),
        *(_flow(n, layer, settings) for n, layer in layers),
        *(_linear(n, layer) for n, layer in layers),
        *(_saturation(n, layer) for n, layer in layers),
        _norm(figures["gradient"], settings),
        *_filter(figures["filters"]),
    ]


def headline(layers: list[dict[str, Any]]) -> str:
    """Where the median gradient explodes, vanishes, fades and lasts."""
    where: dict[str, list[str]] = {}
    for n, layer in enumerate(layers):
        for state, letter in STATES.items():
            where.setdefault(verdict(layer[state]), []).append(f"{letter} of layer {n}")

    def places(kind: str, verb: str) -> list[str]:
        found = where.get(kind, [])
        if len(found) == 2 * len(layers):
            return [f"{verb}: h and c of every layer."]
        return [f"{verb}: {_list(found)}."] if found else []

    sudden = places("explodes", "Gradients explode") + places("vanishes", "Gradients vanish")
    slow = places("fades", "They fade") + places("lasts", "They last")
    return " ".join((sudden or ["Gradients neither explode nor vanish at once."]) + slow)


def _flow(n: int, layer: dict[str, Any], settings: dict[str, Any]) -> str:
    text = []
    for state, letter in STATES.items():
        figures = layer[state]
        kind, reach = verdict(figures), figures["reach"]["0.01"]
        if kind == "explodes":
            how = f"{figures['growth']:.3g} times as large as at lag 1 somewhere"
        elif kind == "lasts":
            how = f"over 1 % of it is left at lag {settings['lags']}"
        else:
            how = f"to 1 % within {reach} steps"
        left = figures["at_bptt"]
        cut = "" if left is None else f", {percent(left)} left at lag {settings['bptt']}"
        text.append(
            f"the gradient by {letter} {kind} ({how}{cut}; a step back multiplies it by "
            f"{figures['near']:.2f} over the first {NEAR}, by {figures['far']:.2f} in the far half)"
        )
    sentence = f"Layer {n}: {'; '.join(text)}."
    wild = max(layer[state]["exploding"] for state in STATES)
    if wild > 0:
        sentence += f" In {percent(wild)} of the samples it grows tenfold somewhere."
    if "cells_masked" in layer and (masked := verdict(layer["cells_masked"])) != verdict(
        layer["cells"]
    ):
        sentence += f" Under the masks of training the gradient by c {masked}."
    return sentence


def _linear(n: int, layer: dict[str, Any]) -> str:
    radii = {gate: layer["spectrum"][gate]["radius"] for gate in LSTM.gates}
    low, high = min(radii, key=radii.__getitem__), max(radii, key=radii.__getitem__)
    measured = layer["hidden"]["far"]
    against = "within their range"
    if measured < radii[low]:
        against = "less than any of them: the gates take away what the matrices alone would keep"
    elif measured > radii[high]:
        against = "more than any of them: the cells carry what the matrices alone would lose"
    return (
        f"Layer {n}, linear analysis: powers of W_hh alone would multiply the gradient by "
        f"{radii[low]:.2f} ({low} gate) to {radii[high]:.2f} ({high} gate) a step; "
        f"measured by h in the far half: {measured:.2f}, {against}."
    )


def _saturation(n: int, layer: dict[str, Any]) -> str:
    gates = layer["gates"]
    shares = [f"{gate} {percent(gates[gate]['saturated'])}" for gate in LSTM.gates]
    return (
        f"Layer {n}, saturated values of each gate: {_list(shares)}. The forget gate alone would "
        f"leave {percent(gates['forget']['kept_per_step'])} of a cell's gradient per step."
    )


def _norm(gradient: dict[str, Any], settings: dict[str, Any]) -> str:
    shares = gradient["shares"]
    order = sorted(shares, key=shares.__getitem__, reverse=True)
    first = ", ".join(f"`{name}` {percent(shares[name])}" for name in order[:3])
    factors = gradient["clip_factors"]
    clipped = [factor for factor in factors if factor < 1]
    text = f"Of the squared global norm {first} hold most"
    if shares[order[0]] >= DOMINANT:
        text += f"; `{order[0]}` alone decides how much is clipped"
    if not settings["clip"]:
        return f"{text}. Nothing is clipped (--clip 0)."
    text += f". Clipping at {settings['clip']:g} acts on {len(clipped)} of {len(factors)} windows"
    if clipped:
        text += f", there multiplying by {sum(clipped) / len(clipped):.2f} in the mean"
    return text + "."


def _filter(figures: dict[str, Any]) -> list[str]:
    found = []
    for threshold, layers in figures["singled_out"].items():
        chosen = {b for layer in layers for b in layer}
        where = "; ".join(
            f"layer {n}: {', '.join(map(str, layer))}" for n, layer in enumerate(layers) if layer
        )
        who = f"{len(chosen)} of {len(figures['norms'][0])} sequences ({where})"
        found.append(
            f"A filter at {threshold} would single out {who if chosen else 'none'}; an ordinary "
            f"sequence is multiplied by {median_mask(float(threshold)):.2f} a layer."
        )
    factor = figures["clip_factor"]
    return [*found, f"Clipping multiplies all sequences of that batch alike, by {factor:.2f}."]


def comparison(
    names: list[str], models: list[dict[str, Any]], settings: dict[str, Any]
) -> list[str]:
    """What differs between two models, layer by layer where they have as many."""
    one, other = models
    found = []
    for n, (a, b) in enumerate(zip(one["layers"], other["layers"], strict=False)):
        for state, letter in STATES.items():
            left, right = _lasting(a[state], settings), _lasting(b[state], settings)
            kinds = (verdict(a[state]), verdict(b[state]))
            found.append(
                f"Layer {n}, gradient by {letter}: {names[0]} {kinds[0]} ({left}), "
                f"{names[1]} {kinds[1]} ({right})."
            )
    norms = [mean(m["gradient"]["norms"]) for m in models]
    if all(norms):
        found.append(
            f"Global norm of a window's gradient: {norms[0]:.3g} and {norms[1]:.3g}, "
            f"a factor of {norms[1] / norms[0]:.2g}."
        )
    return found


def _lasting(state: dict[str, Any], settings: dict[str, Any]) -> str:
    reach = state["reach"]["0.01"]
    return f"1 % at lag {reach}" if reach else f"over 1 % at lag {settings['lags']}"


def mean(values: list[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)


def _list(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def percent(share: float) -> str:
    """A share as people write it: two digits, and no more zeros than say something."""
    value = 100 * share
    if value == 0:
        return "0 %"
    if value < 0.01:
        return "under 0.01 %"
    return f"{value:.2g} %" if value < 10 else f"{value:.0f} %"
