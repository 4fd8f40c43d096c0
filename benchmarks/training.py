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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.baseline import BaselineModel, BaselineStep
from bptt import VariableWindows, Window
from data.corpus import Corpus, Vocabulary
from engine.device import peak_memory, select_device
from engine.interrupt import Interrupt
from engine.run_folder import RunFolder
from engine.trainer import Trainer
from engine.training_state import TrainingOptions
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

Update = Callable[[Window], float]


def zipf_corpus(ntoken: int, tokens: int) -> Corpus:
    """Random text whose words are as frequent as those of a real one (1 / rank)."""
    share = 1 / np.arange(1, ntoken + 1)
    words = np.random.default_rng(0).choice(ntoken, tokens, p=share / share.sum())
    train = torch.from_numpy(words.astype(np.int32))
    vocabulary = Vocabulary([f"w{i}" for i in range(ntoken)])
    return Corpus(vocabulary, train, train[:1000], train[:1000], "zipf")


def ours(recipe: dict[str, Any], corpus: Corpus, device: torch.device, stack: ExitStack) -> Update:
    """The trainer's own update."""
    model = RNNModel(
        "LSTM", recipe["ntoken"], recipe["ninp"], recipe["nhid"], recipe["nlayers"],
        **recipe["dropouts"], tie_weights=True,
    ).to(device)  # fmt: skip
    folder = stack.enter_context(
        RunFolder(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run.pt")
    )
    options = TrainingOptions(
        epochs=1, batch_size=recipe["batch_size"], bptt=recipe["bptt"], clip=CLIP, alpha=2, beta=1
    )
    trainer = Trainer(
        model, NTASGD(model.parameters(), LR, WDECAY), VariableWindows(recipe["bptt"], 1), corpus,
        options, folder, Interrupt(), identity={},
    )  # fmt: skip
    model.train()
    return lambda window: _timed(device, lambda: trainer.update(window))


def baseline(
    recipe: dict[str, Any], corpus: Corpus, device: torch.device, stack: ExitStack
) -> Update:
    """The straightforward implementation's update."""
    names = ("ntoken", "ninp", "nhid", "nlayers", "dropouts")
    model = BaselineModel(**{name: recipe[name] for name in names}).to(device)
    step = BaselineStep(model, LR, CLIP, WDECAY)
    batch_size = recipe["batch_size"]
    rows = corpus.train[: len(corpus.train) // batch_size * batch_size]
    rows = rows.long().view(batch_size, -1).t().contiguous().to(device)
    hidden = model.init_hidden(batch_size)

    def update(window: Window) -> None:
        nonlocal hidden
        part = rows[window.start : window.start + window.length + 1]
        _, hidden = step(part[:-1], part[1:], hidden, window.length / recipe["bptt"])

    return lambda window: _timed(device, lambda: update(window))


PATHS: dict[str, Callable[..., Update]] = {"ours": ours, "baseline": baseline}


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(
    recipe: dict[str, Any], paths: list[str], updates: int, device: torch.device
) -> dict[str, Any]:
    """Time the paths update by update in turn, over the same windows.

    Returns:
        Per path: tokens_per_second and ms (medians over the updates), ms_p90; and the bytes of
        memory at the peak, of all paths together.
    """
    with ExitStack() as stack:
        corpus = zipf_corpus(recipe["ntoken"], recipe["tokens"])
        steps = {name: PATHS[name](recipe, corpus, device, stack) for name in paths}
        num_steps = len(corpus.train) // recipe["batch_size"] - 1
        windows = list(VariableWindows(recipe["bptt"], 2).windows(num_steps))[: updates + 2]
        seconds: dict[str, list[float]] = {name: [] for name in paths}
        for turn, window in enumerate(windows):
            for name in paths if turn % 2 else reversed(paths):
                seconds[name].append(steps[name](window))
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
        if len(paths) == 2:
            ratios = [b / a for a, b in zip(*(seconds[name][2:] for name in paths), strict=True)]
            results["ratio"] = statistics.median(ratios)
    return results


def memory_alone(recipe: str, path: str, device: str) -> int:
    """Peak memory of one path in a process of its own, bytes: the median of three processes."""
    command = [sys.executable, "-m", "benchmarks.training", "--recipe", recipe, "--updates", "8"]
    command += ["--device", device, "--only", path]
    peaks = []
    for _ in range(3):
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
        f"{hardware}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32; "
        f"medians over {args.updates} updates, the two paths in turn on the same windows; memory: "
        "peak of each path in a process of its own, median of three.",
        "",
        f"| {args.recipe} | tokens/s | ms/update | p90 | s/epoch | memory, MiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in PATHS:
        r = results[name]
        lines.append(
            f"| {name} | {r['tokens_per_second']:,.0f} | {r['ms']:,.1f} | {r['ms_p90']:,.1f} "
            f"| {r['seconds_per_epoch']:,.1f} | {r['memory'] / 2**20:,.0f} |"
        )
    lines += ["", f"Baseline's time over ours, median of the pairs: {results['ratio']:.3f}.", ""]
    return "\n".join(lines)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", choices=list(RECIPES), default="penn")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, help="write the Markdown here, and JSON beside it")
    parser.add_argument("--only", choices=list(PATHS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = select_device(args.device)
    torch.manual_seed(1)
    recipe = RECIPES[args.recipe]
    if args.only:
        print(json.dumps(measure(recipe, [args.only], args.updates, device)))
        return 0
    results = measure(recipe, list(PATHS), args.updates, device)
    for name in PATHS:
        results[name]["memory"] = memory_alone(args.recipe, name, args.device)
    text = table(args, results, device)
    print(text)
    if args.output:
        args.output.write_text(text)
        args.output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
