"""Recurrent layers against their equations, in every scheme; a layer of a user's own."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from row_by_row import (
    BATCH,
    ROWS,
    Cell,
    Parts,
    Update,
    assert_same_epoch,
    build_trainer,
    full_updates,
    gru_cell,
    lstm_cell,
    randomized,
    randomized_updates,
    truncated,
    whole,
)
from torch import Tensor, nn

from bptt import FixedWindows, FullWindows, Scheme, VariableWindows, Window
from layers import LAYERS
from layers.gru import GRU
from layers.layer import Layer, State, Weights
from layers.lstm import LSTM
from noise import Noise
from training.gradient import pieces_of


@pytest.mark.parametrize(("kind", "cell"), [(LSTM, lstm_cell), (GRU, gru_cell)])
def test_a_layer_is_its_equations(kind: type[Layer], cell: Cell) -> None:
    layer = kind(6, 5).double()
    x = torch.randn(7, 3, 6, dtype=torch.float64, requires_grad=True)
    state = tuple(torch.randn_like(part) for part in layer.init_state(3))
    for part in state:
        part.requires_grad_()
    wanted = [x, *state, *layer.parameters()]
    output, after = layer(x, state)
    parts, outputs = tuple(part[0] for part in state), []
    for t in range(7):
        parts = cell(x[t], parts, dict(layer.named_parameters()), 0, t)
        outputs.append(parts[0])
    expected = torch.stack(outputs)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tuple(part[0] for part in after), parts, rtol=1e-12, atol=1e-12)
    factors = torch.randn_like(output)
    found, by_hand = (
        torch.autograd.grad((result * factors).sum() + last[-1].square().sum(), wanted)
        for result, last in ((output, after), (expected, parts))
    )
    torch.testing.assert_close(found, by_hand, rtol=1e-10, atol=1e-12)


ZONEOUT = 0.4


class Zoneout(Layer):
    """A cell with three gates, c = f c + (1 - f) g and h = o tanh(c), that keeps the old value of
    a unit of c with probability ZONEOUT in each step (Krueger et al. 2016, arXiv:1606.01305)."""

    recurrent = ("weight_h",)
    num_states = 2

    def __init__(self, width: int, units: int) -> None:
        super().__init__(width, units)
        self.weight_x = nn.Parameter(torch.randn(3 * units, width) / 3)
        self.weight_h = nn.Parameter(torch.randn(3 * units, units) / 3)
        self.bias = nn.Parameter(torch.zeros(3 * units))

    def compute(
        self, x: Tensor, state: State, weights: Weights, noise: Noise
    ) -> tuple[Tensor, State]:
        h, c = (part[0] for part in state)
        kept = torch.full((*x.shape[:2], self.units), ZONEOUT)
        if self.training:
            kept = noise.drop_by_step("cells", tuple(kept.shape), ZONEOUT, like=x, batch_dim=1) == 0
        kept, outputs = kept.to(x), []
        for x_t, kept_t in zip(x, kept, strict=True):
            sums = x_t @ weights["weight_x"].T + h @ weights["weight_h"].T + weights["bias"]
            f, g, o = sums.chunk(3, dim=1)
            f = f.sigmoid()
            c = kept_t * c + (1 - kept_t) * (f * c + (1 - f) * g.tanh())
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs), (h[None], c[None])


def zoneout_cells(noise: Noise, window: Window) -> Cell:
    """Its equations unit by unit, with what this noise keeps in the rows of a window."""
    kept: dict[tuple[int, int], Tensor] = {}
    for piece in pieces_of(window):
        for layer, units in enumerate((5, 4)):
            shape = (piece.stop - piece.start, BATCH, units)
            own = noise.at(piece.start).of(f"layer {layer}")
            like = torch.zeros((), dtype=torch.float64)
            factors = own.drop_by_step("cells", shape, ZONEOUT, like=like, batch_dim=1)
            for t, row in enumerate(factors, window.start + piece.start):
                kept[layer, t] = row == 0

    def cell(x: Tensor, state: Parts, w: dict[str, Tensor], layer: int, row: int) -> Parts:
        h, c = state
        a_f, a_g, a_o = (w["weight_x"] @ x.T + w["weight_h"] @ h.T + w["bias"][:, None]).chunk(3)
        new = (c.T + (1 - a_f.sigmoid()) * (a_g.tanh() - c.T)).T
        columns = [
            [c[b, u] if kept[layer, row][b, u] else new[b, u] for u in range(c.size(1))]
            for b in range(BATCH)
        ]
        c = torch.stack([torch.stack(column) for column in columns])
        return a_o.T.sigmoid() * c.tanh(), c

    return cell


def variable_updates(bptt: int, seed: int) -> list[Update]:
    starts = [window.start for window in VariableWindows(bptt, seed).windows(ROWS)] + [ROWS]
    return [Update(a, range(a, b), whole, set(), b) for a, b in pairwise(starts)]


KEPT = (False, True, True, True, True, False, True)  # five segments in a row: one is run twice
SCHEMES: dict[str, tuple[Callable[[], Scheme], int, list[Update]]] = {
    "overlapping": (lambda: FixedWindows(5, 2), 5, truncated(2, 5)),
    "in pieces": (lambda: FixedWindows(3, 7), 3, truncated(7, 3)),
    "variable": (lambda: VariableWindows(6, 3), 6, variable_updates(6, 3)),
    "randomized": (lambda: randomized(3, 0.7, KEPT), 3, randomized_updates(3, 0.7, KEPT)),
    "full": (lambda: FullWindows(4), 4, full_updates(4)),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_a_gru_trains_in_every_scheme(tmp_path: Path, name: str) -> None:
    """With weight drop, tied, and all other regularisers on."""
    scheme, bptt, updates = SCHEMES[name]
    trainer = build_trainer(tmp_path, scheme(), bptt, "GRU", grad_filter=1.5)
    assert_same_epoch(trainer, updates, lambda noise, window: gru_cell)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_layer_of_one_s_own_with_noise_per_step_trains_in_every_scheme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(LAYERS, "Zoneout", Zoneout)
    scheme, bptt, updates = SCHEMES[name]
    trainer = build_trainer(tmp_path, scheme(), bptt, "Zoneout", grad_filter=1.5)
    assert_same_epoch(trainer, updates, zoneout_cells)
