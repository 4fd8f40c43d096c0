"""cuDNN's LSTM layer over a weight buffer of our own, padded to sizes it is fast at."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Sizes are padded to a multiple of this: rows of 1150 numbers of 16 bits do not start at multiples
# of 16 bytes, which tensor cores want, rows of 1152 do.
MULTIPLE = 8
# cuDNN's number for an LSTM, and how many weights PyTorch hands over for a layer of one.
LSTM_MODE, WEIGHTS = 2, 4


class CudnnLSTM:
    """One layer of torch.nn.LSTM, computed by cuDNN from weights that are masked on the way to it.

    cuDNN wants a layer's weights in one buffer, at places of its own choice. A weight that was
    multiplied by a mask is not there, so that nn.LSTM copies all of them for each call. Here the
    buffer is kept, and one kernel a weight masks, casts and writes it to its place.

    Widths are padded to a multiple of 8. With their weights zero, padded units have gates
    i = f = o = 1/2 and g = 0, so that from a zero state c = f 0 + i 0 = 0 and h = 0 in every step;
    nothing leaves them, and so no gradient enters them. The result is that without padding.

    Args:
        width: of the input, E.
        units: of the layer, H.
        dtype: that cuDNN computes in, float32, float16, bfloat16 (or float64).
        device: with cuDNN.
        multiple: sizes are padded to a multiple of this; 1: not at all.
    """

    def __init__(
        self,
        width: int,
        units: int,
        dtype: torch.dtype,
        device: torch.device,
        multiple: int = MULTIPLE,
    ) -> None:
        self.width = width
        self.units = units
        self.padded_width = -(-width // multiple) * multiple
        self.padded_units = -(-units // multiple) * multiple
        self.dtype = dtype
        shapes = [(4 * self.padded_units, size) for size in (self.padded_width, self.padded_units)]
        parts = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        parts += [torch.zeros(shapes[0][:1], dtype=dtype, device=device) for _ in range(2)]
        with torch.no_grad():
            # Makes the tensors of parts views of the buffer that it returns.
            self.buffer: Tensor = torch.ops.aten._cudnn_rnn_flatten_weight(
                parts, WEIGHTS, self.padded_width, LSTM_MODE, self.padded_units, 0, 1, False, False
            )
        self.parts = parts

    def __call__(
        self,
        x: Tensor,
        hidden: tuple[Tensor, Tensor],
        weights: Sequence[Tensor],
        mask: Tensor | None = None,
        filled: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run the layer.

        Between a call and its backward no other may come with other weights or another mask.

        Args:
            x: input, (T, B, E), or padded, (T, B, padded_width), with zeros in the padding. It is
                cast to dtype, if it has another.
            hidden: states h and c before the first step, (1, B, H) each, of any floating dtype.
            weights: as nn.LSTM has them: of the input, (4·H, E), the gates in the order i, f, g,
                o; recurrent, (4·H, H); two biases, (4·H,) each. float32 may (and should) stay so.
            mask: factors on the recurrent weights, (4·H, H) or (4·H, 1); None: none.
            filled: fill has been called with these weights under their mask; else it is here.

        Returns:
            Outputs (T, B, padded_units) in dtype, zeros in the padding, and the states after the
            last step, (1, B, H) each, of the dtype of those before. Gradients have the dtype of
            what they belong to; a mask has none. They cannot be differentiated again.

        Raises:
            ValueError: the input has another width.
        """
        if x.size(-1) not in (self.width, self.padded_width):
            raise ValueError(f"x is {tuple(x.shape)}; its last dimension must be {self.width}")
        x = pad_last(x.to(self.dtype), self.padded_width)
        output, h, c = _Layer.apply(self, filled, x, *hidden, *weights, mask)
        return output, (h, c)

    @torch.no_grad()
    def fill(self, weights: Sequence[Tensor], mask: Tensor | None) -> None:
        """Write weights into the buffer, cast, the recurrent ones under mask; padding stays 0."""
        for part, weight, factors in zip(self.parts, weights, _masks(mask), strict=True):
            gates = weight.unflatten(0, (4, self.units))
            self._write(gates, factors, self._without_padding(part, weight.size(-1)))

    def gradients(
        self, d_parts: Sequence[Tensor], weights: Sequence[Tensor], mask: Tensor | None
    ) -> list[Tensor]:
        """The weights' gradients from those of the buffer's parts, in the weights' dtype."""
        grads = []
        for d_part, weight, factors in zip(d_parts, weights, _masks(mask), strict=True):
            grads.append(torch.empty_like(weight, memory_format=torch.contiguous_format))
            gates = self._without_padding(d_part, weight.size(-1))
            self._write(gates, factors, grads[-1].unflatten(0, (4, self.units)))
        return grads

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        """cuDNN's forward over the buffer as it is, without autograd.

        Args:
            x: (T, B, padded_width), contiguous, in dtype; like all that follow.
            h: (1, B, padded_units).
            c: (1, B, padded_units).

        Returns:
            Outputs (T, B, padded_units), last h and c, and the reserve, which backward uses up.
        """
        found = torch.ops.aten._cudnn_rnn(x, self.parts, WEIGHTS, self.buffer, h, c, *self._options)
        return tuple(found[:4])

    def backward(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        output: Tensor,
        d_output: Tensor,
        d_states: Sequence[Tensor | None],
        reserve: Tensor,
        of_weights: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """cuDNN's backward: gradients of x, h and c, and, if wanted, of the buffer's parts.

        Args:
            inputs: forward's.
            output: forward's outputs.
            d_output: their gradient.
            d_states: gradients of the last h and c.
            reserve: forward's.
            of_weights: those of the parts are wanted; the others are computed in any case.
        """
        found: tuple[Tensor, Tensor, Tensor, list[Tensor]] = torch.ops.aten._cudnn_rnn_backward(
            inputs[0], self.parts, WEIGHTS, self.buffer, *inputs[1:], output, d_output, *d_states,
            *self._options, reserve, [True, True, True, of_weights],
        )  # fmt: skip
        return found

    @property
    def _options(self) -> list[Any]:
        """What follows the tensors in both calls: one layer, time first, no dropout."""
        return [LSTM_MODE, self.padded_units, 0, 1, False, 0.0, True, False, [], None]

    def _write(self, gates: Tensor, mask: Tensor | None, place: Tensor) -> None:
        """Put numbers of a weight into a place, both by gate; cast, and under mask."""
        if mask is None:
            place.copy_(gates)
        else:
            torch.mul(gates, mask.unflatten(0, (4, self.units)), out=place)

    def _without_padding(self, part: Tensor, columns: int) -> Tensor:
        """A view of a weight's own numbers, (4, H, columns) or (4, H)."""
        gates: Tensor = part.unflatten(0, (4, self.padded_units))[:, : self.units]
        return gates if part.dim() == 1 else gates[..., :columns]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layer: CudnnLSTM,
        filled: bool,
        x: Tensor,
        h0: Tensor,
        c0: Tensor,
        *weights_and_mask: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        *weights, mask = weights_and_mask
        if not filled:
            layer.fill(weights, mask)
        x = x.contiguous()
        h, c = (pad_last(state.to(layer.dtype), layer.padded_units) for state in (h0, c0))
        h, c = h.contiguous(), c.contiguous()
        output, h_n, c_n, reserve = layer.forward(x, h, c)
        ctx.layer = layer
        ctx.save_for_backward(x, h, c, output, reserve, *weights, mask)
        ctx.state_dtypes = h0.dtype, c0.dtype
        ctx.set_materialize_grads(False)
        units = layer.units
        return output, _own(h_n[..., :units], h0.dtype), _own(c_n[..., :units], c0.dtype)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        layer: CudnnLSTM = ctx.layer
        x, h, c, output, reserve, *weights, mask = ctx.saved_tensors
        states = [
            None if g is None else pad_last(g.to(layer.dtype), layer.padded_units).contiguous()
            for g in (grad_h, grad_c)
        ]
        if grad_output is None:
            grad_output = torch.zeros_like(output)
        wanted = ctx.needs_input_grad
        of_weights = any(wanted[5:9])
        d_x, d_h, d_c, d_parts = layer.backward(
            (x, h, c), output, grad_output.contiguous(), states, reserve, of_weights
        )
        grads: list[Tensor | None] = [None] * 10
        if wanted[2]:
            grads[2] = d_x
        for k, (grad, dtype) in enumerate(zip((d_h, d_c), ctx.state_dtypes, strict=True), 3):
            if wanted[k]:
                grads[k] = grad[..., : layer.units].to(dtype)
        if of_weights:
            found = layer.gradients(d_parts, weights, mask)
            grads[5:9] = [g if w else None for g, w in zip(found, wanted[5:9], strict=True)]
        return tuple(grads)


def _masks(mask: Tensor | None) -> list[Tensor | None]:
    """A mask for each weight: only the recurrent ones have one."""
    return [None, mask, None, None]


def pad_last(x: Tensor, size: int) -> Tensor:
    """x with zeros after its last dimension, up to size; x itself where there is nothing to do."""
    return x if x.size(-1) == size else F.pad(x, (0, size - x.size(-1)))


def unpad_last(x: Tensor, size: int) -> Tensor:
    """A view of x without what pad_last added; x itself where that was nothing."""
    return x if x.size(-1) == size else x[..., :size]


def _own(state: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy: the last states outlive the window, what they are a part of does not."""
    return state.to(dtype, copy=True)
