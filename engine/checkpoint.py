"""Checkpoints: model files, and training states for exact resume.

Both are dictionaries of tensors and plain values, written atomically and read with
weights_only=True, so that loading one cannot run code.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from data.corpus import Corpus, Vocabulary
from data.files import atomic_write
from engine.errors import CheckpointError, RunError
from engine.launch import is_follower
from engine.model_folder import model_of_run, read_model_folder
from engine.tracking import warn
from model import RNNModel

MODEL_FORMAT = "awd-lstm model 1"
TRAINING_FORMAT = "awd-lstm training state 2"


def model_payload(model: RNNModel, vocabulary: Vocabulary, **details: Any) -> dict[str, Any]:
    """The contents of a model file: weights, configuration and vocabulary.

    Args:
        details: further plain values, e.g. epoch and valid_loss.
    """
    return dict(
        format=MODEL_FORMAT,
        config=model.config(),
        vocabulary=vocabulary.to_text(),
        weights=model.state_dict(),
        details=details,
    )


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[RNNModel, Vocabulary]:
    """Read a model that main.py saved, or a folder that export.py wrote.

    Returns:
        The model, in evaluation mode and on device, and its vocabulary.

    Raises:
        CheckpointError: the file is missing, damaged, or not a model of this project.
    """
    payload = _read_model(Path(path))
    with damage_reported(Path(path)):
        try:
            model = RNNModel(**payload["config"])
        except ValueError as error:  # saved by other code, with a layer of its own, say
            raise CheckpointError(f"{path}: this code cannot build its model: {error}") from error
        model.load_state_dict(payload["weights"])
        vocabulary = Vocabulary.from_text(payload["vocabulary"])
        if len(vocabulary) != model.ntoken:
            raise ValueError(f"{len(vocabulary)} words for {model.ntoken} embeddings")
    return model.to(device).eval(), vocabulary


def check_vocabulary(path: Path, vocabulary: Vocabulary, folder: str, corpus: Corpus) -> None:
    """Check that a model's vocabulary is that of a corpus.

    Args:
        path, folder: of model and corpus, for the message.

    Raises:
        RunError: it is another one.
    """
    if vocabulary != corpus.vocabulary:
        raise RunError(
            f"{folder}: its words ({len(corpus.vocabulary):,}) are not those of {path} "
            f"({len(vocabulary):,})"
        )


def model_details(path: Path) -> dict[str, Any]:
    """The `details` of a model file or exported folder: epoch, update, valid_loss.

    Raises:
        CheckpointError: the file is missing, damaged, or not a model of this project.
    """
    payload = _read_model(path)
    with damage_reported(path):
        return dict(payload["details"])


def _read_model(path: Path) -> dict[str, Any]:
    """The payload of a model file or of an exported folder."""
    if not path.is_dir():
        return _read(path, MODEL_FORMAT)
    with damage_reported(path):
        return read_model_folder(path)


def training_payload(state: dict[str, Any]) -> dict[str, Any]:
    """The contents of a training state's file: what Trainer.state_dict returns, and the format."""
    return dict(state, format=TRAINING_FORMAT)


def load_training_state(path: Path) -> dict[str, Any]:
    """Read a training state, with tensors on the CPU.

    If the file is damaged, reads the previous training state instead, with a warning.

    Raises:
        CheckpointError: the file is missing, not a training state of this project, or damaged
            without a previous one.
    """
    before = previous_path(path)
    try:
        return _read(path, TRAINING_FORMAT)
    except CheckpointError as error:
        if not before.exists() or not path.exists():
            raise
        state = _read(before, TRAINING_FORMAT)
        if not is_follower():
            warn(f"{error}; going on from the state before it, {before}")
        return state


