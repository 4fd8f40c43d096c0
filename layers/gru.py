"""The gated recurrent unit."""

import torch
from torch import Tensor

from layers.layer import Layer, State, Weights
from layers.lstm import WEIGHTS, register_gates
from noise import Noise


class GRU(Layer):
    """One GRU layer, torch.nn.GRU's variant of Cho et al. 2014 (arXiv:1406.1078):

        r, z = sigmoid(W_ir x + b_ir + W_hr h + b_hr), sigmoid(W_iz x + b_iz + W_hz h + b_hz),
        n = tanh(W_in x + b_in + r (W_hn h + b_hn)),  h[t] = (1 - z) n + z h[t-1].

    Cho et al. apply r to h before the product with W_hn. Parameters have nn.GRU's names, shapes
    and initialisation, uniform in +-1/sqrt(H). The state is (h,).
    """

    recurrent = ("weight_hh_l0",)
    gates = ("reset", "update", "new")

    def __init__(self, width: int, units: int) -> None:
        super().__init__(width, units)
        register_gates(self)

    def compute(
        self, x: Tensor, state: State, weights: Weights, noise: Noise
    ) -> tuple[Tensor, State]:
        """See Layer."""
        listed = [weights[name] for name in WEIGHTS]
        train = self.training or torch.is_grad_enabled()  # else cuDNN has no backward
        output, h = torch.gru(x, state[0], listed, True, 1, 0.0, train, False, False)
        return output, (h,)
