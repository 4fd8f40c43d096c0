"""The interface of a decoder."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

# Signature of Decoder.loss and of kernels that replace it.
Loss = Callable[[Tensor, Tensor], Tensor]


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

    def forward(self, output: Tensor) -> Tensor:
        """Logits (N, V) for outputs (N, E); their softmax is the distribution."""
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
