"""One model on one text: all figures of a diagnosis."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diagnostics import filters, gates, gradients, lag_norms, spectra
from diagnostics.unrolled import Unrolled, recurrent_matrices, unroll
from layers.lstm import LSTM
from model import Hidden, RNNModel
from noise import Noise
from training.objective import Objective, Penalty

WARM_UP = 50  # steps read first, so that the states are those of running text
SPACING = 5  # steps between the positions that gradients start from


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a diagnosis; the flags of diagnose.py of these names explain each."""

    lags: int = 100
    positions: int = 8
    windows: int = 8
    masks: int = 3
    bptt: int = 70
    clip: float = 0.25
    thresholds: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0)
    seed: int = 1111

    @property
    def rows(self) -> int:
        """Time steps of text that a diagnosis reads."""
        return WARM_UP + max(self.lag_window, self.windows * self.bptt) + 1

    @property
    def lag_window(self) -> int:
        """Time steps of the window that single losses are sent back through."""
        return self.lags + 1 + SPACING * (self.positions - 1)


def examine(
    model: RNNModel,
    rows: Tensor,
    settings: Settings,
    penalties: Sequence[Penalty],
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Diagnose a model on a text, in float64, leaving the model and the random state alone.

    Norms by lag, their predictions and the statistics of gates come from the model as it is
    evaluated, and norms by lag also under one draw of training's masks; gradients of whole
    windows, shares and filters come from the model as it is trained.

    Args:
        model: on the device to compute on.
        rows: word ids, (settings.rows, B).
        settings: see Settings.
        penalties: training's, see training.objective.
        say: called with each step's name, to show progress.

    Returns:
        Plain values: layers (a list), gradient, filters.

    Raises:
        OverflowError: a gradient is not finite.
    """
    model = without_filters(model).double()
    generator = torch.Generator(rows.device).manual_seed(settings.seed)
    model.eval()
    with torch.no_grad():
        _, hidden = model(rows[:WARM_UP], model.init_hidden(rows.size(1)))
    rows = rows[WARM_UP:]
    layers = _layers(model, rows, hidden, settings, generator, say)
    say("gradients of whole windows")
    model.train()
    objective = Objective(model, penalties)
    gradient, batch = _windows(objective, rows, hidden, settings, generator)
    result = dict(layers=layers, gradient=gradient, filters=_filters(batch, settings))
    plain_result: dict[str, Any] = plain(result)
    return plain_result


def without_filters(model: RNNModel) -> RNNModel:
    """A copy whose backward pass nothing filters."""
    model = copy.deepcopy(model)
    for layer in model.layers:
        layer.gradient_filter = None
    return model


def _layers(
    model: RNNModel,
    rows: Tensor,
    hidden: Hidden,
    settings: Settings,
    generator: torch.Generator,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    layers: list[dict[str, Any]] = [{} for _ in model.layers]

    def add_lag_norms(noise: Noise, suffix: str = "") -> tuple[Unrolled, list[Tensor]]:
        window = settings.lag_window
        unrolled = unroll(model, rows[:window], hidden, noise)
        targets = rows[1 : window + 1]
        norms = lag_norms.lag_norms(model, unrolled, targets, settings.lags, settings.positions)
        for n, figures in enumerate(layers):
            for state, found in (("hidden", norms.hidden[n]), ("cells", norms.cells[n])):
                figures[f"{state}{suffix}"] = lag_norms.describe(found, settings.bptt)
        return unrolled, norms.arriving

    say(f"gradients of single steps, {settings.lags} steps back")
    unrolled, arriving = add_lag_norms(Noise())
    for n, figures in enumerate(layers):
        figures["gates"] = gates.gate_figures(unrolled, n)
        figures["states"] = gates.state_figures(unrolled, n)
    del unrolled  # and with it the graph, before there is another one
    if any((model.dropout, model.dropouth, model.dropouti, model.dropoute, model.wdrop)):
        say("the same under the masks of training")
        model.train()
        add_lag_norms(Noise(generator), "_masked")
        model.eval()
    for n, figures in enumerate(layers):
        say(f"recurrent matrices of layer {n}")
        matrices = recurrent_matrices(model.layers[n])
        curves = spectra.power_prediction(matrices, arriving[n], settings.lags)
        figures["prediction"] = {
            gate: dict(far=lag_norms.factor_per_step(curve[len(curve) // 2 :]), sizes=curve)
            for gate, curve in zip(LSTM.gates, curves, strict=True)
        }
        figures["spectrum"] = _by_gate(spectra.spectrum(matrices))
        if model.wdrop and settings.masks:
            noise = Noise(generator)
            found = spectra.masked_spectrum(matrices, model.wdrop, settings.masks, noise)
            figures["spectrum_masked"] = _by_gate(found)
    return layers


def _by_gate(found: dict[str, Tensor]) -> dict[str, Any]:
    return {
        gate: {name: values[n] for name, values in found.items()}
        for n, gate in enumerate(LSTM.gates)
    }


def _windows(
    objective: Objective,
    rows: Tensor,
    hidden: Hidden,
    settings: Settings,
    generator: torch.Generator,
) -> tuple[dict[str, Any], gradients.WindowGradient]:
    """The gradients of several windows in a row; also the first of them as it is."""
    found = []
    for start in range(0, settings.windows * settings.bptt, settings.bptt):
        part = rows[start : start + settings.bptt + 1]
        window = gradients.window_gradient(objective, part, hidden, Noise(generator))
        hidden = window.hidden
        found.append(window)
    norms = [window.norm for window in found]
    count = len(found)
    shares = [gradients.shares(window.norms) for window in found]
    parts = [gradients.by_part(window.norms) for window in found]
    factors = [gradients.clip_factor(norm, settings.clip) for norm in norms]
    figures = dict(
        loss=sum(window.loss for window in found) / count,
        norms=norms,
        clip_factors=factors,
        shares={name: sum(s[name] for s in shares) / count for name in shares[0]},
        parts={name: [p[name] for p in parts] for name in parts[0]},
    )
    return figures, found[0]


def _filters(batch: gradients.WindowGradient, settings: Settings) -> dict[str, Any]:
    masks = {t: filters.filter_masks(batch.inputs, t) for t in settings.thresholds}
    return dict(
        norms=filters.sequence_norms(batch.inputs),
        masks={f"{t:g}": layers for t, layers in masks.items()},
        singled_out={
            f"{t:g}": [filters.singled_out(mask, t) for mask in layers]
            for t, layers in masks.items()
        },
        clip_factor=gradients.clip_factor(batch.norm, settings.clip),
    )


def plain(value: Any) -> Any:
    """Tensors to lists, floats to four digits, what is not finite to None: fit for JSON."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
