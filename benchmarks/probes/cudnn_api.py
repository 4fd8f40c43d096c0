"""cuDNN's algorithms for recurrent layers, asked for by name through its C interface.

PyTorch chooses the algorithm itself. Here each one is asked for, told apart by what cuDNN answers,
timed, and held against the standard one. Prototypes: cudnn_adv.h, cudnn_ops.h and cudnn_graph.h of
cuDNN 9. A wrong one would crash the process, so this runs in one of its own.
"""

import ctypes
from collections.abc import Callable, Iterator
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
)  # fmt: skip
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.probes.clock import Clock, NotHereError, Row, Sizes, distance, noted

ALGORITHMS = {"standard": 0, "persist-static": 1, "persist-dynamic": 2, "persist-static-small-h": 3}
TYPES = {"fp16": (torch.float16, 2), "bf16": (torch.bfloat16, 9)}  # CUDNN_DATA_HALF, …_BFLOAT16
FLOAT, LSTM, DOUBLE_BIAS, LINEAR_INPUT, UNIDIRECTIONAL = 0, 2, 2, 0, 0
TRAINING, WGRAD_ADD, MATRICES = 1, 0, 8
# Layout of the sequences, the flag that goes with it, CUDNN_TENSOR_OP_MATH or …_DEFAULT_MATH:
# tried in this order until one is taken.
VARIANTS = {
    "packed": (1, 0, 1),
    "unpacked": (0, 1, 1),
    "packed, default math": (1, 0, 0),
}
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


