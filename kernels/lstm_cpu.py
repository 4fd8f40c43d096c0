"""An LSTM layer for CPUs with fast bfloat16 products; its time loop has one product per step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.padding import pad_rows
from layers.layer import Layer, State, Weights
from layers.lstm import LSTM, WEIGHTS
from noise import Noise


class CpuLSTM:
    """layers.lstm.LSTM, computed by lstm_layer.

    Args:
        dtype: dtype of the products; only bfloat16 is fast.
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
    """Reason why CpuLSTM does not fit; empty if it fits."""
    if type(layer) is not LSTM:
        return f"{type(layer).__name__} has no fast kernel on a CPU"
    if device.type != "cpu" or dtype != torch.bfloat16:
        return "a CPU has a fast kernel for bf16 only"
    return ""


def lstm_layer(
    x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer with products in the dtype of x, made for bfloat16.

    The equations are torch.nn.LSTM's (Hochreiter & Schmidhuber 1997; Gers et al. 2000):

        i, f, o = sigmoid(a_i), sigmoid(a_f), sigmoid(a_o),  g = tanh(a_g),
        a = W_ih x[t] + b_ih + W_hh h[t-1] + b_hh,
        c[t] = f c[t-1] + i g,  h[t] = o tanh(c[t]).

    One product computes W_ih x for all time steps, and in backward one product each computes the
    gradients of x, W_ih and W_hh; they are padded (kernels.padding). Per step the time loop has one
    product, of (B, H) with W_hh, in forward and one in backward.

    In bfloat16 the factors of every product have 8 bits of precision; its sums are accumulated in
    float32 and rounded once. Cells, gates, their derivatives and the sums of the biases' gradients
    are float32. Weights should be float32: they are cast here, once per call, and their gradients
    are float32. In float32 and float64 no cast loses precision.

    Args:
        x: input, (T, B, E), bfloat16, float32 or float64.
        h0: output before the first step, (B, H). This and all that follow: any floating dtype.
        c0: cells before the first step, (B, H).
        w_ih: input weights, (4·H, E), the gates in the order i, f, g, o.
        w_hh: recurrent weights, (4·H, H).
        b_ih: bias, (4·H,).
        b_hh: the other bias, (4·H,).

    Returns:
        Outputs (T, B, H) in the dtype of x; h[T] (B, H) in that of h0; c[T] (B, H) in that of c0.
        Gradients have their tensors' dtypes; there is no double backward.
    """
    training = torch.is_grad_enabled()
    output, h_n, c_n = _LSTMLayer.apply(x, h0, c0, w_ih, w_hh, b_ih, b_hh, training)
    return output, h_n, c_n


class _LSTMLayer(torch.autograd.Function):
    """The layer and its gradient.

    One sigmoid serves all four gates, since tanh(a) = 2 sigmoid(2 a) - 1; for that the rows of g
    are doubled, and cells are stored doubled. Doubling is exact. Below, z is a with its part for g
    doubled, s = sigmoid(z_g), k = 2 c and r = sigmoid(k). The layout per step is gate by gate,
    (4, B, H), so that each gate, and all four together, are contiguous.

    Operations of this size cost little more than their call. So forward saves the factors of
    backward's products instead of gates and cells; with d = dL/dh and e = dL/dk

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
        state = torch.promote_types(dtype, torch.float32)  # of cells and gates
        w_ih = _double_g(w_ih.to(dtype, copy=True))
        w_hh = _double_g(w_hh.to(dtype, copy=True))
        bias = _double_g((b_ih.to(state) + b_hh.to(state)).to(dtype))
        rows = pad_rows(x.reshape(-1, width))

        recur = _product(w_hh, batch, bias)
        z = (rows @ w_ih.t())[: steps * batch].view(steps, batch, -1)
        h_rows = x.new_zeros(len(rows) + batch, units)
        h = h_rows[: (steps + 1) * batch].view(steps + 1, batch, units)
        h[0] = h0
        # Per step: f; the gates, then the factors of dL/dz; o r (1 - r). (One tensor per step:
        # malloc may get a larger block from the system each time.)
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

        ctx.save_for_backward(rows, w_ih, w_hh, h_rows, *saved)
        ctx.set_materialize_grads(False)
        # Copies, so that the last states do not keep the saved tensors alive.
        return h[1:], h[-1].to(h0.dtype, copy=True), (k / 2).to(c0.dtype)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        rows, w_ih, w_hh, h_rows, *saved = ctx.saved_tensors
        (_, batch, units), steps = saved[0].shape, len(saved)
        dtype, wanted = rows.dtype, ctx.needs_input_grad
        if grad_output is None:
            grad_output = rows.new_zeros(()).expand(steps, batch, units)
        dh_next = rows.new_zeros(batch, units) if grad_h is None else grad_h.to(dtype, copy=True)
        dh_next += grad_output[-1]

        # f e for the step before; dL/dz; d o r (1 - r).
        products = torch.zeros_like(saved[0])
        if grad_c is not None:
            torch.div(grad_c.to(products.dtype), 2, out=products[0])
        by_e, by_dh, dz_t = products[:4], products[4:], products[1:5]
        d_bias = torch.zeros_like(dz_t)
        dh, e = torch.empty_like(products[0]), torch.empty_like(products[0])
        dz_rows = rows.new_empty(len(rows), 4 * units)
        dz = dz_rows[: steps * batch].view(steps, batch, -1)
        dz_rows[steps * batch :].zero_()
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

        grads: list[Tensor | None] = [None] * 8
        if wanted[0]:
            grads[0] = (dz_rows @ w_ih)[: steps * batch].view(steps, batch, -1)
        if wanted[1]:
            grads[1] = dh_next.to(ctx.dtypes[1])
        if wanted[2]:
            grads[2] = (e_next * 2).to(ctx.dtypes[2])
        if wanted[3]:
            grads[3] = _double_g((dz_rows.t() @ rows).to(ctx.dtypes[3]))
        if wanted[4]:
            grads[4] = _double_g((dz_rows.t() @ h_rows[: len(rows)]).to(ctx.dtypes[4]))
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
    """The function (y, x) -> y + x W^T + b for many x, (B, K), with W (N, K) and b (N,) fixed.

    Packs W once if possible; oneDNN otherwise packs it for every product. Sums are accumulated in
    float32 (float64 for float64) and rounded once, after y and b were added; without packed weights
    y + b is rounded too.
    """
    if can_pack(weight.dtype):
        kernels = torch.ops.mkldnn
        packed = kernels._reorder_linear_weight(weight, batch)
        return lambda y, x: kernels._linear_pointwise.binary(x, y, packed, bias, "add")
    if bias is None:
        return lambda y, x: torch.addmm(y, x, weight.t())
    return lambda y, x: torch.addmm(y + bias, x, weight.t())


def can_pack(dtype: torch.dtype) -> bool:
    """True if PyTorch has oneDNN's operators for packed weights, and the CPU supports bfloat16.

    These operators are undocumented; torch.compile uses them on CPUs.
    """
    kernels = torch.ops.mkldnn
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if dtype != torch.bfloat16 or not all(hasattr(kernels, name) for name in names):
        return False
    return bool(kernels._is_mkldnn_bf16_supported())


def _double_g(weight: Tensor) -> Tensor:
    """Double the rows of g of a weight, (4·H, …), in place; returns the weight."""
    weight.chunk(4)[2].mul_(2)
    return weight
