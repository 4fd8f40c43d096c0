"""PyTorch's operators for cuDNN's LSTM, written out for the CPU, where PyTorch has none.

With them the code around cuDNN runs unchanged on a machine without a GPU. The operators' schemas
check what it hands over, and these functions check what cuDNN would.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kernels.linear_cross_entropy import FastLinear
from kernels.lstm_cudnn import CudnnLSTM
from layers.lstm import LSTM
from model import RNNModel

GAP = 3  # numbers between the weights in the buffer, which are none of ours


@contextmanager
def cudnn_on_cpu() -> Iterator[None]:
    """Within this context the operators are there."""
    library = torch.library.Library("aten", "IMPL")
    for function in (flatten, forward, backward):
        name = "_cudnn_rnn" + dict(flatten="_flatten_weight", backward="_backward").get(
            function.__name__, ""
        )
        library.impl(name, function, "CPU")
    try:
        yield
    finally:
        library._destroy()


def install_gpu_kernels(model: RNNModel, dtype: torch.dtype | None = None) -> None:
    """What kernels.choose.install does on a GPU."""
    for layer in model.layers:
        assert isinstance(layer, LSTM)
        weight = next(layer.parameters())
        layer.kernel = CudnnLSTM(layer.width, layer.units, dtype or weight.dtype, weight.device)
        layer.mask_dtype = dtype
    model.decoder.kernel = FastLinear(model.decoder, dtype)  # type: ignore[arg-type]


def flatten(
    weights: list[Tensor], stride: int, width: int, mode: int, units: int, *more: Any
) -> Tensor:
    """Put the weights of a layer into one buffer, the last one first, and make views of them."""
    assert (stride, mode, more) == (4, 2, (0, 1, False, False))
    shapes = [(4 * units, width), (4 * units, units), (4 * units,), (4 * units,)]
    assert [tuple(w.shape) for w in weights] == shapes
    assert all(w.is_contiguous() and w.dtype == weights[0].dtype for w in weights)
    buffer = weights[0].new_full((sum(w.numel() + GAP for w in weights),), float("nan"))
    start = 0
    for weight in reversed(weights):
        place = buffer[start : start + weight.numel()].view(weight.shape)
        place.copy_(weight)
        weight.set_(place)  # type: ignore[call-overload]
        start += weight.numel() + GAP
    return buffer


def check(
    x: Tensor, weights: list[Tensor], buffer: Tensor, states: list[Tensor], options: Any
) -> None:
    (mode, units, *rest), (_, batch, width) = options, x.shape
    assert (mode, rest) == (2, [0, 1, False, 0.0, True, False, [], None])
    first = buffer.untyped_storage().data_ptr()
    assert all(w.untyped_storage().data_ptr() == first for w in weights), "not in the buffer"
    shapes = [(4 * units, width), (4 * units, units), (4 * units,), (4 * units,)]
    assert [tuple(w.shape) for w in weights] == shapes
    assert all(tuple(s.shape) == (1, batch, units) and s.is_contiguous() for s in states)
    assert all(t.dtype == x.dtype for t in (*weights, *states))


def forward(
    x: Tensor,
    weights: list[Tensor],
    stride: int,
    buffer: Tensor,
    h0: Tensor,
    c0: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    """The LSTM's equations step by step; the reserve keeps what backward needs."""
    check(x, weights, buffer, [h0, c0], options)
    w_ih, w_hh, b_ih, b_hh = (w.double() for w in weights)
    h, c = h0[0].double(), c0[0].double()
    outputs, reserve = [], []
    for x_t in x.double():
        a = x_t @ w_ih.T + h @ w_hh.T + b_ih + b_hh
        i, f, g, o = a.chunk(4, dim=1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        reserve.append(torch.cat([i, f, g, o, c], dim=1))
        c = f * c + i * g
        h = (o * c.tanh()).to(x.dtype).double()
        outputs.append(h)
    output = torch.stack(outputs).to(x.dtype)
    return output, h[None].to(x.dtype), c[None].to(x.dtype), torch.stack(reserve), buffer.clone()


def backward(
    x: Tensor, weights: list[Tensor], stride: int, buffer: Tensor, h0: Tensor, c0: Tensor,
    output: Tensor, d_output: Tensor | None, d_h: Tensor | None, d_c: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """The gradients step by step; the reserve can be used once, as cuDNN's can."""
    *options, reserve, which = rest
    check(x, weights, buffer, [h0, c0], options)
    assert not reserve.isnan().any(), "the reserve was used before"
    assert d_output is None or (d_output.shape == output.shape and d_output.is_contiguous())
    assert all(g is None or g.is_contiguous() for g in (d_h, d_c))
    assert all(g is None or g.dtype == x.dtype for g in (d_output, d_h, d_c))
    w_ih, w_hh, _, _ = (w.double() for w in weights)
    dh = torch.zeros_like(h0[0], dtype=torch.float64) if d_h is None else d_h[0].double()
    dc = torch.zeros_like(dh) if d_c is None else d_c[0].double()
    d_x = torch.zeros_like(x, dtype=torch.float64)
    d_w = [torch.zeros_like(w, dtype=torch.float64) for w in weights]
    for t in reversed(range(len(x))):
        i, f, g, o, c_before = reserve[t].chunk(5, dim=1)
        c = f * c_before + i * g
        if d_output is not None:
            dh = dh + d_output[t].double()
        dc = dc + dh * o * (1 - c.tanh() ** 2)
        d_a = [dc * g * i * (1 - i), dc * c_before * f * (1 - f), dc * i * (1 - g**2)]
        a = torch.cat([*d_a, dh * c.tanh() * o * (1 - o)], dim=1)
        d_x[t] = a @ w_ih
        d_w[0] += a.T @ x[t].double()
        d_w[1] += a.T @ (output[t - 1] if t else h0[0]).double()
        d_w[2] += a.sum(0)
        d_w[3] += a.sum(0)
        dh, dc = a @ w_hh, dc * f
    reserve.fill_(float("nan"))
    d_weights = [w.to(x.dtype) for w in d_w] if which[3] else []
    return d_x.to(x.dtype), dh[None].to(x.dtype), dc[None].to(x.dtype), d_weights
