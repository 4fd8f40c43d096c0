"""An LSTM layer for a CPU with fast bfloat16 products: few of them inside the time loop."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# What the states and the gates are kept in, by the dtype of the products.
STATE_DTYPES = {
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


def lstm_layer(
    x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer, computed in the dtype of x; bfloat16 is what it is made for.

    The equations are torch.nn.LSTM's (Hochreiter & Schmidhuber 1997; Gers et al. 2000):

        i, f, o = sigmoid(a_i), sigmoid(a_f), sigmoid(a_o),  g = tanh(a_g),
        a = W_ih x[t] + b_ih + W_hh h[t-1] + b_hh,
        c[t] = f c[t-1] + i g,  h[t] = o tanh(c[t]).

    One product gives the inputs' share of a for all time steps, and in backward one each gives the
    gradients of x, W_ih and W_hh. The time loop is left with one product a step, in either
    direction, of (B, H) with W_hh.

    In bfloat16 the factors of every product are rounded to 8 bits, its sums are accumulated in
    float32 and rounded once. Cells, gates and their derivatives are float32, and so are the sums
    of the biases' gradients. Weights may (and should) be float32: they are cast here, once a call,
    and their gradients come back in float32. In float32 and float64 nothing is rounded down.

    Args:
        x: input, (T, B, E), bfloat16, float32 or float64.
        h0: output before the first step, (B, H). Like all that follow of any floating dtype.
        c0: cells before the first step, (B, H).
        w_ih: input weights, (4·H, E), the gates in the order i, f, g, o.
        w_hh: recurrent weights, (4·H, H).
        b_ih: bias, (4·H,).
        b_hh: the other bias, (4·H,).

    Returns:
        Outputs (T, B, H) in the dtype of x; h[T] (B, H) in that of h0; c[T] (B, H) in that of c0.
        Gradients have the dtype of what they belong to. They cannot be differentiated again.

    Raises:
        ValueError: shapes that do not fit together, no time step, no sequence, or another dtype.
    """
    _check(x, h0, c0, w_ih, w_hh, b_ih, b_hh)
    output, h_n, c_n = _LSTMLayer.apply(x, h0, c0, w_ih, w_hh, b_ih, b_hh)
    return output, h_n, c_n


def _check(x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor, *biases: Tensor) -> None:
    if x.dtype not in STATE_DTYPES:
        raise ValueError(f"x is {x.dtype}; it must be bfloat16, float32 or float64")
    if x.dim() != 3 or not x.numel():
        raise ValueError(f"x is {tuple(x.shape)}; it must be (T, B, E), none of them 0")
    _, batch, width = x.shape
    units = w_hh.size(-1)
    expected: dict[str, tuple[int, ...]] = dict(
        h0=(batch, units), c0=(batch, units), w_ih=(4 * units, width), w_hh=(4 * units, units),
        b_ih=(4 * units,), b_hh=(4 * units,),
    )  # fmt: skip
    for (name, shape), given in zip(expected.items(), (h0, c0, w_ih, w_hh, *biases), strict=True):
        if tuple(given.shape) != shape or not given.numel():
            raise ValueError(f"{name} is {tuple(given.shape)}; it must be {shape}")


