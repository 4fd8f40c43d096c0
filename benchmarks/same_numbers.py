"""Checks that two commits train bit for bit alike: python -m benchmarks.same_numbers OLD [NEW]

Trains small models with both commits' main.py, on a CPU and at a fixed seed, and compares every
number in metrics.jsonl (except times) and every weight of the best model. NEW defaults to the
working tree.
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
COMMON = (
    "--emsize 12 --nhid 16 --nlayers 3 --batch-size 4 --bptt 10 --lr 5 --eval-batch-size 3 --seed 7"
    " --dropout 0.2 --dropouth 0.15 --dropouti 0.2 --dropoute 0.05 --wdrop 0.3 --log-interval 3"
    " --device cpu --epochs 3"
)
CONFIGURATIONS = {
    "variable, averaging": "--nonmono 0 --lr 20",
    "untied, one layer, decay": "--untied --nlayers 1 --no-asgd --nonmono-decay 2 --when 2",
    "fixed": "--bptt-scheme fixed",
    "k1 < k2": "--bptt-scheme fixed --k1 4",
    "k1 > k2": "--bptt-scheme fixed --k1 25 --grad-filter 1",
    "randomized": "--bptt-scheme randomized --keep-prob 0.8",
    "full": "--bptt-scheme full --lr 0.3",
    "gradient filter": "--grad-filter 2 --nonmono 0",
    "everything": "--grad-filter 3 --diagnostics 2 --nonmono 0 --lr 20 --checkpoint-every 3",
    "nothing": "--dropout 0 --dropouth 0 --dropouti 0 --dropoute 0 --wdrop 0 --alpha 0 --beta 0",
    "adam": "--optimizer adam --lr 0.01",
    "two processes": "--nonmono 0 --lr 20 --grad-filter 2",
    "bf16": "--precision bf16 --nonmono 0 --lr 20",
    "bf16, randomized": "--precision bf16 --bptt-scheme randomized",
    "fp16": "--precision fp16 --loss-scale-window 4 --nonmono 0",
}


def main() -> int:
    """Run the comparison; returns 0 if nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", help="a commit")
    parser.add_argument("new", nargs="?", help="another one; the working tree, if not given")
    parser.add_argument("--only", nargs="+", help="configurations whose names have these words")
    args = parser.parse_args()
    differing = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_text(folder / "text")
        trees = [checked_out(args.old, folder / "old")]
        trees.append(checked_out(args.new, folder / "new") if args.new else ROOT)
        for name, flags in CONFIGURATIONS.items():
            if args.only and not any(word in name for word in args.only):
                continue
            found = [train(tree, folder, name, flags) for tree in trees]
            difference = first_difference(*found)
            print(f"| {name:28} | {difference or 'the same'}", flush=True)
            differing += [name] if difference else []
    return 1 if differing else 0


def checked_out(commit: str, folder: Path) -> Path:
    """Check out a commit into a folder."""
    subprocess.run(["git", "clone", "--quiet", "--shared", ROOT, folder], check=True)
    subprocess.run(["git", "checkout", "--quiet", commit], cwd=folder, check=True)
    return folder


def write_text(folder: Path) -> None:
    """Write a corpus of random sentences in which a word predicts the next."""
    folder.mkdir()
    draw = random.Random(1)
    for split, lines in (("train", 60), ("valid", 25), ("test", 20)):
        text = []
        for _ in range(lines):
            word = draw.randrange(30)
            sentence = []
            for _ in range(draw.randint(3, 9)):
                sentence.append(f"w{word}")
                word = (word * 7 + draw.choice((1, 1, 1, 3))) % 30
            text.append(" ".join(sentence) + "\n")
        (folder / f"{split}.txt").write_text("".join(text))


def train(tree: Path, folder: Path, name: str, flags: str) -> dict[str, Any]:
    """Run a tree's main.py; returns all logged numbers and saved tensors, or its error."""
    save = folder / f"{tree.name}-{name.replace(' ', '-')}.pt"
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29507"]
    command = [sys.executable, *(launch if name == "two processes" else []), "main.py"]
    command += [*shlex.split(COMMON), "--data", str(folder / "text"), "--save", str(save)]
    command += shlex.split(flags)
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    result = subprocess.run(command, cwd=tree, capture_output=True, text=True, env=environment)
    if result.returncode:
        return {"error": (result.stderr.strip().splitlines() or ["?"])[-1]}
    found: dict[str, Any] = {}
    lines = (save.with_suffix("") / "metrics.jsonl").read_text().splitlines()
    for number, line in enumerate(lines):
        values = json.loads(line)
        for measured in ("tokens_per_second", "seconds"):
            values.pop(measured, None)
        found.update({f"line {number} {key}": value for key, value in values.items()})
    weights: dict[str, Any] = torch.load(save, weights_only=True)["weights"]
    return found | weights


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Describe the first difference of two runs; empty if there is none."""
    if error := new.get("error", old.get("error")):
        return f"failed: {error}"
    for key in [*old, *(key for key in new if key not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            if not torch.equal(a, b):
                return f"{key} differs by at most {(a - b).abs().max():g}"
        elif a != b or isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
            return f"{key}: {a} and {b}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
