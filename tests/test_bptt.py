"""Windows: every row once, lengths from their definition, and a state that goes on."""

import json

import numpy as np
import pytest

from bptt import FixedWindows, Scheme, VariableWindows


@pytest.mark.parametrize("scheme", [FixedWindows(7), VariableWindows(70, 3), VariableWindows(1, 3)])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 69, 70, 71, 1000])
def test_every_row_is_in_one_window(scheme: Scheme, num_steps: int) -> None:
    rows = [
        row
        for window in scheme.windows(num_steps)
        for row in range(window.start, window.start + window.length)
    ]
    assert rows == list(range(num_steps))


def test_fixed_lengths() -> None:
    windows = [(w.start, w.length) for w in FixedWindows(30).windows(100)]
    assert windows == [(0, 30), (30, 30), (60, 30), (90, 10)]


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


def test_short_bptt_stays_within_five_and_twenty_more() -> None:
    lengths = [w.length for w in VariableWindows(4, seed=1).windows(50_000)][:-1]
    assert min(lengths) == 5
    assert max(lengths) <= 24


def test_same_seed_same_lengths_and_a_state_from_between_two_windows_goes_on() -> None:
    whole = list(VariableWindows(20, seed=9).windows(500))
    assert whole == list(VariableWindows(20, seed=9).windows(500))
    assert whole != list(VariableWindows(20, seed=10).windows(500))
    for stop in (0, 1, 5, len(whole) - 1):
        first = VariableWindows(20, seed=9)
        windows = first.windows(500)
        seen = [next(windows) for _ in range(stop)]
        state = json.loads(json.dumps(first.state_dict()))
        second = VariableWindows(20, seed=0)
        second.load_state_dict(state)
        start = seen[-1].start + seen[-1].length if seen else 0
        assert seen + list(second.windows(500, start)) == whole
