"""The figures of a diagnosis against their definitions, in float64, by loops and by numpy."""

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_gradient_filter import by_hand
from torch import Tensor

from bptt import Window
from diagnostics.examine import WARM_UP, Settings, examine
from diagnostics.filters import filter_masks, singled_out
from diagnostics.gates import gate_figures, state_figures
from diagnostics.gradients import by_part, clip_factor, shares, window_gradient
from diagnostics.lag_norms import describe, lag_norms
from diagnostics.probe import probe
from diagnostics.spectra import masked_spectrum, power_prediction, spectral_norms, spectrum
from diagnostics.summary import markdown
from diagnostics.unrolled import recurrent_matrices, unroll
from gradient_filter import GradientFilter
from model import RNNModel
from noise import Noise
from nt_asgd import NTASGD
from training.objective import Objective, paper_penalties
from training.step import PlainStep
from training.update import Updater

Array = NDArray[np.float64]
STEPS, BATCH, WORDS = 7, 3, 11
PENALTIES = paper_penalties(2.0, 1.0)


def make(**changes: Any) -> RNNModel:
    keywords: dict[str, Any] = dict(
        rnn_type="LSTM", ntoken=WORDS, ninp=3, nhid=4, nlayers=2, wdrop=0.4, dropout=0.3,
        dropouth=0.2, dropouti=0.25, dropoute=0.1, tie_weights=True,
    )  # fmt: skip
    torch.manual_seed(3)
    model = RNNModel(**{**keywords, **changes}).double()
    with torch.no_grad():
        for parameter in model.rnns.parameters():
            parameter.mul_(2)  # so that the nonlinearity matters
    return model


def text(steps: int = STEPS) -> Tensor:
    return torch.randint(0, WORDS, (steps + 1, BATCH))


def some_hidden(model: RNNModel) -> Any:
    return [(h + 0.3, c - 0.2) for h, c in model.init_hidden(BATCH)]


def noise() -> Noise:
    return Noise(torch.Generator().manual_seed(6))


def objective_of(model: RNNModel) -> Objective:
    return Objective(model, PENALTIES)


# Norms by lag, against products of Jacobians that are written out


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


class Cell:
    """One step of one layer for one sequence, and its Jacobians."""

    def __init__(self, w: dict[str, Array], x: Array, h: Array, c: Array) -> None:
        self.w_ih, self.w_hh = w["weight_ih_l0"], w["weight_hh_l0"]
        a = self.w_ih @ x + self.w_hh @ h + w["bias_ih_l0"] + w["bias_hh_l0"]
        n = len(h)
        self.i, self.f, self.o = sigmoid(a[:n]), sigmoid(a[n : 2 * n]), sigmoid(a[3 * n :])
        self.g = np.tanh(a[2 * n : 3 * n])
        self.before = c
        self.c = self.f * c + self.i * self.g
        self.h = self.o * np.tanh(self.c)

    def push(self, dx: Array, dh: Array, dc: Array) -> tuple[Array, Array]:
        """Jacobians of (h, c) out of those of (x, h before, c before)."""
        da = self.w_ih @ dx + self.w_hh @ dh
        n = len(self.c)
        i, f, g, o = self.i[:, None], self.f[:, None], self.g[:, None], self.o[:, None]
        di, df = i * (1 - i) * da[:n], f * (1 - f) * da[n : 2 * n]
        dg, do = (1 - g**2) * da[2 * n : 3 * n], o * (1 - o) * da[3 * n :]
        new_c = f * dc + self.before[:, None] * df + g * di + i * dg
        tanh = np.tanh(self.c)[:, None]
        return do * tanh + o * (1 - tanh**2) * new_c, new_c


