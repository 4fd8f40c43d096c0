"""Parsers of flags' values; they raise ArgumentTypeError."""

import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

LARGEST = 2**31 - 1  # of sizes and counts: libraries that torch calls use 32-bit integers


def _number(
    convert: Callable[[str], Any], description: str, holds: Callable[[Any], bool]
) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        # Not math.isfinite, which raises OverflowError for large integers.
        if value is None or value in (math.inf, -math.inf) or not holds(value):
            raise ArgumentTypeError(f"{text!r} is not {description}")
        return value

    return parse


def _several(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        values = [convert(part.strip()) for part in text.split(",")]
        if len(set(values)) < len(values):
            raise ArgumentTypeError(f"{text!r} names one twice")
        return values

    return parse


positive_int = _number(int, "a whole number in [1, 2**31)", lambda n: 1 <= n <= LARGEST)
natural = _number(int, "a whole number in [0, 2**31)", lambda n: 0 <= n <= LARGEST)
layer_count = _number(int, "a whole number from 1 to 1000", lambda n: 1 <= n <= 1000)
seed_value = _number(int, "a whole number in [0, 2**32)", lambda n: 0 <= n < 2**32)
epoch_number = _number(
    int, "an epoch in [1, 2**31), or -1 for never", lambda n: 1 <= n <= LARGEST or n == -1
)
positive = _number(float, "a number above 0", lambda x: x > 0)
# float32, in which torch takes it, also holds its product with the length of an update.
factor = _number(float, "a number in (0, 1e30]", lambda x: 0 < x <= 1e30)
non_negative = _number(float, "a number of at least 0", lambda x: x >= 0)
whole_numbers = _several(natural)
decay = _number(float, "a number above 1, or 0", lambda x: x > 1 or x == 0)
between_0_and_1 = _number(float, "a probability in (0, 1)", lambda x: 0 < x < 1)
vocabulary_size = _number(int, "a whole number of at least 3", lambda n: 3 <= n <= LARGEST)
share = _number(float, "a number in [0, 1]", lambda x: 0 <= x <= 1)
probability_above_0 = _number(float, "a probability in (0, 1]", lambda x: 0 < x <= 1)
probability = _number(float, "a probability in [0, 1)", lambda x: 0 <= x < 1)


def model_name(text: str) -> str:
    """--model: refuses QRNN, which the original has and this project lacks."""
    if text == "QRNN":
        raise ArgumentTypeError("QRNN is not supported")
    return text


def loss_scale(text: str) -> str | float:
    """--loss-scale: dynamic, logmax or a fixed factor."""
    if text in ("dynamic", "logmax"):
        return text
    try:
        value: float = factor(text)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{error}, nor dynamic or logmax") from None
    return value


def shares(text: str) -> list[float]:
    """--split: three shares that add up to 1."""
    values = [positive(part.strip()) for part in text.split(",")]
    if len(values) != 3 or abs(sum(values) - 1) > 1e-6:
        raise ArgumentTypeError(f"{text!r} is not three shares that add up to 1")
    return values


def save_path(text: str) -> str:
    """--save: requires a suffix, since the run's folder is the path without it."""
    if not Path(text).suffix:
        raise ArgumentTypeError(f"{text!r} has no suffix such as .pt")
    return text


def refused_cuda(text: str) -> str:
    """--cuda: refused, since in the original it switched CUDA off."""
    raise ArgumentTypeError(
        "it switched CUDA off in the original; give --device cpu or --device cuda instead"
    )
