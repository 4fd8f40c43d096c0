"""Recurrent layers, one a file, behind the interface of layers.layer."""

from layers.gru import GRU
from layers.layer import Layer
from layers.lstm import LSTM

# By the name that --model takes.
LAYERS: dict[str, type[Layer]] = {"LSTM": LSTM, "GRU": GRU}
