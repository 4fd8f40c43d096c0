"""Evaluation against one token at a time; the bigram model against counting in loops."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from data.corpus import Vocabulary
from evaluation.bigram import bigram_loss
from evaluation.evaluate import evaluate, perplexity
from evaluation.plain import Plain
from evaluation.sampling import sample_sentences
from model import RNNModel


def small_model(ntoken: int = 11) -> RNNModel:
    torch.manual_seed(1)
    model = RNNModel("LSTM", ntoken, 4, 6, 2, 0.5, 0.5, 0.5, 0.1, 0.5, tie_weights=True).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.7)
    return model


@torch.no_grad()
def loss_by_tokens(model: RNNModel, ids: Tensor, batch_size: int) -> float:
    """Every prediction by itself, in batch_size stretches as equal as can be."""
    model.eval()
    predictions = len(ids) - 1
    bounds = np.cumsum([0] + [len(a) for a in np.array_split(np.arange(predictions), batch_size)])
    total = 0.0
    for begin, end in pairwise(bounds):
        hidden = model.init_hidden(1)
        for n in range(begin, end):
            output, hidden = model(ids[n].long().reshape(1, 1), hidden)
            total -= float(model.decoder(output)[0].log_softmax(0)[ids[n + 1]])
    return total / predictions


@pytest.mark.parametrize(("length", "batch_size"), [(53, 1), (53, 4), (54, 10), (11, 10), (2, 1)])
def test_each_prediction_counts_once(length: int, batch_size: int, device: torch.device) -> None:
    model = small_model()
    ids = torch.randint(0, 11, (length,), dtype=torch.int32)
    expected = loss_by_tokens(model, ids, batch_size)
    model.to(device)
    for window in (None, 1, 7, 1000):
        loss = evaluate(Plain(model), ids, batch_size, window)
        assert loss == pytest.approx(expected, rel=1e-9)


def test_evaluation_leaves_mode_and_random_state_alone() -> None:
    model = small_model().train()
    before = torch.get_rng_state()
    evaluate(Plain(model), torch.randint(0, 11, (20,)), 2)
    sample_sentences(Plain(model), Vocabulary([*"abcdefghij", "<eos>"]), 1, seed=1)
    assert model.training
    torch.randint(0, 11, (20,))
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.randint(0, 11, (20,))
    torch.randint(0, 11, (20,))
    assert torch.equal(torch.get_rng_state(), after)


def test_too_short() -> None:
    with pytest.raises(ValueError, match="4 tokens are too few for 4"):
        evaluate(Plain(small_model()), torch.zeros(4, dtype=torch.int32), 4)


def test_perplexity_does_not_overflow() -> None:
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e6) == math.inf


def test_bigram_model_against_counting() -> None:
    draw = np.random.default_rng(2)
    train, valid, test = (draw.integers(0, 6, n).astype(np.int32) for n in (200, 60, 50))
    train[train == 5] = 4  # word 5 is never seen in training
    single, pairs = Counter(train), Counter(pairwise(train))
    follows: Counter[int] = Counter()
    for v in train[:-1]:
        follows[v] += 1

    def parts(v: int, w: int) -> list[float]:
        unigram = single[w] / len(train)
        bigram = pairs[v, w] / follows[v] if follows[v] else unigram
        return [bigram, unigram, 1 / 6]

    weights = [1 / 3] * 3
    for _ in range(50):
        sums = [0.0] * 3
        for v, w in pairwise(valid):
            shares = [a * p for a, p in zip(weights, parts(v, w), strict=True)]
            sums = [s + share / sum(shares) for s, share in zip(sums, shares, strict=True)]
        weights = [s / sum(sums) for s in sums]
    total = 0.0
    for v, w in pairwise(test):
        total -= math.log(sum(a * p for a, p in zip(weights, parts(v, w), strict=True)))
    assert bigram_loss(train, valid, test, 6) == pytest.approx(total / 49, rel=1e-9)


def test_samples_are_reproducible_and_follow_the_model() -> None:
    vocabulary = Vocabulary(["a", "b", "<unk>", "<eos>"])
    model = RNNModel("LSTM", 4, 3, 3, 1, 0, 0, 0, 0, 0, tie_weights=True)
    torch.nn.init.zeros_(model.encoder.weight)
    model.decoder.bias.data = torch.tensor([0.0, math.log(3.0), 5.0, math.log(1.0)])
    sentences = sample_sentences(Plain(model), vocabulary, 400, seed=3)
    assert sentences[:20] == sample_sentences(Plain(model), vocabulary, 20, seed=3)
    assert sentences[:20] != sample_sentences(Plain(model), vocabulary, 20, seed=4)
    words = [word for sentence in sentences for word in sentence.split()]
    assert set(words) == {"a", "b"}
    assert all(sentences)
    assert words.count("b") / len(words) == pytest.approx(0.75, abs=0.05)
    # after its first word a sentence goes on with probability 4/5: 1 + 4 words on average
    assert len(words) / 400 == pytest.approx(5, abs=0.8)
    assert all(
        len(s.split()) <= 7 for s in sample_sentences(Plain(model), vocabulary, 50, 1, max_words=7)
    )
