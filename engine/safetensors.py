"""The safetensors file format (github.com/huggingface/safetensors): named tensors, no code.

A file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and
data_offsets of each tensor) and the tensors' bytes, which follow each other without gaps.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LARGEST_HEADER = 100_000_000  # bytes; the format's own limit


def write_safetensors(file: IO[bytes], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a file that is open for writing.

    Raises:
        KeyError: a dtype that DTYPES lacks.
        OSError: the file cannot be written.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.itemsize
        entry = dict(dtype=names[tensor.dtype], shape=list(tensor.shape), data_offsets=[begin, end])
        header[name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned in a file that is mapped
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        file.write(content.numpy().data)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a file of tensors; each owns its memory.

    Raises:
        ValueError: the file is truncated, too long, or its header is not valid: an unknown dtype,
            a shape that does not fit its bytes, or bytes that overlap, are out of range or unused.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(LARGEST_HEADER, path.stat().st_size):
            raise ValueError(f"{path.name}: not a safetensors file, or truncated")
        text, content = file.read(length), bytearray(file.read())
    try:
        header = json.loads(text, object_pairs_hook=_distinct)
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        return dict(_tensors(entries, content))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path.name}: invalid header: {error!r}") from error


def _tensors(entries: list[tuple[str, Any]], content: bytearray) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors, in the order of their bytes."""
    end = 0
    for name, entry in entries:
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        begin, before = entry["data_offsets"][0], end
        count = math.prod(shape)
        end = begin + count * dtype.itemsize
        whole = all(type(size) is int and size >= 0 for size in (*shape, *entry["data_offsets"]))
        if not whole or begin != before or entry["data_offsets"] != [begin, end]:
            raise ValueError(f"{name} has shape {shape}, bytes {entry['data_offsets']}")
        if end > len(content):
            raise ValueError(f"{name} ends at byte {end} of {len(content)}")
        tensor = torch.empty(shape, dtype=dtype)
        tensor.view(-1).view(torch.uint8).numpy()[:] = memoryview(content)[begin:end]
        yield name, tensor
    if end != len(content):
        raise ValueError(f"{len(content) - end} bytes belong to no tensor")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)
