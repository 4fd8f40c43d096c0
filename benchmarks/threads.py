"""Measures spin counts of libgomp: runs alone, beside a busy process, and side by side.

python -m benchmarks.threads --data FOLDER_OF_PTB --output FILE.md
"""

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data.files import atomic_write
from engine.program import SPIN_COUNT

ROOT = Path(__file__).resolve().parent.parent
# Environment variables that set how threads wait; a single thread never waits.
SETTINGS = {
    "libgomp's default": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    f"spin count {SPIN_COUNT}": {"GOMP_SPINCOUNT": SPIN_COUNT},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
# (recipe, runs side by side, busy processes beside them).
CASES = [("demo", 1, 0), ("demo", 2, 0), ("demo", 3, 0)]
CASES += [("penn", 1, 0), ("penn", 1, 1), ("penn", 2, 0), ("penn", 3, 0)]
FLAGS = {"demo": ["--log-interval", "20"], "penn": ["--precision", "bf16", "--log-interval", "2"]}


def measure(
    recipe: str, runs: int, busy: int, variables: dict[str, str], data: str, seconds: float
) -> float:
    """Median milliseconds per update, averaged over the runs, which end after some seconds."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{k}.log" for k in range(runs)]
        command = [sys.executable, "main.py", f"@recipes/{recipe}.txt", *FLAGS[recipe]]
        command += ["--data", data] if recipe == "penn" else []
        others = [[sys.executable, "-c", "while True: pass"]] * busy
        processes = [subprocess.Popen(other) for other in others]
        for log in logs:
            save = ["--save", str(log.with_suffix(".pt"))]
            with log.open("w") as file:
                processes.append(
                    subprocess.Popen(
                        [*command, *save], cwd=ROOT, env=own | variables, stdout=file, stderr=file
                    )
                )
        time.sleep(seconds)
        for process in processes:
            process.kill()
            process.wait()
        found = [re.findall(r"ms/batch\s*([\d.]+)", log.read_text()) for log in logs]
        # The first two intervals warm up.
        return statistics.mean(statistics.median(map(float, times[2:])) for times in found)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="data/penn", help="PTB's folder")
    parser.add_argument("--seconds", type=float, default=16, help="of each run")
    parser.add_argument("--output", type=Path, help="write the Markdown here")
    args = parser.parse_args()
    lines = [
        f"`python -m benchmarks.threads --seconds {args.seconds:g}`, {os.cpu_count()} cores, "
        f"{platform.machine()}. Milliseconds an update (median, mean over the runs); in brackets "
        "over the best of the row. penn: the paper's size in bf16.",
        "",
        f"| case | {' | '.join(SETTINGS)} |",
        "|---" * (1 + len(SETTINGS)) + "|",
    ]
    for recipe, runs, busy in CASES:
        found = [
            measure(recipe, runs, busy, variables, args.data, args.seconds)
            for variables in SETTINGS.values()
        ]
        cells = [f"{ms:,.0f} ({ms / min(found):.2f})" for ms in found]
        name = f"{recipe}, {runs} at once" + ", beside a busy process" * busy
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if args.output:
        with atomic_write(args.output) as file:
            file.write("\n".join([*lines, ""]).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
