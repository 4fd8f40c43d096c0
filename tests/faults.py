"""Injects random faults into main.py and counts what survives: python -m tests.faults --quick

docs/reliability.md has the table that it prints.
"""

import argparse
import io
import os
import pickle
import pty
import random
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import test_ranks
from conftest import Result, write_corpus
from test_bad_input import BAD_TEXTS
from test_checkpoint import bad_file
from test_download import TEXT_MD5, TEXTS, archive_of, plain_source, serving
from test_flipped_bits import contents, flip
from test_resume import FLAGS, assert_same, assert_same_run

import main
from data.download import fetch_corpus
from data.errors import DataError
from data.sources import CorpusSource, Mirror

Prepare = Callable[[], object]


class Child(NamedTuple):
    """main.py in a forked process, which needs no import of torch."""

    pid: int
    out: int
    err: int

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Result:
        texts = []
        for end in (self.out, self.err):
            with open(end, errors="replace") as file:  # noqa: PTH123
                texts.append(file.read())
        return Result(os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), *texts)


def spawn(argv: Iterable[object], prepare: Prepare = lambda: None) -> Child:
    """Start main.py after a preparation in its process."""
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.dup2(out_end, 1)
            os.dup2(err_end, 2)
            os.closerange(3, 100)
            sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115
            prepare()
            code = main.main([str(arg) for arg in argv])
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    os.close(out_end)
    os.close(err_end)
    return Child(pid, out, err)


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
        assert spawn([*self.argv, "--max-updates", updates]).wait().code == 0

    def ends_the_same(self) -> str:
        """The same command ends, and everything is bit for bit as without the fault."""
        result = spawn(self.argv).wait()
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
    child = spawn(t.argv)
    t.moment()
    child.kill(signal.SIGKILL)
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

    spawn(t.argv, prepare).wait()
    return t.ends_the_same()


def signalled(t: Trial) -> str:
    number = t.draw.choice([signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
    child = spawn(t.argv)
    t.moment()
    child.kill(number)
    result = child.wait()
    assert result.code in (0, 1, -number), result
    assert "Traceback" not in result.err, result.err
    return t.ends_the_same()


def reader_gone(t: Trial) -> str:
    child = spawn(t.argv)
    t.moment()
    os.close(child.out)
    os.close(child.err)
    assert os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1]) == 0
    return t.ends_the_same()


def terminal_gone(t: Trial) -> str:
    """With SIGHUP, or under nohup, which ignores it."""
    nohup = t.draw.random() < 0.5
    pid, terminal = pty.fork()
    if pid == 0:
        sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
        os._exit(main.main([str(arg) for arg in t.argv]))
    until = time.monotonic() + t.draw.uniform(0, 1.1 * t.seconds)
    with suppress(OSError):  # it has ended
        while (left := until - time.monotonic()) > 0:
            if select.select([terminal], [], [], left)[0]:
                os.read(terminal, 65536)
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0 if nohup else code in (0, 1, -signal.SIGHUP), code
    return t.ends_the_same()


def full_disk(t: Trial) -> str:
    if t.draw.random() < 0.5:
        t.begun()
    most = t.draw.randrange(20_000)
    limits = (most, most)
    result = spawn(t.argv, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)).wait()
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
    child = spawn(t.argv)
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
    assert spawn(t.argv).wait().code == 0
    assert_same(*(torch.load(p, weights_only=True)["weights"] for p in (t.whole, t.save)))
    return "ended with the same model"


