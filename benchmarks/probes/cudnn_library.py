"""libcudnn by ctypes: the functions that a recurrent layer needs.

Prototypes: cudnn_adv.h, cudnn_ops.h and cudnn_graph.h of cuDNN 9. A wrong one crashes the process.
"""

import ctypes
from ctypes import (
    POINTER,
    byref,
    c_char_p,
    c_float,
    c_int,
    c_size_t,
    c_uint,
    c_ulonglong,
    c_void_p,
    create_string_buffer,
)
from pathlib import Path
from typing import Any

import torch

PROTOTYPES: dict[str, list[Any]] = {
    "cudnnCreate": [POINTER(c_void_p)],
    "cudnnSetStream": [c_void_p, c_void_p],
    "cudnnCreateTensorDescriptor": [POINTER(c_void_p)],
    "cudnnSetTensorNdDescriptor": [c_void_p, c_int, c_int, POINTER(c_int), POINTER(c_int)],
    "cudnnCreateDropoutDescriptor": [POINTER(c_void_p)],
    "cudnnSetDropoutDescriptor": [c_void_p, c_void_p, c_float, c_void_p, c_size_t, c_ulonglong],
    "cudnnCreateRNNDescriptor": [POINTER(c_void_p)],
    # descriptor; algorithm, cell, bias, direction, input, data type, precision, math;
    # input, hidden, projection, layers; dropout, flags
    "cudnnSetRNNDescriptor_v8": [c_void_p, *[c_int] * 8, *[c_int] * 4, c_void_p, c_uint],
    "cudnnBuildRNNDynamic": [c_void_p, c_void_p, c_int],
    "cudnnCreateRNNDataDescriptor": [POINTER(c_void_p)],
    # descriptor; data type, layout, steps, batch, width; lengths on the host, padding
    "cudnnSetRNNDataDescriptor": [c_void_p, *[c_int] * 5, POINTER(c_int), c_void_p],
    "cudnnGetRNNWeightSpaceSize": [c_void_p, c_void_p, POINTER(c_size_t)],
    "cudnnGetRNNTempSpaceSizes": [
        c_void_p, c_void_p, c_int, c_void_p, POINTER(c_size_t), POINTER(c_size_t),
    ],
    # handle, rnn, layer, weights' size, weights, matrix, its descriptor, its place, the bias's
    "cudnnGetRNNWeightParams": [
        c_void_p, c_void_p, c_int, c_size_t, c_void_p, c_int, c_void_p, POINTER(c_void_p),
        c_void_p, POINTER(c_void_p),
    ],
    # handle, rnn, mode, lengths; x desc, x; y desc, y; h desc, hx, hy; c desc, cx, cy;
    # weights, workspace and reserve, each with its size first
    "cudnnRNNForward": [
        c_void_p, c_void_p, c_int, c_void_p, *[c_void_p] * 10,
        c_size_t, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p,
    ],
    # handle, rnn, lengths; y desc, y, dy; x desc, dx; h desc, hx, dhy, dhx; c desc, cx, dcy, dcx
    "cudnnRNNBackwardData_v8": [
        c_void_p, c_void_p, c_void_p, *[c_void_p] * 13,
        c_size_t, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p,
    ],
    # handle, rnn, mode, lengths; x desc, x; h desc, hx; y desc, y; the weights' gradients
    "cudnnRNNBackwardWeights_v8": [
        c_void_p, c_void_p, c_int, c_void_p, *[c_void_p] * 6,
        c_size_t, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p,
    ],
}  # fmt: skip


class RefusedError(Exception):
    """cuDNN answered with a status other than success; says which call, and the status."""


class Cudnn:
    """The functions of PROTOTYPES, which raise RefusedError; a handle on the current stream.

    Args:
        library: a loaded libcudnn.
        stream: number of a CUDA stream.
    """

    def __init__(self, library: Any, stream: int) -> None:
        self._library = library
        library.cudnnGetErrorString.argtypes = [c_int]
        library.cudnnGetErrorString.restype = c_char_p
        library.cudnnGetLastErrorString.argtypes = [c_char_p, c_size_t]
        library.cudnnGetLastErrorString.restype = None
        for name, arguments in PROTOTYPES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, c_int
        self.handle = self.create("cudnnCreate")
        self.call("cudnnSetStream", self.handle, stream)
        self.dropout = self.create("cudnnCreateDropoutDescriptor")
        self.call("cudnnSetDropoutDescriptor", self.dropout, self.handle, 0.0, None, 0, 0)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function by its name."""
        status = getattr(self._library, name)(*arguments)
        if status:
            text, more = self._library.cudnnGetErrorString(status), create_string_buffer(200)
            self._library.cudnnGetLastErrorString(more, len(more))
            why = (part.decode(errors="replace") for part in (text or b"", more.value))
            raise RefusedError(f"{name}: {' '.join(why).strip() or status}")

    def create(self, name: str) -> c_void_p:
        """Have a handle or descriptor made. They are few and live as long as the process."""
        made = c_void_p()
        self.call(name, byref(made))
        return made

    def tensor(self, data_type: int, shape: tuple[int, int, int]) -> c_void_p:
        """Descriptor of a contiguous tensor of three dimensions."""
        made = self.create("cudnnCreateTensorDescriptor")
        strides = (shape[1] * shape[2], shape[2], 1)
        three = c_int * 3
        self.call("cudnnSetTensorNdDescriptor", made, data_type, 3, three(*shape), three(*strides))
        return made


def loaded_cudnn() -> Any:
    """The libcudnn that PyTorch has in this process."""
    x = torch.zeros(1, 1, 8, device="cuda")
    torch.nn.LSTM(8, 8, device="cuda")(x)
    names = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    found = sorted(name for name in names if Path(name).name.startswith("libcudnn.so"))
    return ctypes.CDLL(found[0] if found else "libcudnn.so.9")
