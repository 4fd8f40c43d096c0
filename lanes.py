"""Layers that overlap in time: streams of a GPU, one for each."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Lanes:
    """Queues of a GPU for the layers of a stack whose input comes in chunks of time.

    While a layer is at one chunk, the one above is at the chunk before: a wavefront over layers
    and time (Appleyard et al. 2016, arXiv:1604.01946), since one layer's steps are too small to
    fill a GPU. Backward runs each operation in its forward's lane, by PyTorch's autograd, and so
    overlaps as well. On a CPU a lane is nothing, and its work is done in the order it comes.

    Args:
        count: of layers.
        device: where they are computed.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        gpu = device.type == "cuda"
        self.streams = [torch.cuda.Stream(device) for _ in range(count if gpu else 0)]

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Lanes start after what the current stream has to do so far; it waits for them at the end.

        So what comes out of them can be used afterwards as if there were none.
        """
        for stream in self.streams:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        yield
        for stream in self.streams:
            torch.cuda.current_stream(stream.device).wait_stream(stream)

    @contextmanager
    def lane(self, number: int, given: Tensor) -> Iterator[None]:
        """What is launched within waits for all that the lane below has been given so far.

        Args:
            number: the lane's, from 0.
            given: its input, made in another lane, where its memory is not used again before this
                lane is done with it.
        """
        if not self.streams:
            yield
            return
        stream = self.streams[number]
        if number:
            stream.wait_stream(self.streams[number - 1])
        given.record_stream(stream)
        with torch.cuda.stream(stream):
            yield
