"""The interface of a recurrent layer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gradient_filter import GradientFilter
from noise import Noise

# The tensors that a layer carries from step to step, each (1, B, H); the first is its output.
State = tuple[Tensor, ...]
Weights = dict[str, Tensor]
# Layer.compute, or another way to the same result.
Compute = Callable[[Tensor, State, Weights, Noise], tuple[Tensor, State]]


class Layer(nn.Module):
    """A recurrent layer over (T, B, E).

    A layer registers its parameters in its constructor, names the recurrent ones (which weight
    drop masks) and computes in plain torch. It uses the weights that `compute` is given: they may
    be masked, or behind a gradient filter.

    A constructor may have further keywords, plain values; main.py's flags of these names fill
    them in, and a checkpoint keeps them.

    Args:
        width: of its input, E.
        units: of its output, H.

    Attributes:
        recurrent: names of the hidden-to-hidden weights.
        gates: names of its gates, where the one recurrent weight, (G·H, H), is made of a block of
            rows for each; else empty.
        num_states: tensors in its state.
        gradient_filter: in front of the layer, over its input and its weights; None: none.
        kernel: computes the same in training, faster; None: `compute` does.
        mask_dtype: of the weights that weight drop masks, where the kernel computes in 16 bits;
            None: their own.
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
        """Zeros, num_states of (1, bsz, H)."""
        weight = next(self.parameters())
        return tuple(weight.new_zeros(1, bsz, self.units) for _ in range(self.num_states))

    def forward(self, x: Tensor, state: State, noise: Noise | None = None) -> tuple[Tensor, State]:
        """Run the layer.

        Args:
            x: (T, B, E).
            state: before the first step.
            noise: has the random factors of calls that share them; None: fresh ones are drawn.

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
        """The weights of a call by their names, under their masks where weight drop has any."""
        names = [name.removesuffix("_raw") for name, _ in self.named_parameters(recurse=False)]
        return {name: getattr(self, name) for name in names}

    def compute(
        self, x: Tensor, state: State, weights: Weights, noise: Noise
    ) -> tuple[Tensor, State]:
        """The layer's equations in plain torch; see forward.

        Args:
            weights: to compute with, by the parameters' names.
            noise: has random factors, where the layer wants any of its own; in training only. In
                16 bits they are float32, and everything else is in 16 bits.
        """
        raise NotImplementedError
