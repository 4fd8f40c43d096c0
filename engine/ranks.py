"""Several processes that train one model together, each on its share of the batch's columns."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import PeerError
from engine.launch import local_rank
from model import Hidden

# How long a process waits for the others, who may be waiting for rank 0 to evaluate or to write.
PATIENCE = timedelta(hours=1)


class Ranks:
    """This process and the others; by itself, where there are none.

    Every process draws the same random numbers, so that masks and windows are those of the whole
    batch; it computes on its columns of it. Gradients of means over equal shares are averaged.
    What follows from them, the step, is the same everywhere, and only rank 0, the leader, writes.

    Args:
        rank: this process's number.
        size: how many there are.
        control: group for what is not on a GPU; None: the one for everything.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, control: dist.ProcessGroup | None = None
    ) -> None:
        self.rank = rank
        self.size = size
        self.control = control

    @property
    def leader(self) -> bool:
        """This is the process that writes."""
        return self.rank == 0

    def share(self, columns: int) -> slice:
        """This process's part of so many columns, contiguous.

        Raises:
            ValueError: they cannot be shared equally.
        """
        if columns % self.size:
            raise ValueError(f"{columns} columns cannot be shared equally by {self.size} processes")
        width = columns // self.size
        return slice(self.rank * width, (self.rank + 1) * width)

    def average(self, tensors: list[Tensor]) -> None:
        """Replace tensors of one device and dtype by their means over the processes."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        with _peers_reported():
            dist.all_reduce(flat)
        flat /= self.size
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.detach().copy_(part.view_as(tensor))

    def gather(self, columns: Tensor, dim: int) -> Tensor:
        """All processes' columns side by side, along dim."""
        if self.size == 1:
            return columns
        parts = [torch.empty_like(columns) for _ in range(self.size)]
        with _peers_reported():
            dist.all_gather(parts, columns.contiguous())
        return torch.cat(parts, dim)

    def largest(self, *values: int) -> list[int]:
        """The largest of each value over the processes; what one asks for is so known to all."""
        if self.size == 1:
            return list(values)
        together = torch.tensor(values, dtype=torch.int64)
        with _peers_reported():
            dist.all_reduce(together, dist.ReduceOp.MAX, group=self.control)
        return [int(value) for value in together]

    def from_leader(self, value: float) -> float:
        """The leader's value."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        with _peers_reported():
            dist.broadcast(shared, 0, group=self.control)
        return float(shared)

    def wait(self) -> None:
        """Wait until all are here."""
        self.largest(0)

    def gather_hidden(self, hidden: Hidden) -> Hidden:
        """States of the whole batch."""
        return [tuple(self.gather(part, 1) for part in state) for state in hidden]

    def share_hidden(self, hidden: Hidden) -> Hidden:
        """This process's part of the states of the whole batch."""
        return [tuple(part[:, self.share(part.size(1))] for part in state) for state in hidden]


@contextmanager
def launched_ranks(device: torch.device) -> Iterator[Ranks]:
    """The processes that torchrun has started (RANK, WORLD_SIZE, …), or this one by itself.

    Args:
        device: of this process, and torch's current one; NCCL connects GPUs, gloo CPUs.
    """
    if local_rank() is None:
        yield Ranks()
        return
    size = int(os.environ["WORLD_SIZE"])
    gpu = device.type == "cuda"
    with _peers_reported():
        store, rank, _ = next(dist.rendezvous("env://", timeout=PATIENCE))  # type: ignore[attr-defined]
        # torchrun keeps its store over a restart, and with it the addresses of the dead.
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"start {start}", store)  # type: ignore[attr-defined]
        backend = "nccl" if gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        control = dist.new_group(backend="gloo", timeout=PATIENCE) if gpu else None
    ranks = Ranks(dist.get_rank(), size, control)
    del control
    try:
        yield ranks
        ranks.wait()  # who leaves early takes connections away that others still close
    finally:
        ranks.control = None
        with suppress(RuntimeError):  # the others may be gone
            dist.destroy_process_group()


@contextmanager
def _peers_reported() -> Iterator[None]:
    """Turn what torch raises when another process is gone into one line."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:150]
        raise PeerError(f"another process of this run is gone: {reason}") from None
