"""A run's files: the best model, and beside it a folder with everything else."""

import glob
import json
import math
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from data.files import atomic_write, sync_directory
from engine.errors import RunError

LOCK = ".lock"


class RunFolder:
    """The files of one run, locked against a second process while this one lives.

    For --save PTB.pt they are PTB.pt, the best model, and in PTB/: last.pt, metrics.jsonl,
    config.json, summary.json.

    Args:
        save: path of the best model; the folder it is in has to exist.
        writes: False for a process that only needs to know where the files are.

    Raises:
        RunError: the place cannot be written to, or another process is using it.
    """

    def __init__(self, save: str | Path, writes: bool = True) -> None:
        self.model_path = Path(save)
        self.folder = self.model_path.with_suffix("")
        self._lock: Any = None
        if not writes:
            return
        if self.folder == self.model_path:
            raise RunError(f"{save}: the name of a model needs a suffix such as .pt")
        if not self.model_path.parent.is_dir():
            raise RunError(f"{self.model_path.parent}: no such folder (for --save {save})")
        if self.model_path.is_dir():
            raise RunError(f"{self.model_path}: is a folder, and --save names a file")
        if self.folder.is_dir() and self._is_foreign():
            raise RunError(f"{self.folder}: has files that are no run's; give --save another name")
        self._lock = lock_folder(self.folder)
        for path in [*self.folder.glob(".*.tmp"), *self._model_leftovers()]:
            path.unlink(missing_ok=True)

    def _is_foreign(self) -> bool:
        """The folder is somebody's, and not an earlier run's."""
        names = {path.name for path in self.folder.iterdir()} - {LOCK}
        return bool(names) and not names & {"metrics.jsonl", "config.json", "last.pt"}

    def _model_leftovers(self) -> list[Path]:
        """Temporary files of a process that was killed while it wrote the best model."""
        return list(self.model_path.parent.glob(f".{glob.escape(self.model_path.name)}.*.tmp"))

    @property
    def last_path(self) -> Path:
        """The state that an exact resume needs."""
        return self.folder / "last.pt"

    @property
    def epoch_best_path(self) -> Path:
        """The best model at an epoch's end, kept while a run that stopped in mid-epoch has put a
        better one in its place: a resumed run does not know of that one."""
        return self.folder / "best-at-epoch-end.pt"

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            self._lock.release()

    def is_empty(self) -> bool:
        """No run has been here yet."""
        return not self.model_path.exists() and not any(
            path.name != LOCK for path in self.folder.iterdir()
        )

    def set_aside(self) -> Path:
        """Rename an earlier run to NAME.1.pt and NAME.1/ (or .2, …), so that nothing is lost.

        Returns:
            The folder it has now.
        """
        number = 1
        suffix = self.model_path.suffix
        while self._numbered(number).exists() or self._numbered(number, suffix).exists():
            number += 1
        aside = self._numbered(number)
        aside.mkdir()
        for path in self.folder.iterdir():
            if path.name != LOCK:
                path.rename(aside / path.name)
        # The best model, and what --when kept of it: PTB.pt, PTB.pt.e25, …
        name = glob.escape(self.model_path.name)
        for path in [self.model_path, *self.model_path.parent.glob(f"{name}.e*")]:
            if path.exists():
                tail = path.name.removeprefix(self.folder.name)
                path.rename(self._numbered(number, tail))
        return aside

    def _numbered(self, number: int, suffix: str = "") -> Path:
        return self.folder.with_name(f"{self.folder.name}.{number}{suffix}")

    def begin(self, source: Path | None = None, best_epoch: int | None = None) -> Path | None:
        """Make the place ready for a new run, or for one that goes on.

        Args:
            source: the folder of the run that goes on, this one or another; None: a new run.
            best_epoch: the epoch of that run's best model; None: it has none yet.

        Returns:
            Where an earlier run that was in the way is now, if one was.

        Raises:
            RunError: the best model of the run that goes on is not there.
        """
        aside = None
        if source is None or source.resolve() != self.folder.resolve():
            aside = None if self.is_empty() else self.set_aside()
            if source is not None:
                self._copy_from(source)
        if source is not None:
            if self.epoch_best_path.exists():
                self.epoch_best_path.replace(self.model_path)
            if best_epoch is not None and not self.model_path.exists():
                raise RunError(
                    f"{self.model_path}: no such file, and the run to be resumed has its best "
                    f"model, of epoch {best_epoch}, there"
                )
        return aside

    def _copy_from(self, source: Path) -> None:
        for name in ("metrics.jsonl", "config.json", self.epoch_best_path.name):
            if (source / name).exists():
                _copy(source / name, self.folder / name)
        model = source.with_name(source.name + self.model_path.suffix)
        if model.exists():
            _copy(model, self.model_path)

    def keep_epoch_best(self) -> None:
        """Before a stop in mid-epoch replaces the best model: keep it for a resumed run."""
        if self.model_path.exists() and not self.epoch_best_path.exists():
            _copy(self.model_path, self.epoch_best_path)

    def write_config(
        self, flags: dict[str, Any], session: dict[str, Any], resumed: bool = False
    ) -> None:
        """Write config.json: the flags in force, and each session's command line and versions."""
        path = self.folder / "config.json"
        sessions: list[dict[str, Any]] = []
        if resumed and path.exists():
            with suppress(ValueError, KeyError, TypeError):  # it was edited: start the list anew
                sessions = [*json.loads(path.read_text(encoding="utf-8"))["sessions"]]
        sessions.append(session)
        self.write_json(path.name, dict(flags=flags, **sessions[0], sessions=sessions))

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Write one of the folder's JSON files, atomically; what is not finite becomes null."""
        finite = {key: None if _not_finite(value) else value for key, value in values.items()}
        with atomic_write(self.folder / name) as file:
            file.write((json.dumps(finite, indent=2, allow_nan=False) + "\n").encode())


def _not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as old, atomic_write(target) as new:
        shutil.copyfileobj(old, new)


def find_run(path: str | Path) -> Path:
    """The last.pt that is meant by a path to it, to a run's folder or to its best model.

    Raises:
        RunError: none is there.
    """
    path = Path(path).absolute()  # the run's folder has a name, also where it is the current one
    candidates = [path / "last.pt", path, path.with_suffix("") / "last.pt"]
    if path.suffix == ".pt" and path.name != "last.pt":
        candidates = [path.with_suffix("") / "last.pt", path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise RunError(f"{path}: no such run (looked for {candidates[0]})")


def lock_folder(folder: Path) -> Any:
    """Make a folder if need be, and keep other processes out until the lock's `release`.

    Raises:
        RunError: another process has it, or it cannot be written to.
    """
    import filelock

    try:
        folder.mkdir(exist_ok=True)
        sync_directory(folder.parent)
        lock = filelock.FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise RunError(f"{folder}: another process is running there") from None
    except OSError as error:
        raise RunError(f"{folder}: cannot write: {error.strerror or error}") from error
    return lock


def is_in_use(save: str | Path) -> bool:
    """A process is at work in the run's folder that belongs to this --save."""
    import filelock

    lock = Path(save).with_suffix("") / LOCK
    if not lock.exists():
        return False
    try:
        with filelock.FileLock(lock, timeout=0):
            return False
    except filelock.Timeout:
        return True
