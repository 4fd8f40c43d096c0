"""Pads the rows of a CPU's matrix products, so that windows of many lengths make few shapes."""

import torch.nn.functional as F
from torch import Tensor


def padded_length(rows: int) -> int:
    """The number of rows to compute with: at most a sixteenth more, 16 different ones an octave.

    oneDNN, which multiplies in bfloat16, compiles code for each shape and keeps it. At the paper's
    size that takes 20 to 80 ms and a megabyte for each of an update's 15 products: an update of a
    new length would take two thirds longer, and what is kept lies between the tensors in memory.
    The rows added are 0 and change no other row and no gradient beyond rounding.
    """
    step = 1 << max(0, rows.bit_length() - 5)
    return -(-rows // step) * step


def pad_rows(x: Tensor) -> Tensor:
    """A matrix with rows of zeros after its own; see padded_length."""
    return F.pad(x, (0, 0, 0, padded_length(len(x)) - len(x)))
