"""An exported model: a folder with model.safetensors, config.json, vocab.txt and README.md."""

import json
import os
import re
from pathlib import Path
from typing import Any

from data.files import atomic_folder, atomic_write
from engine.errors import CheckpointError

FOLDER_FORMAT = "awd-lstm folder 1"
WEIGHTS, CONFIG, VOCABULARY = "model.safetensors", "config.json", "vocab.txt"

README = """# An AWD-LSTM language model

| file | |
|---|---|
| `model.safetensors` | the weights in float32, named as in the code of Merity et al. 2017 |
| `config.json` | sizes; with `tie_weights` the decoder's matrix is `encoder.weight`, stored once |
| `vocab.txt` | a word a line; the first has id 0 |

This program, saved as `perplexity.py`, prints the perplexity of a text under the model:
`python perplexity.py FOLDER TEXT`. It needs PyTorch only. Words are separated by spaces, and each
line ends with an `<eos>`.

```python
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

folder, text = Path(sys.argv[1]), Path(sys.argv[2])
config = json.loads((folder / "config.json").read_text())
words = (folder / "vocab.txt").read_text(encoding="utf-8").split()

# safetensors: the length of the header, the header, the values. (So does the package
# safetensors: weights = safetensors.torch.load_file(folder / "model.safetensors").)
content = bytearray((folder / "model.safetensors").read_bytes())
start = 8 + int.from_bytes(content[:8], "little")
header = json.loads(content[8:start])
header.pop("__metadata__")
weights = {}
for name, entry in header.items():
    first, last = (start + offset for offset in entry["data_offsets"])
    values = torch.frombuffer(content[first:last], dtype=torch.float32)
    # rnns.0.module.weight_hh_l0_raw, the weight behind weight drop, is rnns.0.weight_hh_l0
    weights[name.replace(".module.", ".").removesuffix("_raw")] = values.view(entry["shape"])

layers = []
for n in range(config["nlayers"]):
    own = {name.split(".")[2]: w for name, w in weights.items() if name.startswith(f"rnns.{n}.")}
    units, width = own["weight_hh_l0"].size(1), own["weight_ih_l0"].size(1)
    layer = getattr(torch.nn, config["rnn_type"])(width, units).eval()
    layer.load_state_dict(own)
    layers.append(layer)
embedding, bias = weights["encoder.weight"], weights["decoder.bias"]
decoder = embedding if config["tie_weights"] else weights["decoder.weight"]

index = {word: id for id, word in enumerate(words)}
read = [word for line in text.open(encoding="utf-8") for word in [*line.split(), "<eos>"]]
ids = torch.tensor([index[word if word in index else "<unk>"] for word in read])
states, scores = [None] * len(layers), []
rows = max(1, 2**23 // len(words))  # decoded at a time
with torch.no_grad():
    for inputs, targets in zip(ids[:-1].split(2048), ids[1:].split(2048)):
        x = F.embedding(inputs[:, None], embedding)  # (T, 1, E)
        for n, layer in enumerate(layers):
            x, states[n] = layer(x, states[n])
        for h, goal in zip(x[:, 0].split(rows), targets.split(rows)):
            log_probs = F.linear(h, decoder, bias).log_softmax(1)  # (n, V)
            scores.append(log_probs.gather(1, goal[:, None])[:, 0].double())
print(math.exp(-torch.cat(scores).mean()))
```
"""


def write_model_folder(folder: Path, payload: dict[str, Any]) -> None:
    """Write a model as a folder, complete or not at all.

    Args:
        folder: must not exist.
        payload: from checkpoint.model_payload.

    Raises:
        CheckpointError: the folder exists or cannot be written.
    """
    from safetensors.torch import save

    weights = {name: weight.contiguous() for name, weight in payload["weights"].items()}
    if payload["config"]["tie_weights"]:
        del weights["decoder.weight"]
    config = dict(payload["config"], format=FOLDER_FORMAT, details=payload["details"])
    texts = {
        CONFIG: json.dumps(config, indent=1),
        VOCABULARY: payload["vocabulary"] + "\n",
        "README.md": _readme(payload["config"]),
    }
    try:
        with atomic_folder(folder) as temporary:
            with atomic_write(temporary / WEIGHTS) as file:
                file.write(save(weights, {"format": "pt"}))
            for name, text in texts.items():
                with atomic_write(temporary / name, "w") as file:
                    file.write(text)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot write: {error.strerror or error}") from error


def _readme(config: dict[str, Any]) -> str:
    """README.md; its program is left out for layers and decoders that torch.nn lacks."""
    if (config["rnn_type"] in ("LSTM", "GRU")) and config["decoder"] == "linear":
        return README
    kinds = f"{config['rnn_type']} layers and the decoder {config['decoder']}"
    page = re.sub(r"This program.*", "", README, flags=re.DOTALL)
    return page + f"Its {kinds} need the code that exported it.\n"


def _other_folder(folder: Path, config: dict[str, Any]) -> str:
    """Say what kind of folder has a config.json that is not an exported model's."""
    flags = config.get("flags")
    if not isinstance(flags, dict):
        return "not a folder that export.py wrote"
    return f"a run's folder; the model of this run is {model_of_run(folder, flags)}"


def model_of_run(folder: Path, flags: dict[str, Any]) -> Path:
    """The best model's path of a run, from its folder and flags, also after the run was moved."""
    # normalised, so that "." and ".." have a name
    return Path(f"{os.path.abspath(folder)}{Path(str(flags.get('save'))).suffix}")  # noqa: PTH100


def read_model_folder(folder: Path) -> dict[str, Any]:
    """Read what write_model_folder wrote: the payload of checkpoint.model_payload.

    Raises:
        CheckpointError: a file is missing or cannot be read.
        ValueError, KeyError, TypeError: a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        if not (folder / CONFIG).exists():
            raise CheckpointError(f"{folder}: not a folder that export.py wrote")
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if config.pop("format", None) != FOLDER_FORMAT:
            raise CheckpointError(f"{folder}: {_other_folder(folder, config)}")
        vocabulary = (folder / VOCABULARY).read_bytes().decode().removesuffix("\n")
        weights = load((folder / WEIGHTS).read_bytes())
    except OSError as error:
        reason = f"cannot read: {error.strerror or error}"
        raise CheckpointError(f"{error.filename or folder}: {reason}") from error
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS}: {error}") from error
    if config["tie_weights"]:
        weights["decoder.weight"] = weights["encoder.weight"]
    details = config.pop("details")
    return dict(config=config, vocabulary=vocabulary, weights=weights, details=details)
