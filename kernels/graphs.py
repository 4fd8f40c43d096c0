"""Work on a GPU that is recorded once and replayed: one launch for all of its kernels."""

from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Protocol

import torch

from engine.errors import RunError

Work = Callable[[], None]


class Recorder(Protocol):
    """How work is recorded."""

    def run(self, work: Work) -> None:
        """Do the work once, in a way that makes ready for recording it."""

    def record(self, work: Work) -> Work:
        """Record the work, without doing it; what is returned does it, any number of times.

        The work reads what changes from memory that stays where it is, and leaves its results
        there; numbers of Python are recorded as they are.

        Raises:
            RuntimeError: it cannot be recorded.
        """


class CudaRecorder:
    """Records CUDA graphs, which share one pool of memory and never run at the same time.

    Args:
        device: the GPU.
        generator: that the work draws from, besides torch's default one; None: no other.
    """

    def __init__(self, device: torch.device, generator: torch.Generator | None = None) -> None:
        self.generator = generator
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, work: Work) -> None:
        """On the stream that is recorded from: libraries keep their workspaces by stream."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            work()
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def record(self, work: Work) -> Work:
        """Random numbers are drawn anew by each replay, as if the work were done as it is."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.stream.device)
        if self.generator is not None:
            graph.register_generator_state(self.generator)
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                work()
        except RuntimeError:
            # The end of a recording that has failed fails as well, before it has put things back:
            # the stream, the generator, and where memory comes from.
            torch.cuda.set_stream(before)
            device = self.stream.device.index
            generator = torch.cuda.default_generators[device]
            generator.graphsafe_set_state(generator.clone_state())
            with suppress(RuntimeError):  # a PyTorch that has put this back already
                torch._C._cuda_endAllocateToPool(device, self.pool)
            raise
        return graph.replay


class Graphs:
    """Runs work of many kinds: of each the first as it is, the second while recording it.

    A kind that comes once is so never recorded, and by the time that one is, the libraries it
    calls have loaded what they need. Where recording fails once, everything runs as it is from
    then on, if the device still lets it.

    Args:
        recorder: how to record.
        failed: told why recording failed.
    """

    def __init__(self, recorder: Recorder, failed: Callable[[str], None]) -> None:
        self.recorder = recorder
        self.failed = failed
        self.works = True
        self.seen: set[Hashable] = set()
        self.replays: dict[Hashable, Work] = {}

    def run(self, kind: Hashable, work: Work) -> None:
        """Do the work, recorded if it can be.

        Args:
            kind: work of the same kind is the same but for what it reads from memory.
            work: see Recorder.record.

        Raises:
            RunError: recording failed, and the work fails since.
        """
        if self.works and kind in self.seen and kind not in self.replays:
            try:
                self.replays[kind] = self.recorder.record(work)
            except RuntimeError as error:
                self.works = False
                self.replays.clear()
                # What ends a recording in an exception may fail itself, by way of its end.
                self._work_after(error.__context__ or error, work)
                return
        self.seen.add(kind)
        if self.works and kind in self.replays:
            self.replays[kind]()
        else:
            self.recorder.run(work)

    def _work_after(self, cause: BaseException, work: Work) -> None:
        """Do the work as it is, after a recording of it has failed."""
        reason = " ".join(str(cause).split())[:200]
        self.failed(reason)
        try:
            self.recorder.run(work)
        except RuntimeError:
            what = f"a CUDA graph could not be recorded, nor anything computed since: {reason}"
            raise RunError(f"{what}; --kernel eager does without graphs") from None
