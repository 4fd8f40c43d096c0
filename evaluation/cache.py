"""The continuous cache (Grave, Joulin & Usunier 2016, arXiv:1612.04426)."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from evaluation.evaluate import read
from evaluation.predictor import BLOCK_VALUES, Check, Prediction, Predictor


class Cache(Predictor):
    """Mixes a predictor with a distribution over the words that came lately:

        p(w) = (1 - lambda) p_base(w) + lambda p_cache(w),
        p_cache(w) ~ sum over the entries i with x[i+1] = w of exp(theta h[t] . h[i]),

    where h are the last layer's outputs and the entries i = t - window, …, t - 1 those of the same
    column. The first word of a column has no entry before it: there p is p_base. (The original's
    pointer.py uses p_base until the window is full.)

    Args:
        base: the predictor; its outputs are the keys.
        window: number of entries.
        theta: flatness; 0 makes all entries count the same.
        lambdasm: lambda, the share of the cache.

    Raises:
        ValueError: a window below 1, a theta below 0 or a lambda outside [0, 1].
    """

    def __init__(self, base: Predictor, window: int, theta: float, lambdasm: float) -> None:
        if window < 1:
            raise ValueError(f"the cache's window is {window}; it must be at least 1")
        if not 0 <= theta < math.inf:
            raise ValueError(f"the cache's theta is {theta}; it must be at least 0")
        if not 0 <= lambdasm <= 1:
            raise ValueError(f"the cache's lambda is {lambdasm}; it must be in [0, 1]")
        self.base = base
        self.window, self.theta, self.lambdasm = window, theta, lambdasm
        self.device, self.segment = base.device, base.segment

    def start(self, columns: int) -> None:
        """See Predictor."""
        self.base.start(columns)
        self._keys: Tensor | None = None
        self._following: Tensor | None = None

    def read(self, words: Tensor) -> "Mixture":
        """See Predictor. The word after the last row comes with the next call."""
        base = self.base.read(words)
        rows, columns = words.shape
        keys = base.outputs.view(rows, columns, -1).transpose(0, 1)  # (B, T, E)
        following = words.t()[:, 1:]  # (B, T - 1)
        before = 0
        if self._keys is not None and self._following is not None:
            before = self._keys.shape[1]
            keys = torch.cat([self._keys, keys], 1)
            following = torch.cat([self._following, words.t()], 1)
        # Copies, so that the whole of keys can be freed.
        self._keys = keys[:, -self.window :].clone()
        self._following = following[:, max(0, keys.shape[1] - self.window) :].clone()
        return Mixture(base, keys, following, before, self)


class Mixture(Prediction):
    """A prediction of Cache for T rows and B columns.

    Args:
        base: the predictor's.
        keys: outputs of P earlier rows and the T rows, (B, P + T, E).
        following: the words after them but the last, (B, P + T - 1).
        before: P.
        cache: row t looks back on keys P + t - window, …, P + t - 1 of its window.
    """

    def __init__(
        self, base: Prediction, keys: Tensor, following: Tensor, before: int, cache: Cache
    ) -> None:
        super().__init__(base.outputs, base.ntoken)
        self.values_per_place = max(base.values_per_place, keys.shape[1])
        self._base = base
        self._keys, self._following, self._before = keys, following, before
        self._cache = cache
        self._columns, self._rows = keys.shape[0], keys.shape[1] - before

    def log_probs(self, places: slice) -> Tensor:
        """See Prediction."""
        first, last, _ = places.indices(self._rows * self._columns)
        start, stop = first // self._columns, -(-last // self._columns)
        scores, following = self._scores(start, stop, self._cache.theta)
        shares = scores.softmax(2)
        words = following[:, None, :].expand_as(shares)
        probs = shares.new_zeros(*shares.shape[:2], self.ntoken).scatter_add_(2, words, shares)
        if start == 0 and self._before == 0:
            probs[:, 0] = torch.nan
        cached = probs.log().transpose(0, 1).flatten(0, 1)
        cached = cached[first - start * self._columns : last - start * self._columns]
        return mix(self._base.log_probs(places), cached, self._cache.lambdasm)

    def score(self, targets: Tensor, check: Check = lambda: None) -> Tensor:
        """See Prediction."""
        cached = self._cached(targets, self._cache.theta, check)
        return mix(self._base.score(targets, check), cached, self._cache.lambdasm)

    def grid(
        self, targets: Tensor, thetas: Sequence[float], lambdas: Sequence[float]
    ) -> Iterator[Tensor]:
        """`score` with other settings: for each theta, (number of lambdas, N)."""
        base = self._base.score(targets)
        for theta in thetas:
            cached = self._cached(targets, theta)
            yield torch.stack([mix(base, cached, lambdasm) for lambdasm in lambdas])

    def _cached(self, targets: Tensor, theta: float, check: Check = lambda: None) -> Tensor:
        """log p_cache of the targets (T·B,), (T·B,); NaN where there are no entries."""
        goals = targets.view(self._rows, self._columns).t()  # (B, T)
        # A block of rows, so that the scores stay within BLOCK_VALUES.
        most = BLOCK_VALUES // (self._columns * self._keys.shape[1])
        step = max(1, min(self._cache.window, most))
        parts = []
        for start in range(0, self._rows, step):
            check()
            stop = min(start + step, self._rows)
            scores, following = self._scores(start, stop, theta)
            same = following[:, None, :] == goals[:, start:stop, None]
            hit = scores.masked_fill(~same, -torch.inf).logsumexp(2)
            parts.append(hit - scores.logsumexp(2))
        return torch.cat(parts, 1).t().flatten()

    def _scores(self, start: int, stop: int, theta: float) -> tuple[Tensor, Tensor]:
        """theta h[t] . h[i] of rows t = start, …, stop - 1 and their entries i.

        Returns:
            Scores (B, stop - start, K), -inf where i is no entry of t, and the words after, (B, K).
        """
        first, last, window = self._before + start, self._before + stop, self._cache.window
        low = max(0, first - window)
        keys = self._keys[:, low : last - 1]
        scores = (theta * self._keys[:, first:last]) @ keys.transpose(1, 2)
        rows = torch.arange(first, last, device=keys.device)[:, None]
        entries = torch.arange(low, last - 1, device=keys.device)
        allowed = (entries < rows) & (entries >= rows - window)
        return scores.masked_fill(~allowed, -torch.inf), self._following[:, low : last - 1]


def mix(base: Tensor, cached: Tensor, lambdasm: float) -> Tensor:
    """log((1 - lambda) exp(base) + lambda exp(cached)); base alone where cached is NaN."""
    shares = torch.tensor([1 - lambdasm, lambdasm], dtype=torch.float64).log().tolist()
    mixed = torch.logaddexp(base + shares[0], cached + shares[1])
    return torch.where(cached.isnan(), base, mixed)


def cache_losses(
    base: Predictor,
    ids: Tensor,
    window: int,
    thetas: Sequence[float],
    lambdas: Sequence[float],
    done: Callable[[int], None] = lambda rows: None,
) -> Tensor:
    """Losses of caches over a predictor, nats per token, (number of thetas, of lambdas), float64.

    They are those of `evaluate` with Cache(base, window, theta, lambda) in one column, but the base
    reads the text only once.

    Args:
        done: called with the number of words that were read since the last call.
    """
    totals = torch.zeros(len(thetas), len(lambdas), dtype=torch.float64, device=base.device)
    for prediction, targets in read(Cache(base, window, 0, 0), ids, columns=1):
        assert isinstance(prediction, Mixture)
        for n, scores in enumerate(prediction.grid(targets, thetas, lambdas)):
            totals[n] -= scores.double().sum(1)
        done(len(targets))
    return totals.cpu() / (len(ids) - 1)
