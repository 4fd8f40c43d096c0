"""Which sequences a gradient filter would single out, at several thresholds on the same batch."""

from torch import Tensor

from gradient_filter import SINGLED_OUT, inverse_mask, median_mask


def filter_masks(input_gradients: list[Tensor], threshold: float) -> list[Tensor]:
    """The masks of a filter in front of every layer, from gradients taken without filters.

    The gradient meets the last layer's filter first, and what that does to a sequence scales
    all that this sequence sends further down. Sequences do not touch each other, and a backward
    pass is linear, so that this is all that a filter changes below it.

    Args:
        input_gradients: gradient of each layer's input without any filter, (T, B, features).
        threshold: see GradientFilter.

    Returns:
        1 / inv_mask of each layer's filter, (B,).
    """
    masks: list[Tensor] = []
    so_far: Tensor | float = 1.0
    for gradient in reversed(input_gradients):
        arriving = gradient * (so_far if isinstance(so_far, float) else so_far[:, None])
        mask = 1 / inverse_mask(arriving, 1, threshold).flatten()
        so_far = so_far * mask
        masks.insert(0, mask)
    return masks


def sequence_norms(input_gradients: list[Tensor]) -> list[Tensor]:
    """Root mean square of each sequence's gradient, which filters compare; (B,) a layer."""
    return [g.square().mean(dim=(0, 2)).sqrt() for g in input_gradients]


def singled_out(mask: Tensor, threshold: float) -> Tensor:
    """Indices of the sequences whose mask, (B,), is below SINGLED_OUT times the median sequence's.

    The statistics of training count the same way.
    """
    return (mask < SINGLED_OUT * median_mask(threshold)).nonzero().flatten()
