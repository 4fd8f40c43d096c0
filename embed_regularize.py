"""Embedding dropout: drops whole words of the vocabulary, at all their occurrences."""

import torch.nn.functional as F
from torch import Tensor, nn

from noise import Noise


def embedded_dropout(
    embed: nn.Embedding,
    words: Tensor,
    dropout: float = 0.1,
    scale: Tensor | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """Look up words in an embedding with dropped rows.

    One Bernoulli(1 - dropout) / (1 - dropout) factor per word of the vocabulary and call, so that
    all occurrences of a word are dropped together. Gal & Ghahramani 2016 (arXiv:1512.05287); Merity
    et al. 2017 (arXiv:1708.02182), section 4.3.

    The factor multiplies the rows that were looked up, which gives the same output and gradient
    as masking the whole matrix, (V, E), without a pass over it. Unlike in the original, which
    treats the last word of the vocabulary as padding, that word is trained like any other.

    Args:
        embed: embedding with a weight of (V, E).
        words: ids of any shape, usually (T, B).
        dropout: probability of dropping a word, in [0, 1); 0 draws nothing.
        scale: one factor per word of the vocabulary, (V, 1) or (V,), or None.
        noise: shares the mask, (V, 1), between calls; None: draw a new one.

    Returns:
        words.shape + (E,).
    """
    embedded = F.embedding(
        words,
        embed.weight,
        embed.padding_idx,
        embed.max_norm,
        embed.norm_type,
        embed.scale_grad_by_freq,
        embed.sparse,
    )
    if dropout:
        noise = noise or Noise()
        mask = noise.drop("words", (embed.num_embeddings, 1), dropout, like=embed.weight)
        embedded = embedded * mask[words]
    if scale is not None:
        embedded = embedded * scale.reshape(-1, 1)[words]
    return embedded
