"""A layer at random weights, called as cuDNN is called for it, without autograd."""

import torch
from lstm_cudnn import CudnnLSTM
from torch import Tensor


class RawLayer(CudnnLSTM):
    """A CudnnLSTM whose buffer holds random weights.

    Args:
        width: of the input, E.
        units: of the layer, H.
        dtype: that cuDNN computes in.
        device: with cuDNN.
        multiple: sizes are padded to a multiple of this.
    """

    def __init__(
        self, width: int, units: int, dtype: torch.dtype, device: torch.device, multiple: int = 1
    ) -> None:
        super().__init__(width, units, dtype, device, multiple)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        shapes: list[tuple[int, ...]] = [(4 * units, width), (4 * units, units)]
        shapes += [(4 * units,)] * 2
        self.weights = [
            torch.empty(shape, dtype=wide, device=device).uniform_(-1, 1) / units**0.5
            for shape in shapes
        ]
        self.fill(self.weights, None)

    def random(self, steps: int, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Input (T, B, E), states h and c (1, B, H), gradient of the output (T, B, H)."""
        like = self.buffer
        x = like.new_zeros(steps, batch, self.padded_width)
        h, c = (like.new_zeros(1, batch, self.padded_units) for _ in range(2))
        gradient = like.new_zeros(steps, batch, self.padded_units)
        x[..., : self.width].normal_()
        for tensor in (h, c, gradient):
            tensor[..., : self.units].normal_()
        return x, h, c, gradient
