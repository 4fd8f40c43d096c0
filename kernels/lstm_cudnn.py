"""cuDNN's LSTM layer with a persistent weight buffer, padded to sizes at which cuDNN is fast."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from layers.layer import Layer, State, Weights
from layers.lstm import LSTM, WEIGHTS
from noise import Noise

# Sizes are padded to a multiple of this: tensor cores want rows aligned to 16 bytes, and rows of
# 1152 16-bit numbers are, rows of 1150 are not.
MULTIPLE = 8
# cuDNN's number for an LSTM, and PyTorch's number of weights per layer.
LSTM_MODE, COUNT = 2, 4
# Size of the trial layer: up to 192 units cuDNN uses other kernels.
TRIAL_UNITS = 200
TRIAL_TOLERANCE = 0.03  # outputs lie within 1, and bfloat16 has 8 bits


class CudnnLSTM:
    """layers.lstm.LSTM, computed by cuDNN.

    cuDNN wants a layer's weights in one buffer, in a layout of its own. A masked weight is not in
    that buffer, so nn.LSTM makes a new buffer and copies all weights in every call. This class
    keeps the buffer; one copy per weight casts and moves it.

    Widths are padded to a multiple of 8. Padded units have zero weights, so that i = f = o = 1/2,
    g = 0, and from a zero state c = h = 0 in every step. They contribute nothing to the output and
    receive no gradient: the result is that without padding.

    Args:
        width: size of the input, E.
        units: size of the layer, H.
        dtype: cuDNN's dtype: float32, float16, bfloat16 or float64.
        device: a GPU with cuDNN.
    """

    name = "cudnn"

    def __init__(self, width: int, units: int, dtype: torch.dtype, device: torch.device) -> None:
        self.width = width
        self.units = units
        self.padded_width = -(-width // MULTIPLE) * MULTIPLE
        self.padded_units = -(-units // MULTIPLE) * MULTIPLE
        self.dtype = dtype
        shapes = [(4 * self.padded_units, size) for size in (self.padded_width, self.padded_units)]
        parts = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        parts += [torch.zeros(shapes[0][:1], dtype=dtype, device=device) for _ in range(2)]
        with torch.no_grad():
            # Turns the tensors of parts into views of the buffer that it returns.
            sizes = self.padded_width, LSTM_MODE, self.padded_units
            self.buffer: Tensor = torch.ops.aten._cudnn_rnn_flatten_weight(
                parts, COUNT, *sizes, 0, 1, False, False
            )
        self.parts = parts

    def __call__(
        self, x: Tensor, state: State, weights: Weights, noise: Noise
    ) -> tuple[Tensor, State]:
        """See Layer.compute.

        Run a call's backward before the next call with other weights: they share the buffer.

        Args:
            x: input, (T, B, E); cast to dtype.
            state: h and c before the first step, (1, B, H) each, of any floating dtype.
            weights: of any floating dtype, preferably float32.

        Returns:
            Outputs (T, B, H) in dtype, and the states after the last step in the dtypes of state.
            Gradients have their tensors' dtypes; there is no double backward.
        """
        x = pad_last(x.to(self.dtype), self.padded_width)
        listed = [weights[name] for name in WEIGHTS]
        output, h, c = _Layer.apply(self, x, *state, *listed)
        return output[..., : self.units], (h, c)

    @torch.no_grad()
    def fill(self, weights: Sequence[Tensor]) -> None:
        """Cast the weights and write them into the buffer; padding stays 0."""
        for part, weight in zip(self.parts, weights, strict=True):
            gates = weight.unflatten(0, (4, self.units))
            self._without_padding(part, weight.size(-1)).copy_(gates)

    def gradients(self, d_parts: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """The weights' gradients, in their dtype, from those of the buffer's parts."""
        grads = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]
        for grad, d_part in zip(grads, d_parts, strict=True):
            gates = self._without_padding(d_part, grad.size(-1))
            grad.unflatten(0, (4, self.units)).copy_(gates)
        return grads

    @property
    def options(self) -> list[Any]:
        """cuDNN's options, the same in both calls: one layer, time first, no dropout."""
        return [LSTM_MODE, self.padded_units, 0, 1, False, 0.0, True, False, [], None]

    def _without_padding(self, part: Tensor, columns: int) -> Tensor:
        """A view of a weight without its padding, (4, H, columns) or (4, H)."""
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
        output, h_n, c_n, reserve, _ = torch.ops.aten._cudnn_rnn(
            x, layer.parts, COUNT, layer.buffer, h, c, *layer.options
        )
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
        d_output = torch.zeros_like(output) if grad_output is None else grad_output.contiguous()
        wanted = ctx.needs_input_grad
        which = [True, True, True, any(wanted[4:])]
        d_x, d_h, d_c, d_parts = torch.ops.aten._cudnn_rnn_backward(
            x, layer.parts, COUNT, layer.buffer, h, c, output, d_output, *states,
            *layer.options, reserve, which,
        )  # fmt: skip
        d_states = zip((d_h, d_c), ctx.state_dtypes, strict=True)
        grads = [None, d_x, *(grad[..., : layer.units].to(dtype) for grad, dtype in d_states)]
        grads += layer.gradients(d_parts, weights) if which[3] else [None] * COUNT
        return tuple(grad if w else None for grad, w in zip(grads, wanted, strict=True))


