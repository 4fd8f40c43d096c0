"""Compares flags with those of a saved run, for --resume and for ablate.py's folders."""

import argparse
from collections.abc import Collection, Mapping
from typing import Any

from engine.errors import UsageError
from flags.flag import by_name, dashed, defaults, plain
from flags.training import TRAINING, fill_in

# Flags that main.py no longer has, and the values with which a saved run can still be resumed.
RETIRED: Mapping[str, Any] = {"cuda": None, "wavefront": 1}


def resume_flags(
    args: argparse.Namespace, given: set[str], saved: dict[str, Any]
) -> argparse.Namespace:
    """The flags of a resumed run: the saved ones, except where given now.

    Args:
        args, given: from parse_training.
        saved: the run's flags; flags newer than the run have their defaults.

    Raises:
        UsageError: a flag was given that may not change, or the run has a flag that main.py no
            longer has; the message lists all of them.
    """
    if differences := other_flags({name: getattr(args, name) for name in given}, saved):
        raise UsageError(f"argument --resume: the run was started with other flags: {differences}")
    merged = dict(vars(args))
    for name, flag in by_name(TRAINING).items():
        if name in saved and name not in given and not flag.per_session:
            merged[name] = saved[name]
    return argparse.Namespace(**merged)


def other_flags(wanted: dict[str, Any], saved: dict[str, Any], also: Collection[str] = ()) -> str:
    """Describe the flags that differ from a saved run's; empty if none do.

    Args:
        wanted: flags by name; only these are compared.
        saved: the run's flags; flags newer than the run have their defaults.
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
