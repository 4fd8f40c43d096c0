"""The recurrent matrices: their spectra, and the gradients that their powers predict."""

from typing import Any

import torch
from torch import Tensor

from noise import Noise


def spectrum(matrices: Tensor) -> dict[str, Tensor]:
    """Singular values, largest first, (G, H), and spectral radii, (G,), of matrices (G, H, H)."""
    return dict(
        singular_values=torch.linalg.svdvals(matrices),
        radius=torch.linalg.eigvals(matrices).abs().amax(-1),
    )


def masked_spectrum(matrices: Tensor, dropout: float, draws: int, noise: Noise) -> dict[str, Any]:
    """Means of spectrum over draws of weight drop's mask, which scales what it keeps.

    Args:
        matrices: (G, H, H).
        dropout: probability of dropping a weight, in [0, 1).
        draws: number of masks.
        noise: to draw them from.
    """
    shape = tuple(matrices.shape)
    masks = [noise.drop(f"mask {n}", shape, dropout, like=matrices) for n in range(draws)]
    found = [spectrum(matrices * mask) for mask in masks]
    return {name: torch.stack([one[name] for one in found]).mean(0) for name in found[0]}


def spectral_norms(matrices: Tensor, iterations: int = 30) -> Tensor:
    """Largest singular values of (G, H, H), (G,), by power iteration on W^T W from a fixed start.

    A lower bound, a percent or so below where the two largest lie close together. Draws
    nothing at random: the start is the same each time, and no state is kept.
    """
    units = matrices.size(-1)
    # No direction of a trained matrix is likely to be orthogonal to these.
    start = torch.linspace(0.5, 1.5, units, device=matrices.device, dtype=matrices.dtype)
    start = start * torch.where(torch.arange(units, device=matrices.device) % 3 == 0, -1, 1)
    v = start.expand(len(matrices), -1)[..., None]
    tiny = torch.finfo(matrices.dtype).tiny
    for _ in range(iterations):
        v = matrices.mT @ (matrices @ v)
        v = v / v.norm(dim=1, keepdim=True).clamp_min(tiny)
    sizes: Tensor = (matrices @ v).norm(dim=1)
    return sizes[:, 0]


def power_prediction(matrices: Tensor, arriving: Tensor, lags: int) -> Tensor:
    """Size of a gradient after lag steps back through a linear recurrence h_t = W h_(t-1).

    |(W^T)^lag d| / |d|, the median over samples. This is the analysis of Pascanu et al. 2013
    (arXiv:1211.5063) with the nonlinearity taken for the identity; an LSTM has four such
    matrices, and one prediction of each.

    Args:
        matrices: W of each gate, (G, H, H).
        arriving: gradients d that arrive at lag 0, (S, H).
        lags: largest lag, L.

    Returns:
        (G, L + 1).
    """
    rows = arriving[arriving.norm(dim=1) > 0]
    rows = rows / rows.norm(dim=1, keepdim=True)
    d = rows.expand(len(matrices), *rows.shape)
    sizes = [d.norm(dim=-1)]
    for _ in range(lags):
        d = d @ matrices
        sizes.append(d.norm(dim=-1))
    if not len(rows):
        return matrices.new_zeros(len(matrices), lags + 1)
    return torch.stack([size.quantile(0.5, dim=1) for size in sizes], dim=1)
