"""evaluate.py's flags, and pointer.py's."""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from engine.errors import UsageError
from flags.flag import Flag, Sections, by_name
from flags.parser import Parser
from flags.training import TRAINING
from flags.values import natural, non_negative, positive, positive_int, refused_cuda, share

_SHARED = by_name(TRAINING)


WINDOW = Flag("--window", 500, "words that the cache looks back on", positive_int)
THETA = Flag(
    "--theta",
    [1.0],
    "flatness of the cache's distribution; 0: all entries count the same",
    non_negative,
    "X",
    nargs="+",
)
LAMBDA = Flag("--lambdasm", [0.1], "the cache's share of the mixture", share, "X", nargs="+")

EVALUATION: Sections = {
    "": (
        Flag("model", None, "a model that main.py saved, or an exported folder", metavar="MODEL"),
    ),
    "text": (
        replace(
            _SHARED["data"],
            default=None,
            help="corpus: the text of --split is evaluated, --search takes its validation text "
            "and --dynamic rms its training text (the one that the model was trained on, if "
            "neither this nor --text is given)",
        ),
        Flag("--split", "test", "text of the corpus", choices=("train", "valid", "test")),
        Flag(
            "--text",
            None,
            "texts to evaluate instead, in this order, as one text after an <eos>; -: standard "
            "input",
            metavar="FILE",
            nargs="+",
        ),
        Flag(
            "--eval-batch-size",
            None,
            "columns that the text is divided into (as main.py divides it: 10 for valid, else 1; "
            "with --cache, --dynamic, --text, --per-word or --by-line always 1, if not given)",
            positive_int,
        ),
    ),
    "continuous cache (Grave et al. 2016)": (
        Flag("--cache", False, "mix the predictions with a cache of the words before"),
        WINDOW,
        THETA,
        LAMBDA,
    ),
    "dynamic evaluation (Krause et al. 2017)": (
        Flag("--dynamic", None, "learn from each segment of the text", choices=("sgd", "rms")),
        Flag(
            "--lr",
            None,
            "learning rate (5e-5 for rms, 0.1 for sgd, if not given)",
            non_negative,
            "X",
            nargs="+",
        ),
        Flag("--lamb", [0.002], "decay towards the trained weights", non_negative, "X", nargs="+"),
        Flag("--epsilon", 2e-5, "rms: added to the root mean square", positive, "X"),
        Flag("--bptt", 5, "time steps of a segment", positive_int),
        Flag("--batch_size", 100, "rms: columns of the training text", positive_int),
        Flag(
            "--max_batches", None, "rms: segments of it at most (all, if not given)", positive_int
        ),
    ),
    "other predictions": (
        Flag("--temperature", 1.0, "of the model's distribution", positive, "X"),
        Flag("--mc", 0, "MC dropout: mean of K networks with masks; 0: no dropout", natural, "K"),
        replace(_SHARED["seed"], help="of MC dropout's masks"),
    ),
    "search": (
        Flag(
            "--search",
            False,
            "choose --lr and --lamb, then --theta and --lambdasm, by the validation text; from the "
            "values given, or from a grid for a flag that is not given",
        ),
        Flag(
            "--search-tokens",
            None,
            "words of the validation text to search --lr and --lamb on (all, if not given)",
            positive_int,
        ),
    ),
    "results": (
        Flag(
            "--per-word",
            None,
            "write a line for each word: word, log-probability (nats), rank",
            metavar="FILE",
        ),
        Flag(
            "--by-line",
            None,
            "write a line for each line of the text: its number, words, loss, perplexity",
            metavar="FILE",
        ),
        Flag("--summary", None, "write the results as JSON", metavar="FILE"),
        replace(_SHARED["device"], may_change=False),
        replace(_SHARED["threads"], may_change=False),
    ),
}

POINTER: Sections = {
    "": (
        replace(_SHARED["data"], help="corpus whose test text is evaluated"),
        Flag("--save", None, "the model", metavar="MODEL"),
        Flag("--bptt", 2000, "as in the original; changes nothing here", positive_int),
        WINDOW,
        replace(THETA, default=1.0, nargs=None),
        replace(LAMBDA, default=0.1, nargs=None),
        _SHARED["device"],
        _SHARED["threads"],
    ),
}

# Values to search, the authors' grid for segments of 5 for dynamic evaluation by rms.
THETAS = [0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0]
LAMBDAS = [0.02, 0.05, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5]
RATES = {
    "rms": [3e-5, 4e-5, 5e-5, 6e-5, 7e-5, 1e-4],
    "sgd": [0.01, 0.03, 0.1, 0.3, 1.0],
}
LAMBS = [0.001, 0.002, 0.003, 0.005]
FIRST_RATES = {"rms": 5e-5, "sgd": 0.1}


def pointer_parser() -> Parser:
    """The parser of pointer.py."""
    parser = Parser(POINTER, prog="pointer.py", description="Test a model with a continuous cache.")
    parser.add_argument(
        "--cuda", default=argparse.SUPPRESS, help=argparse.SUPPRESS, type=refused_cuda, nargs="?",
        const="",
    )  # fmt: skip
    return parser


def parse_evaluation(argv: Sequence[str]) -> argparse.Namespace:
    """Parse evaluate.py's command line; fills in the grid of --search.

    Raises:
        UsageError: an invalid flag or value.
    """
    description = "Measure the perplexity of a text under a trained model."
    parser = Parser(EVALUATION, prog="evaluate.py", description=description)
    args, given = parser.parse(argv)
    needs = dict.fromkeys(("window", "theta", "lambdasm"), ("cache", args.cache))
    needs |= dict.fromkeys(("lr", "lamb", "bptt"), ("dynamic", args.dynamic))
    rms = ("dynamic rms", args.dynamic == "rms")
    needs |= dict.fromkeys(("epsilon", "batch_size", "max_batches"), rms)
    needs |= dict(search_tokens=("dynamic and --search", args.dynamic and args.search))
    for name in sorted(given & needs.keys()):
        owner, there = needs[name]
        if not there:
            raise UsageError(f"argument --{name.replace('_', '-')}: goes with --{owner} only")
    if args.search and not (args.cache or args.dynamic):
        raise UsageError("argument --search: goes with --cache or --dynamic only")
    grids = dict(theta=THETAS, lambdasm=LAMBDAS)
    if args.dynamic:
        grids |= dict(lr=RATES[args.dynamic], lamb=LAMBS)
        args.lr = args.lr or [FIRST_RATES[args.dynamic]]
    for name, grid in grids.items():
        if args.search and name not in given:
            setattr(args, name, grid)
        elif not args.search and len(getattr(args, name)) > 1:
            raise UsageError(f"argument --{name}: several values go with --search only")
    if args.text and "split" in given:
        raise UsageError("argument --split: does not go with --text")
    return args


def parse_pointer(argv: Sequence[str]) -> argparse.Namespace:
    """Parse pointer.py's command line; returns evaluate.py's flags.

    Raises:
        UsageError: an invalid flag or value.
    """
    args, _ = pointer_parser().parse(argv)
    if args.save is None:
        raise UsageError("argument --save: which model?")
    same = ["--data", args.data, "--device", args.device, "--window", str(args.window)]
    same += ["--threads", str(args.threads)] if args.threads else []
    same += ["--theta", str(args.theta), "--lambdasm", str(args.lambdasm)]
    return parse_evaluation([args.save, "--cache", *same])
