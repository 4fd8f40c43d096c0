"""Layers that overlap: the second one starts when the first has done a third of the window."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.probes.clock import Clock, Row, Sizes, compute_in, distance, noted
from benchmarks.probes.raw_layer import RawLayer

States = list[tuple[Tensor, Tensor]]
Given = tuple[Tensor, States, Tensor]  # input, states, gradient of the output


class Lanes:
    """Queues of the device that work side by side: a CUDA stream each; on a CPU, one after another.

    Training's (lanes.Lanes) leave backward to autograd, and so to its one thread. Here each can
    have a thread, to see whether that is what holds them up.

    Args:
        count: how many.
        device: whose.
        threads: each lane is fed by a thread of its own. PyTorch has a cuDNN handle a thread, and
            what is queued through one handle may wait for each other inside cuDNN.
    """

    def __init__(self, count: int, device: torch.device, threads: bool = False) -> None:
        self.on_gpu = device.type == "cuda"
        self.streams = [torch.cuda.Stream(device) if self.on_gpu else None for _ in range(count)]
        self.pools = [ThreadPoolExecutor(1) for _ in range(count if threads else 0)]

    def run(self, lane: int, work: Callable[[], Any], after: Sequence[Any]) -> tuple[Any, Any]:
        """Queue work in a lane after some events; its result, and an event after it."""
        stream = self.streams[lane]
        if stream is None:
            return work(), None

        def queue() -> tuple[Any, Any]:
            with torch.cuda.stream(stream):
                for event in after:
                    stream.wait_event(event)
                return work(), stream.record_event()

        return self.pools[lane].submit(queue).result() if self.pools else queue()

    def mark(self) -> list[Any]:
        """An event after all that is queued on the current stream."""
        return [torch.cuda.current_stream().record_event()] if self.on_gpu else []

    def join(self) -> None:
        """Have the current stream wait for all lanes."""
        for stream in self.streams:
            if stream is not None:
                torch.cuda.current_stream().wait_stream(stream)

    def close(self) -> None:
        """End the threads."""
        for pool in self.pools:
            pool.shutdown()


class Wavefront:
    """A stack of layers whose windows are cut into chunks, each layer in a lane.

    Chunk k of layer l waits for chunk k of layer l - 1 and for chunk k - 1 of its own, whose last
    states it starts from; on the way back the other way round, with the states' gradients. The
    weights' gradients of the chunks add up. But for the order of these sums it is the arithmetic
    of whole windows.

    Args:
        layers: each padded to the width of the next one's input.
        chunks: that a window is cut into, as even as can be.
        lanes: as many as there are layers; one: all layers in turn.
    """

    def __init__(self, layers: list[RawLayer], chunks: int, lanes: Lanes) -> None:
        self.layers = layers
        self.chunks = chunks
        self.lanes = lanes

    def forward(self, x: Tensor, states: States) -> tuple[Tensor, dict[Any, Any]]:
        """The last layer's output (T, B, H), and what backward needs.

        Args:
            x: input, (T, B, E).
            states: h and c of each layer before the first step, (1, B, H) each.
        """
        inputs = x.tensor_split(self.chunks)
        start = self.lanes.mark()
        found: dict[Any, Any] = {}  # (layer, chunk) -> (((x, h, c), results), event)
        for number, k in self._order():
            below, before = found.get((number - 1, k)), found.get((number, k - 1))
            h, c = before[0][1][1:3] if before else states[number]
            arguments = (below[0][1][0] if below else inputs[k], h, c)
            work = _call_forward(self.layers[number], arguments)
            after = [event for _, event in filter(None, (below, before))] or start
            found[number, k] = self.lanes.run(self._lane(number), work, after)
        self.lanes.join()
        top = len(self.layers) - 1
        return torch.cat([found[top, k][0][1][0] for k in range(self.chunks)]), found

    def backward(
        self, gradient: Tensor, found: dict[Any, Any]
    ) -> tuple[Tensor, States, list[list[Tensor]]]:
        """Gradients of x, of the states and of the layers' weights, from that of the output."""
        gradients = gradient.tensor_split(self.chunks)
        start = self.lanes.mark()
        made: dict[Any, Any] = {}  # (layer, chunk) -> ((dx, dh, dc, d_parts), event)
        top = len(self.layers) - 1
        for number, k in reversed(self._order()):
            above, later = made.get((number + 1, k)), made.get((number, k + 1))
            given = above[0][0] if above else gradients[k]
            d_states = later[0][1:3] if later else (None, None)
            earlier = later[0][3] if later else None
            work = _call_backward(
                self.layers[number], found[number, k][0], given, d_states, earlier
            )
            after = [event for _, event in filter(None, (above, later))] or start
            made[number, k] = self.lanes.run(self._lane(number), work, after)
        self.lanes.join()
        d_x = torch.cat([made[0, k][0][0] for k in range(self.chunks)])
        firsts = [made[number, 0][0] for number in range(top + 1)]
        weights = [
            raw.gradients(first[3], raw.weights, None)
            for raw, first in zip(self.layers, firsts, strict=True)
        ]
        # made is kept until here: memory of one lane must not be reused while another reads it.
        return d_x, [(first[1], first[2]) for first in firsts], weights

    def _lane(self, number: int) -> int:
        return number % len(self.lanes.streams)

    def _order(self) -> list[tuple[int, int]]:
        """(layer, chunk), along the front: what can be queued, and when there is one lane, run."""
        cells = [(n, k) for n in range(len(self.layers)) for k in range(self.chunks)]
        return sorted(cells, key=lambda cell: (sum(cell), cell))


