"""Estimates the memory of a training run before it starts."""

from itertools import pairwise

from bptt import Scheme
from model import RNNModel, count_parameters


def training_memory(
    model: RNNModel, batch_size: int, scheme: Scheme, num_steps: int, kept: int
) -> int:
    """Estimate the bytes of tensors at the peak of an update with the largest window.

    Counted: weights, gradients, what the optimizer keeps, the masked weights and their gradients;
    per layer and time step of stored activations the input, the four gates' pre-activations and
    activations, cell and output, and buffers of their gradients; three times the logits (logits,
    log softmax, gradient); hidden states to recompute from. Not counted: the interpreter and
    libraries (about 300 MB resident on a CPU) and the allocator's cache.

    Args:
        model: the model, whose sizes count; its tensors may be on the meta device.
        batch_size: columns, B.
        scheme: how the rows are divided into windows.
        num_steps: rows that an epoch trains on.
        kept: values that the optimizer keeps of each weight: the average, or Adam's two moments.
    """
    sizes, held = model.layer_sizes, scheme.footprint(num_steps)
    parameters = count_parameters(model) * (2 + kept)
    recurrent = [p for n, p in model.rnns.named_parameters() if n.endswith("_raw")]
    masked = 2 * sum(p.numel() for p in recurrent)
    per_token = sum(2 * before + 11 * after for before, after in pairwise(sizes))
    activations = batch_size * held.rows * per_token
    logits = 3 * batch_size * held.decoded * model.ntoken
    states = 2 * batch_size * held.states * sum(sizes[1:])
    return 4 * (parameters + masked + activations + logits + states)
