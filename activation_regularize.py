"""AR and TAR: penalties on the activations of the last LSTM layer."""

from torch import Tensor


def activation_regularization(dropped_output: Tensor, alpha: float) -> Tensor:
    """L2 penalty on the last LSTM layer's activations, alpha * mean(h**2).

    Merity et al. 2017 (arXiv:1708.02182), section 4.6, which writes an L2 norm; like the paper's
    own code this takes the mean of squares, to which its alpha = 2 refers.

    Args:
        dropped_output: last layer's output after dropout, (T, B, E).
        alpha: weight, >= 0.

    Returns:
        Scalar float32 (float64 for float64 input), nats per token.
    """
    return alpha * _at_least_float32(dropped_output).square().mean()


def temporal_activation_regularization(raw_output: Tensor, beta: float) -> Tensor:
    """Slowness penalty on the last LSTM layer, beta * mean((h[t+1] - h[t])**2).

    Merity et al. 2017 (arXiv:1708.02182), section 4.6, which writes an L2 norm; like the paper's
    own code this takes the mean of squares.

    Args:
        raw_output: last layer's output before dropout, (T, B, E).
        beta: weight, >= 0.

    Returns:
        Scalar float32 (float64 for float64 input), nats per token; 0 when T == 1.
    """
    if raw_output.size(0) == 1:
        return _at_least_float32(raw_output.new_zeros(()))
    raw_output = _at_least_float32(raw_output)
    return beta * (raw_output[1:] - raw_output[:-1]).square().mean()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.itemsize < 4 else x
