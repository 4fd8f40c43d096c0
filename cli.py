"""Every flag of every program, declared once."""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch

from engine.device import select_device
from engine.program import UsageError
from engine.ranks import local_rank
from flags import (
    CudaFlag,
    Parser,
    add_choice,
    add_flag,
    add_switch,
    between_0_and_1,
    decay,
    epoch_number,
    loss_scale,
    model_name,
    natural,
    non_negative,
    positive,
    positive_int,
    probability,
    save_path,
    seed_value,
    whole_numbers,
)

# Flags that may differ between a run and its resumption; all others are part of what it is.
MAY_CHANGE = frozenset(
    """
    data device wavefront save resume dry_run epochs max_updates log_interval diagnostics
    checkpoint_every checkpoint_minutes test_batch_size bigram samples
    wandb wandb_project wandb_name wandb_group wandb_job_type wandb_tags
    """.split()  # noqa: SIM905
)

# The schemes of back-propagation through time, and the flags that only they take.
SCHEME_FLAGS = {
    "variable": (),
    "fixed": ("k1",),
    "randomized": ("keep_prob",),
    "full": (),
}


def training_parser() -> Parser:
    """The flags of main.py, with the original's names and defaults."""
    parser = Parser(
        prog="main.py",
        description="Train an AWD-LSTM language model, then test it.",
        epilog="@FILE reads flags from FILE (see recipes/); later flags win.",
    )
    _add_corpus(parser)
    _add_model(parser)
    _add_regularisation(parser)
    _add_optimisation(parser)
    _add_precision(parser.add_argument_group("precision and speed"))
    _add_run(parser)
    _add_evaluation(parser)
    _add_logging(parser)
    return parser


def _add_corpus(parser: Parser) -> None:
    group = parser.add_argument_group("corpus")
    what = (
        "folder with train.txt, valid.txt and test.txt; data/penn, data/wikitext-2, "
        "data/wikitext-103, data/pennchar and data/enwik8 are downloaded where they are missing, "
        "data/demo is made on the spot"
    )
    add_flag(group, "--data", "data/penn", what, metavar="FOLDER")