class Layer:
    """One LSTM layer, H units on an input of E = H, by an algorithm of choice.

    Args:
        cudnn: the library.
        algorithm: its number.
        data: cuDNN's number of the data type, and torch's.
        shape: T, B, H.
        variant: layout, flag and math, see VARIANTS.
        device: with cuDNN.

    Raises:
        RefusedError: cuDNN does not want to.
    """

    def __init__(
        self,
        cudnn: Cudnn,
        algorithm: int,
        data: tuple[torch.dtype, int],
        shape: tuple[int, int, int],
        variant: tuple[int, int, int],
        device: torch.device,
    ) -> None:
        (dtype, number), (steps, batch, units), (layout, flags, math) = data, shape, variant
        self.cudnn, self.shape = cudnn, shape
        self.rnn = cudnn.create("cudnnCreateRNNDescriptor")
        cudnn.call(
            "cudnnSetRNNDescriptor_v8", self.rnn, algorithm, LSTM, DOUBLE_BIAS, UNIDIRECTIONAL,
            LINEAR_INPUT, number, FLOAT, math, units, units, units, 1, cudnn.dropout, flags,
        )  # fmt: skip
        if algorithm == ALGORITHMS["persist-dynamic"]:
            cudnn.call("cudnnBuildRNNDynamic", cudnn.handle, self.rnn, batch)
        self.data = cudnn.create("cudnnCreateRNNDataDescriptor")
        lengths = (c_int * batch)(*[steps] * batch)
        self.padding = torch.zeros(1, dtype=dtype)  # on the host; read when it is needed
        cudnn.call(
            "cudnnSetRNNDataDescriptor", self.data, number, layout, steps, batch, units, lengths,
            self.padding.data_ptr(),
        )  # fmt: skip
        self.states = cudnn.tensor(number, (1, batch, units))
        self.lengths = torch.full((batch,), steps, dtype=torch.int32, device=device)
        size, work, reserve = c_size_t(), c_size_t(), c_size_t()
        cudnn.call("cudnnGetRNNWeightSpaceSize", cudnn.handle, self.rnn, byref(size))
        cudnn.call(
            "cudnnGetRNNTempSpaceSizes", cudnn.handle, self.rnn, TRAINING, self.data,
            byref(work), byref(reserve),
        )  # fmt: skip
        self.weights = torch.zeros(size.value // dtype.itemsize, dtype=dtype, device=device)
        self.work, self.reserve = (
            torch.zeros(max(1, s.value), dtype=torch.uint8, device=device) for s in (work, reserve)
        )
        self.d_weights = torch.zeros_like(self.weights)
        x = torch.zeros(steps, batch, units, dtype=dtype, device=device)
        self.y, self.d_x = torch.zeros_like(x), torch.zeros_like(x)
        self.hy, self.cy, self.d_h, self.d_c = (torch.zeros_like(x[:1]) for _ in range(4))

    def places(self, buffer: Tensor) -> list[Tensor]:
        """Views of the 8 matrices, (H, H), and of their biases, (H,), where cuDNN wants them."""
        units, base, found = self.shape[2], self.weights.data_ptr(), []
        unused = [self.cudnn.create("cudnnCreateTensorDescriptor") for _ in range(2)]
        for matrix in range(MATRICES):
            places = c_void_p(), c_void_p()
            self.cudnn.call(
                "cudnnGetRNNWeightParams", self.cudnn.handle, self.rnn, 0, self.weights.nbytes,
                base, matrix, unused[0], byref(places[0]), unused[1], byref(places[1]),
            )  # fmt: skip
            for place, shape in zip(places, ((units, units), (units,)), strict=True):
                start = ((place.value or base) - base) // buffer.itemsize
                numbers = torch.Size(shape).numel()
                found.append(buffer[start : start + numbers].view(shape))
        return found

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> None:
        """Fill y, hy, cy and the reserve."""
        self.cudnn.call(
            "cudnnRNNForward", self.cudnn.handle, self.rnn, TRAINING, self.lengths.data_ptr(),
            self.data, x.data_ptr(), self.data, self.y.data_ptr(),
            self.states, h.data_ptr(), self.hy.data_ptr(),
            self.states, c.data_ptr(), self.cy.data_ptr(), *self._spaces(self.weights),
        )  # fmt: skip

    def backward_data(self, d_y: Tensor, h: Tensor, c: Tensor) -> None:
        """Fill d_x, d_h and d_c."""
        self.cudnn.call(
            "cudnnRNNBackwardData_v8", self.cudnn.handle, self.rnn, self.lengths.data_ptr(),
            self.data, self.y.data_ptr(), d_y.data_ptr(), self.data, self.d_x.data_ptr(),
            self.states, h.data_ptr(), None, self.d_h.data_ptr(),
            self.states, c.data_ptr(), None, self.d_c.data_ptr(), *self._spaces(self.weights),
        )  # fmt: skip

    def backward_weights(self, x: Tensor, h: Tensor) -> None:
        """Add to d_weights."""
        self.cudnn.call(
            "cudnnRNNBackwardWeights_v8", self.cudnn.handle, self.rnn, WGRAD_ADD,
            self.lengths.data_ptr(), self.data, x.data_ptr(), self.states, h.data_ptr(),
            self.data, self.y.data_ptr(), *self._spaces(self.d_weights),
        )  # fmt: skip

    def _spaces(self, weights: Tensor) -> list[int]:
        three = (weights, self.work, self.reserve)
        return [value for t in three for value in (t.nbytes, t.data_ptr())]


def rows_of(algorithm: str) -> Callable[..., Iterator[Row]]:
    """The part for an algorithm."""

    def rows(sizes: Sizes, clock: Clock, library: Any = None) -> Iterator[Row]:
        if library is None and not clock.on_gpu:
            raise NotHereError("cuDNN wants a GPU")
        stream = torch.cuda.current_stream(clock.device).cuda_stream if clock.on_gpu else 0
        cudnn = Cudnn(library or loaded_cudnn(), stream)
        for name in TYPES:
            for units in sizes.api_units:
                for batch in sizes.api_batches:
                    row: Row = dict(algorithm=algorithm, precision=name, units=units, batch=batch)
                    with noted(row):
                        shape = (sizes.steps, batch, units)
                        _measure(cudnn, algorithm, TYPES[name], shape, clock, row)
                    yield row

    return rows


def loaded_cudnn() -> Any:
    """The libcudnn that PyTorch has in this process."""
    x = torch.zeros(1, 1, 8, device="cuda")
    torch.nn.LSTM(8, 8, device="cuda")(x)
    names = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    found = sorted(name for name in names if Path(name).name.startswith("libcudnn.so"))
    return ctypes.CDLL(found[0] if found else "libcudnn.so.9")


def _measure(
    cudnn: Cudnn,
    algorithm: str,
    data: tuple[torch.dtype, int],
    shape: tuple[int, int, int],
    clock: Clock,
    row: Row,
) -> None:
    """Time the algorithm and the standard one, and compare their results."""
    torch.manual_seed(0)
    steps, batch, units = shape
    x, d_y = (torch.randn(steps, batch, units, device=clock.device).to(data[0]) for _ in range(2))
    h, c = (torch.randn(1, batch, units, device=clock.device).tanh().to(data[0]) for _ in range(2))
    values = [
        (torch.rand(size, device=clock.device) * 2 - 1) / units**0.5
        for _ in range(MATRICES)
        for size in ((units, units), (units,))
    ]
    given = (values, x, d_y, h, c)
    standard, variant, expected = _accepted(cudnn, 0, data, shape, given)
    row |= {f"standard {name}": ms for name, ms in _times(standard, clock, x, d_y, h, c).items()}
    row["accepted"] = "no"
    layer, variant, found = _accepted(cudnn, ALGORITHMS[algorithm], data, shape, given)
    row |= dict(accepted=variant, differs=distance(found, expected))
    row |= _times(layer, clock, x, d_y, h, c)


def _accepted(
    cudnn: Cudnn,
    algorithm: int,
    data: tuple[torch.dtype, int],
    shape: tuple[int, int, int],
    given: tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor],
) -> tuple[Layer, str, list[Tensor]]:
    """A layer in the first variant that cuDNN takes, the variant, and the layer's results."""
    reasons = []
    for variant, numbers in VARIANTS.items():
        try:
            layer = Layer(cudnn, algorithm, data, shape, numbers, given[1].device)
            return layer, variant, _results(layer, *given)
        except RefusedError as error:
            reasons.append(f"{variant}: {error}")
    raise RefusedError("; ".join(reasons))


