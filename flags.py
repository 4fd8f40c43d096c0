"""What flags are made of: the values they accept, the parser, and how one is declared."""

import argparse
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from engine.program import UsageError


def _number(
    convert: Callable[[str], Any], description: str, holds: Callable[[Any], bool]
) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not math.isfinite(value) or not holds(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {description}")
        return value

    return parse


def _several(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Values with commas between them, none of them twice."""

    def parse(text: str) -> list[Any]:
        values = [convert(part.strip()) for part in text.split(",")]
        if len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"{text!r} names one twice")
        return values

    return parse


positive_int = _number(int, "a whole number of at least 1", lambda n: n >= 1)
natural = _number(int, "a whole number of at least 0", lambda n: n >= 0)
seed_value = _number(int, "a whole number in [0, 2**32)", lambda n: 0 <= n < 2**32)
epoch_number = _number(int, "an epoch, from 1, or -1 for never", lambda n: n >= 1 or n == -1)
positive = _number(float, "a number above 0", lambda x: x > 0)
non_negative = _number(float, "a number of at least 0", lambda x: x >= 0)
whole_numbers = _several(natural)
decay = _number(float, "a number above 1, or 0", lambda x: x > 1 or x == 0)
between_0_and_1 = _number(float, "a probability in (0, 1)", lambda x: 0 < x < 1)
probability = _number(float, "a probability in [0, 1)", lambda x: 0 <= x < 1)


def model_name(text: str) -> str:
    """--model: the original's other kinds are told apart from nonsense."""
    if text in ("GRU", "QRNN"):
        raise argparse.ArgumentTypeError(f"{text} is not supported; this project trains the LSTM")
    if text != "LSTM":
        raise argparse.ArgumentTypeError(f"{text!r} is not LSTM")
    return text


def loss_scale(text: str) -> str | float:
    """--loss-scale."""
    if text == "dynamic":
        return text
    value: float = positive(text)
    return value


def save_path(text: str) -> str:
    """--save: the run's folder is this path without its suffix, so it needs one."""
    if not Path(text).suffix:
        raise argparse.ArgumentTypeError(f"{text!r} has no suffix such as .pt")
    return text


class Parser(argparse.ArgumentParser):
    """Reads @files with shell-like lines and comments; reports an error in one line.

    Flags of several words are known with - and with _ between them.
    """

    def __init__(self, **keywords: Any) -> None:
        super().__init__(
            fromfile_prefix_chars="@",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            **keywords,
        )

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """One line of a recipe: any number of flags, # begins a comment."""
        return shlex.split(arg_line, comments=True)

    def error(self, message: str) -> NoReturn:
        """Argparse's errors, without the usage before them."""
        if unreadable := re.fullmatch(r"\[Errno \d+\] (.*): '(.*)'", message):
            message = f"@{unreadable[2]}: {unreadable[1]}"
        if message.startswith("unrecognized arguments") and ".txt" in message:
            message += " (a recipe is given as @FILE)"
        raise UsageError(message)


class CudaFlag(argparse.Action):
    """--cuda: refused, since it meant the opposite of what it says."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Say so."""
        parser.error(
            "argument --cuda: it switched CUDA off in the original; give --device cpu or "
            "--device cuda instead"
        )


def add_flag(
    group: Any, name: str, default: Any, help: str, type: Any = str, metavar: Any = "N", **more: Any
) -> None:
    """Declare a flag that takes a value, under both spellings."""
    names = dict.fromkeys(
        [name, "--" + name[2:].replace("_", "-"), "--" + name[2:].replace("-", "_")]
    )
    group.add_argument(*names, default=default, help=help, type=type, metavar=metavar, **more)


def add_choice(group: Any, name: str, choices: list[str], help: str) -> None:
    """Declare a flag that takes one of a few words, the first by default."""
    add_flag(group, name, choices[0], help, metavar="|".join(choices), choices=choices)


def add_switch(group: Any, name: str, help: str) -> None:
    """Declare a flag without a value."""
    names = dict.fromkeys([name, "--" + name[2:].replace("-", "_")])
    group.add_argument(*names, action="store_true", help=help)
