"""The decoder of the paper: one matrix and a softmax."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoders.decoder import Decoder
from noise import Noise


class Linear(Decoder):
    """softmax(W h + b), with W (V, E) uniform in [-0.1, 0.1] and b (V,) zero at first.

    Args:
        width: size of its input, E.
        ntoken: words in the vocabulary, V.
    """

    def __init__(self, width: int, ntoken: int) -> None:
        super().__init__(width, ntoken)
        self.weight = nn.Parameter(torch.empty(ntoken, width).uniform_(-0.1, 0.1))
        self.bias = nn.Parameter(torch.zeros(ntoken))

    def forward(self, output: Tensor, noise: Noise | None = None) -> Tensor:
        """See Decoder."""
        return F.linear(output, self.weight, self.bias)
