"""Measure how gradients flow back through time: python diagnose.py PTB.pt"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assembly import build_penalties
from data.corpus import Corpus, batchify, load_corpus
from data.download import ensure_corpus
from data.files import atomic_write
from diagnostics import plots, summary
from diagnostics.examine import Settings, examine
from engine.checkpoint import check_vocabulary, load_model
from engine.device import select_device, use_threads
from engine.errors import RunError, UsageError
from engine.history import corpus_of_run, flags_of_run
from engine.launch import local_rank
from engine.tracking import warn
from flags.diagnosis import TRAINED, parse_diagnosis
from flags.flag import defaults
from flags.training import TRAINING
from layers.lstm import LSTM
from model import RNNModel, count_parameters
from pictures.canvas import FORMATS, write_figure


def run(argv: Sequence[str]) -> None:
    """Run the program.

    Raises:
        UsageError, RunError, DataError: errors that a user can cause; see engine.program.
    """
    args = parse_diagnosis(argv)
    device = select_device(args.device, local_rank())
    use_threads(args.threads)
    paths = [Path(path) for path in args.compare or [args.model]]
    paths = [path if path.name else path.absolute() for path in paths]  # "." has no name
    args.data = args.data or own_corpus(paths[0])
    ensure_corpus(args.data)
    corpus = load_corpus(args.data)
    models = [read_model(path, corpus, args.data) for path in paths]
    if args.fresh:
        models[-1] = fresh(models[-1], args.seed)
    trained = settle_objective(args, paths[0])
    settings = settings_of(args)
    rows = read_rows(corpus, args, settings).to(device).long()
    folder = make_folder(args.output or default_folder(paths, args.fresh))
    told = dict(asdict(settings), data=args.data, split=args.split, sequences=args.batch_size)
    told |= dict(alpha=args.alpha, beta=args.beta, samples=args.batch_size * settings.positions)
    diagnosis: dict[str, Any] = dict(settings=told, models=[])
    for name, path, model in zip(names_of(paths, args.fresh), paths, models, strict=True):
        print(f"| {name} | {count_parameters(model):,} parameters | {device}", file=sys.stderr)
        try:
            figures = examine(model.to(device), rows, settings, build_penalties(trained), say)
        except OverflowError as error:
            raise RunError(f"{path}: {error}") from None
        found = summary.findings(figures, told)
        diagnosis["models"].append(
            dict(name=name, config=model.config(), findings=found, figures=figures)
        )
    if len(models) == 2:
        diagnosis["comparison"] = summary.comparison(diagnosis["models"])
    write(folder, diagnosis, FORMATS[args.format])


def settle_objective(args: argparse.Namespace, model: Path) -> argparse.Namespace:
    """Set the flags of TRAINED that were not given to those of a model's run, in place.

    Returns:
        All flags of the run, with those; main.py's defaults without the run's config.json.
    """
    known = defaults(TRAINING)
    known |= {name: value for name, value in flags_of_run(model).items() if name in known}
    for name in TRAINED:
        if getattr(args, name) is None:
            setattr(args, name, known[name])
        known[name] = getattr(args, name)
    return argparse.Namespace(**known)


def own_corpus(path: Path) -> str:
    """The corpus of the run that saved a model; prints it.

    Raises:
        UsageError: the run is not there, so --data is needed.
    """
    data = corpus_of_run(path)
    if data is None:
        load_model(path)  # a file that is no model is told so
        raise UsageError(f"argument --data: which corpus? {path} names none")
    print(f"| {path} was trained on {data}", file=sys.stderr)
    return data


def read_model(path: Path, corpus: Corpus, data: str) -> RNNModel:
    """Load a model and check that it can be diagnosed on the corpus.

    Raises:
        RunError: another vocabulary, layers other than LSTM, or weights that are not finite.
    """
    model, vocabulary = load_model(path)
    check_vocabulary(path, vocabulary, data, corpus)
    if any(type(layer) is not LSTM for layer in model.layers):
        kind = type(model.layers[0]).__name__
        raise RunError(
            f"{path}: its layers are {kind}; diagnose.py knows the gates of an LSTM only"
        )
    if not all(p.isfinite().all() for p in model.parameters()):
        raise RunError(f"{path}: its weights are not finite")
    return model


def fresh(model: RNNModel, seed: int) -> RNNModel:
    """A new model of the same configuration, initialised as by main.py with this seed."""
    torch.manual_seed(seed)
    return RNNModel(**model.config())


def names_of(paths: list[Path], fresh: bool) -> list[str]:
    """The models' names: file names, or paths if the file names are equal."""
    names = [path.name.removesuffix(".pt") for path in paths]
    if len(set(names)) < len(names) and not fresh:
        names = [str(path) for path in paths]
    return [*names[:-1], f"{names[-1]} (fresh)"] if fresh else names


def default_folder(paths: list[Path], fresh: bool) -> Path:
    """The folder NAME-diagnosis beside the first model."""
    own = [path.name.removesuffix(".pt") for path in paths]
    names = [*own, *["fresh"] * fresh, "diagnosis"]
    return paths[0].with_name("-".join(names))


def make_folder(path: str | Path) -> Path:
    """Create the folder if missing, and check that it can be written to."""
    path = Path(path)
    try:
        path.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise RunError(f"{path}: cannot write there: {error.strerror or error}") from None
    return path


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings of the diagnosis, from the flags."""
    values = {field.name: getattr(args, field.name) for field in fields(Settings)}
    return Settings(**dict(values, thresholds=tuple(sorted(set(args.thresholds)))))


def read_rows(corpus: Corpus, args: argparse.Namespace, settings: Settings) -> Tensor:
    """The first rows of the batchified text, (rows, B), as many as the diagnosis needs."""
    ids: Tensor = getattr(corpus, args.split)
    needed = settings.rows * args.batch_size
    if len(ids) < needed:
        raise RunError(
            f"{Path(args.data) / args.split}.txt: {len(ids)} tokens are too few, {needed} are "
            "needed; fewer of --batch-size, --lags, --positions, --windows or --bptt need less"
        )
    return batchify(ids, args.batch_size)[: settings.rows]


def say(what: str) -> None:
    """Print progress to stderr."""
    print(f"|   {what}", file=sys.stderr, flush=True)


def write(folder: Path, diagnosis: dict[str, Any], formats: Sequence[str]) -> None:
    """Write figures, page and plots; print the findings."""
    text = json.dumps(diagnosis, indent=1, allow_nan=False)
    # Put each list of numbers on one line.
    text = re.sub(r"\[[^][{}\"]*\]", lambda found: " ".join(found[0].split()), text)
    try:
        pictures = plots.draw(diagnosis)
    except ImportError as error:
        warn(f"plots are left out: {error}")
        pictures = {}
    shown = {f"{name}.{formats[0]}": caption for name, (caption, _) in pictures.items()}
    files = {
        "diagnosis.json": f"{text}\n",
        "summary.md": summary.markdown(diagnosis, shown),
    }
    paths = [folder / name for name in files]
    for name, (_, figure) in pictures.items():
        paths += write_figure(figure, folder / name, formats)
    for name, content in files.items():
        with atomic_write(folder / name, "w") as file:
            file.write(content)
    for model in diagnosis["models"]:
        print(f"{model['name']}:", *model["findings"], sep="\n- ")
    if "comparison" in diagnosis:
        print("Side by side:", *diagnosis["comparison"], sep="\n- ")
    print(f"| {folder}: {', '.join(path.name for path in paths)}")
