"""main.py's flags, with the original's names and defaults. To add one, add a line to TRAINING;
`args.NAME` is its value."""

import argparse
import time
from collections.abc import Sequence
from typing import Any

from engine.errors import UsageError
from flags.flag import Flag, Sections, by_name, dashed
from flags.parser import Parser
from flags.running import RUNNING
from flags.values import (
    between_0_and_1,
    decay,
    epoch_number,
    factor,
    layer_count,
    model_name,
    natural,
    non_negative,
    positive_int,
    probability,
    refused_cuda,
    seed_value,
)

QUICK = 3  # updates, and windows of each evaluation, of --quick

TRAINING: Sections = {
    "corpus": (
        Flag(
            "--data",
            "data/penn",
            "folder with train.txt, valid.txt and test.txt; data/penn, data/wikitext-2, "
            "data/wikitext-103, data/pennchar and data/enwik8 are downloaded where they are "
            "missing, data/demo is made on the spot",
            metavar="FOLDER",
            may_change=True,
        ),
    ),
    "model": (
        Flag("--model", "LSTM", "kind of layer", model_name, choices=("LSTM", "GRU")),
        Flag("--decoder", "linear", "kind of decoder", choices=("linear",)),
        Flag("--emsize", 400, "width of the embedding, units", positive_int),
        Flag("--nhid", 1150, "units of each hidden layer", positive_int),
        Flag("--nlayers", 3, "number of layers", layer_count),
        Flag("--untied", False, "a decoder matrix of its own; the last layer has --nhid units"),
    ),
    "regularisers (0 switches one off)": (
        Flag("--dropout", 0.4, "locked dropout, last layer's output", probability, "P"),
        Flag("--dropouth", 0.3, "locked dropout between layers", probability, "P"),
        Flag("--dropouti", 0.65, "locked dropout on embedded words", probability, "P"),
        Flag("--dropoute", 0.1, "embedding dropout: whole words", probability, "P"),
        Flag("--wdrop", 0.5, "weight drop on hidden-to-hidden weights", probability, "P"),
        Flag("--alpha", 2.0, "AR, weight of mean(h**2)", non_negative, "X"),
        Flag("--beta", 1.0, "TAR, weight of mean((h[t+1] - h[t])**2)", non_negative, "X"),
        Flag("--wdecay", 1.2e-6, "weight decay", non_negative, "X"),
    ),
    "optimisation": (
        Flag("--optimizer", "sgd", "sgd means NT-ASGD", choices=("sgd", "adam")),
        Flag(
            "--lr",
            30.0,
            "learning rate; an update over T time steps takes T / --bptt times that",
            factor,
            "X",
        ),
        Flag(
            "--clip", 0.25, "largest global norm of the gradient; 0: no clipping", non_negative, "X"
        ),
        Flag(
            "--grad-filter",
            0.0,
            "gradient filter in front of every layer: in the backward pass a sequence whose "
            "gradient's norm is r times the batch's median is multiplied by THRESHOLD / "
            "(THRESHOLD + r); THRESHOLD 10, if not given; 0: off",
            non_negative,
            "THRESHOLD",
            nargs="?",
            const=10.0,
        ),
        Flag(
            "--grad-filter-normalize",
            False,
            "divide these factors by the median sequence's, THRESHOLD / (THRESHOLD + 1), so that "
            "the filter does not act like a smaller learning rate besides",
            belongs_to=("grad_filter", True),
        ),
        Flag("--batch_size", 80, "columns of text per update", positive_int),
        Flag(
            "--bptt",
            70,
            "time steps that the gradient reaches back, k2; full: time steps computed at once",
            positive_int,
        ),
        Flag(
            "--bptt-scheme",
            "variable",
            "variable: windows of random length around --bptt; fixed: truncated BPTT(--k1, "
            "--bptt); randomized: history cut at random every --bptt steps, the gradient right on "
            "average; full: never cut, one update an epoch",
            choices=("variable", "fixed", "randomized", "full"),
        ),
        Flag(
            "--k1",
            None,
            "time steps from one update to the next (only fixed; --bptt, if not given)",
            positive_int,
            belongs_to=("bptt_scheme", "fixed"),
        ),
        Flag(
            "--keep-prob",
            None,
            "probability that the history is not cut (only randomized; 0.5, if not given)",
            between_0_and_1,
            "P",
            belongs_to=("bptt_scheme", "randomized"),
        ),
        Flag("--epochs", 8000, "epochs at most", positive_int, may_change=True),
        Flag(
            "--max-updates",
            None,
            "stop training after N updates in all, then validate and test",
            positive_int,
            per_session=True,
        ),
        Flag(
            "--nonmono",
            5,
            "NT-ASGD: its trigger fires when an epoch's validation loss is above the best loss of "
            "more than N epochs before",
            natural,
        ),
        Flag("--no-asgd", False, "never start averaging"),
        Flag(
            "--nonmono-decay",
            0.0,
            "with --no-asgd: divide the learning rate by X where averaging would have started, "
            "each time; 0: never",
            decay,
            "X",
            belongs_to=("no_asgd", True),
        ),
        Flag(
            "--when",
            [-1],
            "epochs at whose end the learning rate is divided by 10; -1: never",
            epoch_number,
            "EPOCH",
            nargs="+",
        ),
        Flag("--seed", 1111, "of all random draws", seed_value),
    ),
    **RUNNING,
}


