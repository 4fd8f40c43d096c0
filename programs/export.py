"""Write a model as a folder that other programs can read: python export.py PTB.pt --output ptb"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from data.corpus import EOS, Vocabulary, load_corpus
from data.download import ensure_corpus
from engine.checkpoint import load_model, model_details, model_payload
from engine.device import use_threads
from engine.errors import RunError
from engine.model_folder import write_model_folder
from engine.original import read_original
from engine.tracking import warn
from flags.export import parse_export
from model import RNNModel, count_parameters


def run(argv: Sequence[str]) -> None:
    """Run the program.

    Raises:
        UsageError, RunError, DataError: errors that a user can cause; see engine.program.
    """
    args = parse_export(argv)
    use_threads(args.threads)
    path, folder = Path(args.model), Path(args.output)
    if args.from_original:
        model, vocabulary = import_model(path, args)
        payload = model_payload(model, vocabulary)
    else:
        model, vocabulary = load_model(path)
        payload = model_payload(model, vocabulary, **model_details(path))
    write_model_folder(folder, payload)
    print(f"| {folder} | {count_parameters(model):,} parameters | {len(vocabulary):,} words")


def import_model(path: Path, args: argparse.Namespace) -> tuple[RNNModel, Vocabulary]:
    """Read a model of the original and the words of its embeddings.

    Raises:
        RunError: another number of words than embeddings, or see read_original.
        DataError: a corpus or vocabulary that cannot be read.
    """
    if args.trust_pickle:
        warn(f"{path}: a pickle can be made to run any program; its author has to be trusted")
    dropouts = ("dropout", "dropouth", "dropouti", "dropoute", "wdrop")
    model = read_original(path, args.trust_pickle, **{name: vars(args)[name] for name in dropouts})
    vocabulary = read_vocabulary(args.data, args.vocab)
    if EOS not in vocabulary:
        raise RunError(f"{args.vocab}: has no {EOS}, which every vocabulary of the original has")
    if len(vocabulary) != model.ntoken:
        raise RunError(
            f"{path}: {model.ntoken:,} embeddings, but {args.vocab or args.data} has "
            f"{len(vocabulary):,} words"
        )
    return model, vocabulary


def read_vocabulary(data: str | None, file: str | None) -> Vocabulary:
    """The words of a corpus, numbered as by the original, or of a file with a word a line."""
    if data is not None:
        ensure_corpus(data)
        return load_corpus(data).vocabulary
    assert file is not None
    try:
        return Vocabulary(Path(file).read_bytes().decode("utf-8-sig").splitlines())
    except ValueError as error:
        raise RunError(f"{file}: not a vocabulary: {error}") from None
