"""Draw the curves of runs: python plot.py PTB"""

from collections.abc import Sequence
from pathlib import Path

from engine.errors import RunError, UsageError
from engine.history import AXES, History, read_history
from engine.tracking import warn
from flags.plotting import parse_plotting, tell_apart
from pictures.canvas import FORMATS, write_figure
from pictures.run_curves import draw_runs

LONGEST_NAME = 100  # characters of the name of a picture of several runs, if none is given


def run(argv: Sequence[str]) -> None:
    """Run the program.

    Raises:
        UsageError, RunError: errors that a user can cause; see engine.program.
    """
    args = parse_plotting(argv)
    output = None if args.output is None else Path(args.output)
    if output is not None and not output.name:  # ".", "/"
        raise UsageError(f"argument --output: {args.output!r} names no file")
    if output is not None and not output.parent.is_dir():
        raise RunError(f"{output.parent}: no such folder (for --output {output})")
    found = [read_history(path) for path in args.run]
    runs = [history for history in found if not history.lacks(args.x)]
    causes = [cause for history in found if (cause := history.lacks(args.x))]
    if not runs:
        raise RunError("; ".join(causes))
    for cause in causes:
        warn(f"left out: {cause}")
    curves = [
        history.curves(args.x, label) for history, label in zip(runs, labels(runs), strict=True)
    ]
    figure = draw_runs(curves, AXES[args.x])
    paths = write_figure(figure, output or default_output(runs), FORMATS[args.format])
    here = Path.cwd()
    shown = [path.relative_to(here) if path.is_relative_to(here) else path for path in paths]
    print(f"| {', '.join(map(str, shown))}")


def labels(runs: list[History]) -> list[str]:
    """The flags in which runs differ, with the names of the runs where those do not tell them."""
    names = [history.folder.name for history in runs]
    if len(set(names)) < len(names):
        names = [str(history.folder) for history in runs]
    if len(runs) == 1 or not all(history.flags for history in runs):
        return names
    texts = {history.config.get("fingerprint") for history in runs}
    flags = tell_apart([history.flags for history in runs], also=("data",) * (len(texts) > 1))
    if len(set(flags)) < len(flags) or "" in flags:
        return [f"{name} {flag}".strip() for name, flag in zip(names, flags, strict=True)]
    return flags


def default_output(runs: list[History]) -> Path:
    """NAME-curves or NAME-NAME-curves, beside the first run."""
    first = runs[0].folder
    name = "-".join(history.folder.name for history in runs)
    if len(name) > LONGEST_NAME and len(runs) > 1:
        name = f"{first.name}-and-{len(runs) - 1}-more"
    return first.with_name(f"{name}-curves")
