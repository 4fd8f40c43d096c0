"""Whole updates in CUDA graphs: alone, and several at once."""

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from lstm_cudnn import CudnnLSTM
from torch import Tensor, nn

from benchmarks.probes.clock import Clock, Row, Sizes, compute_in, distance, noted

ROUND = 10  # replays of each graph between two waits for all of them


class Update:
    """Loss and gradients of three layers and a softmax at random weights, masks and text.

    Args:
        sizes: of layers, vocabulary and batch.
        dtype: of layers and decoder.
        device: where.
        seed: of everything random.
    """

    def __init__(
        self, sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> None:
        torch.manual_seed(seed)
        widths = [sizes.emsize, sizes.units, sizes.units, sizes.emsize]
        pairs = list(pairwise(widths))
        self.layers = [CudnnLSTM(a, b, dtype, device, sizes.multiple) for a, b in pairs]
        self.weights = [list(nn.LSTM(a, b, device=device).parameters()) for a, b in pairs]
        self.masks = [torch.empty_like(w[1]).bernoulli_(0.5) * 2 for w in self.weights]
        self.encoder = torch.empty(sizes.vocabulary, sizes.emsize, device=device)
        self.encoder.uniform_(-0.1, 0.1).requires_grad_()
        self.bias = torch.zeros(sizes.vocabulary, device=device, requires_grad=True)
        shape = (sizes.steps + 1, sizes.batch)
        self.words = torch.randint(sizes.vocabulary, shape, device=device)
        self.hidden = [
            (torch.randn(1, sizes.batch, n, device=device).tanh_(),) * 2 for n in widths[1:]
        ]
        self.emsize, self.dtype = sizes.emsize, dtype

    def __call__(self) -> list[Tensor]:
        """The loss and the gradients of all parameters."""
        x = F.embedding(self.words[:-1], self.encoder)
        for layer, hidden, weights, mask in zip(
            self.layers, self.hidden, self.weights, self.masks, strict=True
        ):
            x, _ = layer(x, hidden, weights, mask)
        x = x[..., : self.emsize].flatten(0, 1)
        scores = F.linear(x, self.encoder.to(self.dtype), self.bias.to(self.dtype))
        loss = F.cross_entropy(scores.float(), self.words[1:].flatten())
        parameters = [self.encoder, self.bias, *(w for some in self.weights for w in some)]
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]


def rows(sizes: Sizes, clock: Clock) -> Iterator[Row]:
    """Eager against graph; then one, two and four graphs at once."""
    for precision in ("bf16", "fp16", "tf32"):
        eager: Row = dict(run="eager", precision=precision)
        graph: Row = dict(run="graph", precision=precision)
        with noted(eager):
            update = Update(sizes, compute_in(precision, clock.device), clock.device)
            expected = [t.clone() for t in update()]
            _measure_eager(update, expected, clock, eager)
            with noted(graph):
                _measure_graph(update, expected, clock, graph)
        yield eager
        yield graph
    for precision in ("bf16", "tf32"):
        for count in (1, 2, 4):
            row: Row = dict(run=f"{count} graphs at once", precision=precision)
            with noted(row):
                _measure_together(count, sizes, compute_in(precision, clock.device), clock, row)
            yield row


def _measure_eager(update: Update, expected: list[Tensor], clock: Clock, row: Row) -> None:
    row["ms a model"] = clock.ms(lambda _: update())
    row["host ms"] = clock.host_ms(lambda _: update())
    row["loss"] = float(expected[0])
    row["repeats itself to"] = distance(update(), expected)


def _measure_graph(update: Update, expected: list[Tensor], clock: Clock, row: Row) -> None:
    start = time.perf_counter()
    replay, found = clock.capture(update)
    row["capture s"] = time.perf_counter() - start
    row["ms a model"] = clock.ms(lambda _: replay())
    row["host ms"] = clock.host_ms(lambda _: replay())
    row["loss"] = float(found[0])
    row["differs from eager"] = distance(found, expected)


def _measure_together(count: int, sizes: Sizes, dtype: torch.dtype, clock: Clock, row: Row) -> None:
    """Models of their own, each replayed on a stream of its own."""
    updates = [Update(sizes, dtype, clock.device, seed) for seed in range(count)]
    expected = [[t.clone() for t in update()] for update in updates]
    captured: list[tuple[Callable[[], None], Any, Any]] = []
    for update in updates:
        stream = torch.cuda.Stream(clock.device) if clock.on_gpu else None
        captured.append((*clock.capture(update, stream), stream))

    def replay_all(_: object) -> None:
        current = torch.cuda.current_stream(clock.device)
        for _, _, stream in captured:
            stream.wait_stream(current)
        for _ in range(ROUND):
            for replay, _, stream in captured:
                with torch.cuda.stream(stream):
                    replay()
        for _, _, stream in captured:
            current.wait_stream(stream)

    row["ms a model"] = clock.ms(replay_all) / ROUND / count
    pairs = zip(captured, expected, strict=True)
    row["differs from eager"] = max(distance(found, alone) for (_, found, _), alone in pairs)


def headline(rows: list[Row]) -> str:
    """Milliseconds of an update of one model in bf16, each way."""
    some = [r for r in rows if r.get("precision") == "bf16" and "ms a model" in r]
    return ", ".join(f"{r['run']} {r['ms a model']:.2f}" for r in some)
