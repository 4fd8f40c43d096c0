"""The continuous cache (Grave, Joulin & Usunier 2016, arXiv:1612.04426)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
        self.theta = theta
        self.lambdasm = lambdasm
        self.device, self.segment = base.device, base.segment
        self.history = History(window)

    def start(self, columns: int) -> None:
        """See Predictor."""
        self.base.start(columns)
        self.history.start()

    def read(self, words: Tensor) -> "Mixture":
        """See Predictor."""
        base = self.base.read(words)
        return Mixture(base, self.history.add(words, base.outputs), self.theta, self.lambdasm)


class Mixture(Prediction):
    """A prediction of Cache."""

    def __init__(self, base: Prediction, entries: "Entries", theta: float, lambdasm: float) -> None:
        super().__init__(base.outputs, base.ntoken)
        self._base, self._entries = base, entries
        self._theta, self._lambdasm = theta, lambdasm
        self.values_per_place = max(base.values_per_place, entries.keys.shape[1])

    def log_probs(self, places: slice) -> Tensor:
        """See Prediction."""
        cached = self._entries.log_probs(places, self._theta, self.ntoken)
        return mix(self._base.log_probs(places), cached, self._lambdasm)

    def score(self, targets: Tensor, check: Check = lambda: None) -> Tensor:
        """See Prediction."""
        cached = self._entries.score(targets, self._theta, check)
        return mix(self._base.score(targets, check), cached, self._lambdasm)

    def grid(
        self, targets: Tensor, thetas: Sequence[float], lambdas: Sequence[float]
    ) -> Iterator[Tensor]:
        """`score` with other settings: for each theta, (number of lambdas, N)."""
        base = self._base.score(targets)
        for theta in thetas:
            cached = self._entries.score(targets, theta)
            yield torch.stack([mix(base, cached, lambdasm) for lambdasm in lambdas])


def mix(base: Tensor, cached: Tensor, lambdasm: float) -> Tensor:
    """log((1 - lambda) exp(base) + lambda exp(cached)); base alone where cached is NaN."""
    shares = torch.tensor([1 - lambdasm, lambdasm], dtype=torch.float64).log().tolist()
    mixed = torch.logaddexp(base + shares[0], cached + shares[1])
    return torch.where(cached.isnan(), base, mixed)


class History:
    """The last `window` outputs of each column, with the words that came after them."""

    def __init__(self, window: int) -> None:
        self.window = window

    def start(self) -> None:
        """Forget everything."""
        self._keys: Tensor | None = None
        self._following: Tensor | None = None

    def add(self, words: Tensor, outputs: Tensor) -> "Entries":
        """Append the outputs (T·B, E) at words (T, B); returns what these T rows look back on.

        The word after the last row comes with the next call.
        """
        rows, columns = words.shape
        keys = outputs.view(rows, columns, -1).transpose(0, 1)  # (B, T, E)
        following = words.t()[:, 1:]  # (B, T - 1)
        before = 0
        if self._keys is not None and self._following is not None:
            before = self._keys.shape[1]
            keys = torch.cat([self._keys, keys], 1)
            following = torch.cat([self._following, words.t()], 1)
        # Copies, so that the whole of keys can be freed.
        self._keys = keys[:, -self.window :].clone()
        self._following = following[:, max(0, keys.shape[1] - self.window) :].clone()
        return Entries(keys, following, before, self.window)


@dataclass
class Entries:
    """The cache entries of each of T rows and B columns.

    keys: outputs of P earlier rows and the T rows, (B, P + T, E).
    following: the words after them but the last, (B, P + T - 1).
    before: P.
    window: row t looks back on keys P + t - window, …, P + t - 1.
    """

    keys: Tensor
    following: Tensor
    before: int
    window: int

    def score(self, targets: Tensor, theta: float, check: Check = lambda: None) -> Tensor:
        """log p_cache of the targets (T·B,), (T·B,); NaN where there are no entries."""
        columns, total = self.keys.shape[0], self.keys.shape[1] - self.before
        goals = targets.view(total, columns).t()  # (B, T)
        # A block of rows, so that the scores stay within BLOCK_VALUES.
        step = max(1, min(self.window, BLOCK_VALUES // (columns * self.keys.shape[1])))
        parts = []
        for start in range(0, total, step):
            check()
            stop = min(start + step, total)
            scores, following = self._scores(start, stop, theta)
            same = following[:, None, :] == goals[:, start:stop, None]
            hit = scores.masked_fill(~same, -torch.inf).logsumexp(2)
            parts.append(hit - scores.logsumexp(2))
        return torch.cat(parts, 1).t().flatten()

    def log_probs(self, places: slice, theta: float, ntoken: int) -> Tensor:
        """log p_cache of all words at some of the T·B places, (n, V); NaN without entries."""
        columns, total = self.keys.shape[0], self.keys.shape[1] - self.before
        first, last, _ = places.indices(total * columns)
        start, stop = first // columns, -(-last // columns)
        scores, following = self._scores(start, stop, theta)
        shares = scores.softmax(2)
        words = following[:, None, :].expand_as(shares)
        probs = shares.new_zeros(columns, stop - start, ntoken).scatter_add_(2, words, shares)
        if start == 0 and self.before == 0:
            probs[:, 0] = torch.nan
        rows = probs.log().transpose(0, 1).flatten(0, 1)
        return rows[first - start * columns : last - start * columns]

    def _scores(self, start: int, stop: int, theta: float) -> tuple[Tensor, Tensor]:
        """theta h[t] . h[i] of rows t = start, …, stop - 1 and their entries i.

        Returns:
            Scores (B, stop - start, K), -inf where i is no entry of t, and the words after, (B, K).
        """
        low = max(0, self.before + start - self.window)
        high = self.before + stop - 1
        queries = self.keys[:, self.before + start : self.before + stop]
        keys = self.keys[:, low:high]
        scores = (theta * queries) @ keys.transpose(1, 2)
        rows = torch.arange(self.before + start, self.before + stop, device=keys.device)[:, None]
        entries = torch.arange(low, high, device=keys.device)
        allowed = (entries < rows) & (entries >= rows - self.window)
        return scores.masked_fill(~allowed, -torch.inf), self.following[:, low:high]
