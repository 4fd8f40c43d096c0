"""Reads the models of the paper's code, github.com/salesforce/awd-lstm-lm."""

import pickle
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
from torch import Tensor

from engine.checkpoint import damage_reported, load_plain, read_pickle
from engine.errors import CheckpointError
from engine.origin import plain_name
from model import RNNModel

KINDS = {4: "LSTM", 3: "GRU"}  # by the number of gates
# What unpickling may call; Unpickler replaces all else by stand-ins.
CALLED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}


def read_original(path: Path, trust_pickle: bool = False, **dropouts: Any) -> RNNModel:
    """Read a state dict of the original's RNNModel; sizes follow from the shapes.

    Args:
        path: a file of torch.save(model.state_dict(), path).
        trust_pickle: the file is a whole pickled model, or the original's checkpoint
            [model, criterion, optimizer]. Only functions that rebuild tensors are called; each
            class that the pickle names is replaced by a stand-in.
        dropouts: dropout, dropouth, dropouti, dropoute and wdrop, which a state dict lacks; they
            have no effect on evaluation.

    Raises:
        CheckpointError: the file is missing, damaged, or not of an LSTM or GRU of the original.
    """
    payload = read_pickle(path, _load_pickle if trust_pickle else load_plain)
    with damage_reported(path):
        weights = _weights_in(path, payload) if trust_pickle else payload
        return _model_of(path, weights, dropouts)


def _model_of(path: Path, weights: Any, dropouts: dict[str, Any]) -> RNNModel:
    foreign = CheckpointError(f"{path}: not an LSTM or GRU of the original's RNNModel")
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise foreign
    # Beside NAME_raw, NAME is a masked copy of it.
    plain = {plain_name(n): w.float() for n, w in weights.items() if f"{n}_raw" not in weights}
    if not {"encoder.weight", "rnns.0.weight_hh_l0"} <= plain.keys():
        raise foreign
    embedding = plain["encoder.weight"]
    (ntoken, ninp), (rows, nhid) = embedding.shape, plain["rnns.0.weight_hh_l0"].shape
    kind = KINDS.get(rows // nhid)
    if kind is None:
        raise foreign
    layers = {name.split(".")[1] for name in plain if name.startswith("rnns.")}
    tied = torch.equal(plain.setdefault("decoder.weight", embedding), embedding)
    model = RNNModel(kind, ntoken, ninp, nhid, len(layers), tie_weights=tied, **dropouts)
    own = {name: plain.pop(plain_name(name)) for name in model.state_dict()}
    if plain:
        raise CheckpointError(f"{path}: unknown weights: {', '.join(sorted(plain))}")
    model.load_state_dict(own)
    return model.eval()


class StandIn:
    """Replaces a class or function that a pickle names: accepts everything, does nothing.

    Attributes:
        state: the attributes of the pickled object.
    """

    state: dict[str, Any]

    def __init__(self, *args: Any, **keywords: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.state = state

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None:
        """No-op, for subclasses of list."""

    def add(self, item: Any) -> None:
        """No-op, for subclasses of set."""


class Unpickler(pickle.Unpickler):
    """Calls what CALLED lists; all other classes and functions become stand-ins of their names."""

    def find_class(self, module: str, name: str) -> Any:
        """See pickle.Unpickler."""
        return CALLED.get((module, name)) or type(name, (StandIn,), {})


def _load_pickle(file: IO[bytes]) -> Any:
    def load(file: IO[bytes], **keywords: Any) -> Any:
        return Unpickler(file, **keywords).load()

    reader = SimpleNamespace(Unpickler=Unpickler, load=load, __name__="pickle")
    # Only what Unpickler allows is called.
    return torch.load(  # nosec B614
        file, map_location="cpu", pickle_module=reader, weights_only=False
    )


def _weights_in(path: Path, payload: Any) -> dict[str, Tensor]:
    """The state dict in what was unpickled: itself, a model or a checkpoint."""
    if isinstance(payload, dict):
        return payload
    parts = payload if isinstance(payload, list | tuple) else [payload]
    for part in parts:
        if type(part).__name__ == "SplitCrossEntropyLoss" and part.state["_parameters"]:
            raise CheckpointError(f"{path}: its adaptive softmax is not supported")
    models = [part for part in parts if type(part).__name__ == "RNNModel"]
    if not models:
        raise CheckpointError(f"{path}: holds no RNNModel")
    return dict(_parameters(models[0]))


def _parameters(module: StandIn, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in module.state["_parameters"].items():
        if isinstance(value, Tensor):
            yield prefix + name, value.detach()
    for name, child in module.state["_modules"].items():
        if isinstance(child, StandIn):
            yield from _parameters(child, f"{prefix}{name}.")
