"""What do the schemes of back-propagation through time cost, and what do they reach?

python -m benchmarks.bptt --data data/penn --seconds 15 --output FILE.md

Each scheme trains a small model in a process of its own, one after the other: cost per token,
peak memory, and validation perplexity after the same number of tokens and after the same time. On
a CPU it computes in one thread and counts that thread's own time, so that a machine which others
use as well does not matter much.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from engine.trainer import Trainer
from engine.training_state import TrainingOptions

from benchmarks.training import hardware_of
from bptt import FixedWindows, FullWindows, RandomizedWindows, Scheme, VariableWindows, Window
from data.corpus import Corpus, load_corpus
from data.download import ensure_corpus
from engine.device import peak_memory, select_device
from engine.interrupt import Interrupt
from engine.run_folder import RunFolder
from evaluation.plain import evaluate, perplexity
from model import RNNModel
from nt_asgd import NTASGD

SIZES = dict(ninp=64, nhid=128, nlayers=2, tie_weights=True)
RATES = dict(dropout=0.2, dropouth=0.15, dropouti=0.2, dropoute=0.05, wdrop=0.3)
BATCH, BPTT, LR, CLIP, WDECAY, SEED = 40, 35, 20.0, 0.25, 1.2e-6, 1
VALID_TOKENS = 10_000


class Contender(NamedTuple):
    """A scheme with its --bptt; rate: of an update of bptt rows, None: of one of any length."""

    make: Callable[[], Scheme]
    bptt: int = BPTT
    rate: float | None = LR


# Where --bptt is not 35 the rate is such that a row weighs what it weighs elsewhere. Full BPTT
# with that rate would step by hundreds of times --lr at once: it gets --lr an update instead.
CONTENDERS = {
    "variable, 35": Contender(lambda: VariableWindows(35, SEED)),
    "fixed, k1 = k2 = 35": Contender(lambda: FixedWindows(35)),
    "fixed, k1 = k2 = 5": Contender(lambda: FixedWindows(5), 5, LR * 5 / BPTT),
    "fixed, k1 = k2 = 1": Contender(lambda: FixedWindows(1), 1, LR / BPTT),
    "fixed, k1 = 12, k2 = 35": Contender(lambda: FixedWindows(35, 12)),
    "fixed, k1 = 70, k2 = 35": Contender(lambda: FixedWindows(35, 70)),
    "randomized, 35, keep 0.5": Contender(lambda: RandomizedWindows(35, 0.5, SEED)),
    "full, segments of 35": Contender(lambda: FullWindows(35), rate=None),
}


def build(name: str, corpus: Corpus, device: torch.device, stack: ExitStack) -> Trainer:
    """A trainer with this scheme."""
    contender = CONTENDERS[name]
    torch.manual_seed(SEED)
    model = RNNModel("LSTM", len(corpus.vocabulary), **SIZES, **RATES).to(device)  # type: ignore[arg-type]
    place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    options = TrainingOptions(
        epochs=1, batch_size=BATCH, bptt=contender.bptt, clip=CLIP, alpha=2, beta=1
    )
    steps = len(corpus.train) // BATCH - 1
    lr = LR * contender.bptt / steps if contender.rate is None else contender.rate
    return Trainer(
        model,
        NTASGD(model.parameters(), lr, WDECAY),
        contender.make(),
        corpus,
        options,
        stack.enter_context(RunFolder(place / "run.pt")),
        Interrupt(),
        identity={},
    )


def measure(name: str, corpus: Corpus, goal: argparse.Namespace) -> dict[str, Any]:
    """Train until both the tokens and the seconds are reached, or 1.5 times the seconds passed.

    Returns:
        lr; tokens, updates and seconds (of training alone) in all; the process's peak memory
        before the first update and with updates, bytes; and the curve: [tokens, seconds, updates,
        validation perplexity] at the start, at half and all of the tokens and at the seconds.
    """
    device = select_device(goal.device)
    with ExitStack() as stack:
        trainer = build(name, corpus, device, stack)
        before = peak = peak_memory(device)
        at, seconds = trainer.at, 0.0
        curve: list[list[float]] = []
        marks = [0, goal.tokens / 2, goal.tokens]
        timed = False
        while marks or not timed:
            trainer.model.train()
            for window in trainer.scheme.windows(trainer.num_steps):
                due = not timed and seconds >= goal.seconds
                if due or (marks and at.tokens >= marks[0]):
                    timed |= due
                    marks = [mark for mark in marks if mark > at.tokens]
                    peak = peak if len(curve) > 1 else peak_memory(device)
                    loss = evaluate(trainer.model, corpus.valid[:VALID_TOKENS], 10)
                    curve.append([at.tokens, seconds, at.update, perplexity(loss)])
                if seconds >= 1.5 * goal.seconds or not (marks or not timed):
                    marks, timed = [], True
                    break
                seconds += _timed(device, trainer, window)
            trainer.hidden = trainer.model.init_hidden(BATCH)
            at.begin_epoch()
        lr = trainer.optimizer.param_groups[0]["lr"]
    return dict(
        lr=lr, tokens=at.tokens, updates=at.update, seconds=seconds, curve=curve,
        memory_before=before, memory=peak,
    )  # fmt: skip


def _timed(device: torch.device, trainer: Trainer, window: Window) -> float:
    """Seconds that an update takes: of the GPU, or of this process on a CPU."""
    if device.type == "cpu":
        start = time.process_time()
        trainer.update(window)
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    trainer.update(window)
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def at_tokens(result: dict[str, Any], tokens: int) -> list[float] | None:
    """The point of the curve after so many tokens, if it got there."""
    return next((point for point in result["curve"] if point[0] >= tokens), None)


def at_seconds(result: dict[str, Any], seconds: float) -> list[float]:
    """The point of the curve after so many seconds: the last that was there by then."""
    reached = [point for point in result["curve"] if point[1] <= 1.02 * seconds]
    return max(reached, key=lambda point: point[1])


def table(goal: argparse.Namespace, results: dict[str, dict[str, Any]]) -> str:
    """The results in Markdown."""
    hardware = hardware_of(select_device(goal.device))
    lines = [
        f"`python -m benchmarks.bptt {' '.join(goal.shown)}`",
        "",
        f"{hardware}, torch {torch.__version__}, float32. "
        f"{SIZES['nlayers']} layers, embedding {SIZES['ninp']}, hidden {SIZES['nhid']}, "
        f"{BATCH} columns, clip {CLIP}, AR 2, TAR 1, dropouts {', '.join(map(str, RATES.values()))}"
        f"; one seed, one process a scheme, one after the other. Trained on the first "
        f"{goal.text:,} tokens of the text, again and again; perplexity on the first "
        f"{VALID_TOKENS:,} tokens of the validation text. Time is that of training alone (on a CPU "
        "the time of the one thread that computes); memory is the process's peak, in brackets "
        "before the first update.",
        "",
        f"| scheme | --lr | µs/token | memory, MiB | updates, ppl after {goal.tokens:,} tokens "
        f"| tokens, updates, ppl after {goal.seconds:g} s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, r in results.items():
        tokens, timed = at_tokens(r, goal.tokens), at_seconds(r, goal.seconds)
        equal = "not reached" if tokens is None else f"{tokens[2]:,.0f}, **{tokens[3]:,.1f}**"
        lines.append(
            f"| {name} | {r['lr']:.3g} | {1e6 * r['seconds'] / r['tokens']:,.1f} "
            f"| {r['memory'] / 2**20:,.0f} ({r['memory_before'] / 2**20:,.0f}) | {equal} "
            f"| {timed[0]:,.0f}, {timed[2]:,.0f}, **{timed[3]:,.1f}** |"
        )
    return "\n".join([*lines, ""])


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="data/penn")
    parser.add_argument("--seconds", type=float, default=15.0, help="of training, per scheme")
    parser.add_argument("--tokens", type=int, default=100_000, help="to compare after")
    parser.add_argument("--text", type=int, default=50_000, help="tokens of text to train on")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, help="write the Markdown here, and JSON beside it")
    parser.add_argument("--only", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    goal = parser.parse_args()
    goal.shown = sys.argv[1:]
    if goal.only:
        torch.set_num_threads(1)
        corpus = load_corpus(goal.data)
        corpus = replace(corpus, train=corpus.train[: goal.text])
        print(json.dumps(measure(goal.only, corpus, goal)))
        return 0
    ensure_corpus(goal.data)
    load_corpus(goal.data)  # cached now, so that no scheme pays for reading it
    results = {}
    for name in CONTENDERS:
        command = [sys.executable, "-m", "benchmarks.bptt", *sys.argv[1:], "--only", name]
        print(f"{name} …", file=sys.stderr, flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(done.stdout)
    text = table(goal, results)
    print(text)
    if goal.output:
        goal.output.write_text(text)
        goal.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
