"""Every flag of every program, declared once, and how programs end."""

import argparse
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from data.errors import DataError
from engine.device import select_device
from engine.errors import PeerError, RunError
from engine.ranks import local_rank

# Flags that may differ between a run and its resumption; all others are part of what it is.
MAY_CHANGE = frozenset(
    """
    data device save resume dry_run epochs max_updates log_interval diagnostics checkpoint_every
    checkpoint_minutes test_batch_size bigram samples
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


class UsageError(Exception):
    """A flag or value that cannot be: one line, exit code 2."""


def run_program(program: Callable[[Sequence[str]], None], argv: Sequence[str] | None) -> int:
    """Run a program's body; turn what a user can cause into one line on stderr.

    Returns:
        The exit code: 0 done, 2 a flag or value that cannot be, 1 anything else.
    """
    try:
        program(sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        return _fail(str(error), 2)
    except PeerError as error:
        print(f"error: rank {os.environ.get('RANK', 0)}: {error}", file=sys.stderr)
        return 1
    except (DataError, RunError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted")
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        where = "GPU's memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
        return _fail(
            f"the {where} is too small; a smaller model, --batch-size or --bptt needs less"
        )
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"{place}{error.strerror or error}")
    return 0


def _is_memory(error: Exception) -> bool:
    """A tensor did not fit; on a CPU torch says so in a RuntimeError like any other."""
    known = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
    special = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return special or any(words in str(error) for words in known)


def _fail(message: str, code: int = 1) -> int:
    if os.environ.get("RANK", "0") == "0":  # where several train together, rank 0 speaks for all
        print(f"error: {message}", file=sys.stderr)
    return code


# Values


def _number(
    convert: Callable[[str], Any], description: str, holds: Callable[[Any], bool]
) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not math.isfinite(value) or not holds(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {description}")
        return value

    return parse


def _several(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Values with commas between them, none of them twice."""

    def parse(text: str) -> list[Any]:
        values = [convert(part.strip()) for part in text.split(",")]
        if len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"{text!r} names one twice")
        return values

    return parse


positive_int = _number(int, "a whole number of at least 1", lambda n: n >= 1)
natural = _number(int, "a whole number of at least 0", lambda n: n >= 0)
seed_value = _number(int, "a whole number in [0, 2**32)", lambda n: 0 <= n < 2**32)
epoch_number = _number(int, "an epoch, from 1, or -1 for never", lambda n: n >= 1 or n == -1)
positive = _number(float, "a number above 0", lambda x: x > 0)
non_negative = _number(float, "a number of at least 0", lambda x: x >= 0)
whole_numbers = _several(natural)
decay = _number(float, "a number above 1, or 0", lambda x: x > 1 or x == 0)
between_0_and_1 = _number(float, "a probability in (0, 1)", lambda x: 0 < x < 1)
probability = _number(float, "a probability in [0, 1)", lambda x: 0 <= x < 1)


def model_name(text: str) -> str:
    """--model: the original's other kinds are told apart from nonsense."""
    if text in ("GRU", "QRNN"):
        raise argparse.ArgumentTypeError(f"{text} is not supported; this project trains the LSTM")
    if text != "LSTM":
        raise argparse.ArgumentTypeError(f"{text!r} is not LSTM")
    return text


def loss_scale(text: str) -> str | float:
    """--loss-scale."""
    if text == "dynamic":
        return text
    value: float = positive(text)
    return value


def save_path(text: str) -> str:
    """--save: the run's folder is this path without its suffix, so it needs one."""
    if not Path(text).suffix:
        raise argparse.ArgumentTypeError(f"{text!r} has no suffix such as .pt")
    return text


# The parser


class Parser(argparse.ArgumentParser):
    """Reads @files with shell-like lines and comments; reports an error in one line.

    Flags of several words are known with - and with _ between them.
    """

    def __init__(self, **keywords: Any) -> None:
        super().__init__(
            fromfile_prefix_chars="@",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            **keywords,
        )

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """One line of a recipe: any number of flags, # begins a comment."""
        return shlex.split(arg_line, comments=True)

    def error(self, message: str) -> NoReturn:
        """Argparse's errors, without the usage before them."""
        if unreadable := re.fullmatch(r"\[Errno \d+\] (.*): '(.*)'", message):
            message = f"@{unreadable[2]}: {unreadable[1]}"
        if message.startswith("unrecognized arguments") and ".txt" in message:
            message += " (a recipe is given as @FILE)"
        raise UsageError(message)


