"""finetune.py's flags: main.py's, without the choice of an optimizer."""

import argparse
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.errors import UsageError
from flags.flag import Flag, Sections, by_name, dashed, defaults
from flags.parser import Parser
from flags.resume import RETIRED
from flags.training import TRAINING, check_bounds, fill_in, training_parser
from flags.values import save_path

# Fine-tuning is averaged SGD: these have their defaults.
SETTLED = ("optimizer", "no_asgd", "nonmono_decay")
# Of the run that is fine-tuned, beside what is of a session: its files, schedule and W&B name.
NOT_TAKEN_OVER = ("save", "when", "wandb_name", "quick")

_MAIN = by_name(TRAINING)


def _finetuning() -> Sections:
    save = replace(
        _MAIN["save"],
        type=str,
        help="the model to start from, which main.py saved or export.py wrote; only read",
        metavar="MODEL",
    )
    output = Flag(
        "--output",
        None,
        "the best model; the rest of the run goes into a folder of this name without its suffix; "
        "an earlier run there is kept as NAME.1 (NAME.finetuned.pt for --save NAME.pt, if not "
        "given)",
        save_path,
        "FILE",
    )
    resume = replace(
        _MAIN["resume"],
        help="continue a run exactly; auto: the run at --output if it started from --save as it "
        "is now, else start one; PATH: a run's last.pt, folder or best model",
    )
    ours = dict(save=(save, output), resume=(resume,))
    return {
        title: tuple(
            flag for old in flags if old.dest not in SETTLED for flag in ours.get(old.dest, (old,))
        )
        for title, flags in TRAINING.items()
    }


FINETUNING = _finetuning()


def parse_finetuning(argv: Sequence[str]) -> tuple[argparse.Namespace, set[str], str | None]:
    """Parse finetune.py's command line.

    Returns:
        main.py's flags for the new run, whose `save` is --output; the names of those that were
        given; and --save, the model to start from, None if not given.

    Raises:
        UsageError: an invalid flag or value.
    """
    args, given = finetuning_parser().parse(argv)
    check_bounds(args)
    start, output = args.save, args.output
    if start is None and args.resume in (None, "auto"):
        raise UsageError("argument --save: is needed, the model to start from")
    if start is not None:
        start = start if Path(start).name else str(Path.cwd())  # "." has no name
        output = output or _default_output(Path(start))
        _check_apart(start, output)
    flags = {**defaults(TRAINING), **vars(args), "save": output}
    names = {dict(save="", output="save").get(name, name) for name in given} - {""}
    return argparse.Namespace(**{name: flags[name] for name in _MAIN}), names, start


def finetuning_parser() -> Parser:
    """The parser of finetune.py."""
    description = (
        "Train a model further by averaged SGD until validation stops improving, then test it. "
        "Flags that are not given are those of the model's own run; the defaults below hold where "
        "that run is not there."
    )
    return training_parser(FINETUNING, "finetune.py", description)


def _default_output(start: Path) -> str:
    return str(start.with_name(f"{start.name.removesuffix('.pt')}.finetuned.pt"))


def _check_apart(start: str, output: str) -> None:
    """Refuse an --output whose files are those of the run that --save names."""
    source, model = (Path(os.path.realpath(path)) for path in (start, output))
    folder = model.with_suffix("")
    if source.with_suffix("") in (folder, model) or source.is_relative_to(folder):  # model: .e25
        raise UsageError(
            f"argument --output: {output} would replace the run of --save {start}, which is only "
            "read; give another name"
        )


def taken_over(saved: Mapping[str, Any], given: Collection[str]) -> list[str]:
    """The part of a command line that repeats the flags of the run that is fine-tuned.

    Left out are the flags that finetune.py lacks or that are of the run's own files and schedule,
    --lr unless it is one of SGD, and what follows from, or goes with, a flag that is given.

    Args:
        saved: the run's flags.
        given: names of the flags that are given.
    """
    known = {**defaults(TRAINING), **saved}
    left_out = set(NOT_TAKEN_OVER)
    if known["optimizer"] != "sgd":
        left_out.add("lr")
    words: list[str] = []
    for name, flag in by_name(FINETUNING).items():
        value = saved.get(name)
        follows = fill_in({**known, name: None})[name] == value
        owner = flag.belongs_to[0] if flag.belongs_to else ""
        if follows or value is False or flag.per_session or name in left_out or owner in given:
            continue
        values = value if isinstance(value, list) else [value]
        words += [dashed(name), *([] if value is True else map(str, values))]
    return words


def unknown_flags(saved: Mapping[str, Any]) -> list[str]:
    """Spellings of a saved run's flags that this version does not have."""
    return sorted(dashed(name) for name in saved.keys() - _MAIN.keys() - RETIRED.keys())