def by_jacobians(
    model: RNNModel, rows: Tensor, hidden: Any, t: int, start: int, layer: int, kind: str, b: int
) -> float:
    """|dL_t / d(h or c of layer at start)| of sequence b."""
    weights = []
    for n in range(model.nlayers):
        prefix = f"rnns.{n}.module."
        weights.append(
            {
                name.removeprefix(prefix).removesuffix("_raw"): p.detach().numpy()
                for name, p in model.named_parameters()
                if name.startswith(prefix)
            }
        )
    embedding = model.encoder.weight.detach().numpy()
    states = [(h[0, b].numpy(), c[0, b].numpy()) for h, c in hidden]
    jacobians: list[tuple[Array, Array]] = []
    for step in range(t + 1):
        x, dx = embedding[rows[step, b]], np.zeros((model.layer_sizes[0], 0))
        for n in range(model.nlayers):
            cell = Cell(weights[n], x, *states[n])
            units = len(cell.c)
            states[n] = (cell.h, cell.c)
            x = cell.h
            if step < start:
                continue
            if step == start:
                width = model.layer_sizes[layer + 1]
                zero = np.zeros((units, width))
                if n < layer:
                    jacobians.append((zero, zero))
                elif n == layer:
                    one = np.eye(width)
                    slope = cell.o * (1 - np.tanh(cell.c) ** 2)
                    jacobians.append((one, zero) if kind == "h" else (np.diag(slope), one))
                else:
                    jacobians.append(cell.push(dx, zero, zero))
            else:
                if n == 0:
                    dx = np.zeros((model.layer_sizes[0], jacobians[0][0].shape[1]))
                jacobians[n] = cell.push(dx, *jacobians[n])
            dx = jacobians[n][0]
    decoder, bias = (p.detach().numpy() for p in model.decoder.parameters())
    scores = decoder @ x + bias
    slope = np.exp(scores) / np.exp(scores).sum()
    slope[rows[t + 1, b]] -= 1
    return float(np.linalg.norm(slope @ decoder @ dx))