class Hostile:
    """Calls something when it is unpickled."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call[0], self.call[1:]


def hostile_pickle(t: Trial) -> str:
    ran = t.folder / "ran"
    calls: list[tuple[Any, ...]] = [
        (os.system, f"touch {ran}"),
        (eval, f"open({str(ran)!r}, 'w')"),
        (exec, f"open({str(ran)!r}, 'w')"),
        (subprocess.Popen, ["touch", str(ran)]),
        (Path.touch, ran),
        (io.open, str(ran), "w"),
    ]
    path = t.folder / "run" / "last.pt"
    path.parent.mkdir()
    if t.draw.random() < 0.2:
        bad_file(t.draw.choice(["malicious", "original", "pickle"]), t.folder).rename(path)
    else:
        hostile, protocol = Hostile(*t.draw.choice(calls)), t.draw.randrange(6)
        if t.draw.random() < 0.5:
            path.write_bytes(pickle.dumps(hostile, protocol))
        else:
            torch.save({"format": "awd-lstm training state 2", "flags": hostile}, path)
    outcome = t.refused(spawn(t.argv).wait(), path)
    assert not ran.exists()
    return outcome


def not_finite(t: Trial) -> str:
    t.begun()
    state = torch.load(t.last, weights_only=True)
    weight = state["model"][t.draw.choice(sorted(state["model"]))].view(-1)
    weight[t.draw.randrange(len(weight))] = float("nan")
    torch.save(state, t.last)
    # A best model that was written after last.pt is replaced by the one before it.
    models = [t.save, t.folder / "run" / "best.previous.pt"]
    models_before = [path.read_bytes() for path in models if path.exists()]
    state_before = t.last.read_bytes()
    result = spawn(t.argv).wait()
    assert result.code == 1, result
    assert "training stopped; a smaller --lr" in result.err, result.err
    assert t.last.read_bytes() == state_before
    assert t.save.read_bytes() in models_before
    return "stopped, files unchanged"


def bad_text(t: Trial) -> str:
    corpus = write_corpus(t.folder / "corpus")
    path = corpus / f"{t.draw.choice(['train', 'valid', 'test'])}.txt"
    makes: list[Prepare] = [
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(path),
        lambda: path.mkdir(),
        lambda: path.write_bytes(b"x\xff" + t.draw.randbytes(10_000)),
        *(lambda c=c: path.write_bytes(c) for c in BAD_TEXTS.values() if c is not None),  # type: ignore[misc]
        lambda: None,
    ]
    path.unlink()
    t.draw.choice(makes)()
    argv = [*FLAGS, "--data", corpus, "--save", t.save, "--test-batch-size", 3]
    outcome = t.refused(spawn(argv).wait(), path)
    assert not t.save.with_suffix("").exists()
    return outcome


def bad_download(t: Trial) -> str:
    files = {f"/{split}.txt": data for split, data in TEXTS.items()}
    files |= {f"/bad/{split}.txt": data + b"x\n" for split, data in TEXTS.items()}
    bomb = {f"{split}.txt": bytes(10_000_000) for split in TEXTS}
    files |= {"/bomb": archive_of(t.draw.choice(["zip", "tgz"]), bomb), "/html": b"<html>" * 99}
    kinds = ["bad", "short", "none", "stalled", "drops", "endless", "bomb", "html"]
    kinds = t.draw.sample(kinds, t.draw.randint(1, 4))
    with serving(files) as server, patch.object(CorpusSource, "most_seconds", 0.4):
        mirrors = [
            Mirror(f"{server.url}/{kind}", "{split}.txt")
            if kind in ("bomb", "html")
            else plain_source(server, f"/{kind}").mirrors[0]
            for kind in kinds
        ]
        for good in (False, True):
            mirrors += plain_source(server, "").mirrors if good else ()
            source = CorpusSource(tuple(mirrors), TEXT_MD5, most_bytes=1_000_000)
            refuses = nullcontext() if good else pytest.raises(DataError)
            with redirect_stderr(io.StringIO()), refuses:
                fetch_corpus(source, t.folder / "x", timeout=0.2)
            assert good or not list(t.folder.iterdir())
    assert {p.stem: p.read_bytes() for p in (t.folder / "x").iterdir()} == TEXTS
    return "given up, the next mirror taken"


def agent_killed(t: Trial) -> str:
    corpus = t.whole.parent / "corpus"
    flags = [*test_ranks.FLAGS, "--epochs", 20, "--data", corpus, "--resume", "auto"]
    argv = test_ranks.command(2, *flags, "--save", t.save)
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as agent:
        time.sleep(t.draw.uniform(0, 25))
        agent.kill()
    test_ranks.train(2, *flags, "--save", t.save)
    one = [*flags[:-2], "--save", t.folder / "one.pt"]
    assert spawn(one).wait().code == 0
    test_ranks.assert_same_run(t.folder / "run", t.folder / "one")
    return "ended the same, to rounding"


SAME = "the same command ends bit for bit where the run without the fault ends"
# Name, share of the trials, what survived means.
FAULTS: list[tuple[Callable[[Trial], str], float, str]] = [
    (killed, 1, SAME),
    (killed_in_a_save, 1, SAME),
    (signalled, 1, f"no traceback; {SAME}"),
    (reader_gone, 0.5, f"the run goes on; {SAME}"),
    (terminal_gone, 0.5, f"the run goes on, or saves and ends at SIGHUP; {SAME}"),
    (full_disk, 1, f"one line with file and bytes; with room, {SAME}"),
    (flipped_state, 1, SAME),
    (flipped_model, 1, "refused in one line with all files unchanged, or ended the same"),
    (damaged_metrics, 0.5, "the run goes on to the same model"),
    (hostile_pickle, 1, "refused in one line, nothing ran"),
    (not_finite, 0.5, "stops in one line; the best model and last.pt are as they were"),
    (bad_text, 1, "refused in one line that names the file, nothing written"),
    (bad_download, 0.5, "the next mirror is taken; without one, refused and nothing left"),
    (agent_killed, 0.1, "torchrun's processes end; the same command ends the same, to rounding"),
]


def matrix(count: int, seed: int, only: str) -> bool:
    """Inject all faults and print the table; returns True if everything survived."""
    lines, broken = [], list[str]()
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole.pt"
        corpus = write_corpus(whole.parent / "corpus")
        begin = time.monotonic()
        assert spawn([*FLAGS, "--data", corpus, "--save", whole]).wait().code == 0
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
