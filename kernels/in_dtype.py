"""Layers and decoders in plain torch, with matrix products in 16 bits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from decoders.decoder import Decoder
from layers.layer import Layer, State, Weights
from noise import Noise


class LayerInDtype:
    """Layer.compute with input, weights and states cast to dtype; returns states in their own.

    Args:
        layer: any layer.
        dtype: bfloat16 or float16.
    """

    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        self.layer = layer
        self.dtype = dtype

    def __call__(
        self, x: Tensor, state: State, weights: Weights, noise: Noise
    ) -> tuple[Tensor, State]:
        """See Layer.compute."""
        cast = {name: weight.to(self.dtype) for name, weight in weights.items()}
        inner = tuple(part.to(self.dtype) for part in state)
        output, new = self.layer.compute(x.to(self.dtype), inner, cast, noise)
        return output, tuple(n.to(s.dtype) for n, s in zip(new, state, strict=True))


class DecoderInDtype:
    """Decoder.forward with parameters and input cast to dtype; the cross-entropy is float32.

    Args:
        decoder: any decoder.
        dtype: bfloat16 or float16.
    """

    def __init__(self, decoder: Decoder, dtype: torch.dtype) -> None:
        self.decoder = decoder
        self.dtype = dtype

    def __call__(self, output: Tensor, targets: Tensor, noise: Noise | None = None) -> Tensor:
        """See Decoder.loss."""
        cast = {name: p.to(self.dtype) for name, p in self.decoder.named_parameters()}
        logits: Tensor = torch.func.functional_call(
            self.decoder, cast, (output.to(self.dtype), noise), tie_weights=False
        )
        return F.cross_entropy(logits.float(), targets)
