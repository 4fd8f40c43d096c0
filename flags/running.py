"""main.py's flags for speed, files, evaluation and logging."""

from flags.flag import Flag, Sections
from flags.values import loss_scale, natural, positive, positive_int, save_path

RUNNING: Sections = {
    "precision and speed": (
        Flag(
            "--precision",
            "auto",
            "of the matrix products in training; auto: tf32 on a GPU that has it, else fp32. "
            "Weights, optimizer, averages, penalties, loss and evaluation are float32 (in tf32 "
            "and on a GPU with bf16 or fp16, products of evaluation are tf32)",
            choices=("auto", "fp32", "tf32", "bf16", "fp16"),
        ),
        Flag(
            "--kernel",
            "auto",
            "auto: the fastest that fits; eager: the same, but without CUDA graphs; plain: torch's "
            "own layers and step, the reference",
            choices=("auto", "eager", "plain"),
        ),
        Flag(
            "--loss-scale",
            None,
            "factor on the loss while gradients are taken; dynamic: halved by an overflow, doubled "
            "after --loss-scale-window updates without; logmax: follows the largest gradients, so "
            "that one update in 1,000 overflows (dynamic for fp16, if not given; else none)",
            loss_scale,
            "dynamic|logmax|X",
        ),
        Flag(
            "--loss-scale-bounds",
            [1.0, 2.0**24],
            "least and greatest loss scale, dynamic or logmax",
            positive,
            "X",
            nargs=2,
        ),
        Flag(
            "--loss-scale-window",
            2000,
            "updates without overflow after which the dynamic loss scale doubles",
            positive_int,
        ),
    ),
    "run": (
        Flag(
            "--device",
            "auto",
            "where to compute; auto: the first GPU, if any, else the CPU",
            metavar="auto|cpu|cuda[:N]",
            may_change=True,
        ),
        Flag(
            "--threads",
            None,
            "most CPU threads (OMP_NUM_THREADS or the number of cores, if not given)",
            positive_int,
            may_change=True,
        ),
        Flag(
            "--save",
            None,
            "the best model; the rest of the run goes into a folder of this name without its "
            "suffix; an earlier run there is kept as NAME.1 (a name made of the time, if not "
            "given)",
            save_path,
            "FILE",
            may_change=True,
        ),
        Flag(
            "--resume",
            None,
            "continue a run exactly; auto: the run at --save if it exists, else start one; PATH: a "
            "run's last.pt, folder or best model. Flags not given are the run's, except "
            "--max-updates",
            metavar="auto|PATH",
            per_session=True,
        ),
        Flag(
            "--checkpoint-every",
            None,
            "updates between checkpoints, besides those at each epoch's end",
            positive_int,
            may_change=True,
        ),
        Flag(
            "--checkpoint-minutes",
            10.0,
            "most minutes between checkpoints",
            positive,
            "X",
            may_change=True,
        ),
        Flag(
            "--dry-run",
            False,
            "make a few updates in memory, print sizes, time and memory by precision, then exit; "
            "writes no run (a known corpus that is missing is made or downloaded)",
            per_session=True,
        ),
        Flag(
            "--quick",
            False,
            "does it work? three updates, and three windows each of validation and test, with all "
            "files; the figures are of a part of the text",
        ),
    ),
    "evaluation": (
        Flag(
            "--eval-batch-size",
            10,
            "columns that the validation text is divided into",
            positive_int,
        ),
        Flag("--test-batch-size", 1, "the same for the test text", positive_int, may_change=True),
        Flag("--bigram", False, "also test an interpolated bigram model", may_change=True),
        Flag("--samples", 0, "sentences to sample from the model last", natural, may_change=True),
    ),
    "logging (WANDB_* variables fill in what is not given)": (
        Flag("--log-interval", 200, "updates between log lines", positive_int, may_change=True),
        Flag(
            "--diagnostics",
            None,
            "every EVERY updates log norms of gradients and recurrent matrices (never, if not "
            "given)",
            positive_int,
            "EVERY",
            may_change=True,
        ),
        Flag(
            "--wandb",
            "disabled",
            "Weights & Biases",
            choices=("disabled", "offline", "online"),
            may_change=True,
        ),
        Flag("--wandb-project", None, "W&B: project", metavar="NAME", may_change=True),
        Flag("--wandb-name", None, "W&B: the run's name", metavar="NAME", may_change=True),
        Flag("--wandb-group", None, "W&B: group", metavar="NAME", may_change=True),
        Flag(
            "--wandb-job-type",
            None,
            "W&B: kind of run, within the group",
            metavar="NAME",
            may_change=True,
        ),
        Flag("--wandb-tags", None, "W&B: tags", metavar="TAG", nargs="+", may_change=True),
    ),
}
