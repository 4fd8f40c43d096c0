"""Which flags make a run another run: the check of --resume and of ablate.py's folders."""

import argparse
from collections.abc import Collection, Mapping
from typing import Any

from engine.errors import UsageError
from flags.flag import by_name, dashed, defaults, plain
from flags.training import TRAINING, fill_in

# Flags that main.py no longer has, and the values at which a saved run does not need them.
RETIRED: Mapping[str, Any] = {"cuda": None, "wavefront": 1}


def resume_flags(
    args: argparse.Namespace, given: set[str], saved: dict[str, Any]
) -> argparse.Namespace:
    """The flags of a resumed run: the run's own where none was given now.

    Args:
        args, given: from parse_training.
        saved: the run's flags; one that is newer than the run counts with its default.

    Raises:
        UsageError: a flag was given that makes it another run, or the run has one that main.py no
            longer has; lists all of them.
    """
    if differences := other_flags({name: getattr(args, name) for name in given}, saved):
        raise UsageError(f"argument --resume: the run was started with other flags: {differences}")
    merged = dict(vars(args))
    for name, flag in by_name(TRAINING).items():
        if name in saved and name not in given and not flag.per_session:
            merged[name] = saved[name]
    return argparse.Namespace(**merged)


def other_flags(wanted: dict[str, Any], saved: dict[str, Any], also: Collection[str] = ()) -> str:
    """The flags that make a run another one than the one that was saved; empty if none do.

    Args:
        wanted: flags by name; those that it lacks are not compared.
        saved: the run's flags; one that is newer than the run counts with its default.
        also: names of flags to compare although a resumed run may change them.
    """
    known = by_name(TRAINING)
    old = fill_in({**defaults(TRAINING), **saved})
    differences = [
        f"{dashed(name)} {plain(wanted[name])} (was {plain(old[name])})"
        for name in sorted(wanted)
        if (known[name].is_compared or name in also) and wanted[name] != old[name]
    ]
    differences += [
        f"{dashed(name)} {plain(saved[name])}, which this version does not have"
        for name in sorted(saved.keys() - known.keys())
        if name not in RETIRED or saved[name] != RETIRED[name]
    ]
    return ", ".join(differences)
