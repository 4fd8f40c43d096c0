"""Measures the speed of updates, this project's and a baseline's, interleaved in one process.

python -m benchmarks.training --recipe penn --updates 20 --output FILE.md
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from assembly import build_loss_scale, build_model, build_optimizer, build_updater
from benchmarks.baseline import BaselineModel, BaselineStep
from bptt import VariableWindows, Window
from data.corpus import batchify
from data.files import atomic_write
from engine.device import keep_freed_memory, peak_memory, reset_peak_memory, select_device
from engine.provenance import cpu_name, gpu_name
from engine.ranks import Ranks
from flags.training import parse_training
from kernels.choose import in_words
from kernels.precision import choose_precision, set_products
from training.state import Position
from training.tally import Tally


class Recipe(NamedTuple):
    """A corpus's vocabulary size and tokens, and the flags that differ from main.py's defaults."""

    ntoken: int
    tokens: int
    flags: str


RECIPES = {
    "penn": Recipe(10_000, 929_589, "--batch_size 20 --dropouth 0.25 --dropouti 0.4"),
    "wikitext-2": Recipe(33_278, 2_088_628, "--batch_size 80 --dropouth 0.2"),
    "small": Recipe(
        10_000,
        929_589,
        "--batch_size 40 --emsize 128 --nhid 256 --bptt 35 --dropout 0.2 --dropouth 0.15 "
        "--dropouti 0.2 --dropoute 0.05 --wdrop 0.3",
    ),
}

# Makes updates from windows; returns the seconds of each.
Updates = Callable[[list[Window]], list[float]]
# Updates of a path before the next path's turn. A GPU is timed by events, without synchronisation,
# as in training.
IN_A_ROW, IN_A_ROW_GPU = 1, 10


def recipe_flags(recipe: Recipe, *more: str) -> argparse.Namespace:
    """main.py's flags, with a learning rate that suits random text."""
    return parse_training([*shlex.split(recipe.flags), "--lr", "1", *more])[0]


def zipf_text(recipe: Recipe) -> torch.Tensor:
    """Random text with word frequencies proportional to 1 / rank, as in real text."""
    share = 1 / np.arange(1, recipe.ntoken + 1)
    words = np.random.default_rng(0).choice(recipe.ntoken, recipe.tokens, p=share / share.sum())
    return torch.from_numpy(words.astype(np.int32))


def ours(path: str, recipe: Recipe, text: torch.Tensor, device: torch.device) -> Updates:
    """main.py's update.

    Args:
        path: PRECISION, or PRECISION-KERNEL with a value of --kernel.
    """
    precision, _, kernel = path.partition("-")
    set_products(precision, device)  # the kernels' trials are to run as training will
    choose_precision(precision, device)
    args = recipe_flags(recipe, "--precision", precision, "--kernel", kernel or "auto")
    model = build_model(args, recipe.ntoken).to(device).train()
    optimizer, loss_scale = build_optimizer(args, model), build_loss_scale(args, precision)
    rows = batchify(text, args.batch_size).to(device)
    generator = torch.Generator(device).manual_seed(1)
    updater, kernels = build_updater(
        args, model, optimizer, rows, generator, precision, loss_scale, Ranks()
    )
    print(f"| {path} | {in_words(kernels)}", file=sys.stderr, flush=True)

    def end_step(update: int, overflow: bool, largest: float | None) -> None:
        updater.step.note(overflow)
        if loss_scale is not None:
            loss_scale.note(overflow, largest)

    position = Position()
    tally = Tally(device, position, end_step, lambda what, update: f"{what} at update {update}")
    hidden = model.init_hidden(args.batch_size)

    def update(window: Window) -> None:
        """As Trainer.update."""
        nonlocal hidden
        tokens = window.counted * args.batch_size
        position.advance(window.counted, tokens)
        outcome = updater(window, hidden)
        hidden = outcome.hidden
        tally.add(position.update, outcome, tokens)
        if updater.step.synchronizes:
            tally.check()

    def updates(windows: list[Window]) -> list[float]:
        set_products(precision, device)  # a setting of the whole process
        return _timed(device, update, windows)

    return updates


