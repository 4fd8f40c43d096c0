"""The decoder of the paper: one matrix and a softmax."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoders.decoder import Decoder


class Linear(Decoder):
    """softmax(W h + b), with W (V, E) uniform in [-0.1, 0.1] and b (V,) zero at first.

    Args:
        width: of its input, E.
        ntoken: words, V.
    """

    def __init__(self, width: int, ntoken: int) -> None:
        super().__init__(width, ntoken)
        self.weight = nn.Parameter(torch.empty(ntoken, width))
        self.bias = nn.Parameter(torch.empty(ntoken))
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)
        nn.init.uniform_(self.bias, -(width**-0.5), width**-0.5)

    def init_weights(self) -> None:
        """See Decoder."""
        nn.init.zeros_(self.bias)
        nn.init.uniform_(self.weight, -0.1, 0.1)

    def forward(self, output: Tensor) -> Tensor:
        """See Decoder."""
        return F.linear(output, self.weight, self.bias)
