"""The model run step by step, so that every state is a node of the graph."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from embed_regularize import embedded_dropout
from model import Hidden, RNNModel, drop
from weight_drop import WeightDrop

GATES = ("input", "forget", "cell", "output")  # in the order of torch's rows: i, f, g, o


class Unrolled(NamedTuple):
    """What a window of T steps looked like on its way through the stack.

    Attributes:
        outputs: last layer's output after dropout, T tensors (B, E).
        hidden: h of each layer, T tensors (B, H).
        cells: c of each layer, T tensors (B, H).
        gates: what the gates let through, in the order of GATES, of each layer (T, B, 4, H).
    """

    outputs: list[Tensor]
    hidden: list[list[Tensor]]
    cells: list[list[Tensor]]
    gates: list[Tensor]


def unroll(model: RNNModel, inputs: Tensor, hidden: Hidden) -> Unrolled:
    """RNNModel.forward in one Python step per time step and layer, for looking at.

    With i, f, o = sigmoid and g = tanh of W_ih x_t + b_ih + W_hh h_(t-1) + b_hh,

        c_t = f c_(t-1) + i g,  h_t = o tanh(c_t).

    In training mode the same random draws are made in the same order as by the model's forward.
    Weights are constants here, and a gradient stops at the states before the window.

    Args:
        model: its gradient filters are left out.
        inputs: word ids, (T, B).
        hidden: states before the window, each (1, B, H).
    """
    masks = model.draw_masks(inputs.size(1))
    with torch.no_grad():
        x = list(drop(embedded_dropout(model.encoder, inputs, 0, masks.words), masks.locked[0]))
    all_h, all_c, all_gates = [], [], []
    for layer in range(model.nlayers):
        w_ih, w_hh, bias = _layer_weights(model, layer, masks.weights[layer])
        h, c = (state[0].detach().requires_grad_() for state in hidden[layer])
        hs, cs, gates = [], [], []
        for x_t in x:
            sums = x_t @ w_ih.T + h @ w_hh.T + bias
            i, f, g, o = sums.chunk(4, dim=1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            c = f * c + i * g
            h = o * c.tanh()
            hs.append(h)
            cs.append(c)
            gates.append(torch.stack([i, f, g, o], dim=1).detach())
        mask = masks.locked[layer + 1]
        x = [drop(h_t, None if mask is None else mask[0]) for h_t in hs]
        all_h.append(hs)
        all_c.append(cs)
        all_gates.append(torch.stack(gates))
    return Unrolled(x, all_h, all_c, all_gates)


def _layer_weights(
    model: RNNModel, layer: int, masks: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """W_ih (4H, F), W_hh (4H, H) under its mask and the sum of both biases (4H,), detached."""
    lstm = layer_lstm(model, layer)
    w_hh = drop(recurrent_weight(model, layer), masks.get("weight_hh_l0"))
    bias = lstm.bias_ih_l0 + lstm.bias_hh_l0
    return lstm.weight_ih_l0.detach(), w_hh.detach(), bias.detach()


def recurrent_weight(model: RNNModel, layer: int) -> Tensor:
    """W_hh as it is trained, without a mask, (4H, H)."""
    name = "weight_hh_l0_raw" if isinstance(model.rnns[layer], WeightDrop) else "weight_hh_l0"
    weight: Tensor = getattr(layer_lstm(model, layer), name)
    return weight.detach()


def recurrent_matrices(model: RNNModel, layer: int) -> Tensor:
    """W_hh of each gate as it is trained, without a mask, (4, H, H) in the order of GATES."""
    weight = recurrent_weight(model, layer)
    return weight.view(4, weight.size(1), weight.size(1))


def layer_lstm(model: RNNModel, layer: int) -> Any:
    """The nn.LSTM of a layer, out of its weight drop."""
    rnn = model.rnns[layer]
    return rnn.module if isinstance(rnn, WeightDrop) else rnn
