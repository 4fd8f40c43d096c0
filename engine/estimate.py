"""What a training run will need, worked out before it starts."""

from itertools import pairwise

from bptt import Scheme
from model import RNNModel, count_parameters


def training_memory(model: RNNModel, batch_size: int, scheme: Scheme, averages: bool) -> int:
    """Bytes that tensors take at the height of an update with the longest window, about.

    Counted: weights, gradients, the average (if averages), the masked weights and their
    gradients; per layer and time step the input, the four gates' pre-activations and activations,
    cell and output, with their gradients' buffers; the logits three times (themselves, their log
    softmax, their gradient). Not counted: the interpreter and libraries (some 300 MB resident on
    a CPU) and what the allocator keeps.
    """
    tokens = batch_size * scheme.max_length
    sizes = model.layer_sizes
    parameters = count_parameters(model) * (3 if averages else 2)
    masked = 2 * sum(4 * units * units for units in sizes[1:]) if model.wdrop else 0
    activations = tokens * sum(2 * before + 11 * after for before, after in pairwise(sizes))
    logits = 3 * tokens * model.ntoken
    return 4 * (parameters + masked + activations + logits)