def baseline(precision: str, recipe: Recipe, text: torch.Tensor, device: torch.device) -> Updates:
    """The baseline's update: float32, or bf16 by autocast."""
    args = recipe_flags(recipe)
    names = ("dropout", "dropouth", "dropouti", "dropoute", "wdrop")
    dropouts = {name: getattr(args, name) for name in names}
    model = BaselineModel(recipe.ntoken, args.emsize, args.nhid, args.nlayers, dropouts).to(device)
    step = BaselineStep(model, args.lr, args.clip, args.wdecay)
    rows = batchify(text, args.batch_size).long().to(device)
    hidden = model.init_hidden(args.batch_size)

    def step_on(window: Window) -> None:
        nonlocal hidden
        part = rows[window.start : window.start + window.length + 1]
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            _, hidden = step(part[:-1], part[1:], hidden, window.length / args.bptt)
        hidden = [(h.float(), c.float()) for h, c in hidden]

    def updates(windows: list[Window]) -> list[float]:
        set_products("fp32" if precision == "bf16" else precision, device)
        return _timed(device, step_on, windows)

    return updates


def paths_on(device: torch.device) -> list[str]:
    """The paths to measure on a device; the last one is the reference of ratios."""
    ours = ["fp32", "bf16", "bf16-plain"]
    if device.type == "cuda":
        ours = ["fp32", "tf32", "bf16", "fp16", "bf16-eager", "fp16-eager"]
        ours += ["tf32-plain", "bf16-plain", "fp16-plain"]
    return [*ours, "baseline-bf16", "baseline-fp32"]


def start(path: str, *arguments: Any) -> Updates:
    """Set up a path by its name."""
    kind, _, precision = path.partition("-")
    return baseline(precision, *arguments) if kind == "baseline" else ours(path, *arguments)


def turn_length(device: torch.device) -> int:
    """Updates of a path before the next path's turn."""
    return IN_A_ROW_GPU if device.type == "cuda" else IN_A_ROW


def _timed(
    device: torch.device, update: Callable[[Window], None], windows: list[Window]
) -> list[float]:
    if device.type == "cuda":
        update(windows[0])  # fills the queue before the first measurement
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(windows) + 1)]
        marks[0].record()
        for window, mark in zip(windows, marks[1:], strict=True):
            update(window)
            mark.record()
        torch.cuda.synchronize(device)
        return [a.elapsed_time(b) / 1000 for a, b in pairwise(marks)]
    seconds = []
    for window in windows:
        start = time.perf_counter()
        update(window)
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(recipe: Recipe, paths: list[str], updates: int, device: torch.device) -> dict[str, Any]:
    """Time the paths in turn, over the same windows.

    Returns:
        Per path: tokens_per_second and ms (medians over the updates), ms_p90, ratio (the last
        path's time over its own, median of the pairs) and, on a GPU, the bytes of its memory at
        the peak; and the bytes of memory at the peak, of all paths together.
    """
    args, text = recipe_flags(recipe), zipf_text(recipe)
    num_steps = len(text) // args.batch_size - 1
    windows = list(VariableWindows(args.bptt, 2).windows(num_steps))[: updates + 2]
    by_length = sorted({w.length: w for w in windows}.values(), key=lambda w: -w.length)
    steps, memory = dict[str, Updates](), dict[str, int]()
    for name in paths:
        if device.type != "cuda":
            steps[name] = start(name, recipe, text, device)
            continue
        reset_peak_memory(device)
        before = peak_memory(device)
        steps[name] = start(name, recipe, text, device)
        for window in by_length:  # graphs are captured when a length comes a second time
            steps[name]([window] * 2)
        memory[name] = peak_memory(device) - before
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    size = turn_length(device)
    for turn, first in enumerate(range(0, len(windows), size)):
        shift = turn % len(paths)  # so that no path always follows the same one
        for name in paths[shift:] + paths[:shift]:
            seconds[name] += steps[name](windows[first : first + size])
    tokens = [window.length * args.batch_size for window in windows[2:]]
    results: dict[str, Any] = {}
    for name in paths:
        times = seconds[name][2:]  # the first two warm up
        rates = [n / s for n, s in zip(tokens, times, strict=True)]
        results[name] = dict(
            tokens_per_second=statistics.median(rates),
            ms=1000 * statistics.median(times),
            ms_p90=1000 * sorted(times)[int(0.9 * len(times))],
            seconds_per_epoch=num_steps * args.batch_size / statistics.median(rates),
        )
    results["peak_memory"] = peak_memory(device)
    for name in paths:
        pairs = zip(seconds[name][2:], seconds[paths[-1]][2:], strict=True)
        results[name]["ratio"] = statistics.median(theirs / own for own, theirs in pairs)
        if name in memory:
            results[name]["memory"] = memory[name]
    return results


