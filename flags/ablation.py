"""ablate.py's flags."""

import argparse
from collections.abc import Sequence

from engine.errors import UsageError
from flags.flag import Flag, Sections, by_name, dashed
from flags.parser import Parser
from flags.plotting import FORMAT
from flags.training import TRAINING
from flags.values import non_negative, positive_int, whole_numbers

_SHARED = by_name(TRAINING)

ABLATION: Sections = {
    "": (Flag("table", None, "TOML file with the rows (see ablations/)", metavar="TABLE"),),
    "what to run": (
        Flag("--seeds", None, "instead of the table's, for instance 1,2,3", whole_numbers, "SEEDS"),
        Flag(
            "--rows",
            None,
            "only the rows whose names contain one of these words; the first row always takes part",
            metavar="WORD",
            nargs="+",
        ),
        Flag(
            "--flags",
            "",
            "flags for every row, before its own, for instance --flags='--epochs 2'",
            metavar="FLAGS",
        ),
        Flag(
            "--output",
            None,
            "folder of the results (results/ and the table's name, if not given)",
            metavar="FOLDER",
        ),
        Flag("--dry-run", False, "print the plan and what it costs, then exit"),
        Flag("--report-only", False, "only write the report again, from the runs so far"),
        FORMAT,
    ),
    "where to run it": (
        Flag("--jobs", None, "runs at a time (one a GPU, if not given)", positive_int),
        Flag(
            "--gpus",
            None,
            "GPUs to share among the jobs, for instance 0,1",
            whole_numbers,
            "NUMBERS",
        ),
        Flag(
            "--threads",
            None,
            "CPU threads of each run (the cores shared among the jobs, if not given; on Ray 1)",
            positive_int,
        ),
        Flag(
            "--ray",
            None,
            "run on a Ray cluster: at ADDRESS, at RAY_ADDRESS, or one of this machine alone",
            metavar="ADDRESS",
            nargs="?",
            const="",
        ),
        Flag(
            "--ray-gpus",
            None,
            "GPUs of each run on Ray, fractions allowed (1 if the cluster has any)",
            non_negative,
            "X",
        ),
    ),
    "logging, of each run and of the table": (_SHARED["wandb"], _SHARED["wandb_project"]),
}


def ablation_parser() -> Parser:
    """The parser of ablate.py."""
    return Parser(
        ABLATION,
        prog="ablate.py",
        description="Run the rows of an ablation table, each with several seeds, and print it. "
        "After an interruption the same command continues.",
    )


def parse_ablation(argv: Sequence[str]) -> argparse.Namespace:
    """Parse ablate.py's command line.

    Raises:
        UsageError: an invalid flag or value, or flags that exclude each other.
    """
    args, given = ablation_parser().parse(argv)
    for one, other in (("dry_run", "report_only"), ("ray", "gpus"), ("ray", "jobs")):
        if {one, other} <= given:
            raise UsageError(f"argument {dashed(other)}: does not go with {dashed(one)}")
    if args.ray_gpus is not None and args.ray is None:
        raise UsageError("argument --ray-gpus: needs --ray")
    return args
