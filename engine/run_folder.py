"""A run's files: the best model, and a folder beside it for everything else."""

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import filelock

from data.errors import WriteError
from data.files import FULL, atomic_write, sync_directory
from engine.checkpoint import model_details, previous_path
from engine.errors import CheckpointError, RunError
from engine.metrics_file import to_json

LOCK = ".lock"
PREVIOUS_BEST = "best.previous.pt"


class RunFolder:
    """The files of one run; a context in which they are locked against other processes.

    --save PTB.pt stands for PTB.pt, the best model, and in PTB/: last.pt, metrics.jsonl,
    config.json, summary.json, and last.previous.pt and best.previous.pt, the previous versions of
    last.pt and PTB.pt.

    Args:
        save: path of the best model; its parent folder must exist.
        writes: False for a process that only needs the paths.

    Raises:
        RunError: the folder cannot be written to, or another process uses it.
    """

    def __init__(self, save: str | Path, writes: bool = True) -> None:
        self.model_path = Path(save)
        self.folder = self.model_path.with_suffix("")
        self._writes = writes
        self._lock: Any = None

    def __enter__(self) -> "RunFolder":
        if self._writes:
            self._take()
        return self

    def _take(self) -> None:
        """Check, create and lock the folder; remove what a killed process left there."""
        save, parent = self.model_path, self.model_path.parent
        if self.folder == save:
            raise RunError(f"{save}: the name of a model needs a suffix such as .pt")
        if not parent.is_dir():
            raise RunError(f"{parent}: no such folder, for {save}")
        if save.is_dir():
            raise RunError(f"{save}: is a folder, where a file is to be written")
        if self.folder.is_dir() and self._is_foreign():
            raise RunError(f"{self.folder}: has files that are no run's; give the run another name")
        self._lock = lock_folder(self.folder)
        for path in [*self.folder.glob(".*.tmp"), *self._models(r"\.", r"\.[^.]+\.tmp")]:
            path.unlink(missing_ok=True)

    def _models(self, before: str = "", after: str = "") -> list[Path]:
        """The best model and the copies of --when: PTB.pt, PTB.pt.e25, …

        Not PTB.pt.e25.finetuned.pt, which is another run's.

        Args:
            before, after: patterns around these names.
        """
        name = re.compile(rf"{before}{re.escape(self.model_path.name)}(\.e\d+)?{after}")
        return [path for path in self.model_path.parent.iterdir() if name.fullmatch(path.name)]

    def _is_foreign(self) -> bool:
        """True if the folder has files that no run leaves, not even one killed at its start."""
        unfinished = {path.name for path in self.folder.glob(".*.tmp")}
        names = {path.name for path in self.folder.iterdir()} - {LOCK} - unfinished
        return bool(names) and not names & {"metrics.jsonl", "config.json", "last.pt"}

    @property
    def last_path(self) -> Path:
        """Path of the training state, for exact resume."""
        return self.folder / "last.pt"

    def kept_path(self, path: Path) -> Path | None:
        """Where to keep the old file when a checkpoint at path is replaced; None: nowhere.

        A resumed run needs it if last.pt is damaged, or if last.pt is older than the best model:
        the run ended between their writes, or validated within an epoch as it stopped.
        """
        if path == self.model_path:
            return self.folder / PREVIOUS_BEST
        return previous_path(path) if path == self.last_path else None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._lock is not None:
            self._lock.release()
        if isinstance(error, WriteError) and error.errno in FULL:
            safe = "no checkpoint was written yet"
            if self.last_path.exists():
                last = self.last_path
                safe = f"{last} is safe, and with more room --resume {last} goes on from there"
            raise RunError(f"{error}; {safe}") from error

    def is_empty(self) -> bool:
        """True if neither the best model nor any file in the folder exists."""
        return not self.model_path.exists() and not any(
            path.name != LOCK for path in self.folder.iterdir()
        )

    def set_aside(self) -> Path:
        """Rename an earlier run to NAME.1.pt and NAME.1/ (or .2, …); returns its new folder.

        The folder is renamed last, so that a move that was cut short is finished under its number.
        """
        name, number, files = self.folder.name, 1, self._models()

        def moved(path: Path) -> Path:
            return path.with_name(f"{name}.{number}{path.name.removeprefix(name)}")

        while any(moved(path).exists() for path in (self.folder, *files)):
            number += 1
        for path in (*files, self.folder):
            path.rename(moved(path))
        aside = moved(self.folder)
        self._lock.release()  # of the renamed folder
        (aside / LOCK).unlink()
        self._lock = lock_folder(self.folder)
        return aside

    def begin(
        self,
        source: Path | None = None,
        best_epoch: int | None = None,
        best_loss: float | None = None,
    ) -> Path | None:
        """Prepare the files for a new or a resumed run; an earlier run is set aside.

        Args:
            source: best model of the run to resume, this one or another; None: a new run.
            best_epoch: epoch of that run's best model; None: it has none yet.
            best_loss: validation loss of that model, nats per token.

        Returns:
            The new folder of an earlier run that was set aside; None: there was none.

        Raises:
            RunError: the best model of the resumed run is missing or damaged.
        """
        best = folder = None
        if source is not None:
            folder = source.with_suffix("")
            if best_epoch is not None:
                best = find_best(source, folder, best_epoch, best_loss)
        if folder is not None and folder.resolve() == self.folder.resolve():
            if best is not None and best.parent == folder:
                best.replace(self.model_path)
            elif best is not None and best.suffix != self.model_path.suffix:
                _copy(best, self.model_path)
            return None
        aside = None if self.is_empty() else self.set_aside()
        if folder is not None:
            for name in ("metrics.jsonl", "config.json"):
                if (folder / name).exists():
                    _copy(folder / name, self.folder / name)
        if best is not None:
            _copy(best, self.model_path)
        return aside

    def write_config(self, flags: dict[str, Any], session: dict[str, Any]) -> None:
        """Write config.json: the flags in force, and each session's command line and versions."""
        path = self.folder / "config.json"
        sessions: list[dict[str, Any]] = []
        if path.exists():  # of the sessions before
            with suppress(ValueError, KeyError, TypeError):  # edited by hand: start a new list
                sessions = [*json.loads(path.read_text(encoding="utf-8"))["sessions"]]
        sessions.append(session)
        self.write_json(path.name, dict(flags=flags, **sessions[0], sessions=sessions))

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Write a JSON file into the folder, atomically; nan and inf become null."""
        with atomic_write(self.folder / name) as file:
            file.write(to_json(values, indent=2))


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as old, atomic_write(target) as new:
        shutil.copyfileobj(old, new)


def find_best(model: Path, folder: Path, epoch: int, loss: float | None) -> Path:
    """Find the best model of a training state, identified by its epoch and validation loss.

    Args:
        model: the run's model path, searched first.
        folder: the run's folder, which keeps the previous best model.
        epoch: epoch of the best model.
        loss: its validation loss, nats per token.

    Raises:
        RunError: the model is missing or damaged.
    """
    reasons = []
    for path in (model, folder / PREVIOUS_BEST):
        try:
            details = model_details(path)
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        found = details.get("epoch"), details.get("valid_loss")
        if found == (epoch, loss):
            return path
        what = "another model, of epoch {} with a validation loss of {}".format(*found)
        reasons.append(f"{path}: {what}")
    raise RunError(
        f"{reasons[0]}, where the run to be resumed has its best model, of epoch {epoch} with a "
        f"validation loss of {loss}"
    )


def find_run(path: str | Path) -> Path:
    """Find a run's last.pt, given its path, the run's folder or its best model.

    Raises:
        RunError: no such file.
    """
    given, path = path, Path(path).absolute()  # so that "." has a name
    candidates = [path.with_suffix("") / "last.pt", path]  # of a model's run; a state itself
    if path.name == "last.pt":
        candidates.reverse()
    for candidate in [path / "last.pt", *candidates]:
        if candidate.is_file():
            return candidate
    if (path / "vocab.txt").is_file():
        raise RunError(f"{given}: an exported model has no run; finetune.py goes on from it")
    hint = "give its last.pt, its folder or its best model"
    raise RunError(f"{given}: no such run, or it has no checkpoint yet ({hint})")


def lock_folder(folder: Path) -> Any:
    """Create a folder if missing, and lock it until the lock's `release`.

    Raises:
        RunError: another process holds the lock, or the folder cannot be written to.
    """
    try:
        folder.mkdir(exist_ok=True)
        sync_directory(folder.parent)
        lock = filelock.FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise RunError(f"{folder}: another process is running there{_holder(folder)}") from None
    except OSError as error:
        raise RunError(f"{folder}: cannot write: {error.strerror or error}") from error
    return lock


def _holder(folder: Path) -> str:
    """Number and command of the process that holds the lock; empty if it is unknown here."""
    with suppress(OSError):
        inode = (folder / LOCK).stat().st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            *_, kind, _, _, pid, place, _, _ = line.split()
            if kind == "FLOCK" and place.endswith(f":{inode}"):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                return f" (process {pid}: {command.decode(errors='replace').strip()[:300]})"
    return ""


def is_in_use(save: str | Path) -> bool:
    """True if a process holds the lock of the run with this --save."""
    lock = Path(save).with_suffix("") / LOCK
    if not lock.exists():
        return False
    try:
        with filelock.FileLock(lock, timeout=0):
            return False
    except filelock.Timeout:
        return True
