"""What a GPU is good for here: cuDNN's layers, its hidden algorithms, graphs, streams, wavefronts.

python -m benchmarks.probe --output FILE.md [--budget SECONDS]

Writes the Markdown, and JSON beside it, after each part. A part runs in a process of its own, so
that none takes the others down; the same call again does what there was no time for.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.probes import cudnn_api, device_facts, flattening, graphs, layers, wavefront
from benchmarks.probes.clock import SIZES, Clock, NotHereError, Row, Sizes
from data.files import atomic_write
from engine.device import select_device
from engine.errors import RunError, UsageError
from engine.program import run_program

LEAST_SECONDS = 15  # a part that has less is left for the next call
DONE, OUT_OF_TIME = "done", "out of time"
Found = tuple[str, list[Row]]  # how a part ended, and its rows up to there


class Part(NamedTuple):
    """Something to find out."""

    title: str
    rows: Callable[[Sizes, Clock], Iterator[Row]]
    headline: Callable[[list[Row]], str]
    limit: int  # seconds


def _cudnn(algorithm: str) -> Part:
    title = f"cuDNN's {algorithm}, through its own interface, against standard as PyTorch calls it"
    rows = cudnn_api.rows_of(algorithm)
    return Part(f"{title}; input as wide as the layer", rows, cudnn_api.headline, 75)


# What decides most comes first, in case there is no time for all.
PARTS = {
    "device": Part("The device", device_facts.rows, device_facts.headline, 60),
    "cudnn-persist-static": _cudnn("persist-static"),
    "layers": Part(
        "One layer, as PyTorch calls cuDNN; T = 70. ms: from event to event; host ms: until the "
        "call returns; kernels ms: the profiler's sum",
        layers.rows, layers.headline, 120,
    ),
    "graphs": Part(
        "Whole updates in CUDA graphs; in short: ms of one in bf16",
        graphs.rows, graphs.headline, 90,
    ),
    "wavefront": Part(
        "Layers that overlap; graphs but for the first row; in short: ms in bf16",
        wavefront.rows, wavefront.headline, 90,
    ),
    "flattening": Part(
        "A masked weight, and where it lies", flattening.rows, flattening.headline, 60
    ),
    "cudnn-persist-dynamic": _cudnn("persist-dynamic"),
    "cudnn-persist-static-small-h": _cudnn("persist-static-small-h"),
    "cudnn-standard": _cudnn("standard"),
    "layer-graphs": Part(
        "One layer, replayed from a CUDA graph", layers.graph_rows, layers.headline, 90
    ),
}  # fmt: skip


def print_part(name: str, sizes: Sizes, device: torch.device) -> None:
    """Find out one thing in this process; a line of JSON for each row, at once."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # which wants a number
    torch.manual_seed(0)
    try:
        for row in PARTS[name].rows(sizes, Clock(device, sizes.repeats, sizes.seconds)):
            print(json.dumps(row), flush=True)
    except NotHereError as error:
        raise RunError(f"not on this device: {error}") from None


def ask(name: str, device: str, limit: float) -> Found:
    """Find out one thing in another process, within a limit of seconds."""
    command = [sys.executable, "-m", "benchmarks.probe", "--part", name, "--device", device]
    try:
        result = subprocess.run(command, capture_output=True, timeout=limit)
        output, ended = result.stdout, DONE
        if result.returncode < 0:
            ended = f"failed: ended by signal {-result.returncode}"
        elif result.returncode:
            said = result.stderr.decode(errors="replace").strip().splitlines()
            ended = f"failed: {said[-1] if said else result.returncode}"
    except subprocess.TimeoutExpired as error:
        output, ended = error.stdout or b"", OUT_OF_TIME
    rows = []
    for line in output.decode(errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut off, or a library's own words
            continue
    return ended, [row for row in rows if isinstance(row, dict)]


def probe(output: Path, budget: float, answer: Callable[[str, float], Found]) -> None:
    """Go through the parts that output does not have yet, within a budget of seconds.

    Raises:
        RunError: the budget was too small for all of them, or what is there is no probe's.
    """
    deadline = time.monotonic() + budget
    beside = output.with_suffix(".json")
    try:
        results = json.loads(beside.read_text())["parts"] if beside.exists() else {}
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{beside}: not what an earlier probe wrote") from None
    for name, part in PARTS.items():
        if results.get(name, {}).get("over"):
            continue
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            break
        begin = time.monotonic()
        ended, rows = answer(name, min(left, part.limit))
        # With its whole limit spent, more time would not help.
        over = ended != OUT_OF_TIME or left >= part.limit
        seconds = round(time.monotonic() - begin, 1)
        rows = max(rows, results.get(name, {}).get("rows", []), key=len)
        results[name] = dict(ended=ended, over=over, seconds=seconds, rows=rows)
        write(output, results)
    if waiting := [name for name in PARTS if not results.get(name, {}).get("over")]:
        raise RunError(f"no time for {', '.join(waiting)}; the same call again goes on")


def write(output: Path, results: dict[str, Any]) -> None:
    """Write what is known so far, as JSON and as Markdown."""
    with atomic_write(output.with_suffix(".json"), "w") as file:
        file.write(json.dumps(dict(parts=results), indent=1) + "\n")
    lines = ["`python -m benchmarks.probe`, medians", "", "| part | ended | s | in short |"]
    lines.append("|---|---|---:|---|")
    for name, result in results.items():
        short = PARTS[name].headline(result["rows"])
        lines.append(f"| {name} | {result['ended']} | {result['seconds']} | {short} |")
    for name, result in results.items():
        lines += ["", f"## {name}", "", f"{PARTS[name].title}.", "", *table(result["rows"])]
    with atomic_write(output, "w") as file:
        file.write("\n".join([*lines, ""]))


def table(rows: list[Row]) -> list[str]:
    """Rows in Markdown, with a column for each key that any of them has."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    lines = [names, ["---"] * len(names)]
    lines += [[_shown(row.get(name, "")) for name in names] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in lines] if rows else ["Nothing."]


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "/")


def run(argv: Sequence[str]) -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe", description=__doc__)
    what = "write the Markdown here, and JSON beside it; what is there is not measured again"
    parser.add_argument("--output", type=Path, help=what)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--budget", type=float, default=240, help="seconds (%(default)s)")
    what = "measure this part alone, in this process, and print it as lines of JSON"
    parser.add_argument("--part", choices=list(PARTS), help=what)
    parser.add_argument("--sizes", choices=list(SIZES), default="ptb", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device = select_device(args.device)
    if device.type != "cuda" and args.sizes != "tiny":
        raise UsageError(f"argument --device: {args.device}: the probe is about GPUs")
    if args.part:
        print_part(args.part, SIZES[args.sizes], device)
    elif args.output is None:
        raise UsageError("argument --output: say where to, or which --part to print")
    elif not args.output.parent.is_dir():
        raise UsageError(f"argument --output: {args.output.parent}: no such folder")
    else:
        probe(args.output, args.budget, lambda name, limit: ask(name, args.device, limit))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; the exit code."""
    return run_program(run, argv)


if __name__ == "__main__":
    sys.exit(main())