def memory_alone(recipe: str, path: str) -> int:
    """Peak memory of one path in a separate process on a CPU, bytes, the median of three."""
    command = [sys.executable, "-m", "benchmarks.training", "--recipe", recipe, "--updates", "8"]
    command += ["--device", "cpu", "--only", path]
    peaks = []
    for _ in range(3):
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(json.loads(result.stdout)["peak_memory"]))
    return int(statistics.median(peaks))


def hardware_of(device: torch.device) -> str:
    """Name of the GPU or CPU."""
    return gpu_name(device) or cpu_name()


def table(args: argparse.Namespace, results: dict[str, Any], device: torch.device) -> str:
    """The results in Markdown."""
    hardware = hardware_of(device)
    lines = [
        f"`python -m benchmarks.training {' '.join(sys.argv[1:])}`",
        "",
        f"{hardware}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"{'malloc keeps freed memory; ' if args.keep_memory else ''}"
        f"medians over {args.updates} updates, the paths in turn on the same windows, each "
        f"{turn_length(device)} at a time; ratio: the "
        "last path's time over a path's own, median of the pairs; memory: peak of each path, on a "
        "GPU what torch took for it, on a CPU in a process of its own, median of three. A path is "
        "a precision by the fastest kernel, or by `--kernel eager` or `plain`; the baselines are "
        "stock parts.",
        "",
        f"| {args.recipe} | tokens/s | ratio | ms/update | p90 | s/epoch | memory, MiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in args.paths or paths_on(device):
        r = results[name]
        memory = f"{r['memory'] / 2**20:,.0f}" if "memory" in r else ""
        lines.append(
            f"| {name} | {r['tokens_per_second']:,.0f} | {r['ratio']:.2f} | {r['ms']:,.1f} "
            f"| {r['ms_p90']:,.1f} | {r['seconds_per_epoch']:,.1f} | {memory} |"
        )
    return "\n".join([*lines, ""])


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", choices=list(RECIPES), default="penn")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, help="write the Markdown here, and JSON beside it")
    what = "have malloc keep what is freed, as main.py does on a CPU"
    parser.add_argument("--keep-memory", action="store_true", help=what)
    parser.add_argument("--paths", nargs="+", help="the paths to measure; see paths_on")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = select_device(args.device)
    if args.keep_memory:
        keep_freed_memory()
    torch.manual_seed(1)
    recipe = RECIPES[args.recipe]
    if args.only:
        print(json.dumps(measure(recipe, [args.only], args.updates, device)))
        return 0
    paths = args.paths or paths_on(device)
    results = measure(recipe, paths, args.updates, device)
    if device.type == "cpu":
        write(args, results, device)  # what follows takes as long again
        for name in paths:
            results[name]["memory"] = memory_alone(args.recipe, name)
    write(args, results, device)
    print(table(args, results, device))
    return 0


def write(args: argparse.Namespace, results: dict[str, Any], device: torch.device) -> None:
    """Write the Markdown to --output, and the JSON beside it."""
    if args.output:
        for path, text in (
            (args.output, table(args, results, device)),
            (args.output.with_suffix(".json"), json.dumps(results, indent=2) + "\n"),
        ):
            with atomic_write(path) as file:
                file.write(text.encode())


if __name__ == "__main__":
    sys.exit(main())
