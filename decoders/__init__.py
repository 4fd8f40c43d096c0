"""Decoders, one a file, behind the interface of decoders.decoder."""

from decoders.decoder import Decoder
from decoders.linear import Linear

DECODERS: dict[str, type[Decoder]] = {"linear": Linear}
