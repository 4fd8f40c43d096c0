"""Fine-tune a model that main.py saved, then test it: python finetune.py --save PTB.pt

Merity et al. 2017 (arXiv:1708.02182), section 5: averaged SGD from the first step on, until
NT-ASGD's trigger fires. All else is main.py's.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.checkpoint import damage_reported
from engine.errors import RunError, UsageError
from engine.launch import is_follower
from engine.origin import Origin, read_origin
from engine.tracking import warn
from evaluation.evaluate import perplexity
from flags.finetuning import parse_finetuning, taken_over, unknown_flags
from flags.flag import dashed, plain
from flags.training import TRAINING
from model import RNNModel
from programs.train import find_state, launch, resumed


def run(argv: Sequence[str]) -> None:
    """Run the program.

    Raises:
        UsageError, RunError, DataError: errors that a user can cause; see engine.program.
    """
    args, given, start = parse_finetuning(argv)
    origin = None if start is None else read_origin(start)
    asked, state = args.resume, find_state(args)
    if state is not None and "origin" not in state:
        raise RunError(f"{args.resume}: a run of main.py, whose --resume continues it")
    if origin is not None and state is not None:
        with damage_reported(Path(args.resume)):
            same = origin.is_origin_of(state)
        if not same and asked != "auto":
            raise UsageError(f"argument --save: {args.resume} started from another model")
        if not same:  # it makes room
            args.resume = state = None
    if state is not None:
        launch(resumed(args, given, state), argv, state)
        return
    assert origin is not None
    resume = args.resume
    args, note = settle(argv, args, given, origin)
    args.resume = resume
    launch(args, argv, None, replace(origin, note=note))


def settle(
    argv: Sequence[str], args: argparse.Namespace, given: set[str], origin: Origin
) -> tuple[argparse.Namespace, str]:
    """The flags of a new run: sizes from the model, what is given, the rest from the model's run.

    Without that run's config.json, dropouts are the model's, too, and the rest has its defaults.

    Returns:
        The flags, and where they are from, in words.

    Raises:
        UsageError: a size is given that is not the model's.
        RunError: config.json is damaged.
    """
    model = model_flags(origin.model)
    sizes = {flag.dest: model[flag.dest] for flag in TRAINING["model"] if flag.dest in model}
    for name, size in sizes.items():
        if name in given and getattr(args, name) != size:
            asked = plain(getattr(args, name))
            raise UsageError(
                f"argument {dashed(name)}: {asked}, where {origin.path} has {plain(size)}"
            )
    config = origin.path.with_suffix("") / "config.json"
    saved = {} if origin.path.is_dir() else read_flags(config)  # an exported one has no run
    try:
        words = taken_over({**model, **saved, **sizes}, given)
        parse_finetuning([*words, "--save", str(origin.path)])
    except UsageError as error:
        raise RunError(f"{config}: {error}") from None
    if not is_follower():
        for name in unknown_flags(saved):
            warn(f"{config}: {name}, which this version does not have, is left out")
    return parse_finetuning([*words, *argv])[0], describe(origin, config, saved)


def model_flags(model: RNNModel) -> dict[str, Any]:
    """The flags that build such a model: the inverse of assembly.build_model."""
    config = model.config()
    flags = dict(
        model=config.pop("rnn_type"),
        emsize=config.pop("ninp"),
        untied=not config.pop("tie_weights"),
    )
    own = [config.pop(f"{part}_options") or {} for part in ("layer", "decoder")]
    del config["ntoken"]
    return {**config, **flags, **own[0], **own[1]}


def read_flags(config: Path) -> dict[str, Any]:
    """The flags in a run's config.json; empty if there is no such file.

    Raises:
        RunError: the file cannot be read or has no flags.
    """
    try:
        flags = json.loads(config.read_text(encoding="utf-8"))["flags"]
    except (FileNotFoundError, NotADirectoryError):  # the latter for PTB.pt.e25, a copy of --when
        return {}
    except OSError as error:
        raise RunError(f"{config}: cannot read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        flags = None
    if not isinstance(flags, dict):
        raise RunError(f"{config}: not the configuration of a run")
    return flags


def describe(origin: Origin, config: Path, saved: dict[str, Any]) -> str:
    """Where training starts, and where the flags that are not given are from."""
    rest = f"those of its run ({config})"
    if not saved:
        missing = f"{config} is not there"
        if origin.path.is_dir():
            missing = "an exported model has no flags of its run"
        rest = f"their defaults ({missing}), dropouts the model's"
    elif saved.get("optimizer", "sgd") != "sgd":
        rest += f", except --lr, which was for {saved['optimizer']}"
    where, details = str(origin.path), origin.details
    if "epoch" in details:  # an imported model has none
        where += f": epoch {details['epoch']}"
    if details.get("valid_loss") is not None:
        where += f", valid ppl {perplexity(details['valid_loss']):.2f}"
    return f"| from {where} | flags that are not given: {rest}"
