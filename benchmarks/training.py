"""How fast is an update? This project's and a straightforward one, interleaved in one process.

python -m benchmarks.training --recipe penn --updates 20 --output FILE.md
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine.graphs import CudaRecorder
from engine.loss_scale import LossScale
from engine.trainer import Trainer
from engine.training_state import TrainingOptions

from benchmarks.baseline import BaselineModel, BaselineStep
from bptt import VariableWindows, Window
from data.corpus import Corpus, Vocabulary
from data.files import atomic_write
from engine.device import keep_freed_memory, peak_memory, select_device
from engine.interrupt import Interrupt
from engine.run_folder import RunFolder
from engine.tracking import Tracker, WandbOptions
from kernels.precision import DTYPES, allow_products, choose_kernel, choose_precision
from model import RNNModel
from nt_asgd import NTASGD

# The sizes and dropouts of the recipes of these names, and the tokens of their corpora.
RECIPES: dict[str, dict[str, Any]] = {
    "penn": dict(
        ntoken=10_000, tokens=929_589, batch_size=20, ninp=400, nhid=1150, nlayers=3, bptt=70,
        dropouts=dict(dropout=0.4, dropouth=0.25, dropouti=0.4, dropoute=0.1, wdrop=0.5),
    ),
    "wikitext-2": dict(
        ntoken=33_278, tokens=2_088_628, batch_size=80, ninp=400, nhid=1150, nlayers=3, bptt=70,
        dropouts=dict(dropout=0.4, dropouth=0.2, dropouti=0.65, dropoute=0.1, wdrop=0.5),
    ),
    "small": dict(
        ntoken=10_000, tokens=929_589, batch_size=40, ninp=128, nhid=256, nlayers=3, bptt=35,
        dropouts=dict(dropout=0.2, dropouth=0.15, dropouti=0.2, dropoute=0.05, wdrop=0.3),
    ),
}  # fmt: skip
LR, CLIP, WDECAY = 1.0, 0.25, 1.2e-6

# Makes updates from windows; returns the seconds that each took.
Updates = Callable[[list[Window]], list[float]]
# Paths take turns after so many updates. On a GPU they are timed by its own clock, since training
# does not wait for it either.
IN_A_ROW, IN_A_ROW_GPU = 1, 10


def zipf_corpus(ntoken: int, tokens: int) -> Corpus:
    """Random text whose words are as frequent as those of a real one (1 / rank)."""
    share = 1 / np.arange(1, ntoken + 1)
    words = np.random.default_rng(0).choice(ntoken, tokens, p=share / share.sum())
    train = torch.from_numpy(words.astype(np.int32))
    vocabulary = Vocabulary([f"w{i}" for i in range(ntoken)])
    return Corpus(vocabulary, train, train[:1000], train[:1000], "zipf")


def ours(
    path: str,
    recipe: dict[str, Any],
    corpus: Corpus,
    device: torch.device,
    stack: ExitStack,
) -> Updates:
    """The trainer's own update, by the kernel that main.py would take, or by its flags.

    Args:
        path: PRECISION, PRECISION-KERNEL for --kernel's, PRECISION-wavefront for --wavefront 3.
    """
    precision, _, asked = path.partition("-")
    kernel = "plain" if asked == "plain" else choose_kernel(precision, device)[0]
    recorded = device.type == "cuda" and asked in ("", "wavefront")
    model = RNNModel(
        "LSTM", recipe["ntoken"], recipe["ninp"], recipe["nhid"], recipe["nlayers"],
        **recipe["dropouts"], tie_weights=True,
    ).to(device)  # fmt: skip
    chunks = 3 if asked == "wavefront" and kernel == "cudnn" else 1
    model.compute_in(DTYPES[precision], kernel, chunks)
    folder = stack.enter_context(
        RunFolder(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run.pt")
    )
    options = TrainingOptions(
        epochs=1, batch_size=recipe["batch_size"], bptt=recipe["bptt"], clip=CLIP, alpha=2, beta=1
    )
    trainer = Trainer(
        model, NTASGD(model.parameters(), LR, WDECAY), VariableWindows(recipe["bptt"], 1), corpus,
        options, folder, Interrupt(), identity={},
        loss_scale=LossScale() if precision == "fp16" else None,
        recorder=CudaRecorder(device) if recorded else None,
    )  # fmt: skip
    trainer.tracker = stack.enter_context(closing(Tracker(folder.folder, {}, WandbOptions())))
    model.train()
    choose_precision(precision, device)

    def updates(windows: list[Window]) -> list[float]:
        allow_products(precision, device)  # a setting of the whole process
        return _timed(device, trainer.update, windows)

    return updates


def baseline(
    precision: str,
    recipe: dict[str, Any],
    corpus: Corpus,
    device: torch.device,
    stack: ExitStack,
) -> Updates:
    """The straightforward implementation's update: float32, or bf16 by autocast."""
    names = ("ntoken", "ninp", "nhid", "nlayers", "dropouts")
    model = BaselineModel(**{name: recipe[name] for name in names}).to(device)
    step = BaselineStep(model, LR, CLIP, WDECAY)
    batch_size = recipe["batch_size"]
    rows = corpus.train[: len(corpus.train) // batch_size * batch_size]
    rows = rows.long().view(batch_size, -1).t().contiguous().to(device)
    hidden = model.init_hidden(batch_size)

    def step_on(window: Window) -> None:
        nonlocal hidden
        part = rows[window.start : window.start + window.length + 1]
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            _, hidden = step(part[:-1], part[1:], hidden, window.length / recipe["bptt"])
        hidden = [(h.float(), c.float()) for h, c in hidden]

    def updates(windows: list[Window]) -> list[float]:
        allow_products("fp32" if precision == "bf16" else precision, device)
        return _timed(device, step_on, windows)

    return updates


def paths_on(device: torch.device) -> list[str]:
    """The paths that a device can take; the last one is what they are held against."""
    ours = ["fp32", "bf16", "bf16-plain"]
    if device.type == "cuda":
        ours = ["fp32", "tf32", "bf16", "fp16"]
        ours += ["tf32-wavefront", "bf16-wavefront", "bf16-eager", "fp16-eager"]
        ours += ["tf32-plain", "bf16-plain", "fp16-plain"]
    return [*ours, "baseline-bf16", "baseline-fp32"]


def start(path: str, *arguments: Any) -> Updates:
    """Set up a path by its name."""
    kind, _, precision = path.partition("-")
    return baseline(precision, *arguments) if kind == "baseline" else ours(path, *arguments)


def turn_length(device: torch.device) -> int:
    """Updates of a path before the next one's."""
    return IN_A_ROW_GPU if device.type == "cuda" else IN_A_ROW


def _timed(
    device: torch.device, update: Callable[[Window], None], windows: list[Window]
) -> list[float]:
    if device.type == "cuda":
        update(windows[0])  # so that the first one measured finds the queue filled
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


def measure(
    recipe: dict[str, Any], paths: list[str], updates: int, device: torch.device
) -> dict[str, Any]:
    """Time the paths in turn, over the same windows.

    Returns:
        Per path: tokens_per_second and ms (medians over the updates), ms_p90, ratio (the last
        path's time over its own, median of the pairs); and the bytes of memory at the peak, of
        all paths together.
    """
    with ExitStack() as stack:
        corpus = zipf_corpus(recipe["ntoken"], recipe["tokens"])
        steps = {name: start(name, recipe, corpus, device, stack) for name in paths}
        num_steps = len(corpus.train) // recipe["batch_size"] - 1
        windows = list(VariableWindows(recipe["bptt"], 2).windows(num_steps))[: updates + 2]
        if device.type == "cuda":  # graphs are recorded when a length comes a second time
            for window in {window.length: window for window in windows}.values():
                for name in paths:
                    steps[name]([window] * 2)
        seconds: dict[str, list[float]] = {name: [] for name in paths}
        size = turn_length(device)
        for turn, first in enumerate(range(0, len(windows), size)):
            shift = turn % len(paths)  # so that none always follows the same one
            for name in paths[shift:] + paths[:shift]:
                seconds[name] += steps[name](windows[first : first + size])
        tokens = [window.length * recipe["batch_size"] for window in windows[2:]]
        results: dict[str, Any] = {}
        for name in paths:
            times = seconds[name][2:]  # the first two warm up
            rates = [n / s for n, s in zip(tokens, times, strict=True)]
            results[name] = dict(
                tokens_per_second=statistics.median(rates),
                ms=1000 * statistics.median(times),
                ms_p90=1000 * sorted(times)[int(0.9 * len(times))],
                seconds_per_epoch=num_steps * recipe["batch_size"] / statistics.median(rates),
            )
        results["peak_memory"] = peak_memory(device)
        for name in paths:
            pairs = zip(seconds[name][2:], seconds[paths[-1]][2:], strict=True)
            results[name]["ratio"] = statistics.median(theirs / own for own, theirs in pairs)
    return results


def memory_alone(recipe: str, path: str, device: str) -> int:
    """Peak memory of one path in a process of its own, bytes.

    On a CPU the median of three processes; on a GPU, whose allocator counts, one tells.
    """
    command = [sys.executable, "-m", "benchmarks.training", "--recipe", recipe, "--updates", "8"]
    command += ["--device", device, "--only", path]
    peaks = []
    for _ in range(1 if device.startswith("cuda") else 3):
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(json.loads(result.stdout)["peak_memory"]))
    return int(statistics.median(peaks))


def hardware_of(device: torch.device) -> str:
    """What the numbers were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


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
        "float32 baseline's time over a path's own, median of the pairs; memory: peak of each path "
        "in a process of its own, median of three (one on a GPU). A path is a precision by the "
        "fastest kernel, or by `--kernel eager` or `plain`, or with `--wavefront 3`; the baselines "
        "are stock parts.",
        "",
        f"| {args.recipe} | tokens/s | ratio | ms/update | p90 | s/epoch | memory, MiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in paths_on(device):
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
    results = measure(recipe, paths_on(device), args.updates, device)
    write(args, results, device)  # what follows takes as long again
    for name in paths_on(device):
        results[name]["memory"] = memory_alone(args.recipe, name, str(device))
    write(args, results, device)
    print(table(args, results, device))
    return 0


def write(args: argparse.Namespace, results: dict[str, Any], device: torch.device) -> None:
    """Write the Markdown and the JSON to where they are wanted."""
    if args.output:
        for path, text in (
            (args.output, table(args, results, device)),
            (args.output.with_suffix(".json"), json.dumps(results, indent=2) + "\n"),
        ):
            with atomic_write(path) as file:
                file.write(text.encode())


if __name__ == "__main__":
    sys.exit(main())
