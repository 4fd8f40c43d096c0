"""cuDNN's algorithms for recurrent layers, asked for by name through its C interface.

PyTorch chooses the algorithm itself. Here each one is asked for, told apart by what cuDNN answers,
timed, and held against the standard one as PyTorch asks for it.
"""

from collections.abc import Callable, Iterator
from ctypes import byref, c_int, c_size_t, c_void_p
from typing import Any

import torch
from torch import Tensor

from benchmarks.probes.clock import Clock, NotHereError, Row, Sizes, distance, noted
from benchmarks.probes.cudnn_library import Cudnn, RefusedError, loaded_cudnn

ALGORITHMS = {"standard": 0, "persist-static": 1, "persist-dynamic": 2, "persist-static-small-h": 3}
TYPES = {"fp16": (torch.float16, 2), "bf16": (torch.bfloat16, 9)}  # CUDNN_DATA_HALF, …_BFLOAT16
FLOAT, LSTM, DOUBLE_BIAS, LINEAR_INPUT, UNIDIRECTIONAL = 0, 2, 2, 0, 0
TRAINING, WGRAD_ADD, MATRICES = 1, 0, 8
# Layout of the sequences, the flag that goes with it, CUDNN_TENSOR_OP_MATH or …_DEFAULT_MATH:
# tried in this order until one is taken. And those that PyTorch takes.
VARIANTS = {
    "packed": (1, 0, 1),
    "unpacked": (0, 1, 1),
    "packed, default math": (1, 0, 0),
    "unpacked, default math": (0, 1, 0),
}
USUAL = {"fp16": "unpacked", "bf16": "unpacked, default math"}


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
        self.zeros = torch.zeros_like(x[:1])  # gradient of the last states

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
                if place.value is None:
                    raise RefusedError(f"cudnnGetRNNWeightParams: matrix {matrix} has no place")
                start = (place.value - base) // buffer.itemsize
                numbers = torch.Size(shape).numel()
                found.append(buffer[start : start + numbers].view(shape))
        return found

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> None:
        """Fill y, hy, cy and the reserve."""
        self.cudnn.call(
            "cudnnRNNForward", self.cudnn.handle, self.rnn, TRAINING, None,
            self.data, x.data_ptr(), self.data, self.y.data_ptr(),
            self.states, h.data_ptr(), self.hy.data_ptr(),
            self.states, c.data_ptr(), self.cy.data_ptr(), *self._spaces(self.weights),
        )  # fmt: skip

    def backward_data(self, d_y: Tensor, h: Tensor, c: Tensor) -> None:
        """Fill d_x, d_h and d_c."""
        self.cudnn.call(
            "cudnnRNNBackwardData_v8", self.cudnn.handle, self.rnn, None,
            self.data, self.y.data_ptr(), d_y.data_ptr(), self.data, self.d_x.data_ptr(),
            self.states, h.data_ptr(), self.zeros.data_ptr(), self.d_h.data_ptr(),
            self.states, c.data_ptr(), self.zeros.data_ptr(), self.d_c.data_ptr(),
            *self._spaces(self.weights),
        )  # fmt: skip

    def backward_weights(self, x: Tensor, h: Tensor) -> None:
        """Add to d_weights."""
        self.cudnn.call(
            "cudnnRNNBackwardWeights_v8", self.cudnn.handle, self.rnn, WGRAD_ADD,
            None, self.data, x.data_ptr(), self.states, h.data_ptr(),
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
            for units, batch in sizes.api_shapes:
                row: Row = dict(algorithm=algorithm, precision=name, units=units, batch=batch)
                with noted(row):
                    _measure(cudnn, algorithm, name, (sizes.steps, batch, units), clock, row)
                yield row

    return rows


def _measure(
    cudnn: Cudnn,
    algorithm: str,
    precision: str,
    shape: tuple[int, int, int],
    clock: Clock,
    row: Row,
) -> None:
    """Time the algorithm and the standard one, and compare their results."""
    torch.manual_seed(0)
    data, (steps, batch, units) = TYPES[precision], shape
    x, d_y = (torch.randn(steps, batch, units, device=clock.device).to(data[0]) for _ in range(2))
    h, c = (torch.randn(1, batch, units, device=clock.device).tanh().to(data[0]) for _ in range(2))
    values = [
        (torch.rand(size, device=clock.device) * 2 - 1) / units**0.5
        for _ in range(MATRICES)
        for size in ((units, units), (units,))
    ]
    given = (values, x, d_y, h, c)
    usual = USUAL[precision]
    standard, _, expected = _accepted(cudnn, 0, data, shape, given, [usual])
    row["accepted"] = "no"
    others = [variant for variant in VARIANTS if (algorithm, variant) != ("standard", usual)]
    layer, variant, found = _accepted(cudnn, ALGORITHMS[algorithm], data, shape, given, others)
    row |= dict(accepted=variant, differs=distance(found, expected))
    row |= _times(layer, clock, x, d_y, h, c)
    row |= {f"standard {name}": ms for name, ms in _times(standard, clock, x, d_y, h, c).items()}
    for name, call in (
        ("forward", lambda: layer.forward(x, h, c)),
        ("data", lambda: layer.backward_data(d_y, h, c)),
    ):
        row |= {f"{name} {what}": value for what, value in clock.kernels(call).items()}


def _accepted(
    cudnn: Cudnn,
    algorithm: int,
    data: tuple[torch.dtype, int],
    shape: tuple[int, int, int],
    given: tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor],
    variants: list[str],
) -> tuple[Layer, str, list[Tensor]]:
    """A layer in the first variant that cuDNN takes, the variant, and the layer's results."""
    reasons = []
    for variant in variants:
        try:
            layer = Layer(cudnn, algorithm, data, shape, VARIANTS[variant], given[1].device)
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
