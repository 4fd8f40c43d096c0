"""Sampling of text from a predictor."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.corpus import EOS, UNK, Vocabulary
from evaluation.predictor import Predictor


@dataclass(frozen=True)
class Shape:
    """How a distribution is changed before a word is drawn from it; see `shaped`.

    Raises:
        ValueError: a value out of its range.

    Attributes:
        temperature: above 0; below 1 prefers what is probable anyway.
        top_k: number of words to keep; None: all.
        top_p: in (0, 1], share of the probability to keep.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"the temperature is {self.temperature}; it must be above 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be in (0, 1]")


def shaped(log_probs: Tensor, shape: Shape) -> Tensor:
    """The distribution that a word is drawn from, (V,), float64, in three steps:

    p(w)^(1 / temperature); of that the top_k most probable words; of those the fewest most
    probable ones whose share is at least top_p (nucleus sampling, Holtzman et al. 2020,
    arXiv:1904.09751). Each step normalises. Of words with the same p the first come first.

    Args:
        log_probs: log p, (V,), up to a constant; -inf for words that must not be drawn.

    Raises:
        ValueError: log_probs has NaN, or nothing but -inf.
    """
    log_probs = log_probs.double()
    # Without its maximum no temperature makes all of it -inf.
    probs = ((log_probs - log_probs.max()) / shape.temperature).softmax(0)
    if probs.isnan().any():
        raise ValueError("the model's probabilities are not finite")
    if shape.top_k is None and shape.top_p == 1:
        return probs
    kept, words = probs.sort(descending=True, stable=True)
    kept, words = kept[: shape.top_k], words[: shape.top_k]
    kept = kept / kept.sum()
    if shape.top_p < 1:
        kept = kept[kept.cumsum(0) - kept < shape.top_p]
    return torch.zeros_like(probs).scatter(0, words[: len(kept)], kept / kept.sum())


def sample_words(
    predictor: Predictor,
    vocabulary: Vocabulary,
    seed: int,
    prompt: Sequence[int] = (),
    shape: Shape | None = None,
) -> Iterator[str]:
    """Sample words without end; the predictor reads an <eos>, the prompt and each sampled word.

    <unk> and empty sentences are not sampled if the vocabulary has other words.

    Args:
        predictor: starts anew.
        seed: seeds a separate generator.
        prompt: ids.

    Raises:
        ValueError: the model's probabilities are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    end = vocabulary.index(EOS)
    banned = [vocabulary.index(UNK)] if UNK in vocabulary else []
    words = [end, *prompt]
    predictor.start(1)
    while True:
        log_probs = predict_next(predictor, words)
        forbidden = banned + ([end] if words[-1] == end else [])
        if len(forbidden) < len(vocabulary):
            log_probs = log_probs.clone()  # it may be the predictor's own
            log_probs[forbidden] = -torch.inf
        probs = shaped(log_probs, shape or Shape())
        words = [int(torch.multinomial(probs, 1, generator=generator))]
        yield vocabulary[words[0]]


def predict_next(predictor: Predictor, words: Sequence[int]) -> Tensor:
    """Read words; returns the log-probabilities (V,) of the word after them, on the CPU."""
    prediction = predictor.read(torch.tensor(words, device=predictor.device)[:, None])
    return prediction.log_probs(slice(len(words) - 1, len(words)))[0].cpu()


def sample_sentences(
    predictor: Predictor, vocabulary: Vocabulary, count: int, seed: int, max_words: int = 60
) -> list[str]:
    """Sample sentences, each conditioned on those before it; longer ones are cut.

    Returns:
        count sentences, words separated by spaces, without <eos>.
    """
    sampled = sample_words(predictor, vocabulary, seed)
    sentences: list[str] = []
    words: list[str] = []
    while len(sentences) < count:
        word = next(sampled)
        if word != EOS:
            words.append(word)
        if words and (word == EOS or len(words) == max_words):
            sentences.append(" ".join(words))
            words = []
    return sentences