def file_version(path: Path) -> tuple[int, int] | None:
    """Changes when the file is replaced; None: no such file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def check_unchanged(path: Path, version: tuple[int, int] | None) -> None:
    """Check, once the run's folder is locked, that the state is still the one that was read.

    Args:
        path: the training state.
        version: its file_version before it was read; None: it did not exist.

    Raises:
        RunError: another process has meanwhile begun the run or continued it.
    """
    if file_version(path) != version:
        raise RunError(f"{path}: another process has just replaced it; the same command goes on")


def previous_path(path: Path) -> Path:
    """The path of the checkpoint that the one at path has replaced: last.previous.pt."""
    return path.with_suffix(f".previous{path.suffix}")


@contextmanager
def damage_reported(path: Path) -> Iterator[None]:
    """Turn errors about a payload's contents into a CheckpointError of one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path}: damaged checkpoint: {reason}") from error


def write_checkpoint(path: Path, payload: dict[str, Any], keep: Path | None = None) -> None:
    """Write a checkpoint atomically.

    Args:
        path: file to write; the old file is replaced once the new one is complete.
        payload: from model_payload or training_payload.
        keep: where to move the old file, unless it is damaged; None: it is not kept.

    Raises:
        WriteError: the file could not be written; the old one is unchanged.
    """
    if keep is not None and not _is_intact(path):
        keep = None  # else a kill right now would leave two damaged files
    with atomic_write(path, keep=keep) as file:
        torch.save(payload, file)


def read_pickle(path: Path, load: Callable[[IO[bytes]], Any]) -> Any:
    """Read a file of torch.save, after its checksums.

    Args:
        load: reads the open file; its errors become CheckpointErrors.

    Raises:
        CheckpointError: the file is missing, damaged or refused.
    """
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            # The error below replaces torch's warning about a foreign pickle.
            warnings.simplefilter("ignore")
            if (part := _damaged_part(file)) is not None:
                raise CheckpointError(f"{path}: damaged: {part} does not match its checksum")
            return load(file)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror or error}") from error
    except EOFError as error:
        raise CheckpointError(f"{path}: empty or truncated, not a checkpoint") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {_refusal(str(error))}") from error
    except Exception as error:
        # torch raises almost anything for a truncated or foreign file.
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: truncated or not a checkpoint ({reason})") from error


def load_plain(file: IO[bytes]) -> Any:
    """torch.load of tensors and plain values; anything else is a pickle.UnpicklingError."""
    return torch.load(file, map_location="cpu", weights_only=True)


def _read(path: Path, expected: str) -> dict[str, Any]:
    payload = read_pickle(path, load_plain)
    found = payload.get("format") if isinstance(payload, dict) else None
    if found != expected:
        if found == TRAINING_FORMAT and isinstance(flags := payload.get("flags"), dict):
            model = model_of_run(path.parent, flags)
            raise CheckpointError(f"{path}: a training state; the model of this run is {model}")
        kind = "not a checkpoint of this project"
        if found == MODEL_FORMAT:
            raise CheckpointError(f"{path}: a model without its run; finetune.py goes on from it")
        if isinstance(found, str):
            kind = f"a {found!r} file (the commit that the run's config.json names reads it)"
        raise CheckpointError(f"{path}: {kind}, where {expected!r} is needed")
    assert isinstance(payload, dict)
    return payload


def _damaged_part(file: IO[bytes]) -> str | None:
    """The first part of torch.save's archive with a wrong CRC-32; None: all are right.

    torch.load does not verify these checksums.

    Raises:
        Exception: of almost any kind, if the archive's structure is damaged.
    """
    magic = file.read(4)
    file.seek(0)
    if magic != b"PK\x03\x04":
        return None  # no archive: torch.load reports that
    with zipfile.ZipFile(file) as archive:
        part = archive.testzip()
    file.seek(0)
    return part


def _is_intact(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return _damaged_part(file) is None
    except Exception:  # missing or damaged
        return False


def _refusal(message: str) -> str:
    """The reason why weights_only refused a pickle, in one line."""
    name = re.search(r"GLOBAL (\S+)", message)
    if name is not None:
        return (
            f"refused, because loading it would run code ({name[1]}); export.py --from-original "
            "--trust-pickle reads a whole pickled model of the original"
        )
    if "Unsupported" in message:
        return "not a checkpoint, or a pickle that may hold more than plain values: refused"
    return "truncated or not a checkpoint"
