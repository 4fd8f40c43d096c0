"""Sample text from a model: python generate.py PTB.pt --prompt "the price of" --words 50"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from data.corpus import EOS, UNK, Vocabulary
from data.errors import DataError
from data.files import atomic_write
from data.text import encode_words
from engine.checkpoint import load_model
from engine.device import select_device, use_threads
from engine.errors import RunError, UsageError
from engine.tracking import warn
from evaluation.cache import Cache
from evaluation.plain import Plain
from evaluation.predictor import Predictor
from evaluation.sampling import Shape, sample_words
from flags.generation import parse_generation


def run(argv: Sequence[str]) -> None:
    """Run the program.

    Raises:
        UsageError, RunError, DataError: errors that a user can cause; see engine.program.
    """
    args = parse_generation(argv)
    use_threads(args.threads)
    model, vocabulary = load_model(args.checkpoint, select_device(args.device))
    predictor: Predictor = Plain(model)
    if args.cache:
        predictor = Cache(predictor, args.window, args.theta, args.lambdasm)
    shape = Shape(args.temperature, args.top_k, args.top_p)
    ids = read_prompt(args.prompt, vocabulary)
    sampled = limited(sample_words(predictor, vocabulary, args.seed, ids, shape), args)
    text = lines(chain(args.prompt.split(), sampled))
    try:
        write(text, args.outf)
    except ValueError as error:
        raise RunError(f"{args.checkpoint}: {error}") from None


def read_prompt(prompt: str, vocabulary: Vocabulary) -> list[int]:
    """The ids of a prompt; words that the vocabulary lacks are named in a warning.

    Raises:
        UsageError: the vocabulary has none of its words, or lacks a word and has no <unk>.
    """
    words = prompt.split()
    try:
        text = encode_words(words, vocabulary)
    except DataError as error:
        raise UsageError(f"argument --prompt: {error}") from None
    unknown = ", ".join(repr(word) for word in dict.fromkeys(words) if word not in vocabulary)
    if unknown and text.unknown == len(words):
        raise UsageError(f"argument --prompt: the vocabulary lacks all of its words: {unknown}")
    if unknown:
        warn(f"--prompt: the vocabulary lacks {unknown}, read as {UNK}")
    return [int(id_) for id_ in text.ids]


def limited(words: Iterator[str], args: argparse.Namespace) -> Iterator[str]:
    """Words until --words of them, or --sentences ends of sentences, have come."""
    count = sentences = 0
    for word in words:
        yield word
        count, sentences = count + (word != EOS), sentences + (word == EOS)
        if args.outf and word != EOS and count % args.log_interval == 0:
            print(f"| Generated {count}/{args.words} words", file=sys.stderr)
        if args.words == count or args.sentences == sentences:
            return


def lines(words: Iterable[str]) -> Iterator[str]:
    """The lines of a text; an <eos> ends one."""
    line: list[str] = []
    for word in words:
        if word == EOS:
            yield " ".join(line)
            line = []
        else:
            line.append(word)
    if line:
        yield " ".join(line)


def write(text: Iterable[str], path: str | None) -> None:
    """Print lines as they come, or write them to a file, complete or not at all."""
    if path is None:
        for line in text:
            print(line, flush=True)
        return
    with atomic_write(path, "w") as file:
        file.writelines(f"{line}\n" for line in text)
