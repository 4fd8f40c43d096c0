"""Locked (variational) dropout: one mask for all time steps."""

from typing import Any

import torch
from torch import Tensor, nn


class LockedDropout(nn.Module):
    """Dropout whose mask is drawn once per call and shared by every time step.

    Gal & Ghahramani 2016 (arXiv:1512.05287), there called variational dropout; Merity et al.
    2017 (arXiv:1708.02182), section 4.2.
    """

    def forward(self, x: Tensor, dropout: float = 0.5) -> Tensor:
        """Drop features of x, the same ones at each time step.

        Args:
            x: (T, B, F).
            dropout: probability of dropping, in [0, 1). Kept values are scaled by
                1 / (1 - dropout).

        Returns:
            (T, B, F): x itself in evaluation or when dropout is 0.
        """
        if not self.training or not dropout:
            return x
        return x * draw_mask(x, (1, x.size(1), x.size(2)), dropout)


def draw_mask(like: Tensor, shape: tuple[int, ...], dropout: float) -> Tensor:
    """Factors that drop: 0 with probability dropout, else 1 / (1 - dropout).

    Args:
        like: gives device and dtype.
        shape: of the mask.
        dropout: probability of dropping, in [0, 1).
    """
    return like.new_empty(shape).bernoulli_(1 - dropout).div_(1 - dropout)


def apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    """x * mask in the dtype of x, of 16 bits, say, where mask is float32: by one kernel.

    The product is rounded once, so that it equals (x * mask).to(x.dtype), and so does the
    gradient.

    Args:
        x: (T, B, F).
        mask: (1, B, F); it has no gradient.
    """
    masked: Tensor = _Masked.apply(x, mask)
    return masked


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return torch.mul(x, mask, out=torch.empty_like(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return torch.mul(grads[0], mask, out=torch.empty_like(grads[0])), None
