"""Back-propagation through time: which tokens each update sees, and how far its gradient reaches.

A batchified corpus is a matrix of rows (time steps) and columns. A scheme divides the rows into
windows, one per update; the hidden state is carried from window to window, detached. A window may
be run in pieces: between two pieces the state is detached, or the gradient passes, possibly
multiplied by a factor.

In every scheme each row's loss counts once an epoch, and an update's learning rate is
lr * counted / bptt, where counted is the number of rows whose loss counts in it. So a row has the
same weight in every scheme: all of them descend an epoch's summed loss, in larger or smaller steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Window:
    """The text of one update and how it is run.

    Rows start, …, start + length - 1 are its input, (T, B) with T = length.

    Args:
        start: first row.
        length: number of rows, >= 1.
        warmup: leading rows that are run but whose loss does not count.
        pieces: lengths of the pieces that it is run in, in order; empty: a single piece.
        crossing: factor on the gradient that passes from a piece to the piece before; 0: the
            state is detached between pieces.
        kept: number of last pieces whose activations are stored for backward; earlier pieces are
            recomputed in backward.
        advance: rows from its start to the next window's start, 0 or the end of a piece; None:
            length.
    """

    start: int
    length: int
    warmup: int = 0
    pieces: tuple[int, ...] = ()
    crossing: float = 1.0
    kept: int = 1
    advance: int | None = None

    @property
    def counted(self) -> int:
        """Number of rows whose loss counts: all but the warmup."""
        return self.length - self.warmup


@dataclass(frozen=True)
class Footprint:
    """Upper bound of what an update holds in memory at its peak.

    rows: time steps whose activations are held at once.
    decoded: how many of these are decoded.
    states: hidden states held besides, to recompute pieces from.
    """

    rows: int
    decoded: int
    states: int = 1


class Scheme:
    """How the rows are divided into windows.

    Args:
        bptt: --bptt, >= 1; each scheme says what it is.
        seed: seeds a generator of the scheme's own, so that what it draws and dropout masks are
            independent; None: the scheme draws nothing.
    """

    def __init__(self, bptt: int, seed: int | None = None) -> None:
        self.bptt = bptt
        self._generator = np.random.Generator(np.random.PCG64(seed or 0))
        self._draws = seed is not None

    def windows(self, num_steps: int, start: int = 0) -> Iterator[Window]:
        """Yield windows such that the loss of each row start, …, num_steps - 1 counts once.

        start is 0, or the first row that has not counted yet when an epoch is resumed. A window is
        drawn only when it is requested, so that state_dict between two windows determines all
        later ones.
        """
        raise NotImplementedError

    def expected_windows(self, num_steps: int) -> float:
        """Approximate number of windows in an epoch of num_steps rows."""
        raise NotImplementedError

    def footprint(self, num_steps: int) -> Footprint:
        """Memory of the largest window in an epoch of num_steps rows."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """State of the scheme's random generator; empty if it draws nothing."""
        return {"generator": dict(self._generator.bit_generator.state)} if self._draws else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what state_dict returned."""
        if self._draws:
            self._generator.bit_generator.state = state["generator"]


class FixedWindows(Scheme):
    """Truncated BPTT(k1, k2): an update every k1 rows, whose gradient reaches back through k2.

    Williams & Peng 1990; Sutskever 2013, section 2.8.1. With k1 = k2 the text is cut into windows
    of k2 rows. k1 = k2 = 1 is an update per row without any history.

    k1 < k2: windows overlap. Window i starts at row max(0, (i + 1) k1 - k2), and its loss is that
    of rows i k1, …, (i + 1) k1 - 1. Its first state is the one that window i - 1 computed at that
    row, with that window's masks and the weights before its update.

    k1 > k2: a window of k1 rows is run in pieces of k2, and the state is detached between them.

    The last window of an epoch may be shorter.

    Args:
        bptt: k2, >= 1.
        k1: rows between two updates, >= 1; None: bptt.
    """

    def __init__(self, bptt: int, k1: int | None = None) -> None:
        super().__init__(bptt)
        self.k1 = k1 or bptt

    def windows(self, num_steps: int, start: int = 0) -> Iterator[Window]:
        """See Scheme."""
        for row in range(start, num_steps, self.k1):
            stop = min(row + self.k1, num_steps)
            if self.k1 < self.bptt:
                yield self._overlapping(row, stop, last=stop == num_steps)
            else:
                pieces = segments(stop - row, self.bptt)
                yield Window(row, stop - row, pieces=pieces, crossing=0.0 if pieces else 1.0)

    def _overlapping(self, row: int, stop: int, last: bool) -> Window:
        """The window whose counted rows are row, …, stop - 1."""
        start = max(0, row + self.k1 - self.bptt)
        length, warmup = stop - start, row - start
        advance = max(0, row + 2 * self.k1 - self.bptt) - start
        if last:
            return Window(start, length, warmup)
        pieces = (advance, length - advance) if 0 < advance < length else ()
        return Window(start, length, warmup, pieces, kept=2, advance=advance)

    def expected_windows(self, num_steps: int) -> float:
        """See Scheme."""
        return -(-num_steps // self.k1)

    def footprint(self, num_steps: int) -> Footprint:
        """See Scheme."""
        rows = min(self.bptt, num_steps)
        return Footprint(rows, min(self.k1, rows), states=1 if self.k1 >= self.bptt else 2)


class VariableWindows(Scheme):
    """Windows of random length, so that no row is always the first or the last of its window.

    Merity et al. 2017 (arXiv:1708.02182), section 4.1: base = bptt with probability 0.95, else
    bptt / 2; length = max(5, int(N(base, 5))). Unlike in the original, a length is at most
    bptt + 20, four standard deviations, so that the memory of an update is bounded, and no row of
    an epoch is left out (the original may skip the last one).

    Args:
        bptt: the usual mean length, >= 1.
        seed: see Scheme.
    """

    STANDARD_DEVIATION = 5
    SHORTEST = 5
    MARGIN = 20

    def __init__(self, bptt: int, seed: int) -> None:
        super().__init__(bptt, seed)
        self.mean_length = max(self.SHORTEST, 0.975 * bptt)
        self.max_length = bptt + self.MARGIN

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

    def expected_windows(self, num_steps: int) -> float:
        """See Scheme."""
        return max(1.0, num_steps / self.mean_length)

    def footprint(self, num_steps: int) -> Footprint:
        """See Scheme."""
        rows = min(self.max_length, num_steps)
        return Footprint(rows, rows)


class RandomizedWindows(Scheme):
    """Randomised truncation: cuts drawn so that the expected gradient is the full one.

    Tallec & Ollivier 2017 (arXiv:1705.08209), with cuts at the boundaries between segments of
    bptt rows only. At each boundary the history is cut with probability 1 - keep_prob, which ends
    the window and makes an update; else the gradient that crosses it is multiplied by
    1 / keep_prob. A path back through n boundaries survives with probability keep_prob**n and then
    has the weight keep_prob**-n: for fixed weights and masks the expected sum of the windows'
    gradients (of summed losses) is the full gradient. Since a window's learning rate is
    lr * length / bptt for its mean loss, this also holds for the updates of SGD without clipping.
    TAR compares rows of one segment only, as with fixed windows of bptt rows.

    A window has n segments with probability keep_prob**(n - 1) * (1 - keep_prob), except the last
    of an epoch. In windows of more than KEPT segments all but the last KEPT are recomputed in
    backward, so that memory stays bounded.

    Args:
        bptt: rows per segment, >= 1.
        keep_prob: probability that the history is not cut at a boundary, in (0, 1).
        seed: see Scheme.
    """

    KEPT = 4

    def __init__(self, bptt: int, keep_prob: float, seed: int) -> None:
        super().__init__(bptt, seed)
        self.keep_prob = keep_prob

    def windows(self, num_steps: int, start: int = 0) -> Iterator[Window]:
        """See Scheme."""
        while start < num_steps:
            stop = start + self.bptt
            while stop < num_steps and self._generator.random() < self.keep_prob:
                stop += self.bptt
            length = min(stop, num_steps) - start
            pieces = segments(length, self.bptt)
            yield Window(start, length, 0, pieces, 1 / self.keep_prob if pieces else 1.0, self.KEPT)
            start += length

    def expected_windows(self, num_steps: int) -> float:
        """See Scheme."""
        boundaries = (num_steps - 1) // self.bptt
        return 1 + boundaries * (1 - self.keep_prob)

    def footprint(self, num_steps: int) -> Footprint:
        """See Scheme."""
        rows = min(self.KEPT * self.bptt, num_steps)
        return Footprint(rows, rows, states=-(-num_steps // self.bptt))


class FullWindows(Scheme):
    """Full BPTT: one window over all rows of the epoch, whose history is never cut.

    The window is run in segments of bptt rows. All but the last are recomputed in backward, so that
    memory holds the activations of one segment, and one state per segment.

    Args:
        bptt: rows per segment, >= 1; changes results by rounding only (a gradient filter, however,
            filters each segment separately).
    """

    def windows(self, num_steps: int, start: int = 0) -> Iterator[Window]:
        """See Scheme; start is 0 or num_steps."""
        if start < num_steps:
            yield Window(start, num_steps - start, pieces=segments(num_steps - start, self.bptt))

    def expected_windows(self, num_steps: int) -> float:
        """See Scheme."""
        return 1.0

    def footprint(self, num_steps: int) -> Footprint:
        """See Scheme."""
        rows = min(self.bptt, num_steps)
        return Footprint(rows, rows, states=-(-num_steps // self.bptt))


def segments(length: int, size: int) -> tuple[int, ...]:
    """Lengths of the segments of size rows (the last may be shorter) that make up length rows.

    Returns:
        The lengths; empty if length <= size.
    """
    if length <= size:
        return ()
    whole, rest = divmod(length, size)
    return (size,) * whole + ((rest,) if rest else ())
