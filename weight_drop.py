"""DropConnect on the weights of a module that stays a black box."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class WeightDrop(nn.Module):
    """Wrap a module so that each call sees some of its weights under a fresh dropout mask.

    DropConnect (Wan et al. 2013), put on the hidden-to-hidden matrices of an LSTM by Merity et al.
    2017 (arXiv:1708.02182), section 2. The mask is drawn once per call, so one pass over the
    weights serves all time steps and the wrapped kernel (cuDNN's LSTM on a GPU) is used as it is.

    The trained parameter is called NAME_raw; gradients reach it through the mask. In evaluation
    the raw weight is used. Unlike the original, nothing but the raw parameters is ever registered,
    and a variational mask is not drawn in evaluation either.

    Args:
        module: any module, e.g. nn.LSTM or nn.Linear.
        weights: names of its parameters to drop, e.g. ["weight_hh_l0"].
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
            # The list of weights that the kernel gets still holds the parameters just renamed.
            module._init_flat_weights()
        self.register_load_state_dict_pre_hook(_forget_masked_weights)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped module, with masked weights in training and raw ones in evaluation."""
        with lend_weights(self.module, self.masked(self.draw_masks())):
            return self.module(*args, **kwargs)

    def draw_masks(self) -> dict[str, Tensor]:
        """Factors for the weights of one call, by their names; none in evaluation."""
        if not self.training or not self.dropout:
            return {}
        return {name: self._draw(getattr(self.module, f"{name}_raw")) for name in self.weights}

    def _draw(self, raw: Tensor) -> Tensor:
        shape = raw.shape
        if self.variational:
            shape = torch.Size([raw.size(0), *(1,) * (raw.dim() - 1)])
        return draw_weight_mask(raw, shape, self.dropout)

    def masked(
        self, masks: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """The dropped weights, by their names, each times its mask where it has one.

        Args:
            masks: from draw_masks.
            dtype: what those with a mask are cast to; their gradients come back in their own.
                None: they are not.
        """
        weights = {name: getattr(self.module, f"{name}_raw") for name in self.weights}
        if dtype is not None:
            return {n: _cast(w, masks[n], dtype) if n in masks else w for n, w in weights.items()}
        return {n: w * masks[n] if n in masks else w for n, w in weights.items()}


class _MaskAndCast(torch.autograd.Function):
    """(weight * mask).to(dtype) and its gradient, without a product in between of its own."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(mask)
        return torch.mul(weight, mask, out=torch.empty_like(weight, dtype=dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return grad.to(mask.dtype, copy=True).mul_(mask), None, None


def _cast(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    result: Tensor = _MaskAndCast.apply(weight, mask, dtype)
    return result


def draw_weight_mask(like: Tensor, shape: torch.Size, dropout: float) -> Tensor:
    """Factors that drop: 0 with probability dropout, else what keeps the expectation at 1.

    Made from 16 random bits a factor, of torch's generator. Tensor.bernoulli_ draws 64 and on
    many CPUs handles them one at a time; masks as large as the weights then take a tenth of an
    update. The probability is rounded to a multiple of 2**-16, and kept weights are scaled by the
    inverse of the rounded one.

    Args:
        like: gives device and dtype.
        shape: of the mask.
        dropout: probability of dropping, in [0, 1); at most 1 - 2**-16 is dropped.
    """
    draws = torch.empty(-(-shape.numel() // 4), dtype=torch.int64, device=like.device)
    # From the lowest number up without a bound: all 64 bits.
    bits = draws.random_(-(2**63), None).view(torch.int16)[: shape.numel()]
    kept = max(1, round((1 - dropout) * 2**16))
    if kept == 2**16:
        return like.new_ones(shape)
    mask = (bits < kept - 2**15).to(like.dtype)
    return mask.mul_(2**16 / kept).view(shape)


@contextmanager
def lend_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within this context module computes with these tensors as its weights.

    They are put into the module's __dict__ and, for a recurrent module, into the list that its
    kernel gets, past nn.Module's and nn.RNNBase's attribute hooks: the first would register a
    raw weight as a second parameter, and what the second notices makes each call re-flatten all
    weights (on CUDA: move the parameters' storage).
    """
    rnn: Any = module if isinstance(module, nn.RNNBase) else None
    if rnn is not None:
        flat, references = rnn._flat_weights, rnn._flat_weight_refs
        names = rnn._flat_weights_names
        rnn._flat_weights = [weights.get(n, w) for n, w in zip(names, flat, strict=True)]
        rnn._flat_weight_refs = [
            None if n in weights else r for n, r in zip(names, references, strict=True)
        ]
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
    """Drop the copies of masked weights that state dicts of the original hold beside the raw."""
    assert isinstance(module, WeightDrop)
    for name in module.weights:
        if f"{prefix}module.{name}_raw" in state_dict:
            state_dict.pop(f"{prefix}module.{name}", None)
