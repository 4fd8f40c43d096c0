"""prepare.py's flags."""

import argparse
from collections.abc import Sequence

from engine.errors import UsageError
from flags.flag import Flag, Sections, by_name
from flags.parser import Parser
from flags.training import TRAINING
from flags.values import positive_int, shares, vocabulary_size

PREPARATION: Sections = {
    "": (
        Flag(
            "texts",
            None,
            "texts in UTF-8, taken in this order; a folder stands for the .txt files in and below "
            "it, by name",
            metavar="FILE",
            nargs="+",
        ),
        Flag(
            "--output",
            None,
            "folder for train.txt, valid.txt, test.txt and prepare.json, such as data/mine; "
            "nothing is overwritten",
            metavar="FOLDER",
        ),
        by_name(TRAINING)["threads"],
    ),
    "parts": (
        Flag(
            "--split",
            None,
            "shares of train, valid and test in the text's bytes, in this order, cut at a line's "
            "end (0.9,0.05,0.05, if not given)",
            shares,
            "SHARES",
        ),
        Flag(
            "--by-document",
            False,
            "each file goes into one part: the last ones into test, those before into valid, as "
            "many as come nearest to the shares",
        ),
    ),
    "words": (
        Flag(
            "--tokenizer",
            "words",
            "whitespace: split at spaces; words: punctuation apart (but not in "
            "well-known, 1,000.5 and 10:30), it's as it 's",
            choices=("whitespace", "words"),
        ),
        Flag("--lowercase", False, "put the text into lower case"),
        Flag(
            "--min-count",
            2,
            "a word that the training text has less often becomes <unk>, in all parts",
            positive_int,
        ),
        Flag(
            "--vocab-size",
            None,
            "most words of the vocabulary, with <unk> and <eos>: the most frequent ones of the "
            "training text (all that --min-count leaves, if not given)",
            vocabulary_size,
        ),
    ),
}


def preparation_parser() -> Parser:
    """The parser of prepare.py."""
    return Parser(
        PREPARATION,
        prog="prepare.py",
        description="Make a corpus for main.py --data of texts of your own.",
    )


def parse_preparation(argv: Sequence[str]) -> argparse.Namespace:
    """Parse prepare.py's command line.

    Raises:
        UsageError: an invalid flag or value, or no --output.
    """
    args, _ = preparation_parser().parse(argv)
    if args.output is None:
        raise UsageError("argument --output: give a folder for the corpus, such as data/mine")
    args.split = args.split or [0.9, 0.05, 0.05]
    return args
