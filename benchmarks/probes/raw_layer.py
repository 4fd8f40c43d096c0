"""A layer as cuDNN is called for it, without autograd."""

from typing import Any

import torch
from torch import Tensor

from lstm_cudnn import LSTM_MODE, WEIGHTS, CudnnLSTM


class RawLayer:
    """CudnnLSTM's buffer, with random weights, and PyTorch's two operators on it.

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
        self.layer = CudnnLSTM(width, units, dtype, device, multiple)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        shapes: list[tuple[int, ...]] = [(4 * units, width), (4 * units, units)]
        shapes += [(4 * units,)] * 2
        self.weights = [
            torch.empty(shape, dtype=wide, device=device).uniform_(-1, 1) / units**0.5
            for shape in shapes
        ]
        self.layer.fill(self.weights, None)

    def random(self, steps: int, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Input (T, B, E), states h and c (1, B, H), gradient of the output (T, B, H)."""
        layer, like = self.layer, self.layer.buffer
        x = like.new_zeros(steps, batch, layer.padded_width)
        h, c = (like.new_zeros(1, batch, layer.padded_units) for _ in range(2))
        gradient = like.new_zeros(steps, batch, layer.padded_units)
        x[..., : layer.width].normal_()
        for tensor in (h, c, gradient):
            tensor[..., : layer.units].normal_()
        return x, h, c, gradient

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        """Outputs, last h and c, and what backward needs (once)."""
        layer = self.layer
        found = torch.ops.aten._cudnn_rnn(
            x, layer.parts, WEIGHTS, layer.buffer, h, c, *self._options()
        )
        return tuple(found[:4])

    def backward(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        output: Tensor,
        d_output: Tensor,
        d_states: tuple[Tensor | None, Tensor | None],
        reserve: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Gradients of x, h, c and of the buffer's parts; uses the reserve up."""
        layer, (x, h, c) = self.layer, inputs
        d_x, d_h, d_c, d_parts = torch.ops.aten._cudnn_rnn_backward(
            x, layer.parts, WEIGHTS, layer.buffer, h, c, output, d_output, *d_states,
            *self._options(), reserve, [True] * 4,
        )  # fmt: skip
        return d_x, d_h, d_c, d_parts

    def _options(self) -> list[Any]:
        return [LSTM_MODE, self.layer.padded_units, 0, 1, False, 0.0, True, False, [], None]
