"""How long libgomp's threads should spin: runs alone, beside a busy process, and side by side.

python -m benchmarks.threads --data FOLDER_OF_PTB --output FILE.md
"""

import argparse
import math
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
# How threads wait, by the variables of libgomp; "one thread" does not wait at all.
SETTINGS = {
    "libgomp's default": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    f"spin count {SPIN_COUNT}": {"GOMP_SPINCOUNT": SPIN_COUNT},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
# Runs side by side, and processes that are busy beside them.
CASES = [("demo", 1, 0), ("demo", 2, 0), ("demo", 3, 0)]
CASES += [("penn", 1, 0), ("penn", 1, 1), ("penn", 2, 0), ("penn", 3, 0)]
INTERVALS, MILLISECONDS = 8, r"ms/batch\s*([\d.]+)"
FLAGS = {"demo": ["--log-interval", "20"], "penn": ["--precision", "bf16", "--log-interval", "2"]}


def measure(
    recipe: str, runs: int, busy: int, variables: dict[str, str], data: str, seconds: float
) -> float:
    """Median milliseconds an update, mean over the runs, each killed after INTERVALS intervals.

    Args:
        seconds: they are killed then, at the latest; infinite where a run is not at its second
            interval yet.
    """
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
        deadline, found = time.monotonic() + seconds, [list[float]()]
        while min(map(len, found)) < INTERVALS and time.monotonic() < deadline:
            time.sleep(0.5)
            texts = [log.read_text() for log in logs]
            found = [[float(ms) for ms in re.findall(MILLISECONDS, text)] for text in texts]
        for process in processes:
            process.kill()
            process.wait()
        # The first interval warms up.
        return statistics.mean(statistics.median(times[1:] or [math.inf]) for times in found)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="data/penn", help="PTB's folder")
    parser.add_argument("--seconds", type=float, default=40, help="of each run, at most")
    parser.add_argument("--output", type=Path, help="write the Markdown here")
    args = parser.parse_args()
    lines = [
        f"`python -m benchmarks.threads --seconds {args.seconds:g}`, {os.cpu_count()} cores, "
        f"{platform.machine()}. Milliseconds an update (median, mean over the runs); in brackets "
        "over the best of the row. penn: the paper's size in bf16. Too slow: not at the second "
        "log interval by then.",
        "",
        f"| case | {' | '.join(SETTINGS)} |",
        "|---" * (1 + len(SETTINGS)) + "|",
    ]
    for recipe, runs, busy in CASES:
        found = [
            measure(recipe, runs, busy, variables, args.data, args.seconds)
            for variables in SETTINGS.values()
        ]
        cells = [
            f"{ms:,.0f} ({ms / min(found):.2f})" if ms < math.inf else "too slow" for ms in found
        ]
        name = f"{recipe}, {runs} at once" + ", beside a busy process" * busy
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if args.output:
        with atomic_write(args.output) as file:
            file.write("\n".join([*lines, ""]).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
