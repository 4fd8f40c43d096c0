"""A power failure at any moment loses no run: what a checkpoint needs is on the disk before it."""

import os
import random
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import Result, read_events, write_corpus
from test_resume import assert_same_run, spawn, start, wait_for

Run = Callable[..., Result]


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


@pytest.mark.parametrize("seed", [0, 1])
def test_whatever_was_not_synced_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    corpus, disk = write_corpus(tmp_path / "corpus"), Disk()
    save = tmp_path / "runs" / "run.pt"
    save.parent.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk.fsync)
        assert start(save, corpus, "--checkpoint-every", 3) == 0
    images = [image for image in disk.images if "last.pt" in image.get(save.with_suffix(""), {})]
    assert len(images) > 20
    for number, image in enumerate(random.Random(seed).sample(images, 3)):
        after = tmp_path / f"after-{number}"
        for folder, files in image.items():
            if not folder.is_relative_to(save.parent):
                continue  # the corpus's cache
            place = after / folder.relative_to(save.parent)
            place.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                (place / name).write_bytes(content)
        assert start(after / "run.pt", corpus) == 0
        assert_same_run(save, after / "run.pt")


@pytest.mark.parametrize("damage", ["shorter", "in mid-line", "absent", "zeroed", "edited"])
def test_a_damaged_metrics_file_loses_no_run(tmp_path: Path, run: Run, damage: str) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    assert start(tmp_path / "whole.pt", corpus) == 0
    save = tmp_path / "run.pt"
    assert start(save, corpus, "--max-updates", 20) == 0
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    kept, gap = {
        "shorter": (lines[:2], 2),
        "in mid-line": ([*lines[:2], lines[2][:9]], 2),
        "absent": ([], 0),
        "zeroed": ([*lines[:2], b"\0" * sum(map(len, lines[2:]))], 2),
        "edited": ([*lines[:3], b"\n", b"# a note\n", *lines[3:]], 3),
    }[damage]
    path.write_bytes(b"".join(kept))
    if damage == "absent":
        path.unlink()
    result = run("--resume", save)
    assert result.code == 0, result.err
    warnings = [line for line in result.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert f"{path}: has" in warnings[0]
    events, expected = read_events(tmp_path / "run"), read_events(tmp_path / "whole")
    step = events[gap - 1]["step"] if gap else 0
    assert events[: gap + 1] == [*expected[:gap], {"event": "gap", "step": step}]
    after = [event for event in expected if event["step"] > 20]
    assert events[-len(after) :] == after


@contextmanager
def mounted(image: Path, folder: Path) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-o", "loop", image, folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mkfs.ext4"), reason="cannot mount ext4")
@pytest.mark.parametrize("seed", range(4))
def test_an_ext4_that_is_copied_while_mounted(tmp_path: Path, seed: int) -> None:
    corpus, image, after = write_corpus(tmp_path / "corpus"), tmp_path / "disk", tmp_path / "after"
    with image.open("wb") as file:
        file.truncate(24 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    with mounted(image, tmp_path / "before"):
        process = spawn(tmp_path / "before" / "run.pt", corpus, "--checkpoint-every", "1")
        try:
            wait_for(tmp_path / "before" / "run" / "metrics.jsonl", process, '"valid"')
            time.sleep(random.Random(seed).uniform(0, 3))
            shutil.copyfile(image, after)
        finally:
            process.kill()
            process.communicate()
    subprocess.run(["fsck.ext4", "-fy", after], check=False, capture_output=True)
    with mounted(after, tmp_path / "mounted"):
        save = shutil.copytree(tmp_path / "mounted", tmp_path / "copy") / "run.pt"
    last = torch.load(save.with_suffix("") / "last.pt", weights_only=True)
    epochs = last["position"]["epoch"] + 1
    assert start(save, corpus, "--epochs", epochs) == 0
    assert start(tmp_path / "run.pt", corpus, "--epochs", epochs) == 0
    assert_same_run(tmp_path / "run.pt", save)
