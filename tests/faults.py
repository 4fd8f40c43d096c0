"""Injects random faults into main.py and counts what survives: python -m tests.faults --quick

docs/reliability.md has the table that it prints.
"""

import argparse
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from conftest import Result, write_corpus
from forked import Child
from test_damage import contents, flip
from test_resume import FLAGS, assert_same, assert_same_run


@dataclass
class Trial:
    """One fault: its random numbers, an own folder, the run that no fault met and its time."""

    draw: random.Random
    folder: Path
    whole: Path
    seconds: float

    @property
    def save(self) -> Path:
        return self.folder / "run.pt"

    @property
    def last(self) -> Path:
        return self.folder / "run" / "last.pt"

    @property
    def argv(self) -> list[object]:
        corpus = self.whole.parent / "corpus"
        return [*FLAGS, "--data", corpus, "--save", self.save, "--resume", "auto"]

    def moment(self) -> None:
        time.sleep(self.draw.uniform(0, 1.1 * self.seconds))

    def begun(self) -> None:
        """A run that was stopped after some updates."""
        updates = self.draw.randint(12, 50)
        assert Child([*self.argv, "--max-updates", updates]).wait().code == 0

    def ends_the_same(self) -> str:
        """The same command ends, and everything is bit for bit as without the fault."""
        result = Child(self.argv).wait()
        assert result.code == 0, result.err
        assert_same_run(self.whole, self.save)
        left = [path for path in self.folder.rglob("*.tmp") if path.is_file()]
        assert not left, left
        return "ended the same"

    def refused(self, result: Result, path: Path) -> str:
        """One line, which names the file."""
        assert result.code == 1, result
        assert result.err.count("error: ") == 1, result.err
        assert result.err.splitlines()[-1].startswith("error: "), result.err
        assert "Traceback" not in result.err, result.err
        assert str(path) in result.err, result.err
        return "refused"


def killed(t: Trial) -> str:
    child = Child(t.argv)
    t.moment()
    child.send(signal.SIGKILL)
    child.wait()
    return t.ends_the_same()


def killed_in_a_save(t: Trial) -> str:
    left = t.draw.randint(1, 120)

    def count(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **keywords: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **keywords)

        return counted

    def prepare() -> None:
        for owner, name in ((os, "fsync"), (os, "link"), (Path, "replace"), (torch, "save")):
            setattr(owner, name, count(getattr(owner, name)))

    Child(t.argv, prepare).wait()
    return t.ends_the_same()


def signalled(t: Trial) -> str:
    number = t.draw.choice([signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
    child = Child(t.argv)
    t.moment()
    child.send(number)
    result = child.wait()
    assert result.code in (0, 1, -number), result
    assert "Traceback" not in result.err, result.err
    return t.ends_the_same()


def full_disk(t: Trial) -> str:
    if t.draw.random() < 0.5:
        t.begun()
    most = t.draw.randrange(6_000, 20_000)  # room for what it prints
    limits = (most, most)
    result = Child(t.argv, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)).wait()
    if result.code:
        t.refused(result, t.folder / "run")
        assert re.search(r"cannot write: File too large \(at least [\d,]+ bytes w", result.err)
    return t.ends_the_same()


def flipped_state(t: Trial) -> str:
    t.begun()
    flip(t.last, t.draw.randrange(8 * t.last.stat().st_size))
    return t.ends_the_same()


def flipped_model(t: Trial) -> str:
    t.begun()
    flip(t.save, t.draw.randrange(8 * t.save.stat().st_size))
    before = contents(t.folder)
    child = Child(t.argv)
    result = child.wait()
    if result.code:
        assert before == contents(t.folder)
        return t.refused(result, t.save)
    assert_same_run(t.whole, t.save)
    return "ended the same"


def damaged_metrics(t: Trial) -> str:
    t.begun()
    path = t.folder / "run" / "metrics.jsonl"
    if t.draw.random() < 0.5:
        flip(path, t.draw.randrange(8 * path.stat().st_size))
    else:
        os.truncate(path, t.draw.randrange(path.stat().st_size))
    assert Child(t.argv).wait().code == 0
    assert_same(*(torch.load(p, weights_only=True)["weights"] for p in (t.whole, t.save)))
    return "ended with the same model"


SAME = "the same command ends bit for bit where the run without the fault ends"
# Name, share of the trials, what survived means.
FAULTS: list[tuple[Callable[[Trial], str], float, str]] = [
    (killed, 1, SAME),
    (killed_in_a_save, 1, SAME),
    (signalled, 1, f"no traceback; {SAME}"),
    (full_disk, 1, f"one line with file and bytes; with room, {SAME}"),
    (flipped_state, 1, SAME),
    (flipped_model, 1, "refused in one line with all files unchanged, or ended the same"),
    (damaged_metrics, 0.5, "the run goes on to the same model"),
]


def matrix(count: int, seed: int, only: str) -> bool:
    """Inject all faults and print the table; returns True if everything survived."""
    lines, broken = [], list[str]()
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole.pt"
        corpus = write_corpus(whole.parent / "corpus")
        begin = time.monotonic()
        assert Child([*FLAGS, "--data", corpus, "--save", whole]).wait().code == 0
        seconds = time.monotonic() - begin
        for fault, share, meaning in FAULTS:
            fault_name = fault.__name__.replace("_", " ")
            if only not in fault_name:
                continue
            outcomes, tried = Counter[str](), max(1, round(share * count))
            for number in range(tried):
                draw = random.Random(f"{seed} {fault_name} {number}")
                with tempfile.TemporaryDirectory(dir=name) as folder:
                    try:
                        outcomes[fault(Trial(draw, Path(folder), whole, seconds))] += 1
                    except Exception as error:
                        broken.append(f"{fault_name} {number}: {type(error).__name__}: {error}")
                        traceback.print_exc()
            told = ", ".join(f"{kind} {n}" for kind, n in outcomes.most_common())
            survived = outcomes.total()
            lines.append(f"| {fault_name} | {tried} | {survived} | {told} | {meaning} |")
            print(lines[-1], file=sys.stderr, flush=True)
    print("| fault | tried | survived | how often | survived means |\n|---|---|---|---|---|")
    print(*lines, sep="\n")
    print(*(f"\nnot survived: {line}" for line in broken), sep="")
    return not broken


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50, help="trials of most faults")
    parser.add_argument("--quick", action="store_true", help="3 trials of most faults")
    parser.add_argument("--seed", type=int, default=1, help="of all random numbers")
    parser.add_argument("--only", default="", help="faults whose names have this")
    options = parser.parse_args()
    survived = matrix(3 if options.quick else options.count, options.seed, options.only)
    sys.exit(0 if survived else 1)
