"""Windows: every row once, lengths from their definition, and a state that goes on."""

import json
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from bptt import (
    FixedWindows,
    Footprint,
    FullWindows,
    RandomizedWindows,
    Scheme,
    VariableWindows,
)

SCHEMES: dict[str, Callable[[], Scheme]] = {
    "fixed": lambda: FixedWindows(7),
    "variable": lambda: VariableWindows(70, 0),
    "variable, short": lambda: VariableWindows(1, 3),
    "1, 1": lambda: FixedWindows(1, 1),
    "1, 7": lambda: FixedWindows(7, 1),
    "5, 7": lambda: FixedWindows(7, 5),
    "20, 7": lambda: FixedWindows(7, 20),
    "randomized": lambda: RandomizedWindows(7, 0.8, 0),
    "full": lambda: FullWindows(7),
}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 69, 70, 71, 1000])
def test_every_row_counts_in_one_window(name: str, num_steps: int) -> None:
    """And windows follow on each other, and hold no more rows than they say."""
    scheme = SCHEMES[name]()
    windows = list(scheme.windows(num_steps))
    counted = [
        row
        for window in windows
        for row in range(window.start + window.warmup, window.start + window.length)
    ]
    assert counted == list(range(num_steps))
    start, held = 0, scheme.footprint(num_steps)
    for window in windows:
        assert window.start == start
        assert window.counted >= 1
        pieces = window.pieces or (window.length,)
        assert sum(pieces) == window.length
        assert min(pieces) >= 1
        advance = window.length if window.advance is None else window.advance
        assert advance in {0} | {sum(pieces[: i + 1]) for i in range(len(pieces))}
        start += advance
        together = sum(pieces[-window.kept :]) if window.crossing else max(pieces)
        assert max(together, *pieces) <= held.rows <= num_steps
        assert min(window.counted, together) <= held.decoded <= held.rows
    assert start == num_steps


@pytest.mark.parametrize("name", SCHEMES)
def test_a_state_from_between_two_windows_goes_on(name: str) -> None:
    """From the state and the number of rows that were counted, as a run is resumed."""
    whole = list(SCHEMES[name]().windows(150))
    for stop in {0, 1, len(whole) // 2, len(whole) - 1}:
        first = SCHEMES[name]()
        windows = first.windows(150)
        seen = [next(windows) for _ in range(stop)]
        state = json.loads(json.dumps(first.state_dict()))
        second = SCHEMES[name]()
        list(second.windows(50))
        second.load_state_dict(state)
        assert seen + list(second.windows(150, sum(w.counted for w in seen))) == whole


def test_footprints() -> None:
    """Rows held, rows decoded, and the states that pieces are recomputed from."""
    assert FixedWindows(7).footprint(100) == Footprint(7, 7, states=1)
    assert FixedWindows(7, 20).footprint(100) == Footprint(7, 7, states=1)
    assert FixedWindows(7, 3).footprint(100) == Footprint(7, 3, states=2)
    assert VariableWindows(70, 3).footprint(1000) == Footprint(90, 90, states=1)
    assert RandomizedWindows(7, 0.8, 3).footprint(100) == Footprint(28, 28, states=15)
    assert FullWindows(7).footprint(100) == Footprint(7, 7, states=15)


@pytest.mark.parametrize(("num_steps", "boundaries"), [(1, 0), (7, 0), (8, 1), (14, 1), (15, 2)])
def test_expected_number_of_windows(num_steps: int, boundaries: int) -> None:
    scheme = RandomizedWindows(7, 0.75, 3)
    assert scheme.expected_windows(num_steps) == 1 + boundaries / 4  # each is cut, or not
    assert FullWindows(7).expected_windows(num_steps) == 1
    fixed = FixedWindows(7, 2)
    assert fixed.expected_windows(num_steps) == len(list(fixed.windows(num_steps)))
    assert VariableWindows(70, 3).expected_windows(num_steps) == 1  # 5 rows at least


@pytest.mark.parametrize("keep_prob", [0.2, 0.75])
def test_randomized_windows_are_geometric(keep_prob: float) -> None:
    """Pearson's chi-squared against n segments with probability p**(n - 1) * (1 - p)."""
    scheme, num_steps = RandomizedWindows(3, keep_prob, seed=4), 3 * 60_000
    windows = list(scheme.windows(num_steps))
    assert {w.crossing for w in windows if w.pieces} == {1 / keep_prob}
    assert {w.crossing for w in windows if not w.pieces} == {1.0}
    assert all(set(w.pieces) <= {3} for w in windows)
    lengths = Counter(w.length // 3 for w in windows)
    assert abs(len(windows) / scheme.expected_windows(num_steps) - 1) < 0.02
    chi_squared = 0.0
    longest = 4 if keep_prob < 0.5 else 15
    for n in range(1, longest + 1):
        # the last class is of all that are as long or longer
        chance = keep_prob ** (n - 1) * (1 if n == longest else 1 - keep_prob)
        count = lengths[n] if n < longest else sum(v for k, v in lengths.items() if k >= n)
        expected = len(windows) * chance
        chi_squared += (count - expected) ** 2 / expected
    assert chi_squared < 3 * longest  # for longest - 1 degrees of freedom; the seed is fixed


def test_variable_lengths_have_the_distribution_of_the_paper() -> None:
    scheme = VariableWindows(70, seed=5)
    lengths = np.array([w.length for w in scheme.windows(70 * 20_000)][:-1])
    long, short = lengths[lengths > 52], lengths[lengths <= 52]
    assert abs(len(short) / len(lengths) - 0.05) < 0.008
    # int() cuts off: half a step below the mean of the normal distribution.
    assert abs(long.mean() - 69.5) < 0.2
    assert abs(short.mean() - 34.5) < 0.8
    assert abs(long.std() - 5) < 0.15
    assert lengths.max() <= 90
    assert lengths.min() >= 5
    assert abs(lengths.mean() - scheme.mean_length) < 0.8
    short_bptt = [w.length for w in VariableWindows(4, seed=1).windows(50_000)][:-1]
    assert min(short_bptt) == 5
    assert max(short_bptt) <= 24
    assert list(VariableWindows(20, 9).windows(500)) != list(VariableWindows(20, 10).windows(500))
