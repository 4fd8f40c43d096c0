"""The interface of a recurrent layer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gradient_filter import GradientFilter
from noise import Noise

# A layer's hidden state: tensors (1, B, H), of which the first is its output.
State = tuple[Tensor, ...]
Weights = dict[str, Tensor]
# Signature of Layer.compute and of kernels that replace it.
Compute = Callable[[Tensor, State, Weights, Noise], tuple[Tensor, State]]


class Layer(nn.Module):
    """A recurrent layer over (T, B, E).

    A subclass registers its parameters in its constructor, names the recurrent ones (which weight
    drop masks) and computes in plain torch. `compute` uses the weights it is given, never the
    parameters: they may be masked, or pass through a gradient filter.

    A constructor may have further keywords, plain values: main.py's flags of the same names set
    them, and checkpoints store them.

    Args:
        width: size of its input, E.
        units: size of its output, H.

    Attributes:
        recurrent: names of the hidden-to-hidden weights.
        gates: names of the G gates, if one recurrent weight, (G·H, H), stacks a block of rows per
            gate; else empty.
        num_states: number of tensors in its state.
        gradient_filter: filters the gradients of its input and weights; None: no filter.
        kernel: replaces `compute` in training; None: `compute` runs.
        mask_dtype: dtype of masked weights, if the kernel computes in 16 bits; None: the
            parameters' own.
    """

    recurrent: tuple[str, ...] = ()
    gates: tuple[str, ...] = ()
    num_states = 1

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.width = width
        self.units = units
        self.gradient_filter: GradientFilter | None = None
        self.kernel: Compute | None = None
        self.mask_dtype: torch.dtype | None = None

    def init_state(self, bsz: int) -> State:
        """Zero state: num_states tensors (1, bsz, H)."""
        weight = next(self.parameters())
        return tuple(weight.new_zeros(1, bsz, self.units) for _ in range(self.num_states))

    def forward(self, x: Tensor, state: State, noise: Noise | None = None) -> tuple[Tensor, State]:
        """Run the layer.

        Args:
            x: (T, B, E).
            state: state before the first step.
            noise: shares random factors between calls; None: draw new ones.

        Returns:
            Outputs (T, B, H), and the state after the last step.
        """
        weights = self.weights()
        if self.gradient_filter is not None:
            x, *filtered = self.gradient_filter(x, *weights.values())
            weights = dict(zip(weights, filtered, strict=True))
        compute = self.kernel if self.training and self.kernel is not None else self.compute
        return compute(x, state, weights, noise or Noise())

    def weights(self) -> Weights:
        """The weights by name, masked if weight drop masks them."""
        names = [name.removesuffix("_raw") for name, _ in self.named_parameters(recurse=False)]
        return {name: getattr(self, name) for name in names}

    def compute(
        self, x: Tensor, state: State, weights: Weights, noise: Noise
    ) -> tuple[Tensor, State]:
        """The layer's equations in plain torch; see forward.

        Args:
            weights: the weights to use, by the parameters' names.
            noise: source of the layer's own random factors, for training only. They are float32
                even if all other tensors have 16 bits.
        """
        raise NotImplementedError
