"""CUDA graphs: capture work on a GPU once, then replay it with one launch for all its kernels."""

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch

from engine.errors import RunError

Work = Callable[[], None]


class Graphs:
    """Captures work on a GPU as CUDA graphs, which share one pool of memory, and replays them.

    The first call of a kind runs eagerly, the second is captured, later ones replay. So work that
    runs once is never captured, and libraries are initialised before a capture.

    Args:
        device: the GPU.
        generator: random generator of the work, besides torch's default one; None: no other.
    """

    def __init__(self, device: torch.device, generator: torch.Generator | None = None) -> None:
        self.generator = generator
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.seen: set[Hashable] = set()
        self.replays: dict[Hashable, Work] = {}

    def run(self, kind: Hashable, work: Work) -> None:
        """Run the work, eagerly or by replaying its graph.

        Args:
            kind: key of the graph; works of one kind differ only in the contents of memory.
            work: must read its inputs from fixed memory and write its results to fixed memory.
                Python numbers become constants; each replay draws new random numbers.

        Raises:
            RunError: the work cannot be captured.
        """
        if kind not in self.seen:
            self.seen.add(kind)
            self.run_eagerly(work)
            return
        if kind not in self.replays:
            try:
                with _nothing_collected():
                    self.replays[kind] = self.capture(work)
            except RuntimeError as error:
                # If ending the failed capture fails too, the first error is the context.
                reason = " ".join(str(error.__context__ or error).split())[:200]
                what = f"capturing a CUDA graph failed: {reason}"
                raise RunError(f"{what}; --kernel eager does without graphs") from None
        self.replays[kind]()

    def run_eagerly(self, work: Work) -> None:
        """Run the work on the capture stream, since libraries allocate workspaces per stream."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            work()
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def capture(self, work: Work) -> Work:
        """Capture the work without running it; returns a function that replays it."""
        graph = torch.cuda.CUDAGraph()
        if self.generator is not None:
            graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            work()
        return graph.replay


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Pause Python's garbage collector: freeing an older graph would break a capture.

    torch.cuda.graph, which collected before each capture, no longer does since torch 2.9.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
