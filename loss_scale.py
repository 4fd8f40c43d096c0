"""Loss scaling: keeps float16 gradients between underflow and overflow."""

from typing import Any


class LossScale:
    """A factor on the loss, taken out of the gradients again before they are used.

    Micikevicius et al. 2018 (arXiv:1710.03740), section 3.2. The dynamic one is halved by each
    update whose gradients overflow, which is skipped, and doubled by window updates without one.

    Args:
        value: the factor, > 0; a dynamic one starts there.
        dynamic: it adapts.
        low: least dynamic factor.
        high: greatest one.
        window: updates without overflow that double it, >= 1.

    Raises:
        ValueError: a value outside these ranges, or low > high.
    """

    def __init__(
        self,
        value: float = 2.0**16,
        *,
        dynamic: bool = True,
        low: float = 1.0,
        high: float = 2.0**24,
        window: int = 2000,
    ) -> None:
        if not (value > 0 and 0 < low <= high and window >= 1):
            raise ValueError(f"no loss scale: {value}, within [{low}, {high}], window {window}")
        self.dynamic = dynamic
        self.low = low
        self.high = high
        self.window = window
        self.value = min(max(value, low), high) if dynamic else value
        self.clean = 0  # updates since the last overflow or change
        # Of each update that overflowed or changed it: its number, the factor since, overflowed.
        self.history: list[tuple[int, float, bool]] = []

    def note(self, update: int, overflowed: bool) -> bool:
        """Count an update, and adapt to it; returns whether it overflowed or changed the scale."""
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
        if notable := overflowed or self.value != before:
            self.history.append((update, self.value, overflowed))
        return notable

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return dict(value=self.value, clean=self.clean, history=list(self.history))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what state_dict returned."""
        self.value = state["value"]
        self.clean = state["clean"]
        self.history = list(state["history"])
