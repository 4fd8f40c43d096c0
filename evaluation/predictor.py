"""The interface of predictors, and two that combine others."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# Values of a block of log-probabilities (32 MB in float32).
BLOCK_VALUES = 2**23
Check = Callable[[], None]


class Prediction:
    """The distributions of the words that follow (T, B) words: N = T·B of them, row after row.

    Attributes:
        outputs: the last layer's outputs, (N, E), which a cache compares.
        ntoken: words in the vocabulary, V.
        values_per_place: values that log_probs computes for one place, at least V.
    """

    def __init__(self, outputs: Tensor, ntoken: int) -> None:
        self.outputs = outputs
        self.ntoken = ntoken
        self.values_per_place = ntoken

    def log_probs(self, places: slice) -> Tensor:
        """Log-probabilities of all words at some of the N places, (n, V), float32 or wider."""
        raise NotImplementedError

    def score(self, targets: Tensor, check: Check = lambda: None) -> Tensor:
        """Log-probabilities of the targets (N,), (N,); of a target -100 that of word 0.

        Args:
            check: called between blocks; may raise an exception.
        """
        parts = []
        for places in self.blocks():
            check()
            own = self.log_probs(places).gather(1, targets[places, None].clamp(min=0))
            parts.append(own[:, 0])
        return torch.cat(parts)

    def ranks(self, targets: Tensor) -> Tensor:
        """Ranks of the targets, (N,): 1 + the number of words that are more probable."""
        parts = []
        for places in self.blocks():
            log_probs = self.log_probs(places)
            own = log_probs.gather(1, targets[places, None].clamp(min=0))
            parts.append(1 + (log_probs > own).sum(1))
        return torch.cat(parts)

    def blocks(self) -> Iterator[slice]:
        """The N places in blocks of at most BLOCK_VALUES values, so that no (N, V) is allocated."""
        places = max(1, BLOCK_VALUES // self.values_per_place)
        for start in range(0, len(self.outputs), places):
            yield slice(start, start + places)


class Predictor:
    """Reads B texts side by side, word by word, and predicts the next word of each.

    It may learn from all words that it has read, never from later ones.

    Attributes:
        device: where it computes; `read` takes words on it.
        segment: number of rows that each read must have, except the last; None: any number.
    """

    device: torch.device
    segment: int | None = None

    def start(self, columns: int) -> None:
        """Forget everything read, and start on B = columns new texts."""
        raise NotImplementedError

    def read(self, words: Tensor) -> Prediction:
        """Read the next words, (T, B), and predict the word after each of them.

        The number of rows per read does not change what is predicted. Use the prediction before
        the next read, which may change the predictor.
        """
        raise NotImplementedError


class Temperature(Predictor):
    """p(w)^(1 / temperature), normalised, of another predictor's p.

    Raises:
        ValueError: a temperature that is not positive.
    """

    def __init__(self, base: Predictor, temperature: float) -> None:
        if not temperature > 0:
            raise ValueError(f"the temperature is {temperature}; it must be above 0")
        self.base = base
        self.temperature = temperature
        self.device, self.segment = base.device, base.segment

    def start(self, columns: int) -> None:
        """See Predictor."""
        self.base.start(columns)

    def read(self, words: Tensor) -> Prediction:
        """See Predictor."""
        return _Tempered(self.base.read(words), self.temperature)


class _Tempered(Prediction):
    def __init__(self, base: Prediction, temperature: float) -> None:
        super().__init__(base.outputs, base.ntoken)
        self.values_per_place = base.values_per_place
        self._base = base
        self._temperature = temperature

    def log_probs(self, places: slice) -> Tensor:
        return (self._base.log_probs(places) / self._temperature).log_softmax(1)


class Mean(Predictor):
    """The mean of the probabilities of several predictors.

    With Plain(model, masks=k) for k = 1, …, K this is MC dropout (Gal & Ghahramani 2016,
    arXiv:1512.05287): the mean over K networks, each with dropout masks that it keeps for the
    whole text.
    """

    def __init__(self, predictors: Sequence[Predictor]) -> None:
        self.predictors = predictors
        self.device, self.segment = predictors[0].device, predictors[0].segment

    def start(self, columns: int) -> None:
        """See Predictor."""
        for predictor in self.predictors:
            predictor.start(columns)

    def read(self, words: Tensor) -> Prediction:
        """See Predictor."""
        return _Averaged([predictor.read(words) for predictor in self.predictors])


class _Averaged(Prediction):
    def __init__(self, parts: Sequence[Prediction]) -> None:
        super().__init__(torch.stack([part.outputs for part in parts]).mean(0), parts[0].ntoken)
        self.values_per_place = max(part.values_per_place for part in parts)
        self._parts = parts

    def log_probs(self, places: slice) -> Tensor:
        total = self._parts[0].log_probs(places)
        for part in self._parts[1:]:
            total = torch.logaddexp(total, part.log_probs(places))
        return total - math.log(len(self._parts))

    def score(self, targets: Tensor, check: Check = lambda: None) -> Tensor:
        scores = torch.stack([part.score(targets, check) for part in self._parts])
        return scores.logsumexp(0) - math.log(len(self._parts))