def test_lag_norms_are_products_of_jacobians() -> None:
    model, rows, lags = make().eval(), text(), 4
    hidden = some_hidden(model)
    found = lag_norms(model, unroll(model, rows[:-1], hidden), rows[1:], lags, positions=2)
    assert found.hidden.shape == found.cells.shape == (2, lags + 1, 2 * BATCH)
    for sample in range(2 * BATCH):
        t, b = (lags, STEPS - 1)[sample // BATCH], sample % BATCH
        for layer in range(2):
            for lag in range(lags + 1):
                place = (model, rows, hidden, t, t - lag, layer)
                for kind, norms in (("h", found.hidden), ("c", found.cells)):
                    expected = by_jacobians(*place, kind, b)
                    assert float(norms[layer, lag, sample]) == pytest.approx(expected, rel=1e-9)
            assert float(found.arriving[layer][sample].norm()) == pytest.approx(
                float(found.hidden[layer, 0, sample]), rel=1e-12
            )


@pytest.mark.parametrize("changes", [{}, dict(wdrop=0, tie_weights=False, nlayers=3)])
@pytest.mark.parametrize("training", [False, True])
def test_unrolled_is_the_model(changes: dict, training: bool) -> None:
    """With the same masks where there are masks."""
    model = make(**changes).train(training)
    rows, hidden = text(), some_hidden(model)
    result, after, raw, _ = model(rows[:-1], hidden, return_h=True, noise=noise())
    found = unroll(model, rows[:-1], hidden, noise())
    torch.testing.assert_close(torch.cat(found.outputs), result)
    for layer in range(model.nlayers):
        torch.testing.assert_close(torch.stack(found.hidden[layer]), raw[layer])
        torch.testing.assert_close(found.cells[layer][-1], after[layer][1][0])
        i, f, g, o = found.gates[layer].unbind(2)
        before = torch.stack([hidden[layer][1][0], *found.cells[layer][:-1]])
        torch.testing.assert_close(f * before + i * g, torch.stack(found.cells[layer]))
        torch.testing.assert_close(o * torch.stack(found.cells[layer]).tanh(), raw[layer])


def test_descriptions_of_known_curves() -> None:
    sizes = torch.tensor([1.0, 2.0, 4.0, 8.0, 100.0], dtype=torch.float64)
    lags = torch.arange(41, dtype=torch.float64)[:, None]
    found = describe(3 * sizes * 0.8**lags, bptt=20)
    assert found["near"] == pytest.approx(0.8)
    assert found["far"] == pytest.approx(0.8)
    assert found["reach"] == {  # 0.8 ** (lag - 1) <= share
        "0.1": 1 + math.ceil(math.log(0.1) / math.log(0.8)),
        "0.01": 1 + math.ceil(math.log(0.01) / math.log(0.8)),
    }
    assert found["growth"] == pytest.approx(1)
    assert found["at_bptt"] == pytest.approx(0.8**19)
    assert found["exploding"] == 0
    expected = np.quantile(3 * sizes.numpy(), [0.05, 0.25, 0.5, 0.75, 0.95])
    assert [float(q[0]) for q in found["quantiles"].values()] == pytest.approx(expected.tolist())

    growing = torch.cat([0.8**lags, 0.8**lags, 0.8**lags, 1.1**lags], dim=1)
    growing[0] *= 1e3  # lag 0 is no measure of growth
    found = describe(growing, bptt=50)
    assert found["exploding"] == 0.25
    assert found["at_bptt"] is None
    assert describe(1.1**lags, 20)["growth"] == pytest.approx(1.1**39)
    assert describe(1.1**lags, 20)["reach"] == {"0.1": None, "0.01": None}
    nothing = describe(torch.zeros(5, 3, dtype=torch.float64), 2)
    assert nothing["near"] == nothing["growth"] == nothing["exploding"] == 0


# Matrices


def test_spectra_are_those_of_numpy() -> None:
    matrices = torch.randn(4, 9, 9, dtype=torch.float64)
    found = spectrum(matrices)
    masked = masked_spectrum(matrices, 0.4, 2, noise())
    drawn = noise()
    draws = [matrices * drawn.drop(f"mask {n}", (4, 9, 9), 0.4, matrices) for n in range(2)]
    for n in range(4):
        assert np.allclose(found["singular_values"][n], np.linalg.svd(matrices[n].numpy())[1])
        radii = [abs(np.linalg.eigvals(m[n].numpy())).max() for m in (matrices, *draws)]
        assert float(found["radius"][n]) == pytest.approx(radii[0])
        assert float(masked["radius"][n]) == pytest.approx(sum(radii[1:]) / 2)
        values = [np.linalg.svd(draw[n].numpy())[1] for draw in draws]
        assert np.allclose(masked["singular_values"][n], (values[0] + values[1]) / 2)
    norms = spectral_norms(matrices, iterations=3000)
    assert np.allclose(norms, found["singular_values"][:, 0], rtol=1e-6)
    quick = spectral_norms(matrices.float())
    assert (quick <= found["singular_values"][:, 0] * (1 + 1e-5)).all()
    assert (quick > 0.9 * found["singular_values"][:, 0]).all()
    assert spectral_norms(torch.zeros(2, 3, 3)).tolist() == [0, 0]


def test_predictions_are_powers() -> None:
    matrices = torch.randn(4, 5, 5, dtype=torch.float64)
    d = torch.randn(7, 5, dtype=torch.float64)
    found = power_prediction(matrices, d, lags=3)
    for n in range(4):
        for lag in range(4):
            power = np.linalg.matrix_power(matrices[n].numpy().T, lag)
            sizes = [np.linalg.norm(power @ v) / np.linalg.norm(v) for v in d.numpy()]
            assert float(found[n, lag]) == pytest.approx(np.median(sizes))
    assert not power_prediction(matrices, torch.zeros_like(d), 3).any()


def test_gate_figures_count() -> None:
    model, rows = make(nlayers=1).eval(), text()
    found = unroll(model, rows[:-1], some_hidden(model))
    found.gates[0][:, :, 1] = torch.linspace(0.01, 0.99, STEPS).double()[:, None, None]
    found.gates[0][0, 0, 2] = torch.tensor([-0.99, 0.96, 0.97])
    gates, states = gate_figures(found, 0), state_figures(found, 0)
    assert gates["forget"]["closed"] == gates["forget"]["open"] == 1 / STEPS
    assert gates["forget"]["saturated"] == pytest.approx(2 / STEPS)
    kept = math.prod(0.01 + 0.98 * t / 6 for t in range(STEPS)) ** (1 / STEPS)
    assert gates["forget"]["kept_per_step"] == pytest.approx(kept)
    values = found.gates[0][:, :, 2].flatten().tolist()
    assert gates["cell"]["negative"] == sum(v < -0.95 for v in values) / len(values) > 0
    assert gates["cell"]["positive"] == sum(v > 0.95 for v in values) / len(values) > 0
    assert gates["cell"]["mean"] == pytest.approx(sum(values) / len(values))
    assert float(gates["cell"]["histogram"].sum()) == pytest.approx(1)
    cells = torch.stack(found.cells[0]).detach().numpy()
    assert states["cells"]["rms"] == pytest.approx(math.sqrt((cells**2).mean()))
    assert states["cells"]["saturated"] == (abs(np.tanh(cells)) > 0.95).mean()
    hidden = torch.stack(found.hidden[0]).detach().numpy()
    assert states["hidden"]["idle"] == (abs(hidden) < 0.05).mean()
    assert states["hidden"]["largest"] == pytest.approx(abs(hidden).max())


# Whole windows


def updated(model: RNNModel, rows: Tensor, hidden: Any, clip: float) -> tuple[Tensor, Tensor]:
    """Loss and norm of training's own update, whose gradients stay in the model."""
    step = PlainStep(NTASGD(model.parameters(), 1e-9), clip)
    updater = Updater(objective_of(model), rows, step, bptt=STEPS, make_noise=noise)
    outcome = updater(Window(0, len(rows) - 1), hidden, keep_gradients=True)
    return outcome.loss, outcome.norm


@pytest.mark.parametrize("tied", [True, False])
def test_window_gradient_is_that_of_training(tied: bool) -> None:
    model = make(tie_weights=tied).train()
    rows, hidden = text(), some_hidden(model)
    found = window_gradient(objective_of(model), rows, hidden, noise())
    assert all(p.grad is None for p in model.parameters())
    loss, norm = updated(model, rows, hidden, clip=0)
    assert found.loss == pytest.approx(float(loss))
    assert found.norm == pytest.approx(float(norm))
    assert found.norms.keys() == dict(model.named_parameters()).keys()
    assert ("decoder.weight" in found.norms) != tied
    whole = 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        square = sum(float(v) ** 2 for v in parameter.grad.flatten())
        assert found.norms[name] == pytest.approx(math.sqrt(square))
        whole += square
    held = shares(found.norms)
    assert sum(held.values()) == pytest.approx(1)
    for name, share in held.items():
        assert share == pytest.approx(found.norms[name] ** 2 / whole)
    parts = by_part(found.norms)
    assert list(parts) == ["embedding", "layer 0", "layer 1", "decoder"]
    own = [norm for name, norm in found.norms.items() if name.startswith("rnns.1.")]
    assert parts["layer 1"] == pytest.approx(math.sqrt(sum(n**2 for n in own)))

    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    updated(model, rows, hidden, clip=found.norm / 3)
    factor = clip_factor(found.norm, found.norm / 3)
    assert factor == pytest.approx(1 / 3, rel=1e-3)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, before[name] * factor)
    assert clip_factor(5.0, 0) == 1
    assert shares(dict(a=0.0, b=0.0)) == dict(a=0, b=0)


