"""The trained model that a run starts from, instead of from random weights."""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.corpus import Vocabulary
from engine.checkpoint import load_model, model_details
from engine.errors import RunError
from model import RNNModel


@dataclass(frozen=True)
class Origin:
    """A model that main.py saved, to be trained further by another run.

    path: its file, which is only read.
    details: its epoch, update and valid_loss (nats per token); empty if it was imported.
    note: what to say on stderr when a run starts from it.
    """

    path: Path
    model: RNNModel
    vocabulary: Vocabulary
    details: dict[str, Any]
    note: str = ""

    def named(self) -> dict[str, Any]:
        """Plain values for checkpoints and config.json, which tell it from other models."""
        checksum = 0
        for weight in self.model.state_dict().values():
            checksum = zlib.crc32(weight.numpy().tobytes(), checksum)
        return dict(self.details, checksum=checksum, path=str(self.path))

    def is_origin_of(self, state: dict[str, Any]) -> bool:
        """True if a training state is that of a run from this model, wherever its file was."""
        ours = self.named()  # older states have no checksum
        return bool({**ours, **state["origin"], "path": ""} == {**ours, "path": ""})

    def give_weights(self, model: RNNModel) -> None:
        """Copy the weights to a model of the same sizes, with or without weight drop.

        Raises:
            RunError: its weights have other names or shapes.
        """
        weights = {plain_name(name): weight for name, weight in self.model.state_dict().items()}
        try:
            model.load_state_dict({name: weights[plain_name(name)] for name in model.state_dict()})
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise RunError(f"{self.path}: its weights do not fit the flags: {reason}") from error


def read_origin(path: str | Path) -> Origin:
    """Read a model to start from.

    Raises:
        CheckpointError: the file is missing, damaged, or not a model of this project.
    """
    path = Path(path)
    model, vocabulary = load_model(path)
    return Origin(path, model, vocabulary, model_details(path))


def plain_name(name: str) -> str:
    """A weight's name without weight drop's prefix and suffix: rnns.0.weight_hh_l0."""
    return name.replace(".module.", ".").removesuffix("_raw")
