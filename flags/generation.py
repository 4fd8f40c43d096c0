"""generate.py's flags, with the original's names and defaults."""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from engine.errors import UsageError
from flags.evaluation import LAMBDA, THETA, WINDOW
from flags.flag import Flag, Sections, by_name, dashed
from flags.parser import Parser
from flags.training import TRAINING
from flags.values import positive, positive_int, probability_above_0

_SHARED = by_name(TRAINING)
_CACHE = ("window", "theta", "lambdasm")

GENERATION: Sections = {
    "": (
        Flag(
            "path",
            None,
            "a model that main.py saved, or an exported folder",
            metavar="MODEL",
            nargs="?",
        ),
        Flag("--checkpoint", None, "the same, as in the original", metavar="MODEL"),
        Flag("--outf", None, "file to write instead of stdout", metavar="FILE"),
        _SHARED["device"],
        _SHARED["threads"],
        replace(_SHARED["data"], default=None, help="no effect: a model has its own vocabulary"),
        Flag("--model", None, "no effect: a model knows its own kind", metavar="KIND"),
        replace(_SHARED["log_interval"], default=100, help="words between progress lines"),
    ),
    "text": (
        Flag("--prompt", "", "words to continue", metavar="TEXT"),
        Flag("--words", 1000, "words to sample, at most", positive_int),
        Flag("--sentences", None, "stop after N sentences", positive_int),
    ),
    "distribution, in this order": (
        Flag("--temperature", 1.0, "p becomes p^(1 / X), normalised", positive, "X"),
        Flag("--top-k", None, "sample from the N most probable words", positive_int),
        Flag(
            "--top-p",
            1.0,
            "sample from the fewest most probable words whose share is at least P",
            probability_above_0,
            "P",
        ),
        _SHARED["seed"],
    ),
    "continuous cache": (
        Flag("--cache", False, "mix the predictions with a cache of the text so far"),
        WINDOW,
        replace(THETA, default=1.0, nargs=None),
        replace(LAMBDA, default=0.1, nargs=None),
    ),
}


def generation_parser() -> Parser:
    """The parser of generate.py."""
    return Parser(GENERATION, prog="generate.py", description="Sample text from a model.")


def parse_generation(argv: Sequence[str]) -> argparse.Namespace:
    """Parse generate.py's command line; `checkpoint` is the model.

    Raises:
        UsageError: an invalid flag or value.
    """
    args, given = generation_parser().parse(argv)
    if (args.path is None) == (args.checkpoint is None):
        raise UsageError("give one MODEL that main.py saved")
    args.checkpoint = args.checkpoint or args.path
    for name in _CACHE:
        if name in given and not args.cache:
            raise UsageError(f"argument {dashed(name)}: goes with --cache only")
    return args
