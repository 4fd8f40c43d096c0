"""What it costs that a masked weight is not where cuDNN wants it."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lstm_cudnn import CudnnLSTM
from torch import Tensor, nn

from benchmarks.probes.clock import Clock, Row, Sizes, compute_in, noted

Made = tuple[Callable[[Any], Tensor], Callable[[], Any], list[Tensor]]


def rows(sizes: Sizes, clock: Clock) -> Iterator[Row]:
    """The middle layer by nn.LSTM, its weights flat or masked, and over a buffer of our own."""
    ways = {
        "nn.LSTM, no mask": stock,
        "nn.LSTM, masked": masked,
        "own buffer, masked": own_buffer,
        "own buffer, masked, padded": padded,
    }
    for precision in ("bf16", "tf32"):
        for name, way in ways.items():
            row: Row = dict(layer=name, precision=precision)
            with noted(row):
                dtype = compute_in(precision, clock.device)
                x = torch.randn(
                    sizes.steps, sizes.batch, sizes.units, device=clock.device, dtype=dtype
                ).requires_grad_()
                _measure(way(sizes, x), x, clock, row)
            yield row
        row = dict(layer="filling the buffer", precision=precision)
        with noted(row), torch.no_grad():
            dtype = compute_in(precision, clock.device)
            fill = _filling(sizes, dtype, clock.device)
            row["forward ms"], row["forward host ms"] = clock.ms(fill), clock.host_ms(fill)
        yield row


def stock(sizes: Sizes, x: Tensor) -> Made:
    """nn.LSTM as it is."""
    lstm = nn.LSTM(sizes.units, sizes.units, dtype=x.dtype, device=x.device)
    return lambda _: lstm(x)[0], lambda: None, list(lstm.parameters())


def masked(sizes: Sizes, x: Tensor) -> Made:
    """nn.LSTM with its recurrent weights multiplied by a mask, which is not timed."""
    lstm: Any = nn.LSTM(sizes.units, sizes.units, dtype=x.dtype, device=x.device)
    raw = lstm.weight_hh_l0
    del lstm.weight_hh_l0
    mask = torch.empty_like(raw).bernoulli_(0.5) * 2

    def put() -> None:
        lstm.weight_hh_l0 = raw * mask

    put()
    return lambda _: lstm(x)[0], put, [raw, *lstm.parameters()]


def own_buffer(sizes: Sizes, x: Tensor) -> Made:
    """CudnnLSTM, which masks and casts; not padded."""
    return _by_ours(sizes, x, 1)


def padded(sizes: Sizes, x: Tensor) -> Made:
    """The same, padded."""
    return _by_ours(sizes, x, sizes.multiple)


def _by_ours(sizes: Sizes, x: Tensor, multiple: int) -> Made:
    layer, weights, mask = _ours(sizes, multiple, x.dtype, x.device)
    hidden = [x.new_zeros(1, sizes.batch, sizes.units) for _ in range(2)]
    return (
        lambda _: layer(x, (hidden[0], hidden[1]), weights, mask)[0],
        lambda: None,
        weights,
    )


def _ours(
    sizes: Sizes, multiple: int, dtype: torch.dtype, device: torch.device
) -> tuple[CudnnLSTM, list[Tensor], Tensor]:
    weights = list(nn.LSTM(sizes.units, sizes.units, device=device).parameters())
    mask = torch.empty_like(weights[1]).bernoulli_(0.5) * 2
    layer = CudnnLSTM(sizes.units, sizes.units, dtype, device, multiple)
    return layer, [w.detach().requires_grad_() for w in weights], mask


def _filling(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Callable[[Any], None]:
    layer, weights, mask = _ours(sizes, sizes.multiple, dtype, device)
    return lambda _: layer.fill(weights, mask)


def _measure(made: Made, x: Tensor, clock: Clock, row: Row) -> None:
    forward, prepare, weights = made
    inputs = [x, *weights]

    def forward_first() -> tuple[Tensor, Tensor]:
        prepare()
        output = forward(None)
        return output, torch.ones_like(output)

    def backward(made: tuple[Tensor, Tensor]) -> object:
        output, gradient = made
        return torch.autograd.grad(output, inputs, gradient)

    row["forward ms"] = clock.ms(forward, prepare)
    row["forward host ms"] = clock.host_ms(forward, prepare)
    row["backward ms"] = clock.ms(backward, forward_first)
    row["backward host ms"] = clock.host_ms(backward, forward_first)


def headline(rows: list[Row]) -> str:
    """The host's time for a layer, forward and backward, masked: theirs and ours."""
    done = {r["layer"]: r for r in reversed(rows) if "backward host ms" in r}
    pair = [done.get(name) for name in ("nn.LSTM, masked", "own buffer, masked, padded")]
    return ", ".join(
        f"{r['layer']}: host {r['forward host ms'] + r['backward host ms']:.2f} ms, "
        f"device {r['forward ms'] + r['backward ms']:.2f}"
        for r in pair
        if r
    )