def _add_model(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    add_flag(group, "--model", "LSTM", "kind of layer", model_name, "LSTM")
    add_flag(group, "--emsize", 400, "width of the embedding, units", positive_int)
    add_flag(group, "--nhid", 1150, "units of each hidden layer", positive_int)
    add_flag(group, "--nlayers", 3, "number of layers", positive_int)
    what = "give the decoder a matrix of its own; the last layer then has --nhid units"
    add_switch(group, "--untied", what)


def _add_regularisation(parser: Parser) -> None:
    group = parser.add_argument_group("regularisers (0 switches one off)")
    add_flag(group, "--dropout", 0.4, "locked dropout, last layer's output", probability, "P")
    add_flag(group, "--dropouth", 0.3, "locked dropout between layers", probability, "P")
    add_flag(group, "--dropouti", 0.65, "locked dropout on embedded words", probability, "P")
    add_flag(group, "--dropoute", 0.1, "embedding dropout: whole words", probability, "P")
    add_flag(group, "--wdrop", 0.5, "weight drop on hidden-to-hidden weights", probability, "P")
    _add_penalties(group)
    add_flag(group, "--wdecay", 1.2e-6, "weight decay", non_negative, "X")


def _add_optimisation(parser: Parser) -> None:
    group = parser.add_argument_group("optimisation")
    add_choice(group, "--optimizer", ["sgd", "adam"], "sgd means NT-ASGD")
    what = "learning rate of an update in which --bptt steps count; of T steps: times T / --bptt"
    add_flag(group, "--lr", 30.0, what, positive, "X")
    _add_clip(group)
    what = "gradient filter in front of every layer; THRESHOLD 10, if none is given; 0: off"
    add_flag(group, "--grad-filter", 0.0, what, non_negative, "THRESHOLD", nargs="?", const=10.0)
    what = "time steps that the gradient reaches through, k2; full: that are computed at once"
    _add_window(group, 80, what)
    _add_bptt(group)
    add_flag(group, "--epochs", 8000, "epochs at most", positive_int)
    what = "stop training after N updates in all, then validate and test"
    add_flag(group, "--max-updates", None, what, positive_int)
    what = "NT-ASGD: epochs without a better validation that are forgiven"
    add_flag(group, "--nonmono", 5, what, natural)
    add_switch(group, "--no-asgd", "never start averaging")
    what = (
        "with --no-asgd: divide the learning rate by X where averaging would have started, each "
        "time; 0: never"
    )
    add_flag(group, "--nonmono-decay", 0.0, what, decay, "X")
    what = "epochs at whose end the learning rate is divided by 10; -1: never"
    add_flag(group, "--when", [-1], what, epoch_number, "EPOCH", nargs="+")
    _add_seed(group)


# Flags of several programs


def _add_penalties(group: Any) -> None:
    add_flag(group, "--alpha", 2.0, "AR, weight of mean(h**2)", non_negative, "X")
    add_flag(group, "--beta", 1.0, "TAR, weight of mean((h[t+1] - h[t])**2)", non_negative, "X")


def _add_clip(group: Any) -> None:
    what = "largest global norm of the gradient; 0: no clipping"
    add_flag(group, "--clip", 0.25, what, non_negative, "X")


def _add_window(group: Any, batch_size: int, bptt: str = "time steps of a window") -> None:
    add_flag(group, "--batch_size", batch_size, "columns of text per update", positive_int)
    add_flag(group, "--bptt", 70, bptt, positive_int)


def _add_seed(group: Any) -> None:
    add_flag(group, "--seed", 1111, "of all random draws", seed_value)


def _add_device(group: Any) -> None:
    what = "where to compute; auto: the first GPU, if there is one"
    add_flag(group, "--device", "auto", what, metavar="auto|cpu|cuda[:N]")


# Flags of main.py alone


def _add_precision(group: Any) -> None:
    what = (
        "of the matrix products in training; auto: tf32 on a GPU that has it, else fp32. Weights, "
        "optimizer, averages, penalties, loss and evaluation are float32 (in tf32 and on a GPU "
        "with bf16 or fp16, products of evaluation are tf32)"
    )
    add_choice(group, "--precision", ["auto", "fp32", "tf32", "bf16", "fp16"], what)
    what = (
        "auto: the fast one where there is one; eager: the same, but a GPU's updates are not "
        "recorded as CUDA graphs; plain: torch's own layers and step, the reference"
    )
    add_choice(group, "--kernel", ["auto", "eager", "plain"], what)
    what = (
        "on a GPU: pipeline the layers over so many chunks of each window's time steps; 1: one "
        "layer after the other"
    )
    add_flag(group, "--wavefront", 1, what, positive_int, "CHUNKS")
    what = "factor on the loss while gradients are taken (dynamic for fp16; else none)"
    add_flag(group, "--loss-scale", None, what, loss_scale, "dynamic|X")
    what = "where the dynamic loss scale stays between"
    add_flag(group, "--loss-scale-bounds", [1.0, 2.0**24], what, positive, "X", nargs=2)
    what = "updates without overflow after which it doubles"
    add_flag(group, "--loss-scale-window", 2000, what, positive_int)


def _add_bptt(group: Any) -> None:
    what = (
        "variable: windows of random length around --bptt; fixed: truncated BPTT(--k1, --bptt); "
        "randomized: history cut at random every --bptt steps, the gradient right on average; "
        "full: never cut, one update an epoch"
    )
    add_choice(group, "--bptt-scheme", list(SCHEME_FLAGS), what)
    what = "time steps from one update to the next (only fixed; --bptt, if not given)"
    add_flag(group, "--k1", None, what, positive_int)
    what = "probability that the history is not cut (only randomized; 0.5, if not given)"
    add_flag(group, "--keep-prob", None, what, between_0_and_1, "P")


def _add_run(parser: Parser) -> None:
    group = parser.add_argument_group("run")
    _add_device(group)
    group.add_argument("--cuda", action=CudaFlag, nargs=0, help=argparse.SUPPRESS)
    what = (
        "the best model; the rest of the run goes into a folder of this name without its suffix; "
        "an earlier run there is kept as NAME.1 (a name made of the time, if not given)"
    )
    add_flag(group, "--save", None, what, save_path, "FILE")
    what = (
        "continue a run exactly; auto: the one at --save if it is there, else start; PATH: a "
        "run's last.pt, folder or best model. Flags not given are the run's own, but for "
        "--max-updates"
    )
    add_flag(group, "--resume", None, what, metavar="auto|PATH")
    what = "updates between checkpoints, besides those at each epoch's end"
    add_flag(group, "--checkpoint-every", None, what, positive_int)
    what = "at most so many minutes between checkpoints"
    add_flag(group, "--checkpoint-minutes", 10.0, what, positive, "X")
    what = "print parameters, updates per epoch and an estimate of the memory, then exit"
    add_switch(group, "--dry-run", what)


def _add_evaluation(parser: Parser) -> None:
    group = parser.add_argument_group("evaluation")
    what = "stretches that the validation text is read in, side by side"
    add_flag(group, "--eval-batch-size", 10, what, positive_int)
    add_flag(group, "--test-batch-size", 1, "the same for the test text", positive_int)
    what = "also print the test perplexity of an interpolated bigram model"
    add_switch(group, "--bigram", what)
    add_flag(group, "--samples", 0, "sentences to let the model write last", natural)


def _add_logging(parser: Parser) -> None:
    group = parser.add_argument_group("logging (WANDB_* variables fill in what is not given)")
    add_flag(group, "--log-interval", 200, "updates between log lines", positive_int)
    what = (
        "every EVERY updates log where the gradient is and how large the recurrent matrices are; "
        "not, if not given"
    )
    add_flag(group, "--diagnostics", None, what, positive_int, "EVERY")
    _add_wandb(group)
    add_flag(group, "--wandb-name", None, "W&B: the run's name", metavar="NAME")
    add_flag(group, "--wandb-group", None, "W&B: group", metavar="NAME")
    add_flag(group, "--wandb-job-type", None, "W&B: kind of run, within the group", metavar="NAME")
    add_flag(group, "--wandb-tags", None, "W&B: tags", metavar="TAG", nargs="+")


def _add_wandb(group: Any) -> None:
    add_choice(group, "--wandb", ["disabled", "offline", "online"], "Weights & Biases")
    add_flag(group, "--wandb-project", None, "W&B: project", metavar="NAME")


def ablation_parser() -> Parser:
    """The flags of ablate.py."""
    parser = Parser(
        prog="ablate.py",
        description="Run the rows of an ablation table, each with several seeds, and print it. "
        "The same command goes on after an interruption.",
    )
    what = "TOML file with the rows (see ablations/)"
    parser.add_argument("table", metavar="TABLE", help=what)
    group = parser.add_argument_group("what to run")
    what = "instead of the table's own, for instance 1,2,3"
    add_flag(group, "--seeds", None, what, whole_numbers, "SEEDS")
    what = "only the rows whose names contain one of these words; the first row always takes part"
    add_flag(group, "--rows", None, what, metavar="WORD", nargs="+")
    what = "flags for every row, before its own, for instance --flags='--epochs 2'"
    add_flag(group, "--flags", "", what, metavar="FLAGS")
    what = "folder of the results (results/ and the table's name, if not given)"
    add_flag(group, "--output", None, what, metavar="FOLDER")
    add_switch(group, "--dry-run", "print the plan and what it costs, then exit")
    add_switch(group, "--report-only", "only make the report anew, from what is there")
    group = parser.add_argument_group("where to run it")
    what = "runs at a time (one a GPU, if not given)"
    add_flag(group, "--jobs", None, what, positive_int)
    what = "GPUs to share among the jobs, for instance 0,1"
    add_flag(group, "--gpus", None, what, whole_numbers, "NUMBERS")
    what = "CPU threads of each run (the cores shared among the jobs, if not given; on Ray 1)"
    add_flag(group, "--threads", None, what, positive_int)
    what = "run on a Ray cluster: at ADDRESS, at RAY_ADDRESS, or one of this machine alone"
    add_flag(group, "--ray", None, what, metavar="ADDRESS", nargs="?", const="")
    what = "GPUs of each run on Ray, fractions allowed (1 if the cluster has any)"
    add_flag(group, "--ray-gpus", None, what, non_negative, "X")
    _add_wandb(parser.add_argument_group("logging, of each run and of the table"))
    return parser


def diagnosis_parser() -> Parser:
    """The flags of diagnose.py."""
    parser = Parser(
        prog="diagnose.py",
        description="Look at how gradients flow back through time in a trained or fresh model.",
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a model that main.py saved")
    add_flag(parser, "--compare", None, "two models, side by side", metavar=("A", "B"), nargs=2)
    what = (
        "draw the weights of MODEL anew by --seed, as they were before training; with --compare: "
        "those of B"
    )
    add_switch(parser, "--fresh", what)
    what = "folder for the results; beside the model, NAME-diagnosis, if not given"
    add_flag(parser, "--output", None, what, metavar="FOLDER")
    _add_device(parser)
    _add_corpus(parser)
    add_choice(parser, "--split", ["train", "valid", "test"], "text to read")
    group = parser.add_argument_group("what to look at")
    add_flag(group, "--lags", 100, "time steps to follow a gradient back", positive_int)
    what = "steps whose losses are sent back, of every column of text"
    add_flag(group, "--positions", 8, what, positive_int)
    add_flag(group, "--windows", 8, "windows of --bptt steps whose gradient is taken", positive_int)
    add_flag(group, "--masks", 3, "draws of weight drop's mask to take spectra of", natural)
    what = "thresholds of the gradient filter to try"
    add_flag(group, "--thresholds", [1.0, 2.0, 5.0, 10.0], what, positive, "X", nargs="+")
    group = parser.add_argument_group("how it is trained")
    _add_window(group, 20)
    _add_clip(group)
    _add_penalties(group)
    _add_seed(group)
    return parser


# Parsing


def parse_diagnosis(argv: Sequence[str]) -> argparse.Namespace:
    """Read diagnose.py's command line.

    Raises:
        UsageError: a flag or value that cannot be.
    """
    args = _parse(diagnosis_parser(), argv)
    if (args.model is None) == (args.compare is None):
        raise UsageError("give a MODEL that main.py saved, or two of them by --compare A B")
    return args


def device_of(args: argparse.Namespace) -> torch.device:
    """The device that --device means.

    Raises:
        UsageError: none.
    """
    try:
        return select_device(args.device, local_rank())
    except ValueError as error:
        raise UsageError(f"argument --device: {error}") from None


def parse_training(argv: Sequence[str]) -> tuple[argparse.Namespace, set[str]]:
    """Read main.py's command line.

    Returns:
        The flags, and the names of those that were given (in argv or a recipe).

    Raises:
        UsageError: a flag or value that cannot be.
    """
    args = _parse(training_parser(), argv)
    given = given_flags(argv)
    if args.resume == "auto" and args.save is None:
        raise UsageError("argument --resume: auto needs --save, to know which run is meant")
    low, high = args.loss_scale_bounds
    if low > high:
        raise UsageError(f"argument --loss-scale-bounds: {low:g} is above {high:g}")
    if args.nonmono_decay and not args.no_asgd:
        raise UsageError("argument --nonmono-decay: goes with --no-asgd only")
    if args.save is None and args.resume is None:
        args.save = f"{time.time_ns() // 1000}.pt"
    return args, given


def given_flags(argv: Sequence[str]) -> set[str]:
    """Names of main.py's flags that a command line gives, each by itself as it may be."""
    silent = training_parser()
    for action in silent._actions:
        action.default = argparse.SUPPRESS
    return set(vars(_parse(silent, argv)))


def parse_ablation(argv: Sequence[str]) -> argparse.Namespace:
    """Read ablate.py's command line.

    Raises:
        UsageError: a flag or value that cannot be.
    """
    args = _parse(ablation_parser(), argv)
    both = [("dry_run", "report_only"), ("ray", "gpus"), ("ray", "jobs")]
    for one, other in both:
        if all(getattr(args, name) not in (None, False) for name in (one, other)):
            flags = [f"--{name.replace('_', '-')}" for name in (one, other)]
            raise UsageError(f"argument {flags[1]}: does not go with {flags[0]}")
    if args.ray_gpus is not None and args.ray is None:
        raise UsageError("argument --ray-gpus: needs --ray")
    return args


def _parse(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse; a recipe that cannot be read as UTF-8 or split into words is a usage error too."""
    try:
        return parser.parse_args(argv)
    except UnicodeDecodeError as error:
        raise UsageError(f"a recipe given by @ is not UTF-8 text: {error}") from None
    except ValueError as error:
        raise UsageError(f"a recipe given by @ cannot be read: {error}") from None


def resume_flags(
    args: argparse.Namespace, given: set[str], saved: dict[str, Any]
) -> argparse.Namespace:
    """The flags of a resumed run: the run's own where none was given now.

    Raises:
        UsageError: a flag was given that makes it another run; lists all of them.
    """
    if differences := other_flags({name: getattr(args, name) for name in given}, saved):
        raise UsageError(f"argument --resume: the run was started with other flags: {differences}")
    merged = dict(vars(args))
    merged.update({name: value for name, value in saved.items() if name not in given})
    # A limit for one session, and what this session was asked to do, are not handed on.
    for name in ("resume", "dry_run", "max_updates"):
        merged[name] = getattr(args, name)
    return argparse.Namespace(**merged)


def other_flags(wanted: dict[str, Any], saved: dict[str, Any]) -> str:
    """Which flags make a run another one than the one that was saved; empty: none do."""
    return ", ".join(
        f"--{name.replace('_', '-')} {_plain(wanted[name])} (was {_plain(saved[name])})"
        for name in sorted(wanted.keys() & saved.keys() - MAY_CHANGE)
        if wanted[name] != saved[name]
    )


def settle_scheme(args: argparse.Namespace) -> None:
    """Fill in what the scheme's own flags mean where they are not given.

    Raises:
        UsageError: a flag that the scheme does not take.
    """
    for scheme, names in SCHEME_FLAGS.items():
        for name in names:
            if scheme != args.bptt_scheme and getattr(args, name) is not None:
                raise UsageError(
                    f"argument --{name.replace('_', '-')}: only --bptt-scheme {scheme} takes it, "
                    f"not {args.bptt_scheme}"
                )
    if args.bptt_scheme == "fixed" and args.k1 is None:
        args.k1 = args.bptt
    if args.bptt_scheme == "randomized" and args.keep_prob is None:
        args.keep_prob = 0.5


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