def training_parser(
    sections: Sections | None = None,
    prog: str = "main.py",
    description: str = "Train an AWD-LSTM language model, then test it.",
) -> Parser:
    """The parser of main.py, or that of a program with nearly the same flags."""
    parser = Parser(
        sections or TRAINING,
        prog=prog,
        description=description,
        epilog="@FILE reads flags from FILE (see recipes/); later flags win.",
    )
    parser.add_argument(
        "--cuda",
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
        type=refused_cuda,
        nargs="?",
        const="",
    )
    return parser


def parse_training(argv: Sequence[str]) -> tuple[argparse.Namespace, set[str]]:
    """Parse main.py's command line.

    Returns:
        The flags, and the names of those that were given (in argv or a recipe).

    Raises:
        UsageError: an invalid flag or value.
    """
    args, given = training_parser().parse(argv)
    if args.resume == "auto" and args.save is None:
        raise UsageError("argument --resume: auto needs --save, to know which run is meant")
    check_bounds(args)
    if args.save is None and args.resume is None:
        args.save = f"{time.time_ns() // 1000}.pt"
    return args, given


def check_bounds(args: argparse.Namespace) -> None:
    """Check --loss-scale-bounds.

    Raises:
        UsageError: the least is above the greatest.
    """
    low, high = args.loss_scale_bounds
    if low > high:
        raise UsageError(f"argument --loss-scale-bounds: {low:g} is above {high:g}")


def given_flags(argv: Sequence[str]) -> set[str]:
    """Names of main.py's flags that are given in a part of a command line.

    Raises:
        UsageError: an invalid flag or value.
    """
    return set(training_parser().given(argv))


def settle_scheme(args: argparse.Namespace) -> None:
    """Check flags that need a value of another flag (`belongs_to`); fill in k1 and keep_prob, and
    max_updates for --quick.

    Call it once the flags are final: a resumed run may have the other flag.

    Raises:
        UsageError: the other flag has another value.
    """
    for name, flag in by_name(TRAINING).items():
        if flag.belongs_to is None or getattr(args, name) == flag.default:
            continue
        owner, value = flag.belongs_to
        found = getattr(args, owner)
        if (bool(found) if value is True else found) != value:
            needed = dashed(owner) if value is True else f"{dashed(owner)} {value}"
            raise UsageError(f"argument {dashed(name)}: goes with {needed} only")
    vars(args).update(fill_in(vars(args)))
    if args.quick:
        args.max_updates = min(args.max_updates or QUICK, QUICK)


def fill_in(flags: dict[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of k1 and keep_prob, which depend on other flags."""
    filled = dict(flags)
    if flags["bptt_scheme"] == "fixed" and flags["k1"] is None:
        filled["k1"] = flags["bptt"]
    if flags["bptt_scheme"] == "randomized" and flags["keep_prob"] is None:
        filled["keep_prob"] = 0.5
    return filled
