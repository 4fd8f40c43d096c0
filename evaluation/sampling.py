"""Sampling text from a model."""

import torch

from data.corpus import EOS, UNK, Vocabulary
from model import RNNModel


@torch.no_grad()
def sample_sentences(
    model: RNNModel,
    vocabulary: Vocabulary,
    count: int,
    seed: int,
    max_words: int = 60,
) -> list[str]:
    """Sample sentences from the model, each conditioned on those before it.

    A sentence starts after an <eos> and ends before the next. <unk> and empty sentences are not
    sampled if the vocabulary has other words.

    Args:
        count: number of sentences.
        seed: seeds a separate generator.
        max_words: longer sentences are cut.

    Returns:
        count sentences, words separated by spaces.
    """
    device = model.encoder.weight.device
    generator = torch.Generator().manual_seed(seed)
    end = vocabulary.index(EOS)
    banned = [vocabulary.index(UNK)] if UNK in vocabulary else []
    training = model.training
    model.eval()
    hidden = model.init_hidden(1)
    word = end
    sentences: list[str] = []
    while len(sentences) < count:
        words: list[str] = []
        while len(words) < max_words:
            output, hidden = model(torch.tensor([[word]], device=device), hidden)
            logits = model.decoder(output)[0].double().cpu()
            forbidden = banned + ([end] if not words else [])
            if len(forbidden) < len(vocabulary):
                logits[forbidden] = -torch.inf
            word = int(torch.multinomial(logits.softmax(0), 1, generator=generator))
            if word == end:
                break
            words.append(vocabulary[word])
        sentences.append(" ".join(words))
    model.train(training)
    return sentences
