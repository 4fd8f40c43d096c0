"""CUDA graphs: capture work on a GPU once, then replay it with one launch for all its kernels."""

from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Protocol

import torch

from engine.errors import RunError

Work = Callable[[], None]


class Recorder(Protocol):
    """Captures work for replay."""

    def run(self, work: Work) -> None:
        """Run the work eagerly, on the capture stream."""

    def capture(self, work: Work) -> Work:
        """Capture the work without running it.

        The work must read its inputs from fixed memory and write its results to fixed memory.
        Python numbers become constants; each replay draws new random numbers.

        Returns:
            A function that replays the work.

        Raises:
            RuntimeError: the work cannot be captured.
        """


class CudaRecorder:
    """Captures CUDA graphs that share one pool of memory and never run at the same time.

    Args:
        device: the GPU.
        generator: random generator of the work, besides torch's default one; None: no other.
    """

    def __init__(self, device: torch.device, generator: torch.Generator | None = None) -> None:
        self.generator = generator
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, work: Work) -> None:
        """See Recorder. Libraries allocate workspaces per stream: run once before a capture."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            work()
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def capture(self, work: Work) -> Work:
        """See Recorder."""
        graph = torch.cuda.CUDAGraph()
        if self.generator is not None:
            graph.register_generator_state(self.generator)
        try:
            # The outer context restores the stream where the inner one fails to end the capture.
            with (
                torch.cuda.stream(self.stream),
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream),
            ):
                work()
        except RuntimeError:
            self._end_capture()
            raise
        return graph.replay

    def _end_capture(self) -> None:
        """Reset generators and allocator, which torch.cuda.graph does not if a capture fails.

        Otherwise generators stay in capture mode, and the allocator keeps freed memory.
        """
        device = self.stream.device.index
        for generator in (torch.cuda.default_generators[device], self.generator):
            if generator is not None:
                generator.graphsafe_set_state(generator.clone_state())
        with suppress(RuntimeError):  # torch may have done so itself
            torch._C._cuda_endAllocateToPool(device, self.pool)


class Graphs:
    """The first call of a kind runs eagerly, the second is captured, later ones replay.

    So work that runs once is never captured, and libraries are initialised before a capture. After
    a failed capture everything runs eagerly.

    Args:
        recorder: captures the work.
        failed: called once, with the reason, if a capture fails.
    """

    def __init__(self, recorder: Recorder, failed: Callable[[str], None]) -> None:
        self.recorder = recorder
        self.failed = failed
        self.works = True
        self.seen: set[Hashable] = set()
        self.replays: dict[Hashable, Work] = {}

    def run(self, kind: Hashable, work: Work) -> None:
        """Run the work, eagerly or by replaying its graph.

        Args:
            kind: key of the graph; works of one kind differ only in the contents of memory.
            work: see Recorder.capture.

        Raises:
            RunError: a capture failed, and the GPU cannot compute any more.
        """
        if self.works and kind in self.seen and kind not in self.replays:
            try:
                self.replays[kind] = self.recorder.capture(work)
            except RuntimeError as error:
                # If ending the failed capture fails too, the first error is the context.
                self._continue_eagerly(error.__context__ or error, work)
                return
        self.seen.add(kind)
        if kind in self.replays:
            self.replays[kind]()
        else:
            self.recorder.run(work)

    def _continue_eagerly(self, cause: BaseException, work: Work) -> None:
        self.works = False
        self.replays.clear()  # frees their memory
        reason = " ".join(str(cause).split())[:200]
        self.failed(reason)
        try:
            self.recorder.run(work)
        except RuntimeError:
            what = f"capturing a CUDA graph failed, and so does all that follows: {reason}"
            raise RunError(f"{what}; --kernel eager does without graphs") from None
