"""export.py's flags."""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from engine.errors import UsageError
from flags.flag import Flag, Sections, by_name, dashed
from flags.parser import Parser
from flags.training import TRAINING

_SHARED = by_name(TRAINING)

EXPORT: Sections = {
    "": (
        Flag("model", None, "a model that main.py saved, or an exported folder", metavar="MODEL"),
        Flag("--output", None, "folder to make; it must not exist", metavar="FOLDER"),
        _SHARED["threads"],
    ),
    "models of the original (salesforce/awd-lstm-lm)": (
        Flag(
            "--from-original",
            False,
            "MODEL is a state dict of the original's RNNModel (LSTM or GRU)",
        ),
        Flag(
            "--trust-pickle",
            False,
            "MODEL is a whole pickled model or checkpoint of the original. A pickle names the "
            "functions to call while it is read, and can so run any program. Here only torch's "
            "functions that rebuild tensors are called, and stand-ins replace everything else; "
            "still, give this only for a file whose author you trust",
        ),
        replace(_SHARED["data"], default=None, help="corpus whose words number the embeddings"),
        Flag("--vocab", None, "the words instead, one a line; the first has id 0", metavar="FILE"),
        *(
            replace(_SHARED[name], help=f"{_SHARED[name].help}; kept for further training")
            for name in ("dropout", "dropouth", "dropouti", "dropoute", "wdrop")
        ),
    ),
}


def parse_export(argv: Sequence[str]) -> argparse.Namespace:
    """Parse export.py's command line.

    Raises:
        UsageError: an invalid flag or value.
    """
    description = "Write a model as a folder: safetensors, config.json, vocab.txt, README.md."
    args, given = Parser(EXPORT, prog="export.py", description=description).parse(argv)
    if args.output is None:
        raise UsageError("argument --output: is missing; it names the folder to make")
    if args.from_original and (args.data is None) == (args.vocab is None):
        raise UsageError("argument --from-original: needs the vocabulary, by --data or --vocab")
    for name in sorted(given - {"model", "output", "threads"}):
        if not args.from_original:
            raise UsageError(f"argument {dashed(name)}: goes with --from-original only")
    return args
