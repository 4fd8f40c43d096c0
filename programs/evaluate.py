"""Measure the perplexity of a text under a trained model: python evaluate.py PTB.pt"""

import argparse
import math
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from data.corpus import EOS
from data.download import ensure_corpus
from data.files import atomic_write
from data.text import Text, read_text
from engine.checkpoint import load_model
from engine.device import keep_freed_memory, select_device, use_threads
from engine.errors import RunError, UsageError
from engine.history import corpus_of_run
from engine.launch import local_rank
from engine.metrics_file import to_json
from engine.progress import Progress
from engine.report import DOUBLE_RULE, loss_figures
from engine.tracking import warn
from evaluation.cache import Cache, cache_losses
from evaluation.dynamic import Dynamic, root_mean_squares
from evaluation.evaluate import evaluate, in_text_order, perplexity, read
from evaluation.plain import Plain
from evaluation.predictor import Mean, Predictor, Temperature
from flags.evaluation import parse_evaluation
from model import RNNModel

Settings = dict[str, float]  # lr, lamb, theta and lambdasm
LISTED = 10  # pairs of the cache's search that are printed, the best first


def run(argv: Sequence[str]) -> None:
    """Run the program.

    Raises:
        UsageError, RunError, DataError: errors that a user can cause; see engine.program.
    """
    measure(parse_evaluation(argv))


def measure(args: argparse.Namespace, title: str = "") -> None:
    """Evaluate; print the loss after the title, and write the files that flags ask for."""
    started = time.monotonic()
    for file in filter(None, (args.per_word, args.by_line, args.summary)):  # before the work
        if Path(file).is_dir() or not Path(file).absolute().parent.is_dir():
            raise RunError(f"{file}: cannot write: it is a folder, or its folder is not there")
    device = select_device(args.device, local_rank())
    use_threads(args.threads)
    if device.type == "cpu":
        keep_freed_memory()
    model, vocabulary = load_model(args.model, device)
    only_text = args.text and not args.search and args.dynamic != "rms"
    folder = Path() if only_text else find_corpus(args)
    if args.text:
        text, name = read_text(args.text, vocabulary, before=EOS), " ".join(args.text)
    else:
        text = read_text(folder / f"{args.split}.txt", vocabulary)
        name = f"{folder} {args.split}"
    columns = args.eval_batch_size or default_columns(args)
    predictions = len(text.ids) - 1
    if predictions < columns:
        raise UsageError(f"argument --eval-batch-size: {name} has {predictions} predictions only")
    if text.unknown:
        share = text.unknown / predictions
        warn(f"{name}: {text.unknown:,} words ({share:.1%}) are not in the model's vocabulary")
    if args.cache and args.window > predictions:
        warn(f"--window {args.window} is longer than {name}; the cache holds all of it")
    roots = None
    if args.dynamic == "rms":
        roots = statistics(args, model, read_text(folder / "train.txt", vocabulary).ids)
    settings = {key: getattr(args, key)[0] for key in used(args)}
    if args.search:
        settings = search(args, model, roots, read_text(folder / "valid.txt", vocabulary).ids)
    print(f"| {args.model} | {name} | {predictions:,} predictions | {device}", file=sys.stderr)
    scores, ranks = score(build(args, model, roots, settings), text.ids, columns, args.per_word)
    loss = -float(scores.mean())
    if args.per_word:
        write_lines(args.per_word, per_word(text, scores, ranks))
    if args.by_line:
        write_lines(args.by_line, by_line(text.lines()[1:] - int(bool(args.text)), scores))
    kind = "text" if args.text else args.split
    print(DOUBLE_RULE)
    print(f"{title}| {loss_figures(f'{kind} ', loss)}", flush=True)
    if args.summary:
        figures = dict(loss=loss, ppl=perplexity(loss), bpc=loss / math.log(2))
        options = {key: getattr(args, key) for key in ("cache", "dynamic", "temperature", "mc")}
        told = dict(model=args.model, text=name, predictions=predictions, unknown=text.unknown)
        told |= dict(figures, columns=columns, **options, **settings)
        more = ["window"] * args.cache + ["bptt"] * bool(args.dynamic) + ["seed"] * bool(args.mc)
        more += ["epsilon", "batch_size", "max_batches"] * (args.dynamic == "rms")
        told |= {name: getattr(args, name) for name in more}
        told |= dict(seconds=time.monotonic() - started)
        write_lines(args.summary, [to_json(told).decode().rstrip()])


def find_corpus(args: argparse.Namespace) -> Path:
    """The folder of the corpus, downloaded if it is missing.

    Raises:
        UsageError: no corpus was given, and the model's run does not name one.
    """
    data = args.data or corpus_of_run(args.model)
    if data is None:
        raise UsageError(
            f"argument --data: which corpus? {args.model} names none (--text takes any text)"
        )
    ensure_corpus(data)
    return Path(data)


def default_columns(args: argparse.Namespace) -> int:
    """As main.py divides the text, if the columns' own predictions are those of one column."""
    one = args.cache or args.dynamic or args.text or args.per_word or args.by_line
    return 10 if args.split == "valid" and not one else 1


def used(args: argparse.Namespace) -> list[str]:
    """The names of the settings in use."""
    return ["lr", "lamb"] * bool(args.dynamic) + ["theta", "lambdasm"] * args.cache


