"""Measures cost and perplexity of the schemes of back-propagation through time.

python -m benchmarks.bptt --data data/penn --seconds 15 --output FILE.md

Each scheme trains a small model in a separate process, one after the other: cost per token, peak
memory, and validation perplexity after the same number of tokens and after the same time. On a
CPU it measures the CPU time of a single thread, which depends little on the machine's load.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from assembly import build_model, build_optimizer, build_scheme, build_updater
from benchmarks.training import hardware_of
from bptt import Window
from data.corpus import Corpus, batchify, load_corpus
from data.download import ensure_corpus
from engine.device import peak_memory, select_device
from engine.ranks import Ranks
from evaluation.evaluate import evaluate, perplexity
from evaluation.plain import Plain
from flags.training import parse_training, settle_scheme
from training.state import Position

FLAGS = (
    "--emsize 64 --nhid 128 --nlayers 2 --batch_size 40 --clip 0.25 --wdecay 1.2e-6 --seed 1 "
    "--dropout 0.2 --dropouth 0.15 --dropouti 0.2 --dropoute 0.05 --wdrop 0.3 --bptt 35 --lr 20"
)
# The flags of each scheme. If --bptt is not 35, the rate is chosen such that a row has the same
# weight in all schemes. For full BPTT that would be hundreds of times --lr per update: it gets --lr
# for any length.
SCHEMES = {
    "variable, 35": "",
    "fixed, k1 = k2 = 35": "--bptt-scheme fixed",
    "fixed, k1 = k2 = 5": f"--bptt-scheme fixed --bptt 5 --lr {20 * 5 / 35}",
    "fixed, k1 = k2 = 1": f"--bptt-scheme fixed --bptt 1 --lr {20 / 35}",
    "fixed, k1 = 12, k2 = 35": "--bptt-scheme fixed --k1 12",
    "fixed, k1 = 70, k2 = 35": "--bptt-scheme fixed --k1 70",
    "randomized, 35, keep 0.5": "--bptt-scheme randomized",
    "full, segments of 35": "--bptt-scheme full",
}
VALID_TOKENS = 10_000


class Training:
    """Trains a small model with one scheme.

    at: updates, tokens and rows so far.
    seconds: time of its updates; on a CPU this process's CPU time.
    """

    def __init__(self, name: str, corpus: Corpus, device: torch.device) -> None:
        self.args, _ = parse_training(shlex.split(f"{FLAGS} {SCHEMES[name]}"))
        settle_scheme(self.args)
        rows = batchify(corpus.train, self.args.batch_size).to(device)
        self.num_steps = len(rows) - 1
        if self.args.bptt_scheme == "full":
            self.args.lr *= self.args.bptt / self.num_steps
        torch.manual_seed(self.args.seed)
        self.model = build_model(self.args, len(corpus.vocabulary)).to(device)
        self.scheme = build_scheme(self.args)
        self.device = device
        optimizer = build_optimizer(self.args, self.model)
        generator = torch.Generator(device).manual_seed(self.args.seed)
        self.updater, _ = build_updater(
            self.args, self.model, optimizer, rows, generator, "fp32", None, Ranks()
        )
        self.at = Position()
        self.seconds = 0.0

    def windows(self) -> Iterator[Window]:
        """Yield windows without end, and train on each after yielding it."""
        while True:
            hidden = self.model.init_hidden(self.args.batch_size)
            for window in self.scheme.windows(self.num_steps):
                yield window
                self.model.train()
                start = self._clock()
                hidden = self.updater(window, hidden).hidden
                self.seconds += self._clock() - start
                self.at.advance(window.counted, window.counted * self.args.batch_size)

    def _clock(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


def measure(name: str, corpus: Corpus, goal: argparse.Namespace) -> dict[str, Any]:
    """Train until both the tokens and the seconds are reached, or 1.5 times the seconds passed.

    Returns:
        lr; tokens, updates and seconds (of training alone) in all; the process's peak memory
        before the first update and with updates, bytes; and the curve: [tokens, seconds, updates,
        validation perplexity] at the start, at half and all of the tokens and at the seconds.
    """
    device = select_device(goal.device)
    training = Training(name, corpus, device)
    before = peak = peak_memory(device)
    at, curve = training.at, list[list[float]]()
    marks, timed = [0, goal.tokens / 2, goal.tokens], False
    for _ in training.windows():
        due = not timed and training.seconds >= goal.seconds
        if due or (marks and at.tokens >= marks[0]):
            timed |= due
            marks = [mark for mark in marks if mark > at.tokens]
            peak = peak if len(curve) > 1 else peak_memory(device)
            loss = evaluate(Plain(training.model), corpus.valid[:VALID_TOKENS], 10)
            curve.append([at.tokens, training.seconds, at.update, perplexity(loss)])
        if training.seconds >= 1.5 * goal.seconds or (timed and not marks):
            break
    return dict(
        lr=training.args.lr, tokens=at.tokens, updates=at.update, seconds=training.seconds,
        curve=curve, memory_before=before, memory=peak,
    )  # fmt: skip


def at_tokens(result: dict[str, Any], tokens: int) -> list[float] | None:
    """The curve's point after this many tokens; None if not reached."""
    return next((point for point in result["curve"] if point[0] >= tokens), None)


def at_seconds(result: dict[str, Any], seconds: float) -> list[float]:
    """The curve's last point within this many seconds."""
    reached = [point for point in result["curve"] if point[1] <= 1.02 * seconds]
    return max(reached, key=lambda point: point[1])


def table(goal: argparse.Namespace, results: dict[str, dict[str, Any]]) -> str:
    """The results in Markdown."""
    hardware = hardware_of(select_device(goal.device))
    lines = [
        f"`python -m benchmarks.bptt {' '.join(goal.shown)}`",
        "",
        f"{hardware}, torch {torch.__version__}, float32. Flags: `{FLAGS}`; one process a scheme, "
        f"one after the other. Trained on the first {goal.text:,} tokens of the text, again and "
        "again; perplexity on the first "
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
    parser.add_argument("--only", choices=list(SCHEMES), help=argparse.SUPPRESS)
    goal = parser.parse_args()
    goal.shown = sys.argv[1:]
    if goal.only:
        torch.set_num_threads(1)
        corpus = load_corpus(goal.data)
        corpus = replace(corpus, train=corpus.train[: goal.text])
        print(json.dumps(measure(goal.only, corpus, goal)))
        return 0
    ensure_corpus(goal.data)
    results = {}
    for name in SCHEMES:
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
