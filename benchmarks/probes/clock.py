"""Times of short pieces of work: medians, by the device's own clock where it is a GPU."""

import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.precision import DTYPES, choose_precision

Row = dict[str, Any]
Work = Callable[[Any], object]
WARM_UP, LEAST = 3, 10


class NotHereError(Exception):
    """What a part wants to know has no answer on this device."""


@dataclass(frozen=True)
class Sizes:
    """What the parts run at; the defaults are those of the PTB recipe."""

    steps: int = 70
    padded: tuple[int, ...] = (1152, 1150)
    batches: tuple[int, ...] = (20, 24, 80)
    units: int = 1150
    emsize: int = 400
    vocabulary: int = 10_000
    batch: int = 20
    multiple: int = 8
    last: tuple[int, int, int] = (1152, 512, 24)  # input, units, batch: cuDNN may persist
    # Units, batch. 1280: cuDNN 9.19 has persistent kernels with that in their names.
    api_shapes: tuple[tuple[int, int], ...] = (
        (1280, 24), (1280, 20), (1280, 16), (1280, 80),
        (1152, 24), (1152, 20), (1152, 16), (1152, 80),
        (1024, 24), (1024, 16), (1024, 80), (512, 24),
    )  # fmt: skip
    matmul: int = 8192
    copied: int = 2**31
    repeats: int = 200
    seconds: float = 0.6  # of one measurement, after which it ends with fewer repeats


TINY = Sizes(
    steps=7, padded=(16, 14), batches=(2,), units=14, emsize=6, vocabulary=11, batch=3,
    last=(16, 8, 4), api_shapes=((16, 2),), matmul=32, copied=1024, repeats=2,
    seconds=0.01,
)  # fmt: skip
SIZES = dict(ptb=Sizes(), tiny=TINY)


@dataclass(frozen=True)
class Clock:
    """Measures work on a device.

    Args:
        device: where the work is done.
        repeats: measured at most.
        seconds: that a measurement may take, about; at least 10 repeats are made.
    """

    device: torch.device
    repeats: int
    seconds: float

    @property
    def on_gpu(self) -> bool:
        """Whether there are streams, events and graphs."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def ms(self, work: Work, prepare: Callable[[], Any] = lambda: None) -> float:
        """Median time that the device takes for work(prepare()), without prepare's.

        From event to event on the current stream; the host queues ahead. Where it is too slow for
        that, its time is what is measured.
        """
        spans = []
        for _ in range(self._count(work, prepare)):
            prepared = prepare()
            spans.append(self._span(work, prepared))
        self.synchronize()
        return statistics.median(span() for span in spans)

    def host_ms(self, work: Work, prepare: Callable[[], Any] = lambda: None) -> float:
        """Median time until work(prepare()) returns to the host; the device is idle before.

        A quarter of the repeats: the host's clock wants no more, and waiting takes time.
        """
        times = []
        for _ in range(-(-self._count(work, prepare) // 4)):
            prepared = prepare()
            self.synchronize()
            start = time.perf_counter()
            work(prepared)
            times.append(1000 * (time.perf_counter() - start))
        self.synchronize()
        return statistics.median(times)

    def _span(self, work: Work, prepared: Any) -> Callable[[], float]:
        if self.on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work(prepared)
            end.record()
            return lambda: float(start.elapsed_time(end))
        begin = time.perf_counter()
        work(prepared)
        taken = 1000 * (time.perf_counter() - begin)
        return lambda: taken

    def _count(self, work: Work, prepare: Callable[[], Any]) -> int:
        """Warm up; how many repeats there is time for."""
        for _ in range(WARM_UP):
            work(prepare())
        self.synchronize()
        start = time.perf_counter()
        for _ in range(WARM_UP):
            work(prepare())
        self.synchronize()
        each = (time.perf_counter() - start) / WARM_UP
        least = min(LEAST, self.repeats)
        return max(least, min(self.repeats, int(self.seconds / max(each, 1e-9))))

    def kernels(self, work: Callable[[], object]) -> Row:
        """What the profiler saw on the GPU: summed ms, count, and the three longest in all."""
        if not self.on_gpu:
            return {}
        work()
        self.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            work()
            self.synchronize()
        seen = [e for e in profile.key_averages() if str(e.device_type).endswith("CUDA")]
        seen.sort(key=lambda e: -e.self_device_time_total)
        names = [f"{e.count} × {shorten(e.key)}" for e in seen[:3]]
        # cuDNN's for a whole sequence are RNN_persist_…, ampere_lstm_…, volta_lstm_…
        persists = any(word in e.key.lower() for e in seen for word in ("persist", "_lstm_"))
        return {
            "kernels ms": sum(e.self_device_time_total for e in seen) / 1000,
            "kernels": sum(e.count for e in seen),
            "longest": "; ".join(names),
            "persists": persists,
        }

    def capture(
        self, work: Callable[[], Any], stream: Any = None
    ) -> tuple[Callable[[], None], Any]:
        """Record work into a CUDA graph.

        Returns:
            A function that replays it, and what work returned: tensors that each replay fills.

        Raises:
            NotHereError: the device has no graphs.
        """
        if not self.on_gpu:
            raise NotHereError("no CUDA graphs on this device")
        stream = torch.cuda.Stream(self.device) if stream is None else stream
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):  # libraries set themselves up, which cannot be captured
                work()
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads (autograd's) may do what a capturing one must not.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            found = work()
        return graph.replay, found


def shorten(name: str, most: int = 64) -> str:
    """The telling part of a kernel's name."""
    name = re.sub(r"^void |\(anonymous namespace\)::|at::native::", "", name)
    name = re.split(r"[(]", name)[0].replace("|", "/")
    return name if len(name) <= most else name[: most - 1] + "…"


@contextmanager
def noted(row: Row) -> Iterator[None]:
    """What goes wrong inside is written into the row, so that others can follow."""
    try:
        yield
    except NotHereError as error:
        row["note"] = f"not on this device: {error}"
    except Exception as error:
        row["note"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def compute_in(precision: str, device: torch.device) -> torch.dtype:
    """Set what products of float32 may do, as training does; the dtype that layers get."""
    if device.type == "cuda":
        choose_precision(precision, device)
    return DTYPES[precision] or torch.float32


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest |a - b| / |b| of the pairs, norms over a tensor; inf where one is not finite."""
    found = [
        float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
        for a, b in zip(ours, theirs, strict=True)
    ]
    return max((x if x == x else float("inf") for x in found), default=0.0)
