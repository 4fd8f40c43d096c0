"""plot.py's flags, and the format of all pictures."""

import argparse
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from flags.flag import Flag, Sections, by_name, dashed, defaults, plain
from flags.parser import Parser
from flags.training import TRAINING, fill_in

FORMAT = Flag("--format", "both", "files of each picture", choices=("png", "pdf", "both"))

PLOTTING: Sections = {
    "": (
        Flag(
            "run",
            None,
            "a run of main.py: its folder, its model or its last.pt",
            metavar="RUN",
            nargs="+",
        ),
        Flag(
            "--x",
            "update",
            "what the x axis counts; time: hours of the run, without those between its sessions",
            choices=("update", "epoch", "time"),
        ),
        Flag(
            "--output",
            None,
            "the picture without its suffix; beside the first run, NAME-curves, if not given",
            metavar="FILE",
        ),
        FORMAT,
        by_name(TRAINING)["threads"],
    ),
}


def plotting_parser() -> Parser:
    """The parser of plot.py."""
    return Parser(
        PLOTTING,
        prog="plot.py",
        description="Draw the curves of runs, also while they are under way.",
    )


def parse_plotting(argv: Sequence[str]) -> argparse.Namespace:
    """Parse plot.py's command line.

    Raises:
        UsageError: an invalid flag or value.
    """
    args, _ = plotting_parser().parse(argv)
    return args


def tell_apart(saved: Sequence[Mapping[str, Any]], also: Collection[str] = ()) -> list[str]:
    """The flags in which saved runs differ, as on a command line, for each run.

    Args:
        saved: each run's flags; flags newer than a run have their defaults.
        also: names of flags to compare although a resumed run may change them.
    """
    runs = [fill_in({**defaults(TRAINING), **flags}) for flags in saved]
    compared = {n: f for n, f in by_name(TRAINING).items() if f.is_compared or n in also}
    names = [name for name in compared if any(run[name] != runs[0][name] for run in runs)]
    return [" ".join(_spelled(run, name) for name in names).strip() for run in runs]


def _spelled(run: Mapping[str, Any], name: str) -> str:
    value = run[name]
    if value is None or value is False:
        return f"no {dashed(name)}"
    if value is True:
        return dashed(name)
    return f"{dashed(name)} {f'{value:g}' if isinstance(value, float) else plain(value)}"