class _LSTMLayer(torch.autograd.Function):
    """The layer and its gradient.

    All four gates go through one sigmoid, the fastest of the functions at hand: with the rows of
    g doubled, tanh(a) = 2 s - 1 where s = sigmoid(2 a). Doubling is exact. So s stands for g in
    what follows, and z for a with its part for g doubled.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h0: Tensor,
        c0: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor,
        b_hh: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        (steps, batch, width), units, dtype = x.shape, w_hh.size(1), x.dtype
        state = STATE_DTYPES[dtype]
        w_ih, w_hh = _double_g(w_ih, dtype), _double_g(w_hh, dtype)
        bias = _double_g(b_ih.to(state) + b_hh.to(state), dtype)
        rows = x.reshape(-1, width)

        z = F.linear(rows, w_ih, bias).view(steps, batch, -1)
        gates = torch.empty_like(z, dtype=state)
        h = x.new_empty(steps + 1, batch, units)
        c = x.new_empty(steps + 1, batch, units, dtype=state)
        tanh_c = torch.empty_like(c[1:])
        h[0], c[0] = h0, c0
        scratch = torch.empty_like(c[0])
        recur = _product(w_hh, batch)
        for t in range(steps):
            i, f, s, o = gates[t].copy_(recur(z[t], h[t])).sigmoid_().chunk(4, dim=1)
            torch.mul(f, c[t], out=c[t + 1])
            c[t + 1].addcmul_(i, torch.sub(s, 0.5, out=scratch), value=2)
            torch.mul(c[t + 1], 2, out=tanh_c[t]).sigmoid_().mul_(2).sub_(1)
            h[t + 1].copy_(torch.mul(o, tanh_c[t], out=scratch))

        ctx.save_for_backward(rows, w_ih, w_hh, gates, h, c, tanh_c)
        ctx.dtypes = [v.dtype for v in (x, h0, c0, w_ih, w_hh, b_ih, b_hh)]
        ctx.set_materialize_grads(False)
        # Copies: the last states outlive the window, what is saved for backward does not.
        return h[1:], h[-1].to(h0.dtype, copy=True), c[-1].to(c0.dtype, copy=True)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        rows, w_ih, w_hh, gates, h, c, tanh_c = ctx.saved_tensors
        (steps, batch, units), dtype, state = tanh_c.shape, rows.dtype, gates.dtype
        if grad_output is None:
            grad_output = h.new_zeros(()).expand(steps, batch, units)
        dc = torch.zeros_like(c[0]) if grad_c is None else grad_c.to(state, copy=True)
        dh_next = torch.zeros_like(h[0]) if grad_h is None else grad_h.to(dtype, copy=True)
        dh_next += grad_output[-1]

        dz = torch.empty_like(gates, dtype=dtype)
        dz_t, dh, scratch = torch.empty_like(gates[0]), torch.empty_like(dc), torch.empty_like(dc)
        by_gate = dz_t.view(batch, 4, units)
        d_bias = torch.zeros_like(dz_t)
        recur = _product(w_hh.t().contiguous(), batch)
        for t in reversed(range(steps)):
            i, f, s, o = gates[t].chunk(4, dim=1)
            dh.copy_(dh_next)
            # dc = dL/dc[t] += dh o (1 - tanh(c)**2)
            torch.mul(o, tanh_c[t], out=scratch)
            dc.addcmul_(dh, torch.addcmul(o, scratch, tanh_c[t], value=-1, out=scratch))
            # dz = sigmoid'(z) times what each gate is multiplied by; g = 2 (s - 0.5)
            torch.addcmul(gates[t], gates[t], gates[t], value=-1, out=dz_t)
            by_gate[:, 0].mul_(torch.sub(s, 0.5, out=scratch))
            by_gate[:, 1].mul_(c[t])
            by_gate[:, 2].mul_(i)
            by_gate[:, 3].mul_(torch.mul(tanh_c[t], dh, out=scratch))
            by_gate[:, :3].mul_(dc[:, None])
            by_gate[:, 0:3:2].mul_(2)
            d_bias += dz_t
            dz[t].copy_(dz_t)
            dc.mul_(f)
            dh_next = recur(grad_output[t - 1] if t else torch.zeros_like(dh_next), dz[t])

        dz = dz.view(-1, 4 * units)
        wanted, dtypes = ctx.needs_input_grad, ctx.dtypes
        grads: list[Tensor | None] = [None] * 7
        if wanted[0]:
            grads[0] = (dz @ w_ih).view(steps, batch, -1)
        if wanted[1]:
            grads[1] = dh_next.to(dtypes[1])
        if wanted[2]:
            grads[2] = dc.to(dtypes[2])
        if wanted[3]:
            grads[3] = _double_g(dz.t() @ rows, dtypes[3])
        if wanted[4]:
            grads[4] = _double_g(dz.t() @ h[:-1].view(-1, units), dtypes[4])
        for k in (5, 6):
            if wanted[k]:
                grads[k] = _double_g(d_bias.sum(0), dtypes[k])
        return tuple(grads)


def _product(weight: Tensor, batch: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The function (y, x) -> y + x W^T for many x, (B, K), and one W, (N, K).

    Left alone, oneDNN rearranges W for every product. Here that is done once where it can be.
    Either way sums are accumulated in float32 (float64 for float64), y is added, and the result
    is rounded once.
    """
    if can_pack(weight.dtype):
        kernels = torch.ops.mkldnn
        packed = kernels._reorder_linear_weight(weight, batch)
        return lambda y, x: kernels._linear_pointwise.binary(x, y, packed, None, "add")
    return lambda y, x: torch.addmm(y, x, weight.t())


def can_pack(dtype: torch.dtype) -> bool:
    """PyTorch has the operators that keep a weight as oneDNN wants it, and the CPU bfloat16.

    They are the ones that torch.compile's code for a CPU uses, and are not documented.
    """
    kernels = torch.ops.mkldnn
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if dtype != torch.bfloat16 or not all(hasattr(kernels, name) for name in names):
        return False
    return bool(kernels._is_mkldnn_bf16_supported())


def _double_g(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in dtype, (4·H, …), in which the rows of g are doubled."""
    weight = weight.to(dtype, copy=True)
    weight.chunk(4)[2].mul_(2)
    return weight