def build(
    args: argparse.Namespace, model: RNNModel, roots: list[Tensor] | None, settings: Settings
) -> Predictor:
    """The predictor: dropout masks inside dynamic evaluation, temperature and cache around it."""

    def network(masks: int | None) -> Predictor:
        if not args.dynamic:
            return Plain(model, masks)
        lr, lamb = settings["lr"], settings["lamb"]
        return Dynamic(model, lr, lamb, args.bptt, roots, args.epsilon, masks)

    predictor = network(None)
    if args.mc:
        predictor = Mean([network(args.seed + k) for k in range(args.mc)])
    if args.temperature != 1:
        predictor = Temperature(predictor, args.temperature)
    if "theta" in settings:
        predictor = Cache(predictor, args.window, settings["theta"], settings["lambdasm"])
    return predictor


def statistics(args: argparse.Namespace, model: RNNModel, train: Tensor) -> list[Tensor]:
    """The root mean squares of the gradients over the training text."""
    most = len(train) // args.batch_size // args.bptt
    with Progress(min(most, args.max_batches or most), description="gradients") as progress:
        try:
            return root_mean_squares(
                model, train, args.batch_size, args.bptt, args.max_batches, progress.update
            )
        except ValueError as error:
            raise RunError(f"training text: {error}") from None


def search(
    args: argparse.Namespace, model: RNNModel, roots: list[Tensor] | None, valid: Tensor
) -> Settings:
    """The settings of the smallest validation loss: first --lr and --lamb, then the cache's."""
    best: Settings = {}
    loss = math.inf
    rates = [dict(lr=lr, lamb=lamb) for lr, lamb in product(args.lr or [], args.lamb)]
    if args.dynamic and args.cache and len(rates) == 1:
        best = rates[0]  # nothing to choose from
    elif args.dynamic:
        part = valid[: (args.search_tokens or len(valid) - 1) + 1]
        for settings in rates:
            found = evaluate(build(args, model, roots, settings), part, 1)
            report(settings, found)
            if not best or found < loss or math.isnan(loss):
                best, loss = settings, found
    if args.cache:
        base = build(args, model, roots, best)
        with Progress(len(valid) - 1, description="search") as progress:
            losses = cache_losses(
                base, valid, args.window, args.theta, args.lambdasm, progress.update
            )
        pairs = [dict(theta=t, lambdasm=share) for t, share in product(args.theta, args.lambdasm)]
        ordered, places = losses.flatten().sort()  # nan comes last
        for value, place in zip(ordered[:LISTED].tolist(), places.tolist(), strict=False):
            report(pairs[place], value)
        if len(pairs) > LISTED:
            print(f"| and {len(pairs) - LISTED} pairs with larger ones", file=sys.stderr)
        loss = float(ordered[0])
        best |= pairs[int(places[0])]
    for name, value in best.items():
        values = sorted(getattr(args, name))
        if len(values) > 1 and value in (values[0], values[-1]):
            warn(f"--{name} {value:g} is at the edge of the values searched; give more beyond it")
    print(f"| best on the validation text: {as_flags(best)} | valid ppl {perplexity(loss):8.2f}")
    return best


def report(settings: Settings, loss: float) -> None:
    """Print a line of the search."""
    print(f"| {as_flags(settings)} | valid ppl {perplexity(loss):8.2f}", file=sys.stderr)


def as_flags(settings: Settings) -> str:
    """Settings as written on the command line."""
    return " ".join(f"--{name} {value:g}" for name, value in settings.items())


def score(
    predictor: Predictor, ids: Tensor, columns: int, with_ranks: object
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all words but the first, and their ranks if asked for, (N - 1,)."""
    scores, ranks = [], []
    predictions = len(ids) - 1
    with Progress(-(-predictions // columns), description="evaluate") as progress:
        for prediction, targets in read(predictor, ids, columns):
            scores.append(prediction.score(targets).double().view(-1, columns))
            if with_ranks:
                ranks.append(prediction.ranks(targets).view(-1, columns))
            progress.update(len(scores[-1]))
    found = torch.cat(ranks) if ranks else torch.zeros(0, columns)
    both = in_text_order(torch.cat(scores), predictions), in_text_order(found, predictions)
    return both[0].cpu(), both[1].cpu()  # they are written one by one


def per_word(text: Text, scores: Tensor, ranks: Tensor) -> Iterable[str]:
    """The lines of --per-word."""
    yield "word\tlog_probability\trank"
    for number, value, rank in zip(text.numbers[1:], scores, ranks, strict=True):
        yield f"{text.words[int(number)]}\t{float(value):.6f}\t{int(rank)}"


def by_line(numbers: Tensor, scores: Tensor) -> Iterable[str]:
    """The lines of --by-line, for the words' line numbers and log-probabilities, (N - 1,)."""
    yield "line\twords\tloss\tppl"
    words = numbers.bincount()
    losses = -torch.zeros(len(words), dtype=scores.dtype).index_add_(0, numbers, scores)
    for line in words.nonzero()[:, 0].tolist():
        mean = float(losses[line] / words[line])
        yield f"{line + 1}\t{int(words[line])}\t{mean:.6f}\t{perplexity(mean):.2f}"


def write_lines(path: str, lines: Iterable[str]) -> None:
    """Write a text file, whole or not at all, and name it on stderr.

    Raises:
        WriteError: it cannot be written.
    """
    with atomic_write(path, "w") as file:
        file.writelines(f"{line}\n" for line in lines)
    print(f"| {path}", file=sys.stderr)
