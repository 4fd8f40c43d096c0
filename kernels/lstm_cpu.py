"""An LSTM layer for a CPU with fast bfloat16 products: few of them inside the time loop."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from layers.layer import Layer, State, Weights
from layers.lstm import LSTM, WEIGHTS
from noise import Noise

# What the states and the gates are kept in, by the dtype of the products.
STATE_DTYPES = {
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


class CpuLSTM:
    """layers.lstm.LSTM by lstm_layer.

    Args:
        dtype: of the products, bfloat16 where it is to be fast.
    """

    name = "cpu"

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(
        self, x: Tensor, state: State, weights: Weights, noise: Noise
    ) -> tuple[Tensor, State]:
        """See Layer.compute."""
        h, c = state
        listed = [weights[name] for name in WEIGHTS]
        output, h, c = lstm_layer(x.to(self.dtype), h[0], c[0], *listed)
        return output, (h[None], c[None])


def why_not(layer: Layer, dtype: torch.dtype | None, device: torch.device) -> str:
    """Why CpuLSTM does not compute this layer; empty: it does."""
    if type(layer) is not LSTM:
        return f"{type(layer).__name__} has no fast kernel on a CPU"
    if device.type != "cpu" or dtype != torch.bfloat16:
        return "a CPU has a fast kernel for bf16 only"
    return ""


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
    training = torch.is_grad_enabled()
    output, h_n, c_n = _LSTMLayer.apply(x, h0, c0, w_ih, w_hh, b_ih, b_hh, training)
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

    All four gates go through one sigmoid, the fastest of the functions at hand, and tanh(a) =
    2 sigmoid(2 a) - 1. For that the rows of g are doubled, and the cells are kept doubled. Doubling
    is exact. In what follows z is a with its part for g doubled, s = sigmoid(z_g), k = 2 c and
    r = sigmoid(k). Per step, everything lies gate by gate, (4, B, H): one gate is then one stretch
    of memory, and an operation on all of them is as fast as on any other such stretch.

    Operations of this size cost little more than their call. So forward keeps, instead of gates
    and cells, what backward multiplies by; with d = dL/dh and e = dL/dk

        e[t] = f[t+1] e[t+1] + 2 d o r (1 - r),   dL/dz = (e, e, e, d) * factors * sigmoid'(z),
        factors = (2 g, k[t-1], 4 i, tanh c).
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
        training: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.dtypes = [v.dtype for v in (x, h0, c0, w_ih, w_hh, b_ih, b_hh)]
        (steps, batch, width), units, dtype = x.shape, w_hh.size(1), x.dtype
        state = STATE_DTYPES[dtype]
        w_ih = _double_g(w_ih.to(dtype, copy=True))
        w_hh = _double_g(w_hh.to(dtype, copy=True))
        bias = _double_g((b_ih.to(state) + b_hh.to(state)).to(dtype))
        rows = x.reshape(-1, width)

        recur = _product(w_hh, batch, bias)
        z = (rows @ w_ih.t()).view(steps, batch, -1)
        h = x.new_empty(steps + 1, batch, units)
        h[0] = h0
        # Per step: f; what dL/dz is a multiple of, in forward the gates; o r (1 - r).
        # (A block of memory for each step: larger ones malloc may get from the system each time.)
        shape = (6, batch, units)
        saved = [x.new_empty(shape, dtype=state) for _ in range(steps if training else 1)]
        factors = torch.empty_like(saved[0][1:5])
        two_g, k, four_i, tanh_c = factors
        r, scratch = torch.empty_like(k), torch.empty_like(k)
        minus_one, minus_two = k.new_tensor(-1.0), k.new_tensor(-2.0)
        torch.mul(c0.to(state), 2, out=k)
        turns = zip(z, h[:-1], h[1:], saved if training else saved * steps, strict=True)
        for z_t, h_t, h_next, kept in turns:
            gates = kept[1:5]
            kept_f, i, f, s, o, kept_r = kept
            gates.copy_(_by_gate(recur(z_t, h_t), units)).sigmoid_()
            torch.add(minus_two, s, alpha=4, out=two_g)
            next_k = torch.mul(f, k, out=scratch).addcmul_(i, two_g)
            torch.sigmoid(next_k, out=r)
            torch.add(minus_one, r, alpha=2, out=tanh_c)
            if training:
                _sigmoid_backward(o, r, kept_r)
                torch.mul(i, 4, out=four_i)
                kept_f.copy_(f)
            h_next.copy_(torch.mul(o, tanh_c, out=r))
            if training:
                _sigmoid_backward(factors, gates, gates)
            k.copy_(next_k)

        ctx.save_for_backward(rows, w_ih, w_hh, h, *saved)
        ctx.set_materialize_grads(False)
        # Copies: the last states outlive the window, what is saved for backward does not.
        return h[1:], h[-1].to(h0.dtype, copy=True), (k / 2).to(c0.dtype)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        rows, w_ih, w_hh, h, *saved = ctx.saved_tensors
        (_, batch, units), steps = saved[0].shape, len(saved)
        dtype, wanted = rows.dtype, ctx.needs_input_grad
        if grad_output is None:
            grad_output = h.new_zeros(()).expand(steps, batch, units)
        dh_next = torch.zeros_like(h[0]) if grad_h is None else grad_h.to(dtype, copy=True)
        dh_next += grad_output[-1]

        # What goes on to the step before; dL/dz; what is added to e
        products = torch.zeros_like(saved[0])
        if grad_c is not None:
            torch.div(grad_c.to(products.dtype), 2, out=products[0])
        by_e, by_dh, dz_t = products[:4], products[4:], products[1:5]
        d_bias = torch.zeros_like(dz_t)
        dh, e = torch.empty_like(products[0]), torch.empty_like(products[0])
        dz = rows.new_empty(steps, batch, 4 * units)
        # As w_hh.t().contiguous(), but that takes a third longer.
        recur = _product(torch.cat([w.t() for w in w_hh.chunk(4)], dim=1), batch)
        e_next, e_more = products[0], products[5]
        for t in reversed(range(steps)):
            torch.mul(saved[t][4:], dh.copy_(dh_next), out=by_dh)
            torch.add(e_next, e_more, alpha=2, out=e)
            torch.mul(saved[t][:4], e, out=by_e)
            d_bias += dz_t
            _by_gate(dz[t], units).copy_(dz_t)
            if t or wanted[1]:
                dh_next = recur(grad_output[t - 1] if t else torch.zeros_like(dh_next), dz[t])

        dz = dz.view(-1, 4 * units)
        grads: list[Tensor | None] = [None] * 8
        if wanted[0]:
            grads[0] = (dz @ w_ih).view(steps, batch, -1)
        if wanted[1]:
            grads[1] = dh_next.to(ctx.dtypes[1])
        if wanted[2]:
            grads[2] = (e_next * 2).to(ctx.dtypes[2])
        if wanted[3]:
            grads[3] = _double_g((dz.t() @ rows).to(ctx.dtypes[3]))
        if wanted[4]:
            grads[4] = _double_g((dz.t() @ h[:-1].view(-1, units)).to(ctx.dtypes[4]))
        for k in (5, 6):
            if wanted[k]:
                grads[k] = _double_g(d_bias.sum(1).flatten().to(ctx.dtypes[k]))
        return tuple(grads)


def _by_gate(rows: Tensor, units: int) -> Tensor:
    """(B, 4·H) as (4, B, H)."""
    return rows.view(-1, 4, units).transpose(0, 1)


def _sigmoid_backward(factor: Tensor, sigmoid: Tensor, out: Tensor) -> None:
    """Put factor * sigmoid * (1 - sigmoid) into out, in one pass."""
    torch.ops.aten.sigmoid_backward.grad_input(factor, sigmoid, grad_input=out)


def _product(
    weight: Tensor, batch: int, bias: Tensor | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """The function (y, x) -> y + x W^T + b for many x, (B, K), one W, (N, K), and one b, (N,).

    Left alone, oneDNN rearranges W for every product. Here that is done once where it can be.
    Either way sums are accumulated in float32 (float64 for float64), b and y are added, and the
    result is rounded once; without packed weights y + b is rounded too.
    """
    if can_pack(weight.dtype):
        kernels = torch.ops.mkldnn
        packed = kernels._reorder_linear_weight(weight, batch)
        return lambda y, x: kernels._linear_pointwise.binary(x, y, packed, bias, "add")
    if bias is None:
        return lambda y, x: torch.addmm(y, x, weight.t())
    return lambda y, x: torch.addmm(y + bias, x, weight.t())


def can_pack(dtype: torch.dtype) -> bool:
    """PyTorch has the operators that keep a weight as oneDNN wants it, and the CPU bfloat16.

    They are the ones that torch.compile's code for a CPU uses, and are not documented.
    """
    kernels = torch.ops.mkldnn
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if dtype != torch.bfloat16 or not all(hasattr(kernels, name) for name in names):
        return False
    return bool(kernels._is_mkldnn_bf16_supported())


def _double_g(weight: Tensor) -> Tensor:
    """weight, (4·H, …), itself, its rows of g doubled in place."""
    weight.chunk(4)[2].mul_(2)
    return weight
