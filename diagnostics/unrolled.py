"""The model run step by step, so that every state is a node of the graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from layers.layer import Layer, State, Weights
from model import Hidden, RNNModel
from noise import Noise


class Unrolled(NamedTuple):
    """States, gates and outputs of a window of T steps, as graph nodes of their own.

    Attributes:
        outputs: last layer's output after dropout, T tensors (B, E).
        hidden: h of each layer, T tensors (B, H).
        cells: c of each layer, T tensors (B, H).
        gates: what the gates let through, in the order of LSTM.gates, of each layer (T, B, 4, H).
    """

    outputs: list[Tensor]
    hidden: list[list[Tensor]]
    cells: list[list[Tensor]]
    gates: list[Tensor]


class _Stepped:
    """layers.lstm.LSTM in one Python step per time step; keeps every state and gate.

    Weights are constants here, and a gradient stops at the states before the window.
    """

    def __init__(self) -> None:
        self.hidden: list[Tensor] = []
        self.cells: list[Tensor] = []
        self.gates: list[Tensor] = []

    def __call__(
        self, x: Tensor, state: State, weights: Weights, noise: Noise
    ) -> tuple[Tensor, State]:
        """See Layer.compute."""
        w = {name: weight.detach() for name, weight in weights.items()}
        bias = w["bias_ih_l0"] + w["bias_hh_l0"]
        h, c = (part[0].detach().requires_grad_() for part in state)
        for x_t in x.unbind(0):
            sums = x_t @ w["weight_ih_l0"].T + h @ w["weight_hh_l0"].T + bias
            i, f, g, o = sums.chunk(4, dim=1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            c = f * c + i * g
            h = o * c.tanh()
            self.hidden.append(h)
            self.cells.append(c)
            self.gates.append(torch.stack([i, f, g, o], dim=1).detach())
        return torch.stack(self.hidden), (h[None], c[None])


def unroll(model: RNNModel, inputs: Tensor, hidden: Hidden, noise: Noise | None = None) -> Unrolled:
    """RNNModel.forward with its LSTMs in one Python step per time step, for diagnosis.

    Args:
        model: of LSTM layers, without gradient filters.
        inputs: word ids, (T, B).
        hidden: states before the window, each (1, B, H).
        noise: see RNNModel.forward.
    """
    with _stepped(model.layers) as layers:
        _, _, _, outputs = model(inputs, hidden, return_h=True, noise=noise)
    return Unrolled(
        list(outputs[-1].unbind(0)),
        [layer.hidden for layer in layers],
        [layer.cells for layer in layers],
        [torch.stack(layer.gates) for layer in layers],
    )


@contextmanager
def _stepped(layers: list[Layer]) -> Iterator[list[_Stepped]]:
    """Within this context each layer computes by a _Stepped of its own, also in evaluation."""
    stand_ins = [_Stepped() for _ in layers]
    for layer, stand_in in zip(layers, stand_ins, strict=True):
        vars(layer)["compute"] = stand_in
    try:
        yield stand_ins
    finally:
        for layer in layers:
            del vars(layer)["compute"]


def recurrent_matrices(layer: Layer) -> Tensor:
    """W_hh of each gate as it is trained, without a mask, (G, H, H) in the order of layer.gates."""
    (name,) = layer.recurrent
    weights = dict(layer.named_parameters(recurse=False))
    weight = weights.get(f"{name}_raw", weights.get(name))
    assert weight is not None
    return weight.detach().view(len(layer.gates), layer.units, layer.units)