class _CudaFlag(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser.error(
            "argument --cuda: it switched CUDA off in the original; give --device cpu or "
            "--device cuda instead"
        )


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


def _flag(
    group: Any, name: str, default: Any, help: str, type: Any = str, metavar: Any = "N", **more: Any
) -> None:
    """Declare a flag that takes a value, under both spellings."""
    names = dict.fromkeys(
        [name, "--" + name[2:].replace("_", "-"), "--" + name[2:].replace("-", "_")]
    )
    group.add_argument(*names, default=default, help=help, type=type, metavar=metavar, **more)


def _choice(group: Any, name: str, choices: list[str], help: str) -> None:
    """Declare a flag that takes one of a few words, the first by default."""
    _flag(group, name, choices[0], help, metavar="|".join(choices), choices=choices)


def _switch(group: Any, name: str, help: str) -> None:
    """Declare a flag without a value."""
    names = dict.fromkeys([name, "--" + name[2:].replace("-", "_")])
    group.add_argument(*names, action="store_true", help=help)


def _add_corpus(parser: Parser) -> None:
    group = parser.add_argument_group("corpus")
    what = (
        "folder with train.txt, valid.txt and test.txt; data/penn, data/wikitext-2, "
        "data/wikitext-103, data/pennchar and data/enwik8 are downloaded where they are missing, "
        "data/demo is made on the spot"
    )
    _flag(group, "--data", "data/penn", what, metavar="FOLDER")


def _add_model(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    _flag(group, "--model", "LSTM", "kind of layer", model_name, "LSTM")
    _flag(group, "--emsize", 400, "width of the embedding, units", positive_int)
    _flag(group, "--nhid", 1150, "units of each hidden layer", positive_int)
    _flag(group, "--nlayers", 3, "number of layers", positive_int)
    what = "give the decoder a matrix of its own; the last layer then has --nhid units"
    _switch(group, "--untied", what)


def _add_regularisation(parser: Parser) -> None:
    group = parser.add_argument_group("regularisers (0 switches one off)")
    _flag(group, "--dropout", 0.4, "locked dropout, last layer's output", probability, "P")
    _flag(group, "--dropouth", 0.3, "locked dropout between layers", probability, "P")
    _flag(group, "--dropouti", 0.65, "locked dropout on embedded words", probability, "P")
    _flag(group, "--dropoute", 0.1, "embedding dropout: whole words", probability, "P")
    _flag(group, "--wdrop", 0.5, "weight drop on hidden-to-hidden weights", probability, "P")
    _add_penalties(group)
    _flag(group, "--wdecay", 1.2e-6, "weight decay", non_negative, "X")


def _add_optimisation(parser: Parser) -> None:
    group = parser.add_argument_group("optimisation")
    _choice(group, "--optimizer", ["sgd", "adam"], "sgd means NT-ASGD")
    what = "learning rate of an update in which --bptt steps count; of T steps: times T / --bptt"
    _flag(group, "--lr", 30.0, what, positive, "X")
    _add_clip(group)
    what = "gradient filter in front of every layer; THRESHOLD 10, if none is given; 0: off"
    _flag(group, "--grad-filter", 0.0, what, non_negative, "THRESHOLD", nargs="?", const=10.0)
    what = "time steps that the gradient reaches through, k2; full: that are computed at once"
    _add_window(group, 80, what)
    _add_bptt(group)
    _flag(group, "--epochs", 8000, "epochs at most", positive_int)
    what = "stop training after N updates in all, then validate and test"
    _flag(group, "--max-updates", None, what, positive_int)
    what = "NT-ASGD: epochs without a better validation that are forgiven"
    _flag(group, "--nonmono", 5, what, natural)
    _switch(group, "--no-asgd", "never start averaging")
    what = (
        "with --no-asgd: divide the learning rate by X where averaging would have started, each "
        "time; 0: never"
    )
    _flag(group, "--nonmono-decay", 0.0, what, decay, "X")
    what = "epochs at whose end the learning rate is divided by 10; -1: never"
    _flag(group, "--when", [-1], what, epoch_number, "EPOCH", nargs="+")
    _add_seed(group)


# Flags of several programs


def _add_penalties(group: Any) -> None:
    _flag(group, "--alpha", 2.0, "AR, weight of mean(h**2)", non_negative, "X")
    _flag(group, "--beta", 1.0, "TAR, weight of mean((h[t+1] - h[t])**2)", non_negative, "X")


def _add_clip(group: Any) -> None:
    what = "largest global norm of the gradient; 0: no clipping"
    _flag(group, "--clip", 0.25, what, non_negative, "X")


def _add_window(group: Any, batch_size: int, bptt: str = "time steps of a window") -> None:
    _flag(group, "--batch_size", batch_size, "columns of text per update", positive_int)
    _flag(group, "--bptt", 70, bptt, positive_int)


def _add_seed(group: Any) -> None:
    _flag(group, "--seed", 1111, "of all random draws", seed_value)


def _add_device(group: Any) -> None:
    what = "where to compute; auto: the first GPU, if there is one"
    _flag(group, "--device", "auto", what, metavar="auto|cpu|cuda[:N]")


# Flags of main.py alone


def _add_precision(group: Any) -> None:
    what = (
        "of the matrix products in training; auto: tf32 on a GPU that has it, else fp32. Weights, "
        "optimizer, averages, penalties, loss and evaluation are float32 (in tf32 and on a GPU "
        "with bf16 or fp16, products of evaluation are tf32)"
    )
    _choice(group, "--precision", ["auto", "fp32", "tf32", "bf16", "fp16"], what)
    what = "auto: the fast one where there is one; plain: torch's own layers, the reference"
    _choice(group, "--kernel", ["auto", "plain"], what)
    what = "factor on the loss while gradients are taken (dynamic for fp16; else none)"
    _flag(group, "--loss-scale", None, what, loss_scale, "dynamic|X")
    what = "where the dynamic loss scale stays between"
    _flag(group, "--loss-scale-bounds", [1.0, 2.0**24], what, positive, "X", nargs=2)
    what = "updates without overflow after which it doubles"
    _flag(group, "--loss-scale-window", 2000, what, positive_int)


def _add_bptt(group: Any) -> None:
    what = (
        "variable: windows of random length around --bptt; fixed: truncated BPTT(--k1, --bptt); "
        "randomized: history cut at random every --bptt steps, the gradient right on average; "
        "full: never cut, one update an epoch"
    )
    _choice(group, "--bptt-scheme", list(SCHEME_FLAGS), what)
    what = "time steps from one update to the next (only fixed; --bptt, if not given)"
    _flag(group, "--k1", None, what, positive_int)
    what = "probability that the history is not cut (only randomized; 0.5, if not given)"
    _flag(group, "--keep-prob", None, what, between_0_and_1, "P")


def _add_run(parser: Parser) -> None:
    group = parser.add_argument_group("run")
    _add_device(group)
    group.add_argument("--cuda", action=_CudaFlag, nargs=0, help=argparse.SUPPRESS)
    what = (
        "the best model; the rest of the run goes into a folder of this name without its suffix; "
        "an earlier run there is kept as NAME.1 (a name made of the time, if not given)"
    )
    _flag(group, "--save", None, what, save_path, "FILE")
    what = (
        "continue a run exactly; auto: the one at --save if it is there, else start; PATH: a "
        "run's last.pt, folder or best model. Flags not given are the run's own, but for "
        "--max-updates"
    )
    _flag(group, "--resume", None, what, metavar="auto|PATH")
    what = "updates between checkpoints, besides those at each epoch's end"
    _flag(group, "--checkpoint-every", None, what, positive_int)
    what = "at most so many minutes between checkpoints"
    _flag(group, "--checkpoint-minutes", 10.0, what, positive, "X")
    what = "print parameters, updates per epoch and an estimate of the memory, then exit"
    _switch(group, "--dry-run", what)


def _add_evaluation(parser: Parser) -> None:
    group = parser.add_argument_group("evaluation")
    what = "stretches that the validation text is read in, side by side"
    _flag(group, "--eval-batch-size", 10, what, positive_int)
    _flag(group, "--test-batch-size", 1, "the same for the test text", positive_int)
    what = "also print the test perplexity of an interpolated bigram model"
    _switch(group, "--bigram", what)
    _flag(group, "--samples", 0, "sentences to let the model write last", natural)


def _add_logging(parser: Parser) -> None:
    group = parser.add_argument_group("logging (WANDB_* variables fill in what is not given)")
    _flag(group, "--log-interval", 200, "updates between log lines", positive_int)
    what = (
        "every EVERY updates log where the gradient is and how large the recurrent matrices are; "
        "not, if not given"
    )
    _flag(group, "--diagnostics", None, what, positive_int, "EVERY")
    _add_wandb(group)
    _flag(group, "--wandb-name", None, "W&B: the run's name", metavar="NAME")
    _flag(group, "--wandb-group", None, "W&B: group", metavar="NAME")
    _flag(group, "--wandb-job-type", None, "W&B: kind of run, within the group", metavar="NAME")
    _flag(group, "--wandb-tags", None, "W&B: tags", metavar="TAG", nargs="+")


def _add_wandb(group: Any) -> None:
    _choice(group, "--wandb", ["disabled", "offline", "online"], "Weights & Biases")
    _flag(group, "--wandb-project", None, "W&B: project", metavar="NAME")


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
    _flag(group, "--seeds", None, what, whole_numbers, "SEEDS")
    what = "only the rows whose names contain one of these words; the first row always takes part"
    _flag(group, "--rows", None, what, metavar="WORD", nargs="+")
    what = "flags for every row, before its own, for instance --flags='--epochs 2'"
    _flag(group, "--flags", "", what, metavar="FLAGS")
    what = "folder of the results (results/ and the table's name, if not given)"
    _flag(group, "--output", None, what, metavar="FOLDER")
    _switch(group, "--dry-run", "print the plan and what it costs, then exit")
    _switch(group, "--report-only", "only make the report anew, from what is there")
    group = parser.add_argument_group("where to run it")
    what = "runs at a time (one a GPU, if not given)"
    _flag(group, "--jobs", None, what, positive_int)
    what = "GPUs to share among the jobs, for instance 0,1"
    _flag(group, "--gpus", None, what, whole_numbers, "NUMBERS")
    what = "CPU threads of each run (the cores shared among the jobs, if not given; on Ray 1)"
    _flag(group, "--threads", None, what, positive_int)
    what = "run on a Ray cluster: at ADDRESS, at RAY_ADDRESS, or one of this machine alone"
    _flag(group, "--ray", None, what, metavar="ADDRESS", nargs="?", const="")
    what = "GPUs of each run on Ray, fractions allowed (1 if the cluster has any)"
    _flag(group, "--ray-gpus", None, what, non_negative, "X")
    _add_wandb(parser.add_argument_group("logging, of each run and of the table"))
    return parser


def diagnosis_parser() -> Parser:
    """The flags of diagnose.py."""
    parser = Parser(
        prog="diagnose.py",
        description="Look at how gradients flow back through time in a trained or fresh model.",
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a model that main.py saved")
    _flag(parser, "--compare", None, "two models, side by side", metavar=("A", "B"), nargs=2)
    what = (
        "draw the weights of MODEL anew by --seed, as they were before training; with --compare: "
        "those of B"
    )
    _switch(parser, "--fresh", what)
    what = "folder for the results; beside the model, NAME-diagnosis, if not given"
    _flag(parser, "--output", None, what, metavar="FOLDER")
    _add_device(parser)
    _add_corpus(parser)
    _choice(parser, "--split", ["train", "valid", "test"], "text to read")
    group = parser.add_argument_group("what to look at")
    _flag(group, "--lags", 100, "time steps to follow a gradient back", positive_int)
    what = "steps whose losses are sent back, of every column of text"
    _flag(group, "--positions", 8, what, positive_int)
    _flag(group, "--windows", 8, "windows of --bptt steps whose gradient is taken", positive_int)
    _flag(group, "--masks", 3, "draws of weight drop's mask to take spectra of", natural)
    what = "thresholds of the gradient filter to try"
    _flag(group, "--thresholds", [1.0, 2.0, 5.0, 10.0], what, positive, "X", nargs="+")
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
    silent = training_parser()
    for action in silent._actions:
        action.default = argparse.SUPPRESS
    given = set(vars(_parse(silent, argv)))
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
