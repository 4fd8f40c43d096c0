"""The interface of a decoder."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from noise import Noise

# Signature of Decoder.loss and of kernels that replace it.
Loss = Callable[[Tensor, Tensor, Noise | None], Tensor]


class Decoder(nn.Module):
    """Maps the last layer's output to a distribution over the vocabulary.

    With tied weights the model replaces its `weight` by the embedding's. A constructor may have
    further keywords, as a layer's may; see layers.layer.

    Args:
        width: size of its input, E.
        ntoken: words in the vocabulary, V.

    Attributes:
        weight: word matrix, (V, E).
        kernel: replaces `plain_loss` in training; None: `plain_loss` runs.
    """

    weight: Tensor

    def __init__(self, width: int, ntoken: int) -> None:
        super().__init__()
        self.kernel: Loss | None = None

    def forward(self, output: Tensor, noise: Noise | None = None) -> Tensor:
        """Logits (N, V) for outputs (N, E); their softmax is the distribution.

        Args:
            noise: in training the update's random factors, for a decoder that drops.
        """
        raise NotImplementedError

    def loss(self, output: Tensor, targets: Tensor, noise: Noise | None = None) -> Tensor:
        """Mean cross-entropy, nats per token, a scalar float32 or wider.

        Args:
            output: (N, E).
            targets: ids of the words to predict, (N,).
            noise: see forward.
        """
        loss = self.kernel if self.training and self.kernel is not None else self.plain_loss
        return loss(output, targets, noise)

    def plain_loss(self, output: Tensor, targets: Tensor, noise: Noise | None) -> Tensor:
        """`loss` in plain torch."""
        return F.cross_entropy(self(output, noise), targets)
