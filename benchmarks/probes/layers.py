"""How long cuDNN takes for one layer, and by which kernels."""

from collections.abc import Callable, Iterator

from torch import Tensor

from benchmarks.probes.clock import Clock, Row, Sizes, compute_in, noted
from benchmarks.probes.raw_layer import RawLayer

PRECISIONS = ("bf16", "fp16", "tf32", "fp32")
Case = tuple[int, int, int, str]  # input, units, batch, precision


def cases(sizes: Sizes) -> list[Case]:
    """A middle layer in all shapes and precisions; the last one; the last one padded."""
    middle = [(n, n, b, p) for p in PRECISIONS for n in sizes.padded for b in sizes.batches]
    last = [(n, sizes.emsize, sizes.batch, p) for p in PRECISIONS for n in sizes.padded]
    return [*middle, *last, *((*sizes.last, p) for p in ("fp16", "bf16"))]


def rows(sizes: Sizes, clock: Clock) -> Iterator[Row]:
    """Forward and backward as PyTorch calls them, and their kernels."""
    return _rows(sizes, clock, _measure_calls)


def graph_rows(sizes: Sizes, clock: Clock) -> Iterator[Row]:
    """The same calls replayed from CUDA graphs: without the host's share."""
    return _rows(sizes, clock, _measure_graphs)


def _rows(sizes: Sizes, clock: Clock, measure: Callable[..., None]) -> Iterator[Row]:
    for case in cases(sizes):
        width, units, batch, precision = case
        row: Row = dict(layer=f"{width} → {units}", batch=batch, precision=precision)
        with noted(row):
            measure(case, sizes.steps, clock, row)
        yield row


def headline(rows: list[Row]) -> str:
    """The fastest precision for a middle layer at the smallest batch."""
    done = [r for r in rows if "backward ms" in r and len(set(r["layer"].split(" → "))) == 1]
    if not done:
        return ""
    batch = min(r["batch"] for r in done)
    some = (r for r in done if r["batch"] == batch)
    best = min(some, key=lambda r: r["forward ms"] + r["backward ms"])
    return (
        f"{best['layer']}, batch {batch}: {best['precision']} is fastest, "
        f"{best['forward ms']:.2f} + {best['backward ms']:.2f} ms"
    )


def _measure_calls(case: Case, steps: int, clock: Clock, row: Row) -> None:
    width, units, batch, precision = case
    raw = RawLayer(width, units, compute_in(precision, clock.device), clock.device)
    x, h, c, gradient = raw.random(steps, batch)
    output, _, _, reserve = raw.forward(x, h, c)

    def forward(_: object = None) -> object:
        return raw.forward(x, h, c)

    def backward(reserve: Tensor) -> object:
        return raw.backward((x, h, c), output, gradient, (None, None), reserve)

    row["forward ms"] = clock.ms(forward)
    row["backward ms"] = clock.ms(backward, reserve.clone)
    row["forward host ms"] = clock.host_ms(forward)
    row["backward host ms"] = clock.host_ms(backward, reserve.clone)
    copies = [reserve.clone(), reserve.clone()]
    for name, seen in (
        ("forward", clock.kernels(forward)),
        ("backward", clock.kernels(lambda: backward(copies.pop()))),
    ):
        row |= {f"{name} {what}": value for what, value in seen.items()}


def _measure_graphs(case: Case, steps: int, clock: Clock, row: Row) -> None:
    width, units, batch, precision = case
    raw = RawLayer(width, units, compute_in(precision, clock.device), clock.device)
    x, h, c, gradient = raw.random(steps, batch)

    def both() -> object:
        output, _, _, reserve = raw.forward(x, h, c)
        return raw.backward((x, h, c), output, gradient, (None, None), reserve)

    replay, _ = clock.capture(lambda: raw.forward(x, h, c))
    row["forward ms"] = clock.ms(lambda _: replay())
    replay_both, _ = clock.capture(both)
    row["backward ms"] = clock.ms(lambda _: replay_both()) - row["forward ms"]
