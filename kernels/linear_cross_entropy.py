"""Fused linear decoder and cross-entropy, which computes its gradient in the forward pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from decoders.decoder import Decoder
from decoders.linear import Linear
from kernels.padding import pad_rows
from noise import Noise

# Bytes of a block of scores, on a CPU and on a GPU, where each block costs a pass over the
# decoder's gradient; rows of softmax at a time on a CPU, so that they stay in its caches.
BLOCK_BYTES, BLOCK_BYTES_GPU = 64 * 2**20, 256 * 2**20
SOFTMAX_ROWS = 64


class FastLinear:
    """The loss of decoders.linear.Linear, computed by linear_cross_entropy.

    Args:
        decoder: owner of the weights.
        dtype: dtype of the products; None: that of the output.
    """

    name = "linear_cross_entropy"

    def __init__(self, decoder: Linear, dtype: torch.dtype | None) -> None:
        self.decoder = decoder
        self.dtype = dtype

    def __call__(self, output: Tensor, targets: Tensor, noise: Noise | None = None) -> Tensor:
        """See Decoder.loss."""
        output = output.to(self.dtype or output.dtype)
        return linear_cross_entropy(output, self.decoder.weight, self.decoder.bias, targets)


def why_not(decoder: Decoder, dtype: torch.dtype | None, device: torch.device) -> str:
    """Reason why FastLinear does not fit; empty if it fits."""
    if type(decoder) is not Linear:
        return f"{type(decoder).__name__} has no fast kernel"
    if device.type != "cuda" and dtype != torch.bfloat16:
        return "a CPU has a fast kernel for bf16 only"
    return ""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of softmax(W h + b), with products in the dtype of hidden.

    Equals F.cross_entropy(F.linear(hidden, weight, bias), targets), but never holds all scores:
    rows are processed in blocks, whose scores are overwritten by their gradient,

        dL/dscores = (softmax(scores) - onehot(target)) / N

    (backward divides by N). Only the gradients of hidden, W and b are saved for backward.

    In bfloat16 and float16 the scores W h are accumulated in float32 and rounded; bias, softmax,
    logarithm and the sum of the losses are float32; softmax - onehot is rounded for its two
    products. (On a GPU softmax is rounded before onehot is subtracted, and the bias's gradient sums
    rounded values.) Weight and bias should be float32: they are cast here, and their gradients
    are float32. In float32 and float64 no cast loses precision.

    In float16 a softmax below 2**-25 becomes 0, and scores above 65,504 are infinite. On a GPU the
    gradient of W is summed in float32. Loss scaling multiplies these sums afterwards, in float32;
    only the gradient of hidden is scaled in float16.

    Args:
        hidden: decoder's input, (N, E), of any floating dtype; N = T·B > 0.
        weight: decoder's matrix, (V, E), of any floating dtype.
        bias: decoder's bias, (V,), of any floating dtype.
        targets: ids of the words to predict, (N,).

    Returns:
        Scalar float32 (float64 for float64 input), nats per token. Gradients have their tensors'
        dtypes; there is no double backward.
    """
    training = torch.is_grad_enabled()
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets, training)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        training: bool,
    ) -> Tensor:
        ctx.dtypes = [v.dtype for v in (hidden, weight, bias)]
        dtype = hidden.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight, bias = weight.to(dtype), bias.to(wide)
        wanted = [training and w for w in ctx.needs_input_grad[:3]]
        loss, count = hidden.new_zeros((), dtype=wide), len(hidden)
        if not hidden.is_cuda:
            hidden = pad_rows(hidden)
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        d_weight = None
        d_bias = torch.zeros_like(bias) if wanted[2] else None
        most = BLOCK_BYTES_GPU if hidden.is_cuda else BLOCK_BYTES
        rows = max(1, most // (len(bias) * hidden.itemsize))
        for start in range(0, len(hidden), rows):
            block = slice(start, start + rows)
            part, words = hidden[block], targets[block]
            scores = part @ weight.t()
            own = scores[: len(words)]  # not of the padding
            loss += _softmax(own, bias, words, any(wanted), d_bias)
            scores[len(words) :] = 0
            if d_hidden is not None:
                torch.mm(scores, weight, out=d_hidden[block])
            if wanted[1]:
                product = _wide_product(scores.t(), part, wide)
                d_weight = product if d_weight is None else d_weight.add_(product)
        d_hidden = None if d_hidden is None else d_hidden[:count]
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.count = count
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_loss / ctx.count
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        grads = [None if g is None else _scaled(g, scale, dtype) for g, dtype in pairs]
        return (*grads, None, None)


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x * scale, rounded once. (A 0-dimensional scale would be rounded to x's dtype first.)"""
    wide = scale.reshape([1] * x.dim())
    return torch.mul(x, wide, out=torch.empty_like(x, dtype=dtype))


def _wide_product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """a b in a wider dtype; on a GPU the sums are not rounded to the dtype of a and b."""
    if a.is_cuda and a.dtype != wide:
        return torch.mm(a, b, out_dtype=wide)
    return (a @ b).to(wide)


def _softmax(
    scores: Tensor, bias: Tensor, targets: Tensor, training: bool, d_bias: Tensor | None
) -> Tensor:
    """Summed loss of a block; overwrites scores by their gradient and adds to d_bias.

    Args:
        scores: without the bias, (rows, V).
        bias: (V,), in the dtype to compute in.
        targets: (rows,).
        training: compute the gradient.
        d_bias: (V,) or None.
    """
    if not _has_caches(scores):
        return _softmax_at_once(scores, bias, targets, training, d_bias)
    loss = bias.new_zeros(())
    for rows, wanted in zip(
        scores.split(SOFTMAX_ROWS), targets[:, None].split(SOFTMAX_ROWS), strict=True
    ):
        wide = rows.to(bias.dtype, copy=True).add_(bias)
        share = wide.softmax(dim=1)
        # log(sum(exp)) from the largest score, whose softmax is at least 1 / V, so that its
        # logarithm is safe. (log_softmax and exp cost twice as much.)
        log_sum = wide.amax(1, keepdim=True) - share.amax(1, keepdim=True).log()
        loss += (log_sum - wide.gather(1, wanted)).sum()
        if training:
            share.scatter_add_(1, wanted, share.new_full((), -1.0).expand_as(wanted))
            rows.copy_(share)
            if d_bias is not None:
                d_bias += share.sum(0)
    return loss


def _softmax_at_once(
    scores: Tensor, bias: Tensor, targets: Tensor, training: bool, d_bias: Tensor | None
) -> Tensor:
    """As _softmax, in few kernels over all rows: a GPU is limited by memory bandwidth."""
    wanted = targets[:, None]
    log_share = torch.add(scores, bias[None]).log_softmax(dim=1)
    loss = -log_share.gather(1, wanted).sum()
    if training:
        torch.exp(log_share, out=scores)
        scores.scatter_add_(1, wanted, scores.new_full((), -1.0).expand_as(wanted))
        if d_bias is not None:
            d_bias += scores.sum(0, dtype=bias.dtype)
    return loss


def _has_caches(x: Tensor) -> bool:
    """True on a CPU, whose caches hold a part that was just written."""
    return x.device.type == "cpu"
