"""Speed and memory of `load_corpus` on a text of WikiText-103's size.

    python -m benchmarks.corpus data/wikitext-2 --output benchmarks/results/corpus_....md

Repeats a corpus's train.txt to the wanted size in a temporary folder and reads it in a fresh
process. The original's loop reads a part of the same text, and its time is scaled by the number of
tokens.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from data.corpus import load_corpus
from data.download import ensure_corpus
from data.errors import DataError
from engine.device import peak_memory

MEGABYTE = 10**6


def main() -> None:
    """Run the benchmark and print its table."""
    args = _parser().parse_args()
    if args.measure:
        print(*(_measure_plain if args.measure == "plain" else _measure_load)(args.folder))
        return
    try:
        ensure_corpus(args.folder)
        load_corpus(args.folder)  # raises DataError if the corpus is damaged
    except DataError as error:
        sys.exit(f"error: {error}")
    with tempfile.TemporaryDirectory(dir=args.temporary) as temporary:
        whole, part = Path(temporary, "whole"), Path(temporary, "part")
        _repeat_text(args.folder, whole, args.megabytes * MEGABYTE)
        _repeat_text(args.folder, part, args.plain_megabytes * MEGABYTE)
        plain, ours = _in_fresh_process("plain", part), _in_fresh_process("load", whole)
    report = _report(args, plain, ours)
    print(report, end="")
    if args.output:
        args.output.write_text(report, encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a corpus whose train.txt is repeated")
    parser.add_argument("--megabytes", type=int, default=540, help="size of the text")
    parser.add_argument(
        "--plain-megabytes", type=int, default=20, help="size of the text for the original's loop"
    )
    parser.add_argument("--temporary", type=Path, help="where the texts are made")
    parser.add_argument("--hardware", default="", help="what the report calls this machine")
    parser.add_argument("--output", type=Path, help="a Markdown file for the report")
    parser.add_argument("--measure", choices=("plain", "load"), help=argparse.SUPPRESS)
    return parser


def _repeat_text(source: Path, folder: Path, num_bytes: int) -> None:
    """Make a corpus whose train.txt has about `num_bytes` bytes, in whole lines."""
    folder.mkdir()
    lines = (source / "train.txt").read_bytes().splitlines(keepends=True)
    missing = num_bytes
    with (folder / "train.txt").open("wb") as file:
        while missing > 0:
            for line in lines:
                missing -= file.write(line)
                if missing <= 0:
                    break
    for name in ("valid.txt", "test.txt"):
        shutil.copyfile(source / name, folder / name)


def _in_fresh_process(what: str, folder: Path) -> tuple[int, float, float]:
    """Number of tokens, seconds, peak resident memory in MB."""
    command = [sys.executable, "-m", "benchmarks.corpus", str(folder), "--measure", what]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    num_tokens, seconds, megabytes = answer.split()
    return int(num_tokens), float(seconds), float(megabytes)


def _measure_load(folder: Path) -> tuple[int, float, float]:

    start = time.perf_counter()
    corpus = load_corpus(folder)
    seconds = time.perf_counter() - start
    num_tokens = len(corpus.train) + len(corpus.valid) + len(corpus.test)
    return num_tokens, seconds, _peak_megabytes()


def _measure_plain(folder: Path) -> tuple[int, float, float]:
    """The original's loop: words to a dict, then ids into a tensor one at a time."""

    start = time.perf_counter()
    index: dict[str, int] = {}
    num_tokens = 0
    for name in ("train.txt", "valid.txt", "test.txt"):
        length = 0
        with (folder / name).open(encoding="utf-8") as file:
            for line in file:
                words = [*line.split(), "<eos>"]
                length += len(words)
                for word in words:
                    if word not in index:
                        index[word] = len(index)
        ids = torch.empty(length, dtype=torch.int64)
        position = 0
        with (folder / name).open(encoding="utf-8") as file:
            for line in file:
                for word in [*line.split(), "<eos>"]:
                    ids[position] = index[word]
                    position += 1
        num_tokens += length
    return num_tokens, time.perf_counter() - start, _peak_megabytes()


def _peak_megabytes() -> float:
    return peak_memory(torch.device("cpu")) / MEGABYTE


def _report(
    args: argparse.Namespace,
    plain: tuple[int, float, float],
    ours: tuple[int, float, float],
) -> str:
    name = args.folder.resolve().name
    command = (
        f"python -m benchmarks.corpus data/{name} --megabytes {args.megabytes} "
        f"--plain-megabytes {args.plain_megabytes}"
    )
    scaled = plain[1] * ours[0] / plain[0]
    rows = [
        ("original's loop, scaled by tokens", ours[0], scaled, plain[0] / plain[1], None),
        (f"original's loop, {args.plain_megabytes} MB", *plain[:2], plain[0] / plain[1], plain[2]),
        ("`load_corpus`", *ours[:2], ours[0] / ours[1], ours[2]),
    ]
    lines = [
        "# Reading a corpus",
        "",
        f"`{command}`" + (f" on {args.hardware}" if args.hardware else ""),
        "",
        f"The train.txt of {name}, repeated to {args.megabytes} MB, its valid.txt and test.txt; "
        "each row a fresh process, the text in the page cache; memory is the peak resident set "
        "with PyTorch imported. The vocabulary is that of the repeated text, so smaller than "
        "WikiText-103's.",
        "",
        "| | tokens | seconds | tokens/s | times the original | peak memory (MB) |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for label, num_tokens, seconds, speed, memory in rows:
        ratio = speed * plain[1] / plain[0]
        peak = "" if memory is None else f"{memory:,.0f}"
        lines.append(
            f"| {label} | {num_tokens:,} | {seconds:.2f} | {speed:,.0f} | {ratio:.1f} | {peak} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