@pytest.mark.parametrize("clip", [0, 0.01])
def test_probe_sees_the_gradient_before_clipping(clip: float) -> None:
    model = make().train()
    rows, hidden = text(), some_hidden(model)
    expected = window_gradient(objective_of(model), rows, hidden, noise())
    _, norm = updated(model, rows, hidden, clip)
    state = torch.get_rng_state()
    found = probe(model, norm)
    assert torch.equal(torch.get_rng_state(), state)
    assert found["grad_norm"] == pytest.approx(expected.norm)
    assert found["clip_factor"] == pytest.approx(clip_factor(expected.norm, clip))
    for part, size in by_part(expected.norms).items():
        name = part.replace("layer ", "l")
        assert found[f"grad_norm_{name}"] == pytest.approx(size)
        assert found[f"grad_share_{name}"] == pytest.approx((size / expected.norm) ** 2)
    for layer in range(2):
        raw = model.get_parameter(f"rnns.{layer}.module.weight_hh_l0_raw").detach()
        assert torch.equal(recurrent_matrices(model.layers[layer]).flatten(0, 1), raw)
        values = [np.linalg.norm(m.numpy(), 2) for m in raw.chunk(4)]  # in torch's order
        names = [f"spectral_norm_{g}_l{layer}" for g in ("input", "forget", "cell", "output")]
        assert [found[name] for name in names] == pytest.approx(values, rel=0.02)


def test_who_is_singled_out() -> None:
    gradients = torch.ones(4, 5, 2, dtype=torch.float64)
    gradients[:, 3] *= 100
    (mask,) = filter_masks([gradients], 2.0)
    assert mask.tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2 / 102, 2 / 3])
    assert singled_out(mask, 2.0).tolist() == [3]