def why_not(layer: Layer, dtype: torch.dtype | None, device: torch.device) -> str:
    """Reason why CudnnLSTM does not fit; empty if it fits. Runs a small trial layer."""
    if type(layer) is not LSTM:
        return f"{type(layer).__name__} has no kernel over cuDNN here"
    if device.type != "cuda":
        return "this is no GPU"
    if not torch.backends.cudnn.is_available():
        return "this PyTorch has no cuDNN"
    failure = failure_of(lambda: _try_out(dtype or torch.float32, device))
    return f"cuDNN's layer fails: {failure}" if failure else ""


def _try_out(dtype: torch.dtype, device: torch.device) -> None:
    """Run a small layer forward and backward and compare its outputs with plain torch's."""
    plain = trial_layer(dtype, device)
    x = torch.linspace(-1, 1, 16 * TRIAL_UNITS, device=device).view(2, 8, -1).to(dtype)
    x.requires_grad_()
    zeros = plain.init_state(8)
    fast = CudnnLSTM(TRIAL_UNITS, TRIAL_UNITS, dtype, device)
    output, _ = fast(x, zeros, plain.weights(), Noise())
    output.float().sum().backward()
    difference = float((output - plain(x, zeros)[0]).detach().abs().max())
    if not difference < TRIAL_TOLERANCE:
        raise RuntimeError(f"outputs differ from plain torch's by {difference:g}")


def trial_layer(dtype: torch.dtype, device: torch.device) -> LSTM:
    """A small layer with deterministic weights, so that no random state changes."""
    with torch.device("meta"):
        layer = LSTM(TRIAL_UNITS, TRIAL_UNITS)
    layer.to_empty(device=device).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            line = torch.linspace(-1, 1, parameter.numel(), device=device)
            parameter.copy_((line * 7).sin().view_as(parameter) * TRIAL_UNITS**-0.5)
    return layer


def failure_of(trial: Callable[[], None]) -> str:
    """The error of a trial, in one line; empty if it works. Raises torch.OutOfMemoryError."""
    try:
        trial()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return " ".join(str(error).split())[:120]
    return ""


def pad_last(x: Tensor, size: int) -> Tensor:
    """Pad the last dimension of x with zeros up to size; returns x itself if it has that size."""
    return x if x.size(-1) == size else F.pad(x, (0, size - x.size(-1)))


def _own(state: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy a last state, so that it does not keep cuDNN's padded tensor alive."""
    return state.to(dtype, copy=True)
