"""cuDNN's LSTM layer over a weight buffer of our own, padded to sizes it is fast at."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from layers.layer import Layer, State, Weights
from layers.lstm import LSTM, WEIGHTS
from noise import Noise

# Sizes are padded to a multiple of this: rows of 1150 numbers of 16 bits do not start at multiples
# of 16 bytes, which tensor cores want, rows of 1152 do.
MULTIPLE = 8
# cuDNN's number for an LSTM, and how many weights PyTorch hands over for a layer of one.
LSTM_MODE, COUNT = 2, 4
# Of a layer that is tried out: for smaller ones, up to 192, cuDNN has other kernels.
TRIAL_UNITS = 200
TRIAL_TOLERANCE = 0.03  # outputs lie within 1, and bfloat16 has 8 bits


class CudnnLSTM:
    """layers.lstm.LSTM by cuDNN.

    cuDNN wants a layer's weights in one buffer, at places of its own choice. A weight that was
    multiplied by a mask is not there, so that nn.LSTM copies all of them for each call and asks
    cuDNN for their places. Here the buffer is kept, and one copy a weight casts and moves it.

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

    name = "cudnn"

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
                parts,
                COUNT,
                self.padded_width,
                LSTM_MODE,
                self.padded_units,
                0,
                1,
                False,
                False,
            )
        self.parts = parts

    def __call__(
        self, x: Tensor, state: State, weights: Weights, noise: Noise
    ) -> tuple[Tensor, State]:
        """See Layer.compute.

        Between a call and its backward no other may come with other weights.

        Args:
            x: input, (T, B, E); it is cast to dtype, if it has another.
            state: h and c before the first step, (1, B, H) each, of any floating dtype.
            weights: of any floating dtype; float32 may (and should) stay so.

        Returns:
            Outputs (T, B, H) in dtype, and the states after the last step, of the dtype of those
            before. Gradients have the dtype of what they belong to. They cannot be differentiated
            again.
        """
        x = pad_last(x.to(self.dtype), self.padded_width)
        listed = [weights[name] for name in WEIGHTS]
        output, h, c = _Layer.apply(self, x, *state, *listed)
        return output[..., : self.units], (h, c)

    @torch.no_grad()
    def fill(self, weights: Sequence[Tensor]) -> None:
        """Write weights into the buffer, cast; padding stays 0."""
        for part, weight in zip(self.parts, weights, strict=True):
            gates = weight.unflatten(0, (4, self.units))
            self._without_padding(part, weight.size(-1)).copy_(gates)

    def gradients(self, d_parts: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """The weights' gradients from those of the buffer's parts, in the weights' dtype."""
        grads = []
        for d_part, weight in zip(d_parts, weights, strict=True):
            grads.append(torch.empty_like(weight, memory_format=torch.contiguous_format))
            gates = self._without_padding(d_part, weight.size(-1))
            grads[-1].unflatten(0, (4, self.units)).copy_(gates)
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
        found = torch.ops.aten._cudnn_rnn(x, self.parts, COUNT, self.buffer, h, c, *self._options)
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
            inputs[0], self.parts, COUNT, self.buffer, *inputs[1:], output, d_output, *d_states,
            *self._options, reserve, [True, True, True, of_weights],
        )  # fmt: skip
        return found

    @property
    def _options(self) -> list[Any]:
        """What follows the tensors in both calls: one layer, time first, no dropout."""
        return [LSTM_MODE, self.padded_units, 0, 1, False, 0.0, True, False, [], None]

    def _without_padding(self, part: Tensor, columns: int) -> Tensor:
        """A view of a weight's own numbers, (4, H, columns) or (4, H)."""
        gates: Tensor = part.unflatten(0, (4, self.padded_units))[:, : self.units]
        return gates if part.dim() == 1 else gates[..., :columns]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layer: CudnnLSTM, x: Tensor, h0: Tensor, c0: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        layer.fill(weights)
        x = x.contiguous()
        h, c = (pad_last(state.to(layer.dtype), layer.padded_units) for state in (h0, c0))
        h, c = h.contiguous(), c.contiguous()
        output, h_n, c_n, reserve = layer.forward(x, h, c)
        ctx.layer = layer
        ctx.save_for_backward(x, h, c, output, reserve, *weights)
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
        x, h, c, output, reserve, *weights = ctx.saved_tensors
        states = [
            None if g is None else pad_last(g.to(layer.dtype), layer.padded_units).contiguous()
            for g in (grad_h, grad_c)
        ]
        if grad_output is None:
            grad_output = torch.zeros_like(output)
        wanted = ctx.needs_input_grad
        of_weights = any(wanted[4:])
        d_x, d_h, d_c, d_parts = layer.backward(
            (x, h, c), output, grad_output.contiguous(), states, reserve, of_weights
        )
        grads: list[Tensor | None] = [None] * 8
        if wanted[1]:
            grads[1] = d_x
        for k, (grad, dtype) in enumerate(zip((d_h, d_c), ctx.state_dtypes, strict=True), 2):
            if wanted[k]:
                grads[k] = grad[..., : layer.units].to(dtype)
        if of_weights:
            found = layer.gradients(d_parts, weights)
            grads[4:] = [g if w else None for g, w in zip(found, wanted[4:], strict=True)]
        return tuple(grads)


def why_not(layer: Layer, dtype: torch.dtype | None, device: torch.device) -> str:
    """Why CudnnLSTM does not compute this layer; empty: it does. A small one is tried."""
    if type(layer) is not LSTM:
        return f"{type(layer).__name__} has no kernel over cuDNN here"
    if device.type != "cuda":
        return "this is no GPU"
    if not torch.backends.cudnn.is_available():
        return "this PyTorch has no cuDNN"
    failure = failure_of(lambda: _try_out(dtype or torch.float32, device))
    return f"cuDNN's layer fails: {failure}" if failure else ""


def _try_out(dtype: torch.dtype, device: torch.device) -> None:
    """Run a small layer forward and backward, and in plain torch, which has to come to the same."""
    plain = trial_layer(dtype, device)
    x = torch.linspace(-1, 1, 16 * TRIAL_UNITS, device=device).view(2, 8, -1).to(dtype)
    x.requires_grad_()
    zeros = plain.init_state(8)
    fast = CudnnLSTM(TRIAL_UNITS, TRIAL_UNITS, dtype, device)
    output, _ = fast(x, zeros, plain.weights(), Noise())
    output.float().sum().backward()
    difference = float((output - plain(x, zeros)[0]).detach().abs().max())
    if not difference < TRIAL_TOLERANCE:
        raise RuntimeError(f"it is {difference:g} off")


def trial_layer(dtype: torch.dtype, device: torch.device) -> LSTM:
    """A small layer with weights that nothing random is drawn for."""
    with torch.device("meta"):
        layer = LSTM(TRIAL_UNITS, TRIAL_UNITS)
    layer.to_empty(device=device).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            line = torch.linspace(-1, 1, parameter.numel(), device=device)
            parameter.copy_((line * 7).sin().view_as(parameter) * TRIAL_UNITS**-0.5)
    return layer


def failure_of(trial: Callable[[], None]) -> str:
    """What a trial fails with, in a line; empty: nothing. A lack of memory is no answer."""
    try:
        trial()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return " ".join(str(error).split())[:120]
    return ""


def pad_last(x: Tensor, size: int) -> Tensor:
    """x with zeros after its last dimension, up to size; x itself where there is nothing to do."""
    return x if x.size(-1) == size else F.pad(x, (0, size - x.size(-1)))


def _own(state: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy: the last states outlive the window, what they are a part of does not."""
    return state.to(dtype, copy=True)
