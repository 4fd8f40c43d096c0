"""diagnose.py's flags."""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from engine.errors import UsageError
from flags.flag import Flag, Sections, by_name
from flags.parser import Parser
from flags.plotting import FORMAT
from flags.training import TRAINING
from flags.values import natural, positive, positive_int

_SHARED = by_name(TRAINING)
# As the model's own run has them, if not given.
TRAINED = ("bptt", "clip", "alpha", "beta")


def _of_the_run(flag: Flag) -> Flag:
    what = flag.help.partition(", k2")[0]
    return replace(flag, default=None, help=f"{what} (that of the model's run, if not given)")


DIAGNOSIS: Sections = {
    "": (
        Flag(
            "model",
            None,
            "a model that main.py saved, or an exported folder",
            metavar="MODEL",
            nargs="?",
        ),
        Flag("--compare", None, "two models, side by side", metavar=("A", "B"), nargs=2),
        Flag(
            "--fresh",
            False,
            "initialise MODEL again by --seed, as before training; with --compare: B",
        ),
        Flag(
            "--output",
            None,
            "folder for the results; beside the model, NAME-diagnosis, if not given",
            metavar="FOLDER",
        ),
        FORMAT,
        _SHARED["device"],
        _SHARED["threads"],
        Flag("--split", "train", "text to read", choices=("train", "valid", "test")),
    ),
    "corpus": (
        replace(
            _SHARED["data"],
            default=None,
            help="folder with the texts (that of the model's own run, if not given)",
        ),
    ),
    "what to look at": (
        Flag("--lags", 100, "time steps to follow a gradient back", positive_int),
        Flag(
            "--positions",
            8,
            "time steps per column of text whose losses are back-propagated",
            positive_int,
        ),
        Flag("--windows", 8, "windows of --bptt steps whose gradient is taken", positive_int),
        Flag("--masks", 3, "draws of weight drop's mask to take spectra of", natural),
        Flag(
            "--thresholds",
            [1.0, 2.0, 5.0, 10.0],
            "thresholds of the gradient filter to try",
            positive,
            "X",
            nargs="+",
        ),
    ),
    "how it is trained": (
        replace(_SHARED["batch_size"], default=20),
        *(_of_the_run(_SHARED[name]) for name in TRAINED),
        _SHARED["seed"],
    ),
}


def diagnosis_parser() -> Parser:
    """The parser of diagnose.py."""
    return Parser(
        DIAGNOSIS,
        prog="diagnose.py",
        description="Measure how gradients flow back through time in a trained or fresh model.",
    )


def parse_diagnosis(argv: Sequence[str]) -> argparse.Namespace:
    """Parse diagnose.py's command line.

    Raises:
        UsageError: an invalid flag or value.
    """
    args, _ = diagnosis_parser().parse(argv)
    if (args.model is None) == (args.compare is None):
        raise UsageError("give a MODEL that main.py saved, or two of them by --compare A B")
    return args
