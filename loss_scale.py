"""Loss scaling: keeps float16 gradients between underflow and overflow.

A loss scale is a factor on the loss; the step divides the gradients by it (Micikevicius et al.
2018, arXiv:1710.03740, section 3.2). An update whose gradients overflow is skipped. `LossScale` and
`LogMax` differ in how they adapt the factor.
"""

import math
from typing import Any


class LossScale:
    """A factor halved by each overflow and doubled after window updates without one; or fixed.

    Args:
        value: the factor, or the initial one if dynamic, > 0.
        dynamic: adapt the factor; False: it is fixed.
        low: smallest dynamic factor.
        high: largest dynamic factor.
        window: updates without overflow after which the factor doubles, >= 1.
    """

    uses_largest = False  # True if `note` needs the largest gradient

    def __init__(
        self,
        value: float = 2.0**16,
        *,
        dynamic: bool = True,
        low: float = 1.0,
        high: float = 2.0**24,
        window: int = 2000,
    ) -> None:
        self.dynamic = dynamic
        self.low = low
        self.high = high
        self.window = window
        self.value = min(max(value, low), high) if dynamic else value
        self.clean = 0  # updates since the last overflow or change

    def note(self, overflowed: bool, largest: float | None = None) -> bool:
        """Count an update and adapt the factor; True if it overflowed or changed the factor."""
        before = self.value
        if overflowed:
            self.clean = 0
            if self.dynamic:
                self.value = max(self.value / 2, self.low)
        else:
            self.clean += 1
            if self.dynamic and self.clean == self.window:
                self.clean = 0
                self.value = min(self.value * 2, self.high)
        return overflowed or self.value != before

    def state_dict(self) -> dict[str, Any]:
        """Plain values for load_state_dict."""
        return dict(value=self.value, clean=self.clean)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what state_dict returned."""
        self.value = state["value"]
        self.clean = state["clean"]


class LogMax:
    """A factor such that 1 in 1,000 log-normal largest gradients, scaled, exceeds 2**16.

    LogMax of OpenSeq2Seq (Kuchaiev et al. 2018, arXiv:1805.10387), with its constants. With
    x = log2 of an update's largest gradient and E_b the exponential moving average with decay b,
    bias-corrected as in Adam,

        mu = E_0.99[x],  sigma = sqrt(E_0.999[x**2] - E_0.999[x]**2),
        factor = 2**(16 - mu - 3.09 sigma),  within [low, high].

    An update that overflows counts as x = 16. (OpenSeq2Seq's code takes x = 2**16, which keeps the
    factor at its smallest for thousands of updates.) An update whose gradients are all 0 is left
    out.

    Args:
        low: smallest factor, > 0; also the initial one.
        high: largest factor.
    """

    uses_largest = True

    LOG_LIMIT = 16.0
    FAST, SLOW = 0.99, 0.999
    DEVIATIONS = 3.09

    def __init__(self, *, low: float = 1.0, high: float = 2.0**24) -> None:
        self.low = low
        self.high = high
        self.value = low
        self.count = 0
        # Moving averages before bias correction: of x, fast and slow, and of x**2, slow.
        self.means = [0.0, 0.0, 0.0]

    def note(self, overflowed: bool, largest: float | None = None) -> bool:
        """Adapt the factor to an update; returns overflowed.

        Args:
            overflowed: its gradients overflowed, and it was skipped.
            largest: its largest absolute gradient, unscaled, before clipping.

        Raises:
            ValueError: largest is missing.
        """
        if overflowed:
            self._adapt(self.LOG_LIMIT)
        elif largest is None:
            raise ValueError("LogMax needs each update's largest gradient")
        elif largest > 0:
            self._adapt(math.log2(largest))
        return overflowed

    def _adapt(self, x: float) -> None:
        self.count += 1
        samples = [(self.FAST, x), (self.SLOW, x), (self.SLOW, x * x)]
        self.means = [b * m + (1 - b) * s for m, (b, s) in zip(self.means, samples, strict=True)]
        mu, slow_mu, square = [
            m / (1 - b**self.count) for m, (b, _) in zip(self.means, samples, strict=True)
        ]
        sigma = math.sqrt(max(square - slow_mu**2, 0.0))
        exponent = min(self.LOG_LIMIT - mu - self.DEVIATIONS * sigma, 1023.0)  # a float's largest
        self.value = min(max(2.0**exponent, self.low), self.high)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for load_state_dict."""
        return dict(value=self.value, count=self.count, means=list(self.means))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what state_dict returned."""
        self.value = state["value"]
        self.count = state["count"]
        self.means = list(state["means"])


AnyLossScale = LossScale | LogMax
