"""Locked (variational) dropout: one mask for all time steps."""

from torch import Tensor, nn

from noise import Noise


class LockedDropout(nn.Module):
    """Dropout whose mask is drawn once per call and shared by every time step.

    Gal & Ghahramani 2016 (arXiv:1512.05287), there called variational dropout; Merity et al.
    2017 (arXiv:1708.02182), section 4.2.
    """

    def forward(self, x: Tensor, dropout: float = 0.5, noise: Noise | None = None) -> Tensor:
        """Drop features of x, the same ones in each time step.

        Args:
            x: (T, B, F).
            dropout: probability of dropping, in [0, 1). Kept values are scaled by
                1 / (1 - dropout).
            noise: shares the mask, (1, B, F), between calls; None: draw a new one.

        Returns:
            (T, B, F): x itself in evaluation or if dropout is 0.
        """
        if not self.training or not dropout:
            return x
        noise = noise or Noise()
        return x * noise.drop("output", (1, x.size(1), x.size(2)), dropout, like=x, batch_dim=1)