def _call_forward(raw: RawLayer, arguments: tuple[Tensor, ...]) -> Callable[[], Any]:
    x, h, c = arguments
    return lambda: ((x, h, c), raw.forward(x, h, c))


def _call_backward(
    raw: RawLayer,
    forward: Any,
    gradient: Tensor,
    d_states: tuple[Tensor | None, Tensor | None],
    earlier: list[Tensor] | None,
) -> Callable[[], Any]:
    inputs, (output, _, _, reserve) = forward

    def work() -> Any:
        made = raw.backward(inputs, output, gradient, d_states, reserve)
        *first, d_parts = made
        if earlier is not None:  # sums of 16-bit numbers are made in 32
            d_parts = [sum_up(a, b) for a, b in zip(earlier, d_parts, strict=True)]
        # made is returned as well, to be kept as long as the rest
        return *first, d_parts, made

    return work


def sum_up(a: Tensor, b: Tensor) -> Tensor:
    """a + b in float32 at least."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return torch.add(a.to(wide), b.to(wide))


def stack(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> list[RawLayer]:
    """The recipe's three layers, padded."""
    widths = [sizes.emsize, sizes.units, sizes.units, sizes.emsize]
    return [RawLayer(a, b, dtype, device, sizes.multiple) for a, b in pairwise(widths)]


def rows(sizes: Sizes, clock: Clock) -> Iterator[Row]:
    """Layers in turn and as wavefronts, each in a graph."""
    for precision in ("bf16", "fp16", "tf32"):
        first: Row = dict(run="in turn, eager", precision=precision)
        later: Iterator[Row] = iter(())
        with noted(first):
            torch.manual_seed(0)
            layers = stack(sizes, compute_in(precision, clock.device), clock.device)
            x = layers[0].random(sizes.steps, sizes.batch)[0]
            gradient = layers[-1].random(sizes.steps, sizes.batch)[3]
            given = (x, [raw.random(1, sizes.batch)[1:3] for raw in layers], gradient)
            plain = Wavefront(layers, 1, Lanes(1, clock.device))
            expected = _flat(plain, *given)
            _measure_eager(plain, given, clock, first)
            later = _overlapping(precision, layers, given, expected, clock)
        yield first
        yield from later


def _overlapping(
    precision: str, layers: list[RawLayer], given: Given, expected: list[Tensor], clock: Clock
) -> Iterator[Row]:
    ways = [(1, 1, False), (3, 3, True)]  # chunks, lanes, threads
    if precision == "bf16":
        ways += [(3, 1, False), (3, 3, False), (2, 3, True), (5, 3, True)]
    for chunks, count, threads in ways:
        handles = ", a cuDNN handle each" if threads else ""
        row: Row = dict(run=f"{chunks} chunks, {count} streams{handles}", precision=precision)
        lanes = Lanes(count, clock.device, threads)
        with noted(row):
            waves = Wavefront(layers, chunks, lanes)
            row["differs"] = distance(_flat(waves, *given), expected)
            _measure(waves, given, expected, clock, row)
        lanes.close()
        yield row


def _measure_eager(waves: Wavefront, given: Given, clock: Clock, row: Row) -> None:
    x, states, _ = given
    row["forward ms"] = clock.ms(lambda _: waves.forward(x, states))
    row["both ms"] = clock.ms(lambda _: _flat(waves, *given))


def _measure(
    waves: Wavefront, given: Given, expected: list[Tensor], clock: Clock, row: Row
) -> None:
    x, states, _ = given
    replay, _ = clock.capture(lambda: waves.forward(x, states))
    row["forward ms"] = clock.ms(lambda _: replay())
    replay_both, found = clock.capture(lambda: _flat(waves, *given))
    row["both ms"] = clock.ms(lambda _: replay_both())
    row["differs in the graph"] = distance(found, expected)


def _flat(waves: Wavefront, x: Tensor, states: States, gradient: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    output, found = waves.forward(x, states)
    d_x, d_states, weights = waves.backward(gradient, found)
    some = [t for pair in d_states for t in pair] + [t for layer in weights for t in layer]
    return [output, d_x, *some]


def headline(rows: list[Row]) -> str:
    """Milliseconds forward and backward in bf16, each way."""
    some = [r for r in rows if r.get("precision") == "bf16" and "both ms" in r]
    return ", ".join(f"{r['run']} {r['both ms']:.2f}" for r in some)
