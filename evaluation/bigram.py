"""An interpolated bigram model, as a baseline."""

import numpy as np
from numpy.typing import NDArray


def bigram_loss(
    train: NDArray[np.int32],
    valid: NDArray[np.int32],
    test: NDArray[np.int32],
    num_words: int,
    iterations: int = 50,
) -> float:
    """Mean negative log likelihood of test, nats per token, over its N - 1 predictions.

    P(w | v) = a count(v, w) / count(v) + b count(w) / count + c / V, with a + b + c = 1 fitted on
    valid by expectation maximisation (Jelinek & Mercer 1980). For words v without a successor in
    train, the unigram replaces the bigram term.

    Args:
        train: ids, (N,), to count on.
        valid: ids to fit the three weights on.
        test: ids to measure.
        num_words: size of the vocabulary, V.
        iterations: of expectation maximisation.
    """
    pairs, counts = np.unique(_pairs(train, num_words), return_counts=True)
    followed = np.bincount(train[:-1], minlength=num_words)
    unigram = np.bincount(train, minlength=num_words) / len(train)

    def components(ids: NDArray[np.int32]) -> NDArray[np.float64]:
        wanted = _pairs(ids, num_words)
        place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
        count = np.where(pairs[place] == wanted, counts[place], 0)
        history = followed[ids[:-1]]
        single = unigram[ids[1:]]
        bigram = np.where(history > 0, count / np.maximum(history, 1), single)
        return np.stack([bigram, single, np.full(len(wanted), 1 / num_words)])

    weights = np.full(3, 1 / 3)
    likelihoods = components(valid)
    for _ in range(iterations):
        posterior = weights[:, None] * likelihoods
        posterior /= posterior.sum(axis=0)
        weights = posterior.mean(axis=1)
    return float(-np.log(weights @ components(test)).mean())


def _pairs(ids: NDArray[np.int32], num_words: int) -> NDArray[np.int64]:
    """A unique number for each pair of neighbouring words, (N - 1,)."""
    return ids[:-1].astype(np.int64) * num_words + ids[1:]
