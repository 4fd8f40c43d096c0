"""The interface of a decoder."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

# Decoder.loss, or another way to the same result.
Loss = Callable[[Tensor, Tensor], Tensor]


class Decoder(nn.Module):
    """From the last layer's output to a distribution over the vocabulary.

    With tied weights the model replaces its `weight`, (V, E), by the embedding's. A constructor may
    have further keywords, as a layer's may; see layers.layer.

    Args:
        width: of its input, E.
        ntoken: words, V.

    Attributes:
        weight: the matrix of the words.
        kernel: computes `loss` in training, faster; None: `plain_loss` does.
    """

    weight: Tensor

    def __init__(self, width: int, ntoken: int) -> None:
        super().__init__()
        self.kernel: Loss | None = None

    def forward(self, output: Tensor) -> Tensor:
        """Logits (N, V) of outputs (N, E): their softmax is the distribution."""
        raise NotImplementedError

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, nats per token, a scalar float32 or wider.

        Args:
            output: (N, E).
            targets: ids of the words to predict, (N,).
        """
        if self.training and self.kernel is not None:
            return self.kernel(output, targets)
        return self.plain_loss(output, targets)

    def plain_loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """`loss` in plain torch."""
        return F.cross_entropy(self(output), targets)
