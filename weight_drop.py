"""Weight drop: DropConnect on named weights of any module."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from layers.layer import Layer
from noise import Noise


class WeightDrop(nn.Module):
    """Wraps a module and applies a new dropout mask to some of its weights in each call.

    DropConnect (Wan et al. 2013), applied to the hidden-to-hidden matrices of an LSTM by Merity et
    al. 2017 (arXiv:1708.02182), section 2. The mask is drawn once per call, so that all time steps
    share it and the wrapped kernel (cuDNN's LSTM on a GPU) runs unchanged.

    The trained parameter is NAME_raw; its gradient passes through the mask. Evaluation uses the raw
    weight. Unlike the original, this registers the raw parameters only and never draws a
    variational mask in evaluation.

    Args:
        module: any module, e.g. a Layer, nn.LSTM or nn.Linear.
        weights: names of its parameters to drop; of a Layer its `recurrent` ones.
        dropout: probability of dropping, in [0, 1). Kept weights are scaled by 1 / (1 - dropout).
        variational: drop whole rows (output units) instead of single weights.
    """

    def __init__(
        self,
        module: nn.Module,
        weights: Sequence[str],
        dropout: float = 0,
        variational: bool = False,
    ) -> None:
        super().__init__()
        self.module = module
        self.weights = list(weights)
        self.dropout = dropout
        self.variational = variational
        for name in self.weights:
            raw = module._parameters.pop(name)
            module.register_parameter(f"{name}_raw", raw)
        if isinstance(module, nn.RNNBase):
            # Rebuild the kernel's list of weights, which still holds the renamed parameters.
            module._init_flat_weights()
        self.register_load_state_dict_pre_hook(_forget_masked_weights)

    def forward(self, *args: Any, noise: Noise | None = None, **kwargs: Any) -> Any:
        """Call the wrapped module, with masked weights in training and raw ones in evaluation.

        Args:
            noise: shares masks, and the factors of a Layer, between calls; None: draw new ones.
        """
        noise = noise or Noise()
        if isinstance(self.module, Layer):
            kwargs["noise"] = noise
        with lend_weights(self.module, {name: self._masked(name, noise) for name in self.weights}):
            return self.module(*args, **kwargs)

    def _masked(self, name: str, noise: Noise) -> Tensor:
        """A masked weight, in the dtype that the module computes in."""
        raw: Tensor = getattr(self.module, f"{name}_raw")
        if not self.training or not self.dropout:
            return raw
        shape = (raw.size(0), *(1,) * (raw.dim() - 1)) if self.variational else tuple(raw.shape)
        mask = noise.drop(name, shape, self.dropout, like=raw)
        dtype = self.module.mask_dtype if isinstance(self.module, Layer) else None
        masked: Tensor = _MaskAndCast.apply(raw, mask, dtype) if dtype else raw * mask
        return masked


class _MaskAndCast(torch.autograd.Function):
    """(weight * mask).to(dtype) and its gradient, without storing the product in float32."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(mask)
        return torch.mul(weight, mask, out=torch.empty_like(weight, dtype=dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return grad.to(mask.dtype, copy=True).mul_(mask), None, None


@contextmanager
def lend_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace a module's weights by these tensors within this context.

    Writes to the module's __dict__ and, for an nn.RNNBase, to the kernel's list of weights. This
    bypasses two hooks: nn.Module's would register a raw weight as a second parameter, and
    nn.RNNBase's would re-flatten all weights in each call (on CUDA: move the parameters' storage).
    """
    rnn: Any = module if isinstance(module, nn.RNNBase) else None
    if rnn is not None:
        flat, references = rnn._flat_weights, rnn._flat_weight_refs
        names = rnn._flat_weights_names
        rnn._flat_weights = [weights.get(n, w) for n, w in zip(names, flat, strict=True)]
    module.__dict__.update(weights)
    try:
        yield
    finally:
        for name in weights:
            del module.__dict__[name]
        if rnn is not None:
            rnn._flat_weights, rnn._flat_weight_refs = flat, references


def _forget_masked_weights(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    """Remove the masked copies of weights from a state dict of the original's code."""
    assert isinstance(module, WeightDrop)
    for name in module.weights:
        if f"{prefix}module.{name}_raw" in state_dict:
            state_dict.pop(f"{prefix}module.{name}", None)
