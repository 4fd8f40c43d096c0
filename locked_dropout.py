"""Locked (variational) dropout: one mask for all time steps."""

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
        mask = x.new_empty(1, x.size(1), x.size(2)).bernoulli_(1 - dropout).div_(1 - dropout)
        return x * mask
