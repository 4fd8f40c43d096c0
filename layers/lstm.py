"""The LSTM."""

import torch
from torch import Tensor, nn

from layers.layer import Layer, State, Weights
from noise import Noise

# In the order of torch's and cuDNN's kernels.
WEIGHTS = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")


class LSTM(Layer):
    """One LSTM layer, torch.nn.LSTM's (Hochreiter & Schmidhuber 1997; Gers et al. 2000):

        i, f, o = sigmoid(a_i), sigmoid(a_f), sigmoid(a_o),  g = tanh(a_g),
        a = W_ih x[t] + b_ih + W_hh h[t-1] + b_hh,
        c[t] = f c[t-1] + i g,  h[t] = o tanh(c[t]).

    Parameters have nn.LSTM's names, shapes and initialisation, uniform in +-1/sqrt(H). The state is
    (h, c).
    """

    recurrent = ("weight_hh_l0",)
    gates = ("input", "forget", "cell", "output")
    num_states = 2

    def __init__(self, width: int, units: int) -> None:
        super().__init__(width, units)
        register_gates(self)

    def compute(
        self, x: Tensor, state: State, weights: Weights, noise: Noise
    ) -> tuple[Tensor, State]:
        """See Layer."""
        listed = [weights[name] for name in WEIGHTS]
        train = self.training or torch.is_grad_enabled()  # else cuDNN has no backward
        output, h, c = torch.lstm(x, state, listed, True, 1, 0.0, train, False, False)
        return output, (h, c)


def register_gates(layer: Layer) -> None:
    """Register and initialise the weights of G gates: (G·H, E), (G·H, H), two biases (G·H,)."""
    width, units, gates = layer.width, layer.units, len(layer.gates)
    shapes = [(gates * units, width), (gates * units, units), (gates * units,), (gates * units,)]
    for name, shape in zip(WEIGHTS, shapes, strict=True):
        layer.register_parameter(name, nn.Parameter(torch.empty(shape)))
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -(units**-0.5), units**-0.5)
