"""The cheap part of the diagnosis, logged during training (--diagnostics)."""

import math

import torch
from torch import Tensor

from diagnostics.gradients import by_part
from diagnostics.spectra import spectral_norms
from diagnostics.unrolled import recurrent_matrices
from model import RNNModel


@torch.no_grad()
def probe(model: RNNModel, grad_norm: Tensor) -> dict[str, float]:
    """Gradient norms by part of the model, and spectral norms of each W_hh.

    Draws nothing at random and changes nothing. Synchronises with the device.

    Args:
        model: its parameters hold the gradients of the update, clipped or not.
        grad_norm: their global norm before clipping.

    Returns:
        grad_norm, and of each part of the model grad_norm_PART (before clipping) and
        grad_share_PART (of the squared global norm), where PART is embedding, l0, l1, …,
        decoder; clip_factor, what clipping multiplied the gradients by; spectral_norm_GATE_lN,
        the largest singular value of a gate's W_hh without a mask, by power iteration.
    """
    names, gradients = zip(
        *((n, p.grad) for n, p in model.named_parameters() if p.grad is not None), strict=True
    )
    norms = torch.stack(torch._foreach_norm(gradients)).double()
    gated = [(n, layer) for n, layer in enumerate(model.layers) if layer.gates]
    spectral = [spectral_norms(recurrent_matrices(layer).float()) for _, layer in gated]
    read = torch.cat([grad_norm[None].double(), norms, *(s.double() for s in spectral)]).tolist()
    whole, read = read[0], read[1:]
    parts = by_part(dict(zip(names, read, strict=False)))
    clipped = math.hypot(*parts.values())
    figures = dict(grad_norm=whole, clip_factor=clipped / whole if whole > 0 else 1.0)
    for part, norm in parts.items():
        name = part.replace("layer ", "l")
        ratio = norm / clipped if clipped > 0 else 0.0
        figures[f"grad_norm_{name}"] = ratio * whole
        figures[f"grad_share_{name}"] = ratio**2
    labels = [f"spectral_norm_{gate}_l{n}" for n, layer in gated for gate in layer.gates]
    figures.update(zip(labels, read[len(names) :], strict=True))
    return figures
