"""The gradient filter: soft-masks exploding sequences inside the backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Keeps the quotient finite if the median is 0.
EPS = 1e-20
# A filter singles out a sequence whose mask is below this times the median sequence's mask.
SINGLED_OUT = 0.9


class GradientFilter(nn.Module):
    """Identity over (x, *params) whose backward pass scales down sequences with large gradients.

    From icefall (pruned_transducer_stateless2/scaling.py), which puts it in front of the LSTMs of
    a speech recogniser. Let g be the gradient of x and n_b the root mean square of g over all but
    the batch dimension. In backward, with eps = 1e-20,

        cutoff = threshold * median(n),  inv_mask_b = (cutoff + n_b) / (cutoff + eps),

    x's gradient is divided by inv_mask, each parameter's by mean(inv_mask). A sequence far below
    the cutoff keeps its gradient; one far above is scaled down to the cutoff. The median is
    torch's: the lower one of two.

    The median sequence, and about all of an ordinary batch, is multiplied by
    threshold / (threshold + 1): 0.91 at 10, 0.67 at 2. So the filter also acts like a smaller
    learning rate. With normalize, inv_mask_b = (cutoff + n_b) / (cutoff + median(n) + eps): the
    median sequence keeps its gradient, and one far below the median is multiplied by up to
    (threshold + 1) / threshold.

    Unlike icefall, this computes in float32 or wider, so that half precision neither underflows eps
    nor overflows g**2; eps is relative to the largest gradient, so that a factor on the loss
    changes nothing; all-zero gradients stay zero, and non-finite gradients stay non-finite.

    Args:
        batch_dim: x's dimension of sequences; 1 for (T, B, F).
        threshold: cutoff divided by the median norm, > 0. A sequence whose norm is threshold times
            the median is halved.
        normalize: divide by the median sequence's factor.

    Attributes:
        scale: the median sequence's mask: threshold / (threshold + 1), or 1 with normalize.
        gather: all-gathers the norms, (B,), if several processes share the batch: median and mean
            are over the whole batch. None: one process.

    Raises:
        ValueError: the threshold is not above 0.
    """

    def __init__(
        self, batch_dim: int = 1, threshold: float = 10.0, normalize: bool = False
    ) -> None:
        super().__init__()
        if not threshold > 0:
            raise ValueError(f"threshold is {threshold}; it must be above 0")
        self.batch_dim = batch_dim
        self.threshold = threshold
        self.normalize = normalize
        self.scale = 1.0 if normalize else median_mask(threshold)
        self.gather: Callable[[Tensor], Tensor] | None = None
        # Backward passes, sequences, sequences singled out, smallest mask, sum of parameter masks.
        self.statistics: Tensor
        self.register_buffer("statistics", torch.empty(5, dtype=torch.float64), persistent=False)
        self.reset_statistics()

    def forward(self, x: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        """Return x and params unchanged; the class describes what happens to their gradients."""
        return tuple(_Filter.apply(self, x, *params))

    # Statistics

    def reset_statistics(self) -> None:
        """Reset the statistics."""
        self.statistics.zero_()
        self.statistics[3] = 1

    def note(self, mask: Tensor, param_mask: Tensor) -> None:
        """Count a backward pass: the sequences' masks, (B,), and the parameters' mask.

        Never synchronises, and updates the statistics in place, so that it can be captured.
        """
        old = self.statistics
        singled_out = (mask < SINGLED_OUT * self.scale).sum()
        new = [old[0] + 1, old[1] + mask.numel(), old[2] + singled_out]
        new += [torch.minimum(old[3], mask.min().double()), old[4] + param_mask.double()]
        # Do not count a pass that overflowed: loss scaling skips such an update.
        counted = torch.stack(new)
        self.statistics.copy_(torch.where(torch.isfinite(counted).all(), counted, old))

    def summary(self) -> dict[str, float]:
        """Statistics since the last reset; synchronises with the device.

        Returns:
            singled_out: share of sequences whose mask was below nine tenths of the median
            sequence's; scale: the median sequence's mask; smallest: the smallest mask; params:
            mean of the parameters' mask. Masks are 1 / inv_mask and 1 / mean(inv_mask).
            Without a backward pass nothing was singled out, and masks are 1.
        """
        passes, sequences, singled_out, smallest, params = self.statistics.tolist()
        if not passes:
            return dict(singled_out=0.0, scale=self.scale, smallest=1.0, params=1.0)
        return dict(
            singled_out=singled_out / sequences,
            scale=self.scale,
            smallest=smallest,
            params=params / passes,
        )


class _Filter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, owner: GradientFilter, x: Tensor, *params: Tensor) -> Any:
        ctx.owner = owner
        return (x.view_as(x), *(p.view_as(p) for p in params))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x_grad, *param_grads = grads
        owner: GradientFilter = ctx.owner
        norm, unit = sequence_norms(x_grad, owner.batch_dim)
        everyone = norm.flatten()
        if owner.gather is not None:
            everyone = owner.gather(everyone * unit)
            common = everyone.amax()
            common = torch.where(common > 0, common, torch.ones_like(common))
            norm, everyone = norm * (unit / common), everyone / common
        median = everyone.median()
        cutoff = owner.threshold * median
        unmasked = cutoff + median if owner.normalize else cutoff
        inv_mask = _inverse(norm, cutoff, unmasked)
        all_masks = _inverse(everyone, cutoff, unmasked)
        mean = all_masks.mean()
        owner.note(1 / all_masks, 1 / mean)
        filtered = (x_grad / inv_mask).to(x_grad.dtype)
        # With no dimension, mean would be rounded to the gradients' dtype before the division.
        means = (mean.reshape([1] * g.dim()) for g in param_grads)
        params = ((g / m).to(g.dtype) for g, m in zip(param_grads, means, strict=True))
        return (None, filtered, *params)


def inverse_mask(x_grad: Tensor, batch_dim: int, threshold: float) -> Tensor:
    """The divisor of each sequence's gradient; see GradientFilter.

    Args:
        x_grad: gradient of the filter's x, any shape.

    Returns:
        float32 (float64 for float64 gradients), size 1 in every dimension but batch_dim.
    """
    norm, _ = sequence_norms(x_grad, batch_dim)
    cutoff = threshold * norm.median()
    return _inverse(norm, cutoff, cutoff)


def median_mask(threshold: float) -> float:
    """What the median sequence is multiplied by."""
    return threshold / (threshold + 1)


def sequence_norms(x_grad: Tensor, batch_dim: int) -> tuple[Tensor, Tensor]:
    """Root mean square of each sequence's gradient, in units of the largest value.

    Returns:
        The norms, size 1 in every dimension but batch_dim, and the unit, a scalar (1 if all values
        are zero).
    """
    g = x_grad.float() if x_grad.itemsize < 4 else x_grad
    others = [d for d in range(g.dim()) if d != batch_dim % g.dim()]
    # Divide by the largest value, so that squaring neither overflows nor underflows.
    largest = g.abs().amax()
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    return (g / scale).square().mean(dim=others, keepdim=True).sqrt(), scale


def _inverse(norm: Tensor, cutoff: Tensor, unmasked: Tensor) -> Tensor:
    """(cutoff + norm) / (unmasked + eps), 1 where cutoff and norm are zero."""
    inv_mask = (cutoff + norm) / (unmasked + EPS)
    # All-zero gradients would be divided by 0 / eps.
    return torch.where(cutoff + norm == 0, torch.ones_like(inv_mask), inv_mask)
