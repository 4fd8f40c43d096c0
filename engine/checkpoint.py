"""Checkpoints: a model for every other program, and all that an exact resume needs.

Both kinds are dictionaries of tensors and plain values, written atomically and read with
weights_only=True, so that loading one cannot run code.
"""

import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from data.corpus import Vocabulary
from data.files import atomic_write
from engine.errors import CheckpointError
from model import RNNModel

MODEL_FORMAT = "awd-lstm model 1"
TRAINING_FORMAT = "awd-lstm training state 2"
OLD_TRAINING_FORMAT = "awd-lstm training state 1"
TRAINING_PARTS: dict[str, type] = {
    "flags": dict,
    "fingerprint": str,
    "model": dict,
    "optimizer": dict,
    "scheme": dict,
    "hidden": list,
    "position": dict,
    "callbacks": dict,
    "random": dict,
    "tracking": dict,
}


def model_payload(model: RNNModel, vocabulary: Vocabulary, **details: Any) -> dict[str, Any]:
    """What a model's file holds: weights, configuration, vocabulary, all that programs need.

    Args:
        details: plain values that are kept along, e.g. epoch and valid_loss.
    """
    return dict(
        format=MODEL_FORMAT,
        config=model.config(),
        vocabulary=vocabulary.to_text(),
        weights=model.state_dict(),
        details=details,
    )


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[RNNModel, Vocabulary]:
    """Read a model that main.py saved.

    Returns:
        The model, in evaluation mode and on device, and its vocabulary.

    Raises:
        CheckpointError: no such file, or not a model of this project.
    """
    payload = _read(Path(path), MODEL_FORMAT)
    with damage_reported(Path(path)):
        model = RNNModel(**payload["config"])
        model.load_state_dict(payload["weights"])
        vocabulary = Vocabulary.from_text(payload["vocabulary"])
        if len(vocabulary) != model.ntoken:
            raise ValueError(f"{len(vocabulary)} words for {model.ntoken} embeddings")
    return model.to(device).eval(), vocabulary


def training_payload(state: dict[str, Any]) -> dict[str, Any]:
    """What a training state's file holds: all that an exact resume needs, TRAINING_PARTS."""
    return dict(state, format=TRAINING_FORMAT)


def load_training_state(path: Path) -> dict[str, Any]:
    """Read what training_payload makes, tensors on the CPU.

    Raises:
        CheckpointError: no such file, or not a training state of this project.
    """
    state = _read(path, TRAINING_FORMAT)
    with damage_reported(path):
        for part, kind in TRAINING_PARTS.items():
            if not isinstance(state[part], kind):
                raise TypeError(f"its {part} is not a {kind.__name__}")
    return state


@contextmanager
def damage_reported(path: Path) -> Iterator[None]:
    """Turn what a payload of the wrong shape raises into one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path}: damaged checkpoint: {reason}") from error


def write_checkpoint(path: Path, payload: dict[str, Any]) -> None:
    """Write tensors and plain values.

    Args:
        path: where to; what was there is replaced once the new file is complete.
        payload: from model_payload or training_payload.

    Raises:
        CheckpointError: it could not be written; what was there before is untouched.
    """
    try:
        with atomic_write(path) as file:
            torch.save(payload, file)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot write: {error.strerror or error}") from error
    except RuntimeError as error:
        # torch's zip writer reports a write that failed beneath it as a RuntimeError.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = " ".join(str(cause).split())[:300]
        raise CheckpointError(f"{path}: cannot write: {reason}") from error


def _read(path: Path, expected: str) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            # What torch has to say about a foreign pickle becomes the error's one line below.
            warnings.simplefilter("ignore")
            payload: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror or error}") from error
    except EOFError as error:
        raise CheckpointError(f"{path}: empty or truncated, not a checkpoint") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {_refusal(str(error))}") from error
    except Exception as error:
        # A truncated or foreign file makes torch raise almost anything; none of it is a bug here.
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: truncated or not a checkpoint ({reason})") from error
    found = payload.get("format") if isinstance(payload, dict) else None
    if found == OLD_TRAINING_FORMAT:
        raise CheckpointError(
            f"{path}: a run of an earlier version of this code, which drew other random numbers; "
            "resume it with the commit that its config.json names (its best model still loads)"
        )
    if found != expected:
        kind = f"a {found!r} file" if isinstance(found, str) else "not a checkpoint of this project"
        raise CheckpointError(f"{path}: {kind}, where {expected!r} is needed")
    assert isinstance(payload, dict)
    return payload


def _refusal(message: str) -> str:
    """Say in a line why weights_only refused a pickle."""
    name = re.search(r"GLOBAL (\S+)", message)
    if name is not None:
        return (
            f"refused, because loading it would run code ({name[1]}); a whole pickled model, as "
            "the original saves, has to be exported as a state dict first"
        )
    if "Unsupported" in message:
        return "not a checkpoint, or a pickle that may hold more than plain values: refused"
    return "truncated or not a checkpoint"
