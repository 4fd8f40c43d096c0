"""A damaged file, another run's, or one that a power failure cut off costs no run, nor is it taken
for what the run had written."""

import os
import random
import resource
import shutil
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, read_events, write_corpus
from forked import Child
from test_resume import FLAGS, assert_same, assert_same_run, start

from data.files import _temporary, atomic_write
from engine import checkpoint_writer
from engine.checkpoint import load_model, load_training_state, model_details, write_checkpoint
from engine.errors import CheckpointError
from engine.run_folder import RunFolder

Run = Callable[..., Result]


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def flip_a_weight(path: Path) -> None:
    """A bit of the embedding, which torch.load takes as it is."""
    payload = torch.load(path, weights_only=True)
    weights = payload.get("weights") or payload["model"]
    values = weights["encoder.weight"].numpy().tobytes()
    flip(path, 8 * (path.read_bytes().index(values) + 30))
    damaged = torch.load(path, weights_only=True)
    weights = damaged.get("weights") or damaged["model"]
    assert weights["encoder.weight"].numpy().tobytes() != values


def contents(folder: Path) -> dict[Path, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {path: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the corpus, the uninterrupted run, and one stopped in its second epoch."""
    folder = tmp_path_factory.mktemp("whole")
    corpus = write_corpus(folder / "corpus")
    assert start(folder / "whole.pt", corpus) == 0
    (folder / "stopped").mkdir()
    assert start(folder / "stopped" / "run.pt", corpus, "--max-updates", 20) == 0
    return folder


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """The best model of a copy of the stopped run."""
    shutil.copytree(whole / "stopped", tmp_path, dirs_exist_ok=True)
    return tmp_path / "run.pt"


def warnings_of(result: Result) -> list[str]:
    return [line for line in result.err.splitlines() if line.startswith("warning: ")]


@pytest.mark.parametrize("kind", ["model", "training state"])
def test_a_flipped_bit_is_refused_or_changes_nothing(
    whole: Path, tmp_path: Path, kind: str
) -> None:
    good = whole / "whole.pt" if kind == "model" else whole / "whole" / "last.pt"

    def read(path: Path) -> Any:
        if kind == "model":
            model, words = load_model(path)
            return dict(model.state_dict()), model.config(), words.to_text()
        return load_training_state(path)

    expected, path = read(good), tmp_path / good.name
    draw, refused = random.Random(0), list[str]()
    for _ in range(200):
        path.write_bytes(good.read_bytes())
        flip(path, draw.randrange(8 * path.stat().st_size))
        try:
            found = read(path)
        except CheckpointError as error:
            refused.append(str(error))
        else:
            assert_same(found, expected)
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in refused)
    assert len(refused) > 100  # what is left is padding, and what no reader looks at


@pytest.mark.parametrize("damage", ["bit", "truncated", "zeroed"])
def test_a_damaged_state_is_replaced_by_the_one_before(
    whole: Path, stopped: Path, run: Run, damage: str
) -> None:
    last = stopped.with_suffix("") / "last.pt"
    if damage == "bit":
        flip_a_weight(last)
    else:
        content = last.read_bytes()
        half = content[: len(content) // 2]
        last.write_bytes(half if damage == "truncated" else bytes(len(content)))
    result = run("--resume", stopped)
    assert result.code == 0, result.err
    [warning] = warnings_of(result)
    assert f"{last}: " in warning
    assert str(last.with_name("last.previous.pt")) in warning
    assert_same_run(whole / "whole.pt", stopped)


def test_what_is_damaged_is_not_kept(stopped: Path) -> None:
    """Else a kill right after that would leave two damaged states."""
    last = stopped.with_suffix("") / "last.pt"
    before = last.with_name("last.previous.pt")
    payload, kept = load_training_state(last), before.read_bytes()
    flip_a_weight(last)
    write_checkpoint(last, payload, before)
    assert before.read_bytes() == kept
    write_checkpoint(last, payload, before)
    assert_same(load_training_state(before), load_training_state(last))


@pytest.mark.parametrize("part", ["tracking", "optimizer", "position"])
def test_a_state_that_lacks_a_part_is_refused(stopped: Path, run: Run, part: str) -> None:
    last = stopped.with_suffix("") / "last.pt"
    payload = load_training_state(last)
    del payload[part]
    write_checkpoint(last, payload)
    before = contents(stopped.parent)
    result = run("--resume", stopped)
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith(f"error: {last}: damaged checkpoint: ")
    assert before == contents(stopped.parent)


def test_two_damaged_states_are_refused(stopped: Path, run: Run) -> None:
    folder = stopped.with_suffix("")
    for name in ("last.pt", "last.previous.pt"):
        flip_a_weight(folder / name)
    before = contents(folder.parent)
    result = run("--resume", stopped)
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert f"error: {folder / 'last.previous.pt'}: damaged: " in result.err
    assert "does not match its checksum" in result.err
    assert before == contents(folder.parent)


@pytest.mark.parametrize(
    ("what", "cause", "elsewhere"),
    [
        ("damaged", "damaged: ", False),
        ("another run's", "another model, ", True),
        ("absent", "no such file", False),
    ],
)
def test_the_best_model_has_to_be_the_run_s(
    whole: Path, stopped: Path, run: Run, what: str, cause: str, elsewhere: bool
) -> None:
    folder = stopped.parent
    assert start(folder / "other.pt", whole / "corpus", "--epochs", 1, "--seed", 8) == 0
    for path in (stopped, folder / "run" / "best.previous.pt"):
        if what == "absent":
            path.unlink(missing_ok=True)
        elif path.exists():
            if what == "damaged":
                flip_a_weight(path)
            else:
                path.write_bytes((folder / "other.pt").read_bytes())
    before = contents(folder)
    result = run("--resume", stopped, *(["--save", folder / "new.pt"] if elsewhere else []))
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert result.err.startswith(f"error: {stopped}: {cause}")
    assert "where the run to be resumed has its best model, of epoch 1" in result.err
    assert before == contents(folder)


@pytest.mark.parametrize("damaged", [False, True])
def test_killed_between_the_best_model_and_the_state_that_knows_of_it(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """The model on the disk is then a later one than the state's; damaged: the state, too."""
    save, written = tmp_path / "whole.pt", list[Path]()

    def until_the_second_best(path: Path, *rest: Any) -> None:
        if written.count(save) == 2 and path.name == "last.pt":
            raise KeyboardInterrupt
        written.append(path)
        write_checkpoint(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "write_checkpoint", until_the_second_best)
        assert start(save, whole / "corpus", "--checkpoint-every", 5) == 1
    assert model_details(save)["epoch"] == 2
    if damaged:
        flip_a_weight(tmp_path / "whole" / "last.pt")
    assert start(save, whole / "corpus") == 0
    assert_same_run(whole / "whole.pt", save)


@pytest.mark.parametrize("damage", ["shorter", "absent", "zeroed", "edited"])
def test_a_damaged_metrics_file_loses_no_run(
    whole: Path, stopped: Path, run: Run, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """What remains are whole lines; one gap marks the rest, also if the run is killed again."""
    path = stopped.with_suffix("") / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(
        {
            "shorter": b"".join([*lines[:2], lines[2][:9]]),
            "absent": b"",
            "zeroed": b"".join([*lines[:2], b"\0" * sum(map(len, lines[2:]))]),
            "edited": b"".join([*lines[:2], lines[2].replace(b"1", b"10"), *lines[3:]]),
        }[damage]
    )
    if damage == "absent":
        path.unlink()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "write_checkpoint", killed)
        [warning] = warnings_of(run("--resume", stopped))
    assert f"{path}: has" in warning
    result = run("--resume", stopped)
    assert (result.code, warnings_of(result)) == (0, []), result.err
    expected = read_events(whole / "whole.pt")
    kept = {"absent": 0, "edited": sum(event["step"] <= 20 for event in expected) - 1}
    after = [event for event in expected if event["step"] > 20]
    found = read_events(stopped)[kept.get(damage, 2) :]
    assert found == [{"event": "gap", "step": 20}, *after]


class Disk:
    """What would be left of a folder after a power failure, in the worst case.

    A file has the bytes that it had at its last fsync, a folder the names that it had at its own.
    """

    def __init__(self) -> None:
        self.contents: dict[int, bytes] = {}  # by inode
        self.names: dict[Path, dict[str, int]] = {}  # of a folder's files, their inodes
        self.images: list[dict[Path, dict[str, bytes]]] = []

    def fsync(self, descriptor: int) -> None:
        place = Path(f"/proc/self/fd/{descriptor}").resolve()
        status = os.fstat(descriptor)
        if not stat.S_ISDIR(status.st_mode):
            self.contents[status.st_ino] = place.read_bytes()
            return
        files = [entry for entry in place.iterdir() if entry.is_file()]
        self.names[place] = {entry.name: entry.stat().st_ino for entry in files}
        self.images.append(
            {
                folder: {name: self.contents.get(inode, b"") for name, inode in names.items()}
                for folder, names in self.names.items()
            }
        )


def test_a_power_failure_loses_only_what_was_not_synced(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, disk, save = whole / "corpus", Disk(), tmp_path / "runs" / "run.pt"
    save.parent.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk.fsync)
        assert start(save, corpus, "--checkpoint-every", 3) == 0
    images = [image for image in disk.images if "last.pt" in image.get(save.with_suffix(""), {})]
    assert len(images) > 20
    for number, image in enumerate(random.Random(0).sample(images, 3)):
        after = tmp_path / f"after-{number}"
        for folder, files in image.items():
            if folder.is_relative_to(save.parent):
                place = after / folder.relative_to(save.parent)
                place.mkdir(parents=True, exist_ok=True)
                for name, content in files.items():
                    (place / name).write_bytes(content)
        assert start(after / "run.pt", corpus) == 0
        assert_same_run(save, after / "run.pt")


def killed(argv: list[object], draw: random.Random) -> None:
    """At a random moment."""
    child = Child(argv)
    time.sleep(draw.uniform(0, 2))
    child.send(signal.SIGKILL)
    child.wait()


def killed_in_a_save(argv: list[object], draw: random.Random) -> None:
    left = draw.randint(1, 120)

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

    Child(argv, prepare).wait()


def signalled(argv: list[object], draw: random.Random) -> None:
    child = Child(argv)
    time.sleep(draw.uniform(0, 2))
    child.send(draw.choice([signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]))
    assert "Traceback" not in child.wait().err


def full_disk(argv: list[object], draw: random.Random) -> None:
    limits = (draw.randrange(6_000, 20_000),) * 2  # of a file, so that what is printed has room
    result = Child(argv, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)).wait()
    last = result.err.splitlines()[-1]
    assert result.code == 0 or "cannot write: File too large (at least " in last, result.err


@pytest.mark.slow
@pytest.mark.parametrize("fault", [killed, killed_in_a_save, signalled, full_disk])
@pytest.mark.parametrize("seed", range(5))
def test_random_faults(
    whole: Path, tmp_path: Path, fault: Callable[[list[object], random.Random], None], seed: int
) -> None:
    """The same command ends bit for bit where the run without the faults ends."""
    draw, save = random.Random(seed), tmp_path / "run.pt"
    argv = [*FLAGS, "--data", whole / "corpus", "--save", save, "--resume", "auto"]
    for _ in range(3):
        fault(argv, draw)
    assert Child(argv).wait().code == 0
    assert_same_run(whole / "whole.pt", save)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_kept_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def refuse(*names: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    path, keep = tmp_path / "a", tmp_path / "b"
    path.write_text("one")
    if links:
        keep.hardlink_to(path)  # as a process that was killed once the link was made left it
    else:
        monkeypatch.setattr(os, "link", refuse)
    for content in ("two", "three"):
        with atomic_write(path, "w", keep=keep) as file:
            file.write(content)
    assert (path.read_text(), keep.read_text()) == ("three", "two")
    assert sorted(tmp_path.iterdir()) == [path, keep]


def test_what_a_killed_process_left_is_removed_and_nothing_of_another_run(tmp_path: Path) -> None:
    """Which may be writing its model at this moment. Killed while it copied its first file."""
    (tmp_path / "run").mkdir()
    ours = [_temporary(tmp_path / name) for name in ("run.pt", "run.pt.e2", "run/last.pt")]
    names = ("other.pt", "run.finetuned.pt", "run.pt.e2.finetuned.pt")
    others = [_temporary(tmp_path / name) for name in names]
    for path in (*ours, *others):
        path.write_text("half")
    with RunFolder(tmp_path / "run.pt"):
        assert [path.exists() for path in (*ours, *others)] == [False] * 3 + [True] * 3