@pytest.mark.parametrize("threshold", [0.5, 3.0])
def test_filter_masks_are_those_of_filters(
    threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From gradients without filters: against the equation, and against filters at work."""
    model = make(nlayers=3).train()
    rows, hidden = text(), some_hidden(model)
    found = window_gradient(objective_of(model), rows, hidden, noise())
    masks = filter_masks(found.inputs, threshold)
    factor = [1.0] * BATCH
    for layer in (2, 1, 0):
        arriving = found.inputs[layer] * torch.tensor(factor, dtype=torch.float64)[:, None]
        _, _, inverse = by_hand(arriving, [], threshold)
        assert masks[layer].tolist() == pytest.approx([1 / v for v in inverse], rel=1e-12)
        factor = [f / v for f, v in zip(factor, inverse, strict=True)]

    filtering = make(nlayers=3, grad_filter=threshold).train()
    noted: dict[GradientFilter, Tensor] = {}
    monkeypatch.setattr(GradientFilter, "note", lambda gate, mask, _: noted.update({gate: mask}))
    updated(filtering, rows, hidden, clip=0)
    for mask, filtered in zip(masks, filtering.layers, strict=True):
        assert filtered.gradient_filter is not None
        torch.testing.assert_close(mask, noted[filtered.gradient_filter], rtol=1e-9, atol=0)


def test_examining_leaves_no_trace_and_sees_no_filter() -> None:
    """The model, its random stream and a filter of its own make no difference."""
    settings = Settings(lags=5, positions=2, windows=2, bptt=4)
    model, filtering = make().float(), make(grad_filter=0.5).float()
    rows = text(settings.rows)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = examine(model, rows[: settings.rows], settings, PENALTIES)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())
    torch.manual_seed(99)
    assert examine(filtering, rows[: settings.rows], settings, PENALTIES) == found
    assert all(layer.gradient_filter is not None for layer in filtering.layers)
    assert json.dumps(found, allow_nan=False)


def test_windows_follow_one_another_and_each_has_masks_of_its_own() -> None:
    """The mean loss is that of the text read at once; where only masks differ, so do norms."""
    settings = Settings(lags=3, positions=1, windows=4, bptt=3)
    rows = torch.randint(0, WORDS, (settings.rows, BATCH))
    off = dict.fromkeys(("wdrop", "dropout", "dropouth", "dropouti", "dropoute"), 0)
    model = make(**off)
    with torch.no_grad():
        model.encoder.weight.mul_(20)  # so that the state matters
        output, _ = model(rows[:-1], model.init_hidden(BATCH))
        scores = model.decoder(output).view(-1, BATCH, WORDS)[WARM_UP:][: 4 * 3]
        targets = rows[WARM_UP + 1 :][: 4 * 3]
        expected = torch.nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())
    found = examine(model, rows, settings, PENALTIES)["gradient"]
    assert found["loss"] == pytest.approx(float(expected), rel=5e-4)

    forgetful = make()  # and so each window of the same word is the same
    with torch.no_grad():
        for name, parameter in forgetful.rnns.named_parameters():
            if "weight_hh" in name:
                parameter.zero_()
            elif "bias_ih" in name:
                parameter.chunk(4)[1].fill_(-1e3)
    norms = examine(forgetful, torch.zeros_like(rows), settings, PENALTIES)["gradient"]["norms"]
    assert len(set(norms)) == settings.windows


def test_the_page_tells_the_masks_of_training_apart() -> None:
    settings = Settings(lags=6, positions=2, windows=1, bptt=4)
    model = make()
    figures = examine(model, text(settings.rows)[: settings.rows], settings, PENALTIES)
    told = dict(asdict(settings), data="d", split="train", sequences=BATCH, samples=2 * BATCH)
    one = dict(name="m", config=model.config(), findings=[], figures=figures)
    page = markdown(dict(settings=dict(told, alpha=2.0, beta=1.0), models=[one]), {})
    cells = {line.split(" | ")[0]: line for line in page.splitlines() if line.startswith("| ")}
    for state, letter in (("hidden", "h"), ("cells", "c")):
        for key, masks in ((state, ""), (f"{state}_masked", ", masks of training")):
            layers = [f"{x[key]['near']:.3g}, {x[key]['far']:.3g}" for x in figures["layers"]]
            name = f"| gradient by {letter}{masks}: factor a step, near, far"
            assert cells[name] == f"{name} | {' | '.join(layers)} |"
        for layer in figures["layers"]:
            assert layer[state]["near"] != layer[f"{state}_masked"]["near"]