def _results(
    layer: Layer, values: list[Tensor], x: Tensor, d_y: Tensor, h: Tensor, c: Tensor
) -> list[Tensor]:
    """Everything that a forward and a backward compute, from weights put in their places."""
    for place, value in zip(layer.places(layer.weights), values, strict=True):
        place.copy_(value)
    layer.forward(x, h, c)
    layer.backward_data(d_y, h, c)
    layer.d_weights.zero_()
    layer.backward_weights(x, h)
    found = [layer.y, layer.hy, layer.cy, layer.d_x, layer.d_h, layer.d_c]
    return [t.clone() for t in (*found, *layer.places(layer.d_weights))]


def _times(
    layer: Layer, clock: Clock, x: Tensor, d_y: Tensor, h: Tensor, c: Tensor
) -> dict[str, float]:
    """Milliseconds of the three calls; each starts from the reserve that it would find."""
    layer.forward(x, h, c)
    kept = layer.reserve.clone()
    forward = clock.ms(lambda _: layer.forward(x, h, c))
    data = clock.ms(lambda _: layer.backward_data(d_y, h, c), lambda: layer.reserve.copy_(kept))
    weights = clock.ms(lambda _: layer.backward_weights(x, h))
    times = {"forward ms": forward, "data ms": data, "weights ms": weights}
    return {**times, "all ms": forward + data + weights}


def headline(rows: list[Row]) -> str:
    """What was accepted, and the best gain."""
    taken = [r for r in rows if "all ms" in r]
    if not taken:
        return f"refused in all {len(rows)} shapes" if rows else ""
    best = max(taken, key=lambda r: r["standard all ms"] / r["all ms"])
    wide = [r for r in taken if r["units"] > 1024]
    return (
        f"accepted in {len(taken)} of {len(rows)} shapes, {len(wide)} of them above 1024 units; "
        f"best {best['precision']} {best['units']} × {best['batch']}: {best['all ms']:.2f} ms, "
        f"standard {best['standard all ms']:.2f}"
    )
