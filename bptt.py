"""Truncated back-propagation through time: which tokens each update sees.

A batchified corpus is a matrix of rows (time steps) and columns. A scheme walks down its rows and
yields windows; the hidden state is carried from window to window and its history is cut between
them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Window:
    """Rows start, …, start + length - 1 are the input of one update, (T, B) with T = length."""

    start: int
    length: int


class Scheme(Protocol):
    """How the rows are divided into windows."""

    mean_length: float
    max_length: int

    def windows(self, num_steps: int, start: int = 0) -> Iterator[Window]:
        """Windows that cover the rows start, …, num_steps - 1, each row once.

        A window is drawn when it is asked for and not before, so that state_dict between two
        windows is the state from which the rest follows.
        """

    def state_dict(self) -> dict[str, Any]:
        """The scheme's own random state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what state_dict returned."""


class FixedWindows:
    """Windows of bptt rows, the last of an epoch shorter where it must be.

    Args:
        bptt: rows per window, >= 1.
    """

    def __init__(self, bptt: int) -> None:
        self.bptt = bptt
        self.mean_length = float(bptt)
        self.max_length = bptt

    def windows(self, num_steps: int, start: int = 0) -> Iterator[Window]:
        """See Scheme."""
        while start < num_steps:
            yield Window(start, min(self.bptt, num_steps - start))
            start += self.bptt

    def state_dict(self) -> dict[str, Any]:
        """Nothing: fixed windows draw nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Scheme."""


class VariableWindows:
    """Windows of random length, so that no row is always the first or the last of its window.

    Merity et al. 2017 (arXiv:1708.02182), section 4.1: base = bptt with probability 0.95, else
    bptt / 2; length = max(5, int(N(base, 5))). Unlike the original's, a length is at most
    bptt + 20, four standard deviations, so that the memory an update needs is bounded, and no row
    of an epoch is left out (there the last one could be).

    Args:
        bptt: the usual mean length, >= 1.
        seed: of a generator of its own, so that lengths and dropout masks are independent.
    """

    STANDARD_DEVIATION = 5
    SHORTEST = 5
    MARGIN = 20

    def __init__(self, bptt: int, seed: int) -> None:
        self.bptt = bptt
        self.mean_length = max(self.SHORTEST, 0.975 * bptt)
        self.max_length = bptt + self.MARGIN
        self._generator = np.random.Generator(np.random.PCG64(seed))

    def windows(self, num_steps: int, start: int = 0) -> Iterator[Window]:
        """See Scheme."""
        while start < num_steps:
            window = Window(start, min(self._draw(), num_steps - start))
            yield window
            start += window.length

    def _draw(self) -> int:
        base = self.bptt if self._generator.random() < 0.95 else self.bptt / 2
        length = int(self._generator.normal(base, self.STANDARD_DEVIATION))
        return min(max(self.SHORTEST, length), self.max_length)

    def state_dict(self) -> dict[str, Any]:
        """See Scheme."""
        return {"generator": dict(self._generator.bit_generator.state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Scheme."""
        self._generator.bit_generator.state = state["generator"]
